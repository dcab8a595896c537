"""How good and how fast a model is on this machine."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import check_sampling, check_vocabulary, context_length, evaluation_windows
from .errors import SparsekitError

TEXTS = 4  # that own_text writes at a time


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout and the like; afterwards each of its modules in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    seq_len: int,
    max_tokens: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    tokens (count,), cut into windows of seq_len that do not overlap; the first token of each is given, not predicted.
    Returns perplexity, tokens (predicted ones) and seconds. progress is told (windows done, windows in all).
    Raises SparsekitError where the text is too short or not of the model's vocabulary, and where the logits are broken."""
    windows = evaluation_windows(tokens, seq_len, max_tokens)
    check_vocabulary(windows, model)
    device = next(model.parameters()).device
    begin, total, count = time.perf_counter(), 0.0, 0
    with eval_mode(model):
        for done in range(0, len(windows), batch):
            ids = windows[done : done + batch].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
            if progress:
                progress(min(done + batch, len(windows)), len(windows))
    mean = total / count
    if not mean < 700:  # NaN, Inf, or beyond what exp can take
        raise SparsekitError(
            f"a token's negative log-likelihood must be a sane number, got {mean:g}; the model's weights are broken"
        )
    return {"perplexity": math.exp(mean), "tokens": count, "seconds": time.perf_counter() - begin}


def cache_argument(model: nn.Module) -> str:
    """What the model calls the argument, and the result, that remembers earlier tokens: transformers renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _stepper(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function of the next tokens (rows, count) that gives the logits (rows, vocabulary) after them, and remembers them."""
    name, cache = cache_argument(model), None

    def step(ids: Tensor) -> Tensor:
        nonlocal cache
        out = model(input_ids=ids, use_cache=True, **{name: cache})
        cache = out[name]
        return out.logits[:, -1]

    return step


@torch.no_grad()
def generate(model: nn.Module, tokenizer, prompt: str, max_new_tokens: int = 64) -> dict[str, float | str]:
    """Greedy text after the prompt (through the tokenizer's chat template where it has one), and the speed of decoding.

    Returns text, tokens, seconds and tokens_per_second; the prompt's own pass is not in them. Every run decodes
    max_new_tokens, so that two models are timed over the same work; the text ends where the model ended it.
    Raises SparsekitError where the prompt has no token, or the model no context left for so many new ones."""
    device = next(model.parameters()).device
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], dtype=torch.long, device=device)
    if ids.numel() == 0:
        raise SparsekitError("the prompt must hold at least one token, and is empty")
    if ids.shape[1] + max_new_tokens > (context := context_length(model.config)):
        raise SparsekitError(
            f"the prompt and the new tokens must fit the model's context of {context}, got {ids.shape[1]} and {max_new_tokens}"
        )
    check_vocabulary(ids, model)
    step = _stepper(model)
    new = [step(ids).argmax(-1, keepdim=True)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(max_new_tokens - 1):
        new.append(step(new[-1]).argmax(-1, keepdim=True))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    text = torch.cat(new, dim=1)[0].tolist()
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [ends])
    stop = next((i for i, token in enumerate(text) if token in ends), len(text))
    speed = (max_new_tokens - 1) / seconds if seconds > 0 else 0.0
    text = tokenizer.decode(text[:stop], skip_special_tokens=True).strip()
    return {"text": text, "tokens": max_new_tokens, "seconds": seconds, "tokens_per_second": speed}


@torch.no_grad()
def own_text(
    model: nn.Module,
    first: int,
    samples: int,
    seq_len: int,
    seed: int = 0,
    batch: int = TEXTS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Text that the model writes itself, to calibrate on: ``samples`` sequences of seq_len tokens, as batches (<= batch, seq_len).

    Each begins with the token ``first``; the others are drawn from the model's own probabilities (temperature 1, nothing cut off).
    After a token that ends a text comes ``first`` again. The same seed gives the same sequences on one machine. progress is told
    (tokens written, tokens in all). Source: Williams et al. 2024, arXiv:2410.17170, without its schedule of temperatures.
    Raises SparsekitError where the logits are broken."""
    check_sampling(samples, seq_len, seed)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = torch.tensor([end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, first)], dtype=torch.long)
    batches = []
    with eval_mode(model):
        for begin in range(0, samples, batch):
            rows = min(batch, samples - begin)
            ids, step = torch.full((rows, seq_len), first), _stepper(model)
            check_vocabulary(ids, model)
            for i in range(1, seq_len):
                probabilities = step(ids[:, i - 1 : i].to(device)).float().softmax(-1).cpu()
                if not torch.isfinite(probabilities).all():
                    raise SparsekitError(
                        "the model's logits must be finite to write a text, got NaN or Inf; its weights are broken"
                    )
                drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                ids[:, i] = torch.where(torch.isin(ids[:, i - 1], ends), first, drawn)
                if progress:
                    progress(begin * seq_len + rows * (i + 1), samples * seq_len)
            batches.append(ids)
    return batches
