"""What parts of a model give, seen while calibration batches run through the whole of it; streamed, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import model_call, next_tokens
from ..errors import SparsekitError
from ..evaluate import eval_mode

Batches = Iterable[Tensor | Mapping[str, Tensor]]
Progress = Callable[[int, int], None]  # batches done, batches in all


@torch.no_grad()
def watch(
    model: nn.Module, batches: Batches, watched: Mapping[nn.Module, Callable[[Tensor], None]], progress: Progress | None = None
) -> None:
    """Shows each of the linears' watchers its inputs (tokens, in_features), those alone that the attention_mask counts.

    Raises SparsekitError where there is no batch."""
    for args, kwargs, mask in calls(model, batches, progress):
        with ExitStack() as stack:
            for linear, see in watched.items():

                def look(_, args, see=see, mask=mask):
                    rows = args[0].reshape(-1, args[0].shape[-1])
                    see(rows if mask is None else rows[mask.to(rows.device)])

                stack.callback(linear.register_forward_pre_hook(look).remove)
            run(model, args, kwargs)


def gate_gradients(
    model: nn.Module, batches: Batches, gates: Mapping[nn.Module, int], progress: Progress | None = None
) -> dict[nn.Module, Tensor]:
    """Mean over the samples of |d loss / d gate|, for a count of gates, all open, on equal shares of each linear's inputs.

    A sample's loss is the mean negative log-likelihood of its tokens (of its ``labels`` where the batch has them). Gradients are
    taken a sample, so they do not cancel over a batch. Returns (count,) fp32 for each linear.
    Raises SparsekitError where there is no batch, where a sample predicts no token, and where a gradient is not finite."""
    sums = {linear: torch.zeros(count, device=linear.weight.device) for linear, count in gates.items()}
    samples = 0
    for args, kwargs, mask in calls(model, batches, progress):
        ids = args[0] if args else kwargs["input_ids"]
        targets = next_tokens(kwargs.pop("labels", ids), None if mask is None else mask.view(ids.shape))
        counts = targets != -100
        if not (predicted := counts.sum(1)).all():
            raise SparsekitError("each calibration sample must predict a token, and one has fewer than two; give longer samples")
        open_gates = {  # a model may lie on several devices
            linear: torch.ones(len(ids), count, device=linear.weight.device, requires_grad=True) for linear, count in gates.items()
        }
        with _gated(open_gates), _frozen(model), torch.enable_grad():
            logits = model(*args, **kwargs).logits[:, :-1].float().flatten(0, 1).to(targets.device)
            # The sum: the mean's share a token would underflow in 16 bits.
            total = F.cross_entropy(logits, targets.flatten(), reduction="sum")
            gradients = torch.autograd.grad(total, list(open_gates.values()))
        for held, gradient in zip(sums.values(), gradients):
            held += (gradient / predicted[:, None].to(gradient.device)).abs().sum(0)
        samples += len(ids)
    if not all(torch.isfinite(held).all() for held in sums.values()):
        raise SparsekitError("gradients of the loss must be finite, got NaN or Inf; load the model in another dtype")
    return {linear: held / samples for linear, held in sums.items()}


def run(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Runs the model up to its last block; no logits are needed."""
    getattr(model, "base_model", model)(*args, **{name: value for name, value in kwargs.items() if name != "labels"})


def calls(model: nn.Module, batches: Batches, progress: Progress | None) -> Iterator[tuple[tuple, dict[str, Any], Tensor | None]]:
    """What to call the model with, batch by batch, and which of its tokens count."""
    batches, device = list(batches), next(model.parameters()).device
    if not batches:
        raise SparsekitError("importance is measured on calibration batches, got none")
    with eval_mode(model):
        for done, batch in enumerate(batches):
            args, kwargs, mask = model_call(model, batch, device)
            yield args, {"use_cache": False, **kwargs}, mask
            if progress:
                progress(done + 1, len(batches))


@contextmanager
def _gated(gates: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Multiplies the inputs of each linear by gates (samples, count), each for an equal share of a sample's features."""
    with ExitStack() as stack:
        for linear, gate in gates.items():

            def multiply(_, args, gate=gate):
                shares = args[0].reshape(len(gate), -1, gate.shape[1], args[0].shape[-1] // gate.shape[1])
                return ((shares * gate[:, None, :, None]).to(args[0].dtype).reshape(args[0].shape), *args[1:])

            stack.callback(linear.register_forward_pre_hook(multiply).remove)
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that nothing is kept for one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
