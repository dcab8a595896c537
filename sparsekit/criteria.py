"""What is known of a linear's inputs, gathered a batch at a time, and the scores made from it (higher is kept)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class SquaredNorm:
    """Sum of squares of each input feature over all tokens: what Wanda needs. Memory k * 4 bytes."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.sum, self.tokens = torch.zeros(columns, dtype=torch.float32, device=device), 0

    def update(self, x: Tensor) -> None:
        """Adds the tokens of x (..., k), any float dtype; summed in fp32."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.sum += (rows * rows).sum(0)
        self.tokens += rows.shape[0]


@dataclass(frozen=True)
class Factor:
    """H^-1 = U' U with U upper triangular (k, k) fp32; the inputs that never fired; the damping that made H positive definite."""

    upper: Tensor
    dead: Tensor
    damping: float


class Gram:
    """Sum of x x' over all tokens, fp32: what SparseGPT needs. Memory k * k * 4 bytes."""

    # Shares of the mean diagonal added to it, tried in order; the last one is factorised in fp64.
    DAMPING_LADDER = (0.01, 0.1, 1.0)

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.sum, self.tokens = torch.zeros(columns, columns, dtype=torch.float32, device=device), 0

    def update(self, x: Tensor) -> None:
        """Adds the tokens of x (..., k), any float dtype; summed in fp32."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]
        self.__dict__.pop("factor", None)

    @cached_property
    def factor(self) -> Factor:
        """The factor of (2 H / tokens + damping)^-1, from one Cholesky and one triangular inverse.

        H = R R' with R upper is the Cholesky factorisation of H read from its last row and column backwards; then
        H^-1 = (R^-1)' R^-1, and R^-1 is the upper factor asked for, without ever forming H^-1.
        Raises ValueError for NaN or Inf, or when the last rung of the ladder is not positive definite either."""
        h = self.sum * (2 / max(self.tokens, 1))
        if not torch.isfinite(h).all():
            raise ValueError("its inputs hold NaN or Inf")
        diagonal = h.diagonal()
        dead = diagonal == 0
        # The mean is over inputs that fired: the ones set to 1 below say nothing about the scale of the others.
        mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
        diagonal[dead] = mean
        h /= mean  # so that neither a huge nor a tiny scale over- or underflows; undone on U
        for damping in self.DAMPING_LADDER:
            damped = h.double() if damping == self.DAMPING_LADDER[-1] else h.clone()
            damped.diagonal().add_(damping)
            backwards, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                r = backwards.flip(0, 1)
                upper = torch.linalg.solve_triangular(r, torch.eye(r.shape[0], dtype=r.dtype, device=r.device), upper=True)
                if torch.isfinite(upper).all():
                    return Factor((upper / mean.to(upper.dtype).sqrt()).float(), dead, damping)
        raise ValueError(
            f"its Gram matrix is not positive definite with damping up to {self.DAMPING_LADDER[-1]:g} of the mean diagonal"
        )

    def output_error(self, weight: Tensor, pruned: Tensor) -> float:
        """|X (W - W_pruned)'|^2 / |X W'|^2 over the tokens seen; weights (n, k)."""
        difference, weight = weight.float() - pruned.float(), weight.float()
        whole = (weight @ self.sum * weight).sum().item()
        lost = max((difference @ self.sum * difference).sum().item(), 0.0)  # rounding can take a small one below zero
        return lost / whole if whole > 0 else 0.0


def total(parts: Sequence[Gram] | Sequence[SquaredNorm]) -> Gram | SquaredNorm:
    """The statistic of all the tokens that the parts, of one kind and size, have seen."""
    whole = type(parts[0])(parts[0].sum.shape[0], parts[0].sum.device)
    for part in parts:
        whole.sum += part.sum
        whole.tokens += part.tokens
    return whole


def magnitude(weight: Tensor) -> Tensor:
    """|w|, fp32."""
    return weight.float().abs()


def wanda(weight: Tensor, norm: SquaredNorm) -> Tensor:
    """|w_ij| * |x_j|_2, fp32, to be compared within each row. Source: Sun et al. 2023, arXiv:2306.11695."""
    return weight.float().abs() * norm.sum.sqrt()
