"""Heads and neurons out of a live model, block by block, where what is left takes over the work of what goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..criteria import Gram
from ..errors import SparsekitError
from ..evaluate import eval_mode
from ..linear import dense_weight
from ..structured import (
    architecture_of,
    head_importance,
    keep_heads,
    keep_neurons,
    neuron_importance,
    select_heads,
    select_neurons,
    settle_config,
)  # fmt: skip
from ..structured.architecture import Architecture
from ..structured.compensation import compensated
from ..structured.neurons import expert_downs, set_expert_downs
from ..structured.routed import activations, check_width, routing
from ..structured.selection import Remove
from ..structured.surgery import group_features, group_parameters, neuron_parameters, set_weight
from ..timing import Phases
from .blocks import Target
from .source import Progress
from .stream import Stream


@dataclass(frozen=True)
class Narrowed:
    """What ``prune_heads`` or ``prune_neurons`` took out. what: "heads" or "neurons"; heads that share a key-value head go together
    and are counted by it.

    By block: removed, the numbers of those that went, of experts' neurons through all experts of the block; kept, how many are
    left; importance, of all that were there; errors, those of the output of the linear that reads them (o, down; experts' down
    taken together), squared and over its square, without and with compensation, and damping, what that had to add, None where
    nothing went or nothing made up for it.
    parameters_before, parameters_after: of the model, counted; parameters_predicted: reckoned beforehand."""

    what: str
    method: str
    removed: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    importance: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float | None, float | None], ...]
    damping: tuple[float | None, ...]
    parameters_before: int
    parameters_after: int
    parameters_predicted: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Of JSON's types alone, but for tuples."""
        return asdict(self)


def prune_heads(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    remove: Remove,
    *,
    method: str = "taylor",
    scope: str = "layer",
    compensate: bool = True,
    progress: Progress | None = None,
) -> Narrowed:
    """Takes attention heads out of the model, in place: those of least importance on the batches, whole groups where query heads
    share a key-value head.

    remove, scope: as for ``select_heads``. method: of ``head_importance``. compensate: let the output projection of each block make
    up for them by least squares, on what the model narrowed so far feeds it. progress is told what is under way, how much of it is
    done, and of how much.
    The config says what is left: its own fields where transformers builds such a model from them, else entries a block.
    Raises SparsekitError for what cannot be done; where that is known beforehand, nothing has changed."""
    return _narrow(model, batches, "heads", remove, method, scope, None, compensate, progress)


def prune_neurons(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    remove: Remove,
    *,
    method: str = "contribution",
    scope: str = "layer",
    round_to: int | None = None,
    compensate: bool = True,
    progress: Progress | None = None,
) -> Narrowed:
    """Takes neurons out of the model's MLPs, in place: those of least importance on the batches.

    remove, scope, round_to: as for ``select_neurons``. method: of ``neuron_importance``. The rest as for ``prune_heads``;
    down is what makes up for them."""
    return _narrow(model, batches, "neurons", remove, method, scope, round_to, compensate, progress)


