"""How much an error in a matrix's outputs matters to the loss, by the second order of the loss, from one backward pass a batch.

With the Fisher matrix F of a weight W (n, k) in place of the Hessian, a change D of it that is spread evenly costs
trace(F) |D|^2 / 2nk nats a token; one of relative squared error e, e trace(F) |W|^2 / 2nk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import check_vocabulary
from ..errors import SparsekitError
from ..evaluate import eval_mode
from ..pipeline.blocks import find_blocks, find_targets


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
    held: dict[nn.Parameter, list] = {}
    for target in targets:
        held.setdefault(getattr(target.module, target.parameter), []).append(target)
    squares, tokens = {target: torch.zeros((), dtype=torch.float64) for target in targets}, 0

    def take(parameter: nn.Parameter) -> None:
        for target in held[parameter]:
            squares[target] += target.of(parameter.grad).float().square().sum().cpu()
        parameter.grad = None

    batches = list(batches)
    with eval_mode(model), _asking_for(model, set(held)), torch.enable_grad(), ExitStack() as stack:
        for parameter in held:
            stack.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        for i, batch in enumerate(batches):
            if progress:
                progress("gradients", i, len(batches))
            loss, count = _summed_loss(model, batch)
            loss.backward()
            tokens += count
    if not tokens:
        raise SparsekitError("weighing errors needs calibration batches, got none")
    trace = {target: square.item() / tokens for target, square in squares.items()}
    return {t.name: trace[t] * t.weight.float().square().mean().item() / 2 if t.weight.numel() else 0.0 for t in targets}


def _summed_loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The negative log-likelihood of every token that follows another, summed, and how many there are."""
    device = next(model.parameters()).device
    arguments = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    arguments = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in arguments.items() if name != "labels"}
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    check_vocabulary(ids, model)
    wanted = ids[:, 1:] if mask is None or mask.dim() != 2 else ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    count = int((wanted != -100).sum())
    if not count:
        raise SparsekitError("a batch must hold two tokens in a row to be predicted, got none")
    logits = model(**{"use_cache": False, **arguments}).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    if not torch.isfinite(loss):
        raise SparsekitError(f"the loss of a batch must be finite, got {loss.item():g}; check weights and text")
    return loss, count


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
