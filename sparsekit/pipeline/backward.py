"""The gradients of a model's weights by the loss of whole batches: of a model in memory, or with one block there at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..data import model_call
from ..evaluate import eval_mode
from ..report import BlockReport
from .blocks import Target
from .gradients import gradients_given, next_token_loss
from .source import Progress, Source
from .store import Store
from .stream import Stream, ending_in


def gradients_at_once(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Tensor | Mapping[str, Tensor]],
    take: Callable[[Target, Tensor], None],
    progress: Progress | None = None,
) -> int:
    """Gives ``take``, batch by batch, the gradient (out_features, in_features) of each target of the sum of the batch's negative
    log-likelihoods. Returns the number of tokens predicted. Raises SparsekitError as ``next_token_loss`` does."""
    tokens, device = 0, next(model.parameters()).device
    with eval_mode(model), gradients_given(model, targets, take):
        for i, batch in enumerate(batches):
            if progress:
                progress("gradients", i, len(batches))
            loss, count = _loss(model, batch, device)
            loss.backward()
            tokens += count
    return tokens


def gradients_by_block(
    source: Source,
    targets: Sequence[Sequence[Target]],
    batches: Sequence[Tensor | Mapping[str, Tensor]],
    take: Callable[[Target, Tensor], None],
    done: Callable[[Target], None] = lambda target: None,
    progress: Progress | None = None,
) -> int:
    """What ``gradients_at_once`` does, with one block of the source in memory at a time.

    targets: by block; those of the last block come first. done: called of each when all of its gradients were given, its weight
    still in memory. Every block is brought twice, on the way forward and on the way back; what enters each of them waits in a
    store of the source's, so its size is the number of blocks times that of all batches' hidden states.
    Raises SparsekitError as ``Stream`` and ``next_token_loss`` do."""
    blocks, count = source.blocks, len(source.blocks)
    tell = progress or (lambda *_: None)
    with eval_mode(source.model):
        with torch.no_grad(), source.capturing():
            stream = Stream(source.model, blocks, batches, device=source.device, store=source.store)
        entered: list[Store] = []
        for i, block in enumerate(blocks):
            tell("forward", i, 2 * count)
            entered.append(_kept(source, stream))
            with torch.no_grad():
                source.enter(i)
                stream.advance(block, forget=False)
                source.leave(i, BlockReport(""), [])
        with source.surrounding():
            tokens, behind = _behind(source, stream, batches)
        for i in reversed(range(count)):
            tell("back", 2 * count - 1 - i, 2 * count)
            with torch.no_grad():
                source.enter(i)
            with gradients_given(blocks[i], targets[i], take):
                for b in range(len(behind)):
                    hidden = entered[i][b].requires_grad_()
                    stream.again(blocks[i], b, hidden.clone()).backward(behind[b])  # a copy: it may add to it in place
                    behind[b] = hidden.grad
            for target in targets[i]:
                done(target)
            source.leave(i, BlockReport(""), [])
            entered.pop()
    tell("", 2 * count, 2 * count)
    return tokens


def _kept(source: Source, stream: Stream) -> Store:
    """A copy of the hidden states of all batches."""
    kept = source.keep()
    for b in range(len(stream.hidden)):
        kept.append(stream.hidden[b])
    return kept


def _behind(source: Source, stream: Stream, batches: Sequence[Tensor | Mapping[str, Tensor]]) -> tuple[int, Store]:
    """The number of tokens predicted, and the gradients of what leaves the last block, batch by batch."""
    tokens, gradients = 0, source.keep()
    with gradients_given(source.model, (), lambda *_: None):
        for b, batch in enumerate(batches):
            hidden = stream.hidden[b].requires_grad_()
            with ending_in(source.blocks, hidden, stream.beside):
                loss, count = _loss(source.model, batch, source.device)
            loss.backward()
            gradients.append(hidden.grad)
            tokens += count
    return tokens, gradients


def _loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, int]:
    """The summed loss of a batch, and the tokens predicted."""
    _, arguments, _ = model_call(model, batch if isinstance(batch, Mapping) else {"input_ids": batch}, device)
    loss, count, _ = next_token_loss(model, arguments)
    return loss, count