def _narrow(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    what: str,
    remove: Remove,
    method: str,
    scope: str,
    round_to: int | None,
    compensate: bool,
    progress: Progress | None,
) -> Narrowed:
    begin, batches = time.perf_counter(), list(batches)
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)

    def told(done: int, of: int) -> None:
        if progress:
            progress(f"importance of {what}", done, of)

    if what == "heads":
        importance = head_importance(model, batches, method, progress=told)
        removed = select_heads(importance, remove, scope=scope)
        each = [group_parameters(architecture, block) for block in blocks]
    else:
        importance = neuron_importance(model, batches, method, progress=told)
        removed = select_neurons(importance, remove, scope=scope, round_to=round_to)
        for block, gone in zip(blocks, removed):
            if gone and architecture.expert_parts(block):
                shape = architecture.shape(block)
                check_width(architecture, block, shape.moe_intermediate_size - len(gone) // shape.num_experts)
        each = [neuron_parameters(architecture, block) for block in blocks]
    before = count_parameters(model)
    kept = [sorted({*range(scores.numel())} - {*gone}) for scores, gone in zip(importance, removed)]
    names = {module: name for name, module in model.named_modules()}
    fits = []
    with torch.no_grad(), eval_mode(model):
        stream = Stream(model, blocks, batches) if compensate else None
        last = max(i for i, gone in enumerate(removed) if gone)
        for i, block in enumerate(blocks):
            if progress:
                progress(f"{what} of {names[block]}", i, len(blocks))
            fits.append(_cut(architecture, block, what, kept[i], stream, names) if removed[i] else _Fit())
            if stream and i < last:
                stream.advance(block)
    settle_config(architecture, model)
    if progress:
        progress(what, len(blocks), len(blocks))
    return Narrowed(
        what=what,
        method=method,
        removed=tuple(map(tuple, removed)),
        kept=tuple(map(len, kept)),
        importance=tuple(tuple(scores.flatten().tolist()) for scores in importance),
        errors=tuple((fit.plain, fit.compensated) for fit in fits),
        damping=tuple(fit.damping for fit in fits),
        parameters_before=before,
        parameters_after=count_parameters(model),
        parameters_predicted=before - sum(len(gone) * size for gone, size in zip(removed, each)),
        seconds=time.perf_counter() - begin,
    )


class _Fit(NamedTuple):
    """Of a linear whose inputs were narrowed: its errors without and with compensation, and the damping."""

    plain: float | None = None
    compensated: float | None = None
    damping: float | None = None


def _cut(
    architecture: Architecture,
    block: nn.Module,
    what: str,
    kept: Sequence[int],
    stream: Stream | None,
    names: Mapping[nn.Module, str],
) -> _Fit:
    """Takes all but the kept heads or neurons out of the block; with a stream, compensated on what it brings."""
    if what == "neurons" and architecture.expert_parts(block):
        return _cut_experts(architecture, block, kept, stream, names)
    if what == "heads":
        reader, keep, columns = architecture.projections(block)["o"], keep_heads, group_features(architecture.shape(block), kept)
    else:
        reader, keep, columns = architecture.neurons(block)["down"], keep_neurons, list(kept)
    if stream is None:
        keep(architecture, block, kept)
        return _Fit()
    whole = dense_weight(reader)
    gram = Gram(whole.shape[1], whole.device)
    watcher = SimpleNamespace(statistics=gram, observe=gram.update)
    stream.observe(block, {Target(names[reader], reader): watcher}, Phases(whole.device))
    try:
        weight, damping = compensated(whole, gram, columns)
    except ValueError as error:
        raise SparsekitError(f"{names[reader]} cannot make up for the {what} that go: {error}") from error
    weight = weight.to(whole.dtype)
    spread = [torch.zeros_like(whole) for _ in range(2)]  # the narrow weights, at the width that the Gram matrix has
    spread[0][:, columns], spread[1][:, columns] = whole[:, columns], weight
    errors = gram.output_errors(whole, spread)
    keep(architecture, block, kept)
    set_weight(reader, weight)
    return _Fit(*errors, damping)


def _cut_experts(
    architecture: Architecture,
    block: nn.Module,
    kept: Sequence[int],
    stream: Stream | None,
    names: Mapping[nn.Module, str],
) -> _Fit:
    """The same for the neurons of a block's experts: each makes up for its own, on the tokens it is given times their weights."""
    if stream is None:
        keep_neurons(architecture, block, kept)
        return _Fit()
    experts, _ = architecture.expert_parts(block)
    whole = expert_downs(architecture, block)
    grams = [Gram(whole.shape[2], whole.device) for _ in whole]

    def see(expert: int, rows: Tensor, weights: Tensor) -> None:
        made = activations(architecture, experts, expert, rows)
        grams[expert].update(made.float() * weights.float()[:, None])

    masks = iter(stream.masks)
    with routing(architecture, block, lambda: next(masks), see):
        stream.observe(block, {}, Phases(whole.device))
    fitted, errors, most = [], torch.zeros(3, dtype=torch.float64), 0.0
    for expert, (weight, gram) in enumerate(zip(whole, grams)):
        columns = [i % whole.shape[2] for i in kept if i // whole.shape[2] == expert]
        try:
            narrow, damping = compensated(weight, gram, columns)
        except ValueError as error:
            raise SparsekitError(f"expert {expert} of {names[block]} cannot make up for the neurons that go: {error}") from error
        fitted.append(narrow.to(weight.dtype))
        most = max(most, damping)
        lost = [weight.double().clone() for _ in range(3)]  # the output itself, and what is lost without and with it
        for change, found in zip(lost[1:], (weight[:, columns], fitted[-1])):
            change[:, columns] -= found
        errors += torch.stack([((one @ gram.sum.double()) * one).sum() for one in lost]).cpu()
    keep_neurons(architecture, block, kept)
    set_expert_downs(architecture, block, fitted)
    plain, made_up = (float(one / errors[0]) if errors[0] > 0 else 0.0 for one in errors[1:])
    return _Fit(plain, made_up, most)


def count_parameters(model: nn.Module) -> int:
    """Of all its weights, one that is tied counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
