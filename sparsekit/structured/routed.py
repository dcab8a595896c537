"""Which tokens each expert of a block is given, with which weight, whether experts are one module or modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SparsekitError
from .architecture import Architecture

# See(expert, rows, weights): the tokens (t, width) that one expert is given, and what its outputs are multiplied with, (t,).
See = Callable[[int, Tensor, Tensor], None]
Mask = Callable[[], Tensor | None]  # of the batch that runs: which of its tokens count, (batch * tokens,) bool, or all


@contextmanager
def routing(architecture: Architecture, block: nn.Module, mask: Mask, see: See) -> Iterator[None]:
    """Inside, shows what each of the block's experts is given whenever the block runs, tokens that do not count left out."""
    experts, _ = architecture.expert_parts(block)
    if isinstance(experts, nn.ModuleList):
        holder = architecture.mlp(block)
        hook = holder.register_forward_pre_hook(lambda _, *call: _see_modules(holder, experts, call, mask(), see), with_kwargs=True)
    else:
        hook = experts.register_forward_pre_hook(lambda _, *call: _see_fused(call, mask(), see), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _see_fused(call: tuple[tuple, dict[str, Any]], mask: Tensor | None, see: See) -> None:
    """One module is called with the tokens, their experts' numbers, and the weights: (tokens, experts a token)."""
    args, kwargs = call
    names = ("hidden_states", "top_k_index", "top_k_weights")
    hidden, index, weights = (kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names))
    if mask is not None:
        hidden, index, weights = hidden[mask], index[mask], weights[mask]
    for expert in index.unique().tolist():
        tokens, choice = torch.where(index == expert)
        see(expert, hidden[tokens], weights[tokens, choice])


def _see_modules(
    holder: nn.Module, experts: nn.ModuleList, call: tuple[tuple, dict[str, Any]], mask: Tensor | None, see: See
) -> None:
    """What holds the experts weighs and adds their outputs in a way of its own: the weights are what its output moves with."""
    rows: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def catch(expert: int, args: tuple, out: Any) -> Any:
        rows[expert] = args[0].detach()
        made = out if isinstance(out, Tensor) else out[0]
        outputs[expert] = made.detach().requires_grad_()
        return outputs[expert] if isinstance(out, Tensor) else (outputs[expert], *out[1:])

    args, kwargs = call
    with ExitStack() as stack, torch.enable_grad():
        for i, expert in enumerate(experts):
            stack.callback(expert.register_forward_hook(lambda _, args, out, i=i: catch(i, args, out)).remove)
        found = holder.forward(*args, **kwargs)
        found = (found if isinstance(found, Tensor) else found[0]).flatten(0, -2)[:, 0]
        counted = found if mask is None else found[mask]
        # Each output moves the first feature of its own token alone, and by its weight.
        moved = torch.autograd.grad(counted.sum(), list(outputs.values()), allow_unused=True) if outputs else ()
    for (expert, given), gradient in zip(rows.items(), moved):
        if gradient is not None:
            weights = gradient.flatten(0, -2)[:, 0]
            there = weights != 0
            see(expert, given.flatten(0, -2)[there], weights[there])


def expert_output(experts: nn.Module, expert: int, rows: Tensor, weights: Tensor) -> Tensor:
    """What one expert makes of the rows (t, width), times the weights (t,)."""
    if isinstance(experts, nn.ModuleList):
        out = experts[expert].forward(rows)
        return (out if isinstance(out, Tensor) else out[0]) * weights[:, None]
    return experts.forward(rows, torch.full((len(rows), 1), expert, device=rows.device), weights[:, None])


def activations(architecture: Architecture, experts: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """The activations (t, neurons) of one expert's neurons for the rows (t, width)."""
    if not isinstance(experts, nn.ModuleList):
        made = F.linear(rows, experts.gate_up_proj[expert])
        if hasattr(experts, "_apply_gate"):
            return experts._apply_gate(made)
        gate, up = made.chunk(2, dim=-1)
        return experts.act_fn(gate) * up
    seen: list[Tensor] = []
    down = architecture.expert_linears(experts[expert])["down"]
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        experts[expert].forward(rows)
    finally:
        hook.remove()
    return seen[0].flatten(0, -2)


GROUPED = 8  # torch's product of many matrices takes rows of whole 16 bytes


def check_width(architecture: Architecture, block: nn.Module, kept: int | str) -> None:
    """Raises SparsekitError where experts in one module would not run with so many neurons left of each."""
    if not isinstance(architecture.expert_parts(block)[0], nn.ModuleList) and (isinstance(kept, str) or kept % GROUPED):
        raise SparsekitError(
            f"experts in one module must keep a multiple of {GROUPED} neurons each, for torch's product of all of them takes no "
            f"other, got {kept}; give round_to={GROUPED}, or a multiple of it"
        )


def check_neurons(architecture: Architecture, block: nn.Module) -> None:
    """Raises SparsekitError where the neurons of the block's experts cannot be told apart."""
    experts, _ = architecture.expert_parts(block)
    if architecture.shape(block).moe_intermediate_size is None:
        raise SparsekitError(
            f"the neurons of experts must lie in gate_up_proj (experts, 2 * neurons, width), gate's first, and down_proj (experts, "
            f"width, neurons), or in modules with the linears that the descriptor names, got {type(experts).__name__}; take whole "
            f"experts out"
        )
