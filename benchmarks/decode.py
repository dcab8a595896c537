"""Tokens a second of a whole model, dense and with every linear of its blocks stored 2:4: a row a number of sequences.

    python -m benchmarks.decode [--device cpu|cuda] [--model M] [--blocks N] [--batch 1 16] [--context N] [--json] [--out FILE]

The model is shaped as named and of random bf16 weights; the sparse one has the same weights at 2:4 by magnitude. Each sequence of
the batch has a prompt of `context` random tokens in a static cache, and one token a step goes through the model, eight steps at
positions context to context + 7. What the tokens are is given: choosing the next one is no part of the time. On a GPU the steps are
one CUDA graph, replayed in turns with the other model's; on a CPU they are run one by one, and the dense model in fp32 as well:
dense_dtype is the faster one's.

dense_ms and sparse_ms are of one step, tokens a second those of all sequences together. weight_bytes are what a step reads of the
weights, with the output layer, which stays dense; floor_ms and dense_floor_ms are these bytes at the speed of torch's copy,
copy_gbps. rel_err is how far the logits that the timed steps of the sparse model left are from those of the same weights written
dense, multiplied in fp32; bf16_rel_err is that of the same weights written dense in bf16: what the dtype costs any kernel.
peak_gib is the most memory that the process held. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import gpu_copy_gbps
from benchmarks.measure import attempted, copy_gbps, relative_error, write
from benchmarks.sparsegpt import MODELS, random_model, refuse_size
from sparsekit import SparseLinear, ops
from sparsekit.evaluate import cache_argument
from sparsekit.linear import is_linear
from sparsekit.pipeline.blocks import find_blocks
from sparsekit.precision import full_precision
from sparsekit.timing import graph_us, peak_memory, time_us

STEPS = 8


class WrittenDense(nn.Module):
    """A linear with its weight at 2:4 by magnitude, zeros written out, at each call anew and in the dtype of the activations: a
    whole model of them takes no memory beside the linears', which it shares."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._shared = [linear]  # where no _apply finds it

    def forward(self, x: Tensor) -> Tensor:
        (linear,) = self._shared
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, ops.prune24(linear.weight).to(x.dtype), bias)


def sparse_linear(linear: nn.Linear) -> SparseLinear:
    return SparseLinear(ops.prune_compress24(linear.weight), linear.bias, requires_grad=False)


def rebuilt(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with each linear of its blocks made anew, one at a time; it shares all other parameters and buffers."""
    made = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for parent in list(find_blocks(made).modules()):
        for name, child in list(parent.named_children()):
            if is_linear(child):
                setattr(parent, name, make(child))
    return made


def in_fp32(model: nn.Module) -> nn.Module:
    """The model itself with its parameters replaced; who shares them keeps them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
    return model


class Decoding:
    """A model after a prompt (batch, context): ``step(i)`` reads token i of ``given`` (batch, steps) at position context + i, and
    writes ``logits[i]`` (batch, vocabulary). Steps are taken in order, and step 0 goes back to the prompt's end, so that a CUDA
    graph of them begins where it began."""

    def __init__(self, model: nn.Module, prompt: Tensor, given: Tensor):
        from transformers import StaticCache

        self._model, self._context, steps = model, prompt.shape[1], given.shape[1]
        self._given = [token.contiguous() for token in given.split(1, dim=1)]
        self._cache = StaticCache(config=model.config, max_cache_len=self._context + steps)
        first = self._run(prompt)
        # Each layer counts on a number of its own: here they lie in one tensor, so that one kernel sets all back.
        self._lengths = torch.full((len(self._cache.layers),), self._context, device=prompt.device)
        for i, layer in enumerate(self._cache.layers):
            layer.cumulative_length = self._lengths[i]
        self.logits = first.new_empty(steps, *first.shape)

    def _run(self, ids: Tensor) -> Tensor:
        named = {cache_argument(self._model): self._cache}
        return self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **named).logits[:, -1]

    def step(self, i: int) -> None:
        if i == 0:
            self._lengths.fill_(self._context)
        self.logits[i].copy_(self._run(self._given[i]))

    def steps(self) -> list[Callable[[], None]]:
        return [partial(self.step, i) for i in range(len(self._given))]

    def all_steps(self) -> Tensor:
        """The logits (steps, batch, vocabulary)."""
        for step in self.steps():
            step()
        return self.logits


