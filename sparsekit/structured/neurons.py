"""Neurons of the MLPs: how much each matters, and which go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..criteria import SquaredNorm
from ..errors import SparsekitError, listed
from ..linear import dense_weight
from .architecture import architecture_of
from .selection import Remove, select
from .watching import Batches, Progress, gate_gradients, watch

METHODS = ("contribution", "taylor")


def neuron_importance(
    model: nn.Module, batches: Batches, method: str = "contribution", *, progress: Progress | None = None
) -> list[Tensor]:
    """How much each neuron of each MLP matters on the calibration batches: (neurons,) fp32 on the CPU a block, higher is kept.

    A neuron is a row of gate and one of up, which make its activation, and a column of down. method: "contribution", the root mean
    square over tokens of what it adds to the hidden states, |down's column| * rms of its activation, to compare neurons of a block;
    or "taylor", the mean over samples of |d loss / d gate| for a gate on its activation, which is comparable between blocks.
    A block without an MLP, or with experts in its place, has none. Batches and errors as for ``head_importance``."""
    if method not in METHODS:
        raise SparsekitError(f"the importance of neurons is {listed(METHODS, 'or')}, got {method!r}")
    architecture = architecture_of(model)
    downs = [architecture.neurons(block).get("down") for block in architecture.blocks(model)]
    columns = {down: dense_weight(down).shape[1] for down in downs if down is not None}
    if method == "taylor":
        found = gate_gradients(model, batches, columns, progress)
    else:
        norms = {down: SquaredNorm(count, down.weight.device) for down, count in columns.items()}
        watch(model, batches, {down: norm.update for down, norm in norms.items()}, progress)
        found = {
            down: (norm.sum / max(norm.tokens, 1)).sqrt() * dense_weight(down).float().norm(dim=0) for down, norm in norms.items()
        }
    return [torch.zeros(0) if down is None else found[down].float().cpu() for down in downs]


def select_neurons(
    importance: Sequence[Tensor], remove: Remove, *, scope: str = "layer", round_to: int | None = None
) -> list[list[int]]:
    """The neurons to remove from each block, in rising order, by the importance of each (neurons,): the least important.

    remove, scope: as for ``select_heads``. round_to: keep a multiple of it in each block that loses any, 64 or 128 for kernels
    whose tiles are as wide; then no more go than asked for, and as many as that allows. By default none: what is asked for goes.
    Raises SparsekitError for all of a block's neurons, and where nothing would go."""
    return select(importance, remove, scope, "neurons", round_to)
