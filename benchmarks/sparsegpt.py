"""SparseGPT by phase, against the column loop of its paper in eager torch: a row a layer, or a whole model.

    python -m benchmarks.sparsegpt [--device cpu|cuda] [--layers LAYER ...] [--pattern P ...] [--tokens N] [--json] [--out FILE]
    python -m benchmarks.sparsegpt --model llama-2-7b [--blocks N] [--samples N] [--seq-len N]

Of a layer: gram_ms adds `tokens` bf16 tokens to the Gram matrix, factor_ms makes the factor of it, loop_ms chooses the masks and
prunes the blocks of columns, trailing_ms brings the later columns up to date, error_ms finds the output errors of the result and of
its mask alone; prune_ms is all of these but the first. eager_loop_ms is the paper's loop from the same factor, choice of masks and
trailing products included, so it stands against loop_ms + trailing_ms: that is speedup; prune_speedup sets it against prune_ms.
rel_err is the difference of the two results over the rows on whose masks they agree, and rows_apart says how many do not: there
two scores were equal within rounding. The floor of loop_ms is rows * cols * b / 2 multiply-adds for blocks of b columns, 128
but for shares of narrow layers; loop_gflops counts them twice.

Of a model, shaped as named and of random weights, in seconds: the phases over all its blocks, on random tokens; forward_s is the
rest, two runs of each block over all tokens. On a CPU --blocks must say how many of the blocks of llama-2-7b to take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import sparsekit
from benchmarks.measure import attempted, relative_error, write
from sparsekit.patterns import NM, PairNM, Pattern, Unstructured
from sparsekit.pruners import SparseGPT

LAYERS = {  # (rows, cols): the linears of the models that they are named for
    "square 1024": (1024, 1024),
    "Llama-2-7B q": (4096, 4096),
    "Llama-2-7B up": (11008, 4096),
    "Llama-3-8B down": (4096, 14336),
}
MODELS = {  # what differs from transformers' LlamaConfig, whose defaults are the first model's
    "llama-2-7b": {},
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def paper_loop(w: Tensor, upper: Tensor, pattern: Pattern, block: int = 128) -> tuple[Tensor, Tensor]:
    """The pruned weights and the mask of w (n, k), from the upper factor U of the inverse Hessian, H^-1 = U' U: column by column.

    block: columns between two trailing products, a multiple of the pattern's group. Source: arXiv:2301.00774, algorithm 1."""
    w, kept, group = w.clone(), torch.ones_like(w, dtype=torch.bool), getattr(pattern, "m", 0)
    for begin in range(0, w.shape[1], block):
        now, keep, u = w[:, begin : begin + block].clone(), kept[:, begin : begin + block], upper[begin : begin + block]
        end, diagonal = begin + now.shape[1], u.diagonal(begin)
        pruned, errors = torch.zeros_like(now), torch.zeros_like(now)
        if isinstance(pattern, Unstructured):
            scores = (now / diagonal).square()
            gone = pattern.removed(w[:, :end].numel()) - pattern.removed(w[:, :begin].numel())
            mask = torch.ones_like(scores, dtype=torch.bool).view(-1)
            mask[scores.view(-1).sort().indices[:gone]] = False
            keep.copy_(mask.view(scores.shape))
        for j in range(now.shape[1]):
            if group and j % group == 0:
                scores = (now[:, j : j + group] / diagonal[j : j + group]).square()
                if isinstance(pattern, PairNM):
                    keep[:, j : j + group] = pattern.mask(scores)
                else:
                    worst = scores.topk(max(scores.shape[1] - pattern.n, 0), dim=1, largest=False).indices
                    keep[:, j : j + group].scatter_(1, worst, False)
            pruned[:, j] = torch.where(keep[:, j], now[:, j], 0)
            errors[:, j] = (now[:, j] - pruned[:, j]) / diagonal[j]
            now[:, j:] -= errors[:, j, None] * u[j, begin + j : end]
        w[:, begin:end] = pruned
        w[:, end:] -= errors @ u[:, end:]
    return w, kept


def timed_ms(call, device: str) -> tuple[float, object]:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    found = call()
    wait()
    return (time.perf_counter() - begin) * 1e3, found


