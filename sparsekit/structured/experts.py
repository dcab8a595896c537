"""Whole experts of mixtures of experts: what each adds to the hidden states, and a model without those that add least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import SparsekitError
from .architecture import Architecture, architecture_of
from .routed import expert_output, routing
from .surgery import keep_experts, settle_config
from .watching import Batches, Progress, calls, run


@dataclass(frozen=True)
class RemovedExperts:
    """What ``prune_experts`` took out: by block the numbers of the experts that are gone, and the importance of all it had."""

    removed: dict[int, tuple[int, ...]]
    importance: dict[int, tuple[float, ...]]


@torch.no_grad()
def expert_importance(model: nn.Module, batches: Batches, *, progress: Progress | None = None) -> dict[int, Tensor]:
    """What each expert adds, by the number of its block: the sum over tokens of the norm of its output times the router's weight,
    (experts,) in fp64 on the CPU.

    A token counts for the experts that the router gives it to, and not at all where a batch's attention_mask leaves it out. Of
    experts that are modules of their own, a weight is what the layer's output moves with. The sums are streamed; each batch costs
    the experts' work twice, of separate modules three times. progress is told (batches done, batches in all).
    Raises SparsekitError where the model has no experts, and for no batches."""
    architecture = architecture_of(model)
    layers = _layers(architecture, model)
    totals = {i: torch.zeros(architecture.shape(block).num_experts, dtype=torch.float64) for i, block in layers.items()}
    mask: Tensor | None = None

    def look(i: int, experts: nn.Module, expert: int, rows: Tensor, weights: Tensor) -> None:
        totals[i][expert] += float(expert_output(experts, expert, rows, weights).double().norm(dim=-1).sum())

    with ExitStack() as stack:
        for i, block in layers.items():
            see = partial(look, i, architecture.expert_parts(block)[0])
            stack.enter_context(routing(architecture, block, lambda: mask, see))
        for args, kwargs, mask in calls(model, batches, progress):  # noqa: B007  the hooks read it
            run(model, args, kwargs)
    if broken := [i for i, total in totals.items() if not torch.isfinite(total).all()]:
        raise SparsekitError(f"what experts add must be finite, got NaN or Inf in block {broken[0]}")
    return totals


def select_experts(importance: Mapping[int, Tensor], remove: int, keep: int = 1) -> dict[int, list[int]]:
    """By block, the numbers of the ``remove`` experts of least importance, in rising order; of equal ones the first go.

    keep: experts that each block has to keep, those that a token is given to. Raises SparsekitError for none, and for more than
    that leaves, and for importance that is not finite."""
    for i, scores in importance.items():
        if not torch.isfinite(scores).all():
            raise SparsekitError(f"the importance of experts must be finite, got NaN or Inf for block {i}")
        most = len(scores) - keep
        if isinstance(remove, bool) or not isinstance(remove, int) or not 1 <= remove <= most:
            raise SparsekitError(
                f"the number of experts to remove must be 1 to {most}, for block {i} has {len(scores)} and each token is given to "
                f"{keep} of them, got {remove!r}"
            )
    order = {i: torch.argsort(scores, stable=True).tolist() for i, scores in importance.items()}
    return {i: sorted(order[i][:remove]) for i in importance}


def remove_experts(model: nn.Module, removed: Mapping[int, Iterable[int]]) -> None:
    """Takes these experts, by the number of their block, out of the model, in place, with their rows of the router.

    Raises SparsekitError, and changes nothing, for an expert or a block of experts that is not there, and where a token is given to
    more experts than would be left."""
    architecture = architecture_of(model)
    layers = _layers(architecture, model)
    left = {}
    for i, gone in removed.items():
        count = architecture.shape(layers[i]).num_experts if i in layers else 0
        gone = sorted(set(gone))
        if not count or (gone and not 0 <= gone[0] <= gone[-1] < count):
            raise SparsekitError(f"the experts to remove must be some of those that block {i} has, {count}, got {gone}")
        left[i] = [e for e in range(count) if e not in gone]
        if len(left[i]) < (keep := experts_a_token(architecture, model)):
            raise SparsekitError(
                f"a token is given to {keep} experts, and block {i} would be left with {len(left[i])}; remove fewer"
            )
    for i, kept in left.items():
        keep_experts(architecture, layers[i], kept)
    settle_config(architecture, model)


def prune_experts(model: nn.Module, batches: Batches, remove: int, *, progress: Progress | None = None) -> RemovedExperts:
    """Takes the ``remove`` experts of least importance out of every block that has experts, in place.

    Raises SparsekitError where the router gives a token to more experts than would be left; then nothing is changed."""
    architecture = architecture_of(model)
    counts = {i: architecture.shape(block).num_experts for i, block in _layers(architecture, model).items()}
    keep = experts_a_token(architecture, model)
    select_experts({i: torch.zeros(count) for i, count in counts.items()}, remove, keep)  # refuses before anything is measured
    importance = expert_importance(model, batches, progress=progress)
    removed = select_experts(importance, remove, keep)
    remove_experts(model, removed)
    return RemovedExperts({i: tuple(gone) for i, gone in removed.items()}, {i: tuple(s.tolist()) for i, s in importance.items()})


def experts_a_token(architecture: Architecture, model: nn.Module) -> int:
    """To how many experts the router of a block gives each token."""
    return getattr(model.config, architecture.top_k_field)


def _layers(architecture: Architecture, model: nn.Module) -> dict[int, nn.Module]:
    """The blocks that have experts, by number."""
    blocks = {i: block for i, block in enumerate(architecture.blocks(model)) if architecture.expert_parts(block)}
    if not blocks:
        raise SparsekitError(f"the model must have experts to remove some, got {type(model).__name__} without one")
    return blocks
