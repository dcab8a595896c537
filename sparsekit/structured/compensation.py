"""What is left of a linear's inputs takes over, by least squares, what those that go did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..criteria import Gram

# Shares of the mean diagonal added to it, tried in order, all in fp64: at first only what keeps rounding from deciding.
DAMPING_LADDER = (1e-6, *Gram.DAMPING_LADDER)


def compensated(weight: Tensor, gram: Gram, kept: Sequence[int]) -> tuple[Tensor, float]:
    """The weight (n, len(kept)), fp32, by rising column, that makes of the kept inputs what ``weight`` (n, k) makes of all, nearly.

    It is V = W_K + W_R G_RK (G_KK + damping)^-1 of least |X W' - X_K V'|^2 for the inputs X with Gram matrix G, K those kept and R
    the others: optimal brain surgery (Hassibi and Stork 1993) on all of R at once. Damping pulls towards W_K. Where each of R is a
    linear combination of K nothing is lost but by the damping. Returns V and the damping used, a share of the mean diagonal.
    Raises ValueError for inputs that are not finite, and where G_KK with the largest damping is not positive definite."""
    if not torch.isfinite(gram.sum).all():
        raise ValueError("its inputs hold NaN or Inf")
    keep = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    keep[list(kept)] = True
    g, w = gram.sum.double(), weight.double()
    inner = g[keep][:, keep]
    lost = w[:, ~keep] @ g[~keep][:, keep]
    fired = inner.diagonal() > 0
    mean = inner.diagonal()[fired].mean() if fired.any() else 1.0  # an input that never fired says nothing about the scale
    for damping in DAMPING_LADDER:
        damped = inner.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            change = torch.cholesky_solve(lost.T, factor).T
            if torch.isfinite(change).all():
                return (w[:, keep] + change).float(), damping
    raise ValueError(f"its Gram matrix is not positive definite with damping up to {DAMPING_LADDER[-1]:g} of the mean diagonal")
