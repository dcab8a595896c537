"""What stands in place of a removed sub-layer: it adds nothing to the hidden states, and keeps the cache in step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .architecture import Architecture


class Removed(nn.Module):
    """In place of an MLP, or of another module of hidden states: zeros, or what it was given to add to.

    It holds an empty weight, of shape (0,), under the name of one that is gone. A loader that takes the model for a whole one stops
    at it, where it would put random weights in place of those that are missing."""

    def __init__(self, gone: nn.Module, adds_residual: bool = False):
        super().__init__()
        self.adds_residual = adds_residual
        held = list(gone.named_parameters())
        name, weight = next(((name, p) for name, p in held if p.dim() == 2), held[0])  # savers take those of experts apart
        *path, leaf = name.split(".")
        holder = self
        for part in path:
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
        holder.register_parameter(leaf, nn.Parameter(empty, requires_grad=weight.requires_grad))

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.adds_residual:
            return args[0] if args else kwargs["residual"]
        return torch.zeros_like(hidden_states)


class Passed(Removed):
    """In place of the way into an MLP that is no module of its own: the hidden states as they are."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class RemovedAttention(Removed):
    """In place of an attention: zeros, or what it was given to add to.

    A model counts the tokens it has seen in the cache of one block, the first one's mostly. So this one's grows too, by a key and a
    value of one number a token."""

    def __init__(self, gone: nn.Module, index: int, adds_residual: bool = False):
        super().__init__(gone, adds_residual)
        self.layer_idx = index

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        cache = next((held for held in (*args, *kwargs.values()) if hasattr(held, "get_seq_length")), None)
        if cache is not None:
            layers = getattr(cache, "layers", ())
            made = getattr(layers[self.layer_idx], "keys", None) if self.layer_idx < len(layers) else None
            heads, width = (made.shape[1], made.shape[3]) if made is not None and made.dim() == 4 else (1, 1)
            nothing = hidden_states.new_zeros(hidden_states.shape[0], heads, hidden_states.shape[1], width)
            cache.update(nothing, nothing, self.layer_idx)
        return super().forward(hidden_states, *args, **kwargs), None


def take_out(architecture: Architecture, block: nn.Module, sublayer: str) -> None:
    """Puts what adds nothing in the place of the block's "attention" or "mlp". The norm before it stays, and its output is unused.

    The weights' device and dtype are kept, meta among them. Nothing is changed where it is gone already."""
    if sublayer == "attention":
        if (gone := architecture.attention(block)) is not None:
            stand_in = RemovedAttention(gone, getattr(gone, architecture.index), architecture.adds_residual)
            block.set_submodule(architecture.attention_at, stand_in)
    elif (gone := architecture.mlp(block)) is None:
        return
    elif architecture.mlp_at:
        block.set_submodule(architecture.mlp_at, Removed(gone, architecture.adds_residual))
    else:  # the MLP's linears are the block's own
        for part, linear in architecture.neurons(block).items():
            path = {"gate": architecture.gate, "up": architecture.up, "down": architecture.down}[part]
            block.set_submodule(path, Removed(linear) if part == "down" else Passed(linear))
