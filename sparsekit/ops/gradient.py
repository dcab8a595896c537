"""linear24 under autograd and torch.func: its gradients, of any order, and what vmap and forward mode make of it.

The gradient of x is a product with the weight written out dense; that of the values is the dense gradient at the kept places. To
write out and to take are each the other's gradient, so a derivative of any order is made of these three and of torch's products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from .. import reference
from ..format import Fragments24, Sparse24, from_fragments, to_fragments, widened


def in_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode, in which no op and no Function of ours is known."""
    return forward_ad._current_level >= 0


def held(values: Tensor, meta: Tensor, n: int, k: int) -> Sparse24 | Fragments24:
    """The weight (n, k) of values and meta, whose dtype says in which order they are."""
    kind = Fragments24 if meta.dtype == torch.int32 else Sparse24
    return kind(values, meta, (n, k))


def call(x: Tensor, s: Sparse24 | Fragments24, bias: Tensor | None, activation: str | None) -> Tensor:
    """The op alone, which autograd does not see."""
    if isinstance(s, Fragments24):
        return torch.ops.sparsekit.linear24_fragments.default(x, s.values, s.meta, *s.shape, bias, activation)
    check_rows(s)
    return torch.ops.sparsekit.linear24.default(x, s.values, s.meta, s.shape[1], bias, activation)


def check_rows(s: Sparse24) -> None:
    """Raises ValueError where the values have not the rows of the shape, which the op does not hear of."""
    if s.values.dim() == 2 and s.values.shape[0] != s.shape[0]:  # of other dimensions the op speaks
        raise ValueError(f"linear24: values must have the {s.shape[0]} rows of shape, got {tuple(s.values.shape)}")


def dense(s: Sparse24 | Fragments24) -> Tensor:
    """The weight written out, by the op alone."""
    if isinstance(s, Fragments24):
        return torch.ops.sparsekit.expand_fragments.default(s.values, s.meta, *s.shape)
    return torch.ops.sparsekit.expand24.default(s.values, s.meta, s.shape[1])


class Product(Function):
    """x W' + bias, for x (..., k) and values that may require gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor, meta: Tensor, n: int, k: int, bias: Tensor | None) -> Tensor:
        return call(x, held(values, meta, n, k), bias, None)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, values, meta, ctx.n, ctx.k, _ = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, meta)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, values, meta = ctx.saved_tensors
        of_x = of_values = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ WriteOut.apply(values, meta, ctx.n, ctx.k).to(grad.dtype)
        rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
        if ctx.needs_input_grad[1]:
            of_values = Take.apply(rows.T @ x.reshape(len(rows), x.shape[-1]), values, meta, ctx.n, ctx.k)
        if ctx.needs_input_grad[5]:
            of_bias = rows.sum(0)
        return of_x, of_values, None, None, None, of_bias


class WriteOut(Function):
    """The dense weight (n, k) in the values' dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
        return dense(held(values, meta, n, k))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        values, meta, ctx.n, ctx.k = inputs
        ctx.save_for_backward(values, meta)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Take.apply(grad, *ctx.saved_tensors, ctx.n, ctx.k), None, None, None


class Take(Function):
    """The elements of a dense (n, k) at the places that meta keeps, in the order and the dtype of the values."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dense: Tensor, values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
        s = held(values, meta, n, k)
        if isinstance(s, Sparse24):
            return reference.take24(dense, meta).to(values.dtype)
        s = from_fragments(s)
        return to_fragments(s._replace(values=reference.take24(dense, s.meta).to(values.dtype))).values

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        dense, _, meta, ctx.n, ctx.k = inputs
        ctx.dtype = dense.dtype
        ctx.save_for_backward(meta)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return WriteOut.apply(grad, *ctx.saved_tensors, ctx.n, ctx.k).to(ctx.dtype), None, None, None, None


def in_plain_torch(x: Tensor, s: Sparse24 | Fragments24, bias: Tensor | None) -> Tensor:
    """The product by torch's own operators on a weight written out by them, for forward mode: it has their derivatives."""
    if isinstance(s, Fragments24):
        s = from_fragments(s)
    return F.linear(x, written_out(s.values, s.meta, s.shape[1]).to(x.dtype), bias)


def written_out(values: Tensor, meta: Tensor, k: int) -> Tensor:
    """The dense weight (n, k) of values (n, kp/2) and meta (n, kp/8) by torch's own operators, not contiguous."""
    kept = reference.kept_columns(meta)
    numbers = widened(values)  # fp8 cannot be scattered
    groups = torch.zeros(*kept.shape[:2], 4, dtype=numbers.dtype, device=numbers.device)
    return groups.scatter(-1, kept, numbers.reshape(kept.shape)).flatten(1)[:, :k].to(values.dtype)
