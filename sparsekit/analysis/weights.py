"""How much an error in a matrix's outputs matters to the loss, by the second order of the loss, from one backward pass a batch.

With the Fisher matrix F of a weight W (n, k) in place of the Hessian, a change D of it that is spread evenly costs
trace(F) |D|^2 / 2nk nats a token; one of relative squared error e, e trace(F) |W|^2 / 2nk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..data import model_call
from ..errors import SparsekitError
from ..evaluate import eval_mode
from ..pipeline.blocks import Target, find_blocks, find_targets
from ..pipeline.gradients import gradients_given, next_token_loss


def gradient_weights(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """Of every matrix that ``sparsekit.prune`` would prune, by name, the nats a token that a relative squared error of 1 in its
    outputs would cost if all of the loss were second order: what to weigh the errors of its ``Curve`` with.

    batches, skip, blocks: as for ``prune``. trace(F) is the empirical Fisher information: squared gradients of the batches' summed
    loss, over their tokens. One parameter's gradient is in memory at a time, but the activations of a batch are too; the model
    is as it was afterwards.
    Raises SparsekitError for no batches, batches without two tokens in a row, and a loss that is not finite."""
    names = {module: name for name, module in model.named_modules()}
    targets = [t for group in find_targets(find_blocks(model) if blocks is None else blocks, names, tuple(skip)) for t in group]
    squares, tokens, device = dict.fromkeys(targets, 0.0), 0, next(model.parameters()).device
    batches = list(batches)

    def take(target: Target, gradient: Tensor) -> None:
        squares[target] += gradient.float().square().sum(dtype=torch.float64).item()

    with eval_mode(model), gradients_given(model, targets, take):
        for i, batch in enumerate(batches):
            if progress:
                progress("gradients", i, len(batches))
            _, arguments, _ = model_call(model, batch if isinstance(batch, Mapping) else {"input_ids": batch}, device)
            loss, count, _ = next_token_loss(model, arguments)
            loss.backward()
            tokens += count
    if not tokens:
        raise SparsekitError("weighing errors needs calibration batches, got none")
    mean = {target: target.weight.float().square().mean().item() if target.weight.numel() else 0.0 for target in targets}
    return {target.name: square / tokens * mean[target] / 2 for target, square in squares.items()}
