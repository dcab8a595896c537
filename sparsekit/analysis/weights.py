"""How much an error in a matrix's outputs matters to the loss, by the second order of the loss, from the gradients of its batches.

With the Fisher matrix F of a weight W (n, k) in place of the Hessian, a change D of it that is spread evenly costs
trace(F) |D|^2 / 2nk nats a token; one of relative squared error e, e trace(F) |W|^2 / 2nk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import SparsekitError
from ..pipeline.backward import gradients_at_once, gradients_by_block
from ..pipeline.blocks import Target, find_targets
from ..pipeline.source import Progress
from .dense import source_of


def gradient_weights(
    model: nn.Module | str | Path,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
) -> dict[str, float]:
    """Of every matrix that ``sparsekit.prune`` would prune, by name, the nats a token that a relative squared error of 1 in its
    outputs would cost if all of the loss were second order: what to weigh the errors of its ``Curve`` with.

    model: one in memory, or the folder of one that need not fit there (device, dtype: as for ``load``): of that one block is there
    at a time, and what enters the blocks waits on disk. batches, skip, blocks: as for ``prune``. trace(F) is the empirical Fisher
    information: squared gradients of the batches' summed loss, over their tokens. One parameter's gradient is in memory at a time,
    but the activations of a batch are too, those of all blocks or of one; the model is as it was afterwards.
    Raises SparsekitError for no batches, batches without two tokens in a row, and a loss that is not finite."""
    place = source_of(model, blocks, device, dtype)
    names = {module: name for name, module in place.model.named_modules()}
    groups = find_targets(place.blocks, names, tuple(skip))
    squares, weights = {target: 0.0 for group in groups for target in group}, {}
    batches = list(batches)
    if not batches:
        raise SparsekitError("weighing errors needs calibration batches, got none")

    def take(target: Target, gradient: Tensor) -> None:
        squares[target] += gradient.float().square().sum(dtype=torch.float64).item()

    def done(target: Target) -> None:
        weights[target.name] = squares[target] * (target.weight.float().square().mean().item() if target.weight.numel() else 0.0)

    if isinstance(model, nn.Module):
        tokens = gradients_at_once(model, list(squares), batches, take, progress)
        for target in squares:
            done(target)
    else:
        tokens = gradients_by_block(place, groups, batches, take, done, progress)
    return {target.name: weights[target.name] / tokens / 2 for target in squares}