def weight_bytes(model: nn.Module) -> int:
    """What a step reads of the model's weights: all but the embedding's table, of which it reads a row a sequence."""
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    held = sum(p.nbytes for p in model.parameters() if tied or p is not table)
    return held + sum(module.meta.nbytes for module in model.modules() if isinstance(module, SparseLinear))


def step_ms(decodings: dict[str, Decoding], device: str) -> dict[str, float]:
    """Median milliseconds of a step, the models taking turns."""
    if device == "cuda":
        return {name: us / 1e3 for name, us in graph_us({name: d.steps() for name, d in decodings.items()}, 1.0).items()}
    return {name: us / 1e3 / STEPS for name, us in time_us({name: d.all_steps for name, d in decodings.items()}, 1.0).items()}


@torch.no_grad()
def row(models: dict[str, nn.Module], name: str, batch: int, context: int, device: str, gbps: float) -> dict:
    """models: what is timed by its dtype, and "sparse"."""
    dense = models["bfloat16"]
    generator, vocabulary = torch.Generator(device).manual_seed(batch), dense.config.vocab_size
    prompt, given = (torch.randint(vocabulary, (batch, n), generator=generator, device=device) for n in (context, STEPS))
    decodings = {of: Decoding(model, prompt, given) for of, model in models.items()}
    times = step_ms(decodings, device)
    sparse_ms = times.pop("sparse")
    fastest = min(times, key=times.__getitem__)
    read = {of: weight_bytes(model) for of, model in models.items()}
    with full_precision():
        truth = Decoding(in_fp32(rebuilt(dense, WrittenDense)), prompt, given).all_steps()
    written = Decoding(rebuilt(dense, WrittenDense), prompt, given).all_steps()
    return {
        "model": name,
        "blocks": dense.config.num_hidden_layers,
        "batch": batch,
        "context": context,
        "dense_ms": round(times[fastest], 4),
        "sparse_ms": round(sparse_ms, 4),
        "dense_tokens_s": round(batch / times[fastest] * 1e3, 2),
        "sparse_tokens_s": round(batch / sparse_ms * 1e3, 2),
        "speedup": round(times[fastest] / sparse_ms, 3),
        "dense_dtype": fastest,
        "weight_bytes_dense": read[fastest],
        "weight_bytes_sparse": read["sparse"],
        "dense_floor_ms": round(read[fastest] / gbps / 1e6, 4),
        "floor_ms": round(read["sparse"] / gbps / 1e6, 4),
        "copy_gbps": round(gbps, 2),
        "rel_err": relative_error(decodings["sparse"].logits, truth),
        "bf16_rel_err": relative_error(written, truth),
        "peak_gib": round(peak_memory(torch.device(device)) / 2**30, 2),
    }


def models_of(name: str, device: str, blocks: int | None, **shape) -> dict[str, nn.Module]:
    """What is timed; shape: what differs from the named model's configuration, for a test."""
    dense = random_model(name, device, torch.bfloat16, blocks, **shape).requires_grad_(False).eval()
    models = {"bfloat16": dense, "sparse": rebuilt(dense, sparse_linear)}
    if device == "cpu":
        models["float32"] = copy.deepcopy(dense).float()
    return models


def rows(name: str, device: str, blocks: int | None, batches: list[int], context: int, **shape) -> Iterator[dict]:
    gbps = gpu_copy_gbps() if device == "cuda" else copy_gbps()
    models = models_of(name, device, blocks, **shape)
    return attempted(lambda batch: row(models, name, batch, context, device, gbps), [(batch,) for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--blocks", type=int, help="of the model, fewer than it has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences, each with a token a step (1 16)")
    parser.add_argument("--context", type=int, default=128, help="tokens of each that are in the cache (128)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    refuse_size(parser, args.model, args.device, args.blocks)
    for option, least in (("batch", min(args.batch)), ("context", args.context)):
        if least < 1:
            parser.error(f"argument --{option}: must be at least 1, got {least}")
    write(rows(args.model, args.device, args.blocks, args.batch, args.context), args.json, args.out, args.device)


if __name__ == "__main__":
    main()
