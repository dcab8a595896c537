"""How good and how fast a model is on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import evaluation_windows
from .errors import SparsekitError


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
    Returns perplexity, tokens (predicted ones) and seconds. progress is told (windows done, windows in all)."""
    windows = evaluation_windows(tokens, seq_len, max_tokens)
    device = next(model.parameters()).device
    begin, total, count = time.perf_counter(), 0.0, 0
    for done in range(0, len(windows), batch):
        ids = windows[done : done + batch].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
        if progress:
            progress(min(done + batch, len(windows)), len(windows))
    mean = total / count
    if math.isnan(mean):
        raise SparsekitError("the model's logits hold NaN; its weights are broken")
    value = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": value, "tokens": count, "seconds": time.perf_counter() - begin}


@torch.no_grad()
def generate(model: nn.Module, tokenizer, prompt: str, max_new_tokens: int = 64) -> dict[str, float | str]:
    """Greedy text after the prompt (through the tokenizer's chat template where it has one), and the speed of decoding.

    Returns text, tokens, seconds and tokens_per_second; the prompt's own pass is not in them. Every run decodes
    max_new_tokens, so that two models are timed over the same work; the text ends where the model ended it."""
    device = next(model.parameters()).device
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
    out = model(input_ids=ids, use_cache=True)
    new = [out.logits[:, -1].argmax(-1, keepdim=True)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(max_new_tokens - 1):
        out = model(input_ids=new[-1], past_key_values=out.past_key_values, use_cache=True)
        new.append(out.logits[:, -1].argmax(-1, keepdim=True))
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
