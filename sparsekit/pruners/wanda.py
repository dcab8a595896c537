"""Wanda: weights by the size of what they multiply, compared within each output row. Source: Sun et al. 2023, arXiv:2306.11695."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import criteria
from ..patterns import Pattern
from .base import PruneResult


class Wanda:
    """Keeps the largest |w_ij| * |x_j|_2 of each row; no weight changes its value."""

    needs_inputs, rowwise = True, True

    def __init__(self, columns: int, pattern: Pattern, device: torch.device | str = "cpu"):
        self.pattern, self.statistics = pattern, criteria.SquaredNorm(columns, device)

    def observe(self, x: Tensor) -> None:
        self.statistics.update(x)

    def prune(self, weight: Tensor) -> PruneResult:
        if self.statistics.tokens == 0:
            raise ValueError("wanda needs the linear's inputs, and observed none")
        if not torch.isfinite(self.statistics.sum).all():
            raise ValueError("its inputs hold NaN or Inf")
        mask = self.pattern.mask(criteria.wanda(weight, self.statistics), rowwise=self.rowwise)
        return PruneResult(torch.where(mask, weight, 0), mask)
