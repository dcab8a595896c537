"""The squared gradients of a model's weights, a sequence at a time: what the gradient criterion goes by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..criteria import SquaredGradients
from ..data import model_call, next_tokens
from ..errors import SparsekitError
from .blocks import Target


def square_gradients(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    device: torch.device | None = None,
    watch: Callable[[], None] = lambda: None,
) -> tuple[dict[Target, SquaredGradients], int]:
    """Of each matrix the sum over all sequences of its squared gradient, and the tokens of the sequences.

    Each sequence of a batch has a backward pass of its own, so that no two of them cancel; its loss is ``sequence_loss``. One
    parameter's gradient is held at a time. A matrix that a sequence does not reach (an expert's) does not count it. The model's own
    gradients and what asks for them are as before afterwards. watch: called after each sequence.
    Raises SparsekitError for no batches, a sequence of fewer than two tokens, and a loss that is not finite."""
    device = next(model.parameters()).device if device is None else device
    found = {target: SquaredGradients(target.weight.shape, target.weight.device) for target in targets}

    # Of a mean over a long sequence fp16 would lose the gradients; a power of two costs no other dtype a bit.
    tokens, scale = 0, 1.0

    def take(target: Target, gradient: Tensor) -> None:
        if gradient.any():
            found[target].update(gradient.float().div_(scale))

    with gradients_given(model, targets, take):
        for sequence in _sequences(model, batches, device):
            loss, count = sequence_loss(model, sequence)
            scale = 2.0 ** math.floor(math.log2(count))
            (loss * scale).backward()
            tokens += count
            watch()
    if not tokens:
        raise SparsekitError("this method needs calibration batches, got none")
    return found, tokens


@contextmanager
def gradients_given(model: nn.Module, targets: Sequence[Target], take: Callable[[Target, Tensor], None]) -> Iterator[None]:
    """Inside, each backward pass gives ``take`` the gradient (out_features, in_features) of each target, and keeps none: one
    parameter's is held at a time. The model's own gradients and what asks for them are as before afterwards."""
    held: dict[nn.Parameter, list[Target]] = {}
    for target in targets:
        held.setdefault(getattr(target.module, target.parameter), []).append(target)

    def give(parameter: nn.Parameter) -> None:
        for target in held[parameter]:
            take(target, target.of(parameter.grad))
        parameter.grad = None

    with _asking_for(model, set(held)), torch.enable_grad(), ExitStack() as stack:
        for parameter in held:
            stack.callback(parameter.register_post_accumulate_grad_hook(give).remove)
        yield


def sequence_loss(model: nn.Module, sequence: Mapping[str, Any]) -> tuple[Tensor, int]:
    """The mean negative log-likelihood of the next token of one sequence, fp32, and the sequence's tokens.

    sequence: the model's keyword arguments, a row each; ``labels`` are what is predicted where they are given (-100: nothing). What
    attention_mask leaves out neither is nor helps to be."""
    loss, count, tokens = next_token_loss(model, sequence)
    return loss / count, tokens


def next_token_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int, int]:
    """The negative log-likelihood of every next token of a batch, summed, fp32; how many there are, and the batch's tokens. batch:
    keyword arguments, labels and attention_mask as for ``sequence_loss``."""
    arguments = dict(batch)
    mask = arguments.get("attention_mask")
    labels = arguments.pop("labels", arguments.get("input_ids"))
    if labels is None:
        raise SparsekitError("gradients need the tokens to predict, got a batch without input_ids or labels")
    wanted = next_tokens(labels, mask)
    tokens = labels.numel() if mask is None or mask.dim() != 2 else int(mask.count_nonzero())
    if not (count := int((wanted != -100).sum())):
        raise SparsekitError("each calibration sequence must hold at least two tokens for gradients, got fewer")
    logits = model(**arguments, use_cache=False).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    if not torch.isfinite(loss):
        raise SparsekitError(f"the loss of each calibration sequence must be finite, got {loss.item():g}; check weights and text")
    return loss, count, tokens


def _sequences(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Each sequence of the batches as keyword arguments, one row each."""
    for batch in batches:
        _, batch, _ = model_call(model, batch if isinstance(batch, Mapping) else {"input_ids": batch}, device)
        predicted = batch.get("labels", batch.get("input_ids"))
        if predicted is None:
            raise SparsekitError("the gradient criterion needs the tokens to predict, got a batch without input_ids or labels")
        rows = len(predicted)
        each = {name for name, t in batch.items() if isinstance(t, Tensor) and t.dim() and len(t) == rows}
        for i in range(rows):
            # A copy: a tensor that was made under inference_mode is of no use to a backward pass.
            yield {name: t[i : i + 1].clone() if name in each else t for name, t in batch.items()}


@contextmanager
def _asking_for(model: nn.Module, wanted: set[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are asked for by the wanted parameters alone, and none is there."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, *_ in before:
            parameter.grad = None
            parameter.requires_grad_(parameter in wanted)
        yield
    finally:
        for parameter, asked, gradient in before:
            parameter.requires_grad_(asked)
            parameter.grad = gradient
