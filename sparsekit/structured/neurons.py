"""Neurons of the MLPs: how much each matters, and which go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..criteria import SquaredNorm
from ..data import count_tokens
from ..errors import SparsekitError, listed
from ..linear import dense_weight
from .architecture import Architecture, architecture_of
from .routed import activations, check_neurons, routing
from .selection import Remove, select
from .surgery import set_weight
from .watching import Batches, Progress, calls, gate_gradients, run, watch

METHODS = ("contribution", "taylor")


def neuron_importance(
    model: nn.Module, batches: Batches, method: str = "contribution", *, progress: Progress | None = None
) -> list[Tensor]:
    """How much each neuron of each MLP matters on the calibration batches: (neurons,) fp32 on the CPU a block, higher is kept.

    A neuron is a row of gate and one of up, which make its activation, and a column of down. method: "contribution", the root mean
    square over tokens of what it adds to the hidden states, |down's column| * rms of its activation, to compare neurons of a block;
    or "taylor", the mean over samples of |d loss / d gate| for a gate on its activation, which is comparable between blocks.
    A block without an MLP has none. One of experts has (experts, neurons), by "contribution" alone: what a neuron adds to the
    tokens that its expert is given, times the router's weight, and nothing to the others; an expert that no token comes to has
    zeros. Batches and errors as for ``head_importance``."""
    if method not in METHODS:
        raise SparsekitError(f"the importance of neurons is {listed(METHODS, 'or')}, got {method!r}")
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    downs = [architecture.neurons(block).get("down") for block in blocks]
    of_experts = {i: block for i, block in enumerate(blocks) if architecture.expert_parts(block)}
    for block in of_experts.values():
        check_neurons(architecture, block)
    if of_experts and method == "taylor":
        raise SparsekitError(
            f"the importance of experts' neurons is contribution, got taylor, and block {next(iter(of_experts))} holds experts"
        )
    columns = {down: dense_weight(down).shape[1] for down in downs if down is not None}
    if method == "taylor":
        found = gate_gradients(model, batches, columns, progress)
    else:
        norms = {down: SquaredNorm(count, down.weight.device) for down, count in columns.items()}
        batches, shares = list(batches), {}
        if of_experts:
            shares = _of_experts(architecture, model, of_experts, batches, None if columns else progress)
        if columns or not of_experts:
            watch(model, batches, {down: norm.update for down, norm in norms.items()}, progress)
        found = {
            down: (norm.sum / max(norm.tokens, 1)).sqrt() * dense_weight(down).float().norm(dim=0) for down, norm in norms.items()
        }
    dense = [torch.zeros(0) if down is None else found[down].float().cpu() for down in downs]
    return [shares[i] if i in of_experts else scores for i, scores in enumerate(dense)]


@torch.no_grad()
def _of_experts(
    architecture: Architecture, model: nn.Module, blocks: dict[int, nn.Module], batches: list, progress: Progress | None
) -> dict[int, Tensor]:
    """By number of the block, the contribution of its experts' neurons, (experts, neurons)."""
    shapes = {i: architecture.shape(block) for i, block in blocks.items()}
    sums = {i: torch.zeros(s.num_experts, s.moe_intermediate_size, dtype=torch.float64) for i, s in shapes.items()}
    mask: Tensor | None = None

    def look(i: int, experts: nn.Module, expert: int, rows: Tensor, weights: Tensor) -> None:
        made = activations(architecture, experts, expert, rows).float() * weights.float()[:, None]
        sums[i][expert] += made.square().sum(0).double().cpu()

    with ExitStack() as stack:
        for i, block in blocks.items():
            stack.enter_context(routing(architecture, block, lambda: mask, partial(look, i, architecture.expert_parts(block)[0])))
        for args, kwargs, mask in calls(model, batches, progress):  # noqa: B007  the hooks read it
            run(model, args, kwargs)
    tokens = count_tokens(batches)
    columns = {i: expert_downs(architecture, block).float().norm(dim=1).cpu() for i, block in blocks.items()}
    return {i: (total / max(tokens, 1)).sqrt().float() * columns[i] for i, total in sums.items()}


def expert_downs(architecture: Architecture, block: nn.Module) -> Tensor:
    """The matrices (experts, width, neurons) that lead out of the block's experts."""
    experts, _ = architecture.expert_parts(block)
    if not isinstance(experts, nn.ModuleList):
        return experts.down_proj.detach()
    return torch.stack([dense_weight(architecture.expert_linears(expert)["down"]).detach() for expert in experts])


def set_expert_downs(architecture: Architecture, block: nn.Module, weights: Sequence[Tensor]) -> None:
    """Gives the experts these matrices (width, neurons), of the shape that they have."""
    experts, _ = architecture.expert_parts(block)
    if not isinstance(experts, nn.ModuleList):
        experts.down_proj.data.copy_(torch.stack(list(weights)))
        return
    for expert, weight in zip(experts, weights):
        set_weight(architecture.expert_linears(expert)["down"], weight)


def select_neurons(
    importance: Sequence[Tensor], remove: Remove, *, scope: str = "layer", round_to: int | None = None
) -> list[list[int]]:
    """The neurons to remove from each block, in rising order, by the importance of each (neurons,): the least important.

    remove, scope: as for ``select_heads``. round_to: keep a multiple of it in each block that loses any, 64 or 128 for kernels
    whose tiles are as wide; then no more go than asked for, and as many as that allows. By default none: what is asked for goes.
    Of a block of experts, whose importance is (experts, neurons), all this is of each expert: as many go from each, its own least
    important, and over all blocks they are compared by their mean. Their numbers run through the experts, one after the other.
    Raises SparsekitError for all of a block's neurons, and where nothing would go."""
    ranked = [scores.sort(dim=-1).values.mean(0) if scores.dim() == 2 else scores for scores in importance]
    removed = select(ranked, remove, scope, "neurons", round_to)
    return [_of_each(scores, len(gone)) if scores.dim() == 2 else gone for scores, gone in zip(importance, removed)]


def _of_each(scores: Tensor, count: int) -> list[int]:
    """The ``count`` least of each row of the scores (experts, neurons), of equal ones the last, by number through all rows."""
    width = scores.shape[1]
    order = width - 1 - scores.flip(1).argsort(dim=1, stable=True)
    return sorted(i * width + j for i, row in enumerate(order.tolist()) for j in row[:count])