def row(name: str, rows: int, cols: int, text: str, tokens: int, device: str, repeats: int = 3) -> dict:
    pattern, generator = Pattern.parse(text), torch.Generator(device).manual_seed(0)
    w = torch.randn(rows, cols, generator=generator, device=device)
    mix = torch.randn(64, cols, generator=generator, device=device)  # neighbours alike, as activations are
    x = torch.randn(tokens, cols, generator=generator, device=device)
    x = (x + torch.randn(tokens, 64, generator=generator, device=device) @ mix / 8).bfloat16()
    pruner = SparseGPT(cols, pattern, device)
    pruner.observe(x)  # the library's first call is slow
    grams, prunes, phases = [], [], []
    for _ in range(repeats):
        grams.append(timed_ms(lambda: pruner.observe(x), device)[0])  # which forgets the factor
        ms, result = timed_ms(lambda: pruner.prune(w), device)
        prunes.append(ms)
        phases.append(result.seconds)
    upper = pruner.statistics.factor.upper
    block = pruner.width(pattern, cols)  # the same masks: a share is chosen from as often
    paper_loop(w[:128], upper, pattern, block)  # again for the library
    eager, (wanted, mask) = timed_ms(lambda: paper_loop(w, upper, pattern, block), device)
    ms = {phase: statistics.median(seconds[phase] for seconds in phases) * 1e3 for phase in phases[0]}
    whole, agree = statistics.median(prunes), (mask == result.mask).all(1)
    return {
        "layer": name,
        "rows": rows,
        "cols": cols,
        "pattern": text,
        "tokens": tokens,
        "gram_ms": round(statistics.median(grams), 2),
        **{f"{phase}_ms": round(spent, 2) for phase, spent in ms.items()},
        "prune_ms": round(whole, 2),
        "eager_loop_ms": round(eager, 2),
        "speedup": round(eager / (ms["loop"] + ms["trailing"]), 2),
        "prune_speedup": round(eager / whole, 2),
        "loop_gflops": round(rows * cols * block / ms["loop"] / 1e6, 1),
        "rel_err": relative_error(result.weight[agree], wanted[agree]),
        "rows_apart": int((~agree).sum()),
        "output_error": float(f"{result.output_error:.4g}"),
        "output_error_masked": float(f"{result.output_error_masked:.4g}"),
    }


def random_model(name: str, device: str, dtype: torch.dtype, blocks: int | None = None, **shape) -> torch.nn.Module:
    """A model shaped as the named one, of random weights made on the device in their dtype. shape: what differs, for a test."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**{**MODELS[name], **shape})
    config.num_hidden_layers = blocks or config.num_hidden_layers
    config.dtype = dtype
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).to(dtype)  # made in that dtype: in fp32 it would need twice the memory


def refuse_size(parser: argparse.ArgumentParser, name: str | None, device: str, blocks: int | None) -> None:
    """Ends the command where the model is too large for a CPU, or has not so many blocks."""
    if name == "llama-2-7b" and device == "cpu" and blocks is None:
        parser.error("argument --model: a whole model must run on a GPU, got --device cpu; say --blocks N for some of its blocks")
    if blocks is not None and blocks < 1:
        parser.error(f"argument --blocks: must be at least 1, got {blocks}")


def model_row(name: str, text: str, device: str, blocks: int | None, samples: int, seq_len: int, **shape) -> dict:
    """Phases of a whole model; shape: what differs from the named one's configuration, for a test."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(name, device, dtype, blocks, **shape)
    vocabulary = model.config.vocab_size
    batches = [torch.randint(0, vocabulary, (1, seq_len), device=device) for _ in range(samples)]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms, report = timed_ms(lambda: sparsekit.prune(model, batches, method="sparsegpt", pattern=text), device)
    phases = {phase: spent for phase, spent in report.phases.items() if phase not in ("read", "forward", "write")}
    return {
        "model": name,
        "blocks": model.config.num_hidden_layers,
        "tokens": samples * seq_len,
        "pattern": text,
        "forward_s": round(ms / 1e3 - sum(phases.values()), 3),
        **{f"{phase}_s": round(spent, 3) for phase, spent in phases.items()},
        "total_s": round(ms / 1e3, 3),
        "peak_gib": round(report.peak_memory / 2**30, 2),
        "output_error": float(f"{statistics.median(linear.output_error for linear in report.linears):.4g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="LAYER", help=", ".join(LAYERS))
    parser.add_argument("--pattern", nargs="+", default=["2:4", "50%"], help="patterns as sparsekit reads them (2:4 50%%)")
    parser.add_argument("--tokens", type=int, default=2048, help="of one call to the Gram matrix (2048)")
    parser.add_argument("--model", choices=MODELS, help="a whole model in place of layers")
    parser.add_argument("--blocks", type=int, help="of the model, fewer than it has")
    parser.add_argument("--samples", type=int, default=128, help="sequences that the model is shown (128)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in each (2048)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for text in args.pattern:
        try:
            known = isinstance(Pattern.parse(text), (NM, PairNM, Unstructured))
        except sparsekit.SparsekitError as error:
            parser.error(f"argument --pattern: {error}")
        if not known:
            parser.error(f"argument --pattern: must be N:M, N:M pairs or a share, which the paper's loop knows, got {text!r}")
    refuse_size(parser, args.model, args.device, args.blocks)
    if args.model:
        cases = [(args.model, text, args.device, args.blocks, args.samples, args.seq_len) for text in args.pattern]
        found = attempted(model_row, cases)
    else:
        cases = [(name, *LAYERS[name], text, args.tokens, args.device) for name in args.layers for text in args.pattern]
        found = attempted(row, cases)
    write(found, args.json, args.out, args.device)


def test_sparsegpt(benchmark):
    pruner = SparseGPT(1024, NM(2, 4))
    pruner.observe(torch.randn(2048, 1024))
    _ = pruner.statistics.factor
    benchmark(pruner.prune, torch.randn(1024, 1024))


if __name__ == "__main__":
    main()
