"""Each pruner as a function on tensors, for one line of code."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..patterns import Pattern
from .base import Pruner
from .scored import Magnitude, Wanda
from .sparsegpt import SparseGPT

# What torch counts among float dtypes, and cannot hold a pruned weight: powers of two alone; two values in a byte.
_UNFIT = tuple(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name))


def magnitude_prune(weight: Tensor, pattern: str | Pattern = "2:4") -> Tensor:
    """The weight (n, k), any float dtype, fp8 included, with zeros where its smallest |w| were. It comes back in its dtype.

    pattern: a Pattern or its text. Raises SparsekitError for another text, ValueError for NaN and a weight of another shape."""
    return _prune(Magnitude, weight, (), pattern)


def wanda_prune(weight: Tensor, activations: Tensor | Iterable[Tensor], pattern: str | Pattern = "2:4") -> Tensor:
    """The weight (n, k) with zeros where |w_ij| * |x_j|_2 was smallest in its row; no other weight changes.

    activations: what the linear receives, (tokens, k) or (batch, tokens, k), any float dtype, or several of them one after another.
    Raises as ``magnitude_prune`` does, and for activations of another width. Source: Sun et al. 2023, arXiv:2306.11695."""
    return _prune(Wanda, weight, activations, pattern)


def sparsegpt_prune(weight: Tensor, activations: Tensor | Iterable[Tensor], pattern: str | Pattern = "2:4") -> Tensor:
    """The weight (n, k) pruned column by column, what is left updated to make up for it.

    activations as of ``wanda_prune``; raises as it does, and ValueError for Inf. An update ends at the dtype's
    largest number. Source: Frantar and Alistarh 2023, arXiv:2301.00774."""
    return _prune(SparseGPT, weight, activations, pattern)


@torch.no_grad()
def _prune(kind: type[Pruner], weight: Tensor, activations: Tensor | Iterable[Tensor], pattern: str | Pattern) -> Tensor:
    name = f"{kind.__name__.lower()}_prune"
    if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype in _UNFIT:
        what = "(n, k) of a float dtype that has a zero, one value an element"
        raise ValueError(f"{name}: weight must be {what}, got {tuple(weight.shape)} in {weight.dtype}")
    pruner = kind(weight.shape[1], Pattern.parse(pattern), weight.device)
    for x in (activations,) if isinstance(activations, Tensor) else activations:
        if x.dim() < 2 or x.shape[-1] != weight.shape[1] or not x.is_floating_point():
            raise ValueError(
                f"{name}: activations must be (..., tokens, {weight.shape[1]}) of a float dtype, got {tuple(x.shape)} in {x.dtype}"
            )
        pruner.observe(x.to(weight.device))
    return pruner.prune(weight).weight
