"""Magnitude pruning: the smallest weights go. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import criteria
from ..patterns import Pattern
from .base import PruneResult


class Magnitude:
    """Keeps the largest |w|; unstructured patterns compare over the whole weight."""

    needs_inputs, rowwise = False, False

    def __init__(self, columns: int, pattern: Pattern, device: torch.device | str = "cpu"):
        self.pattern, self.statistics = pattern, None

    def observe(self, x: Tensor) -> None:
        """Ignores x: magnitude looks at weights alone."""

    def prune(self, weight: Tensor) -> PruneResult:
        mask = self.pattern.mask(criteria.magnitude(weight), rowwise=self.rowwise)
        return PruneResult(torch.where(mask, weight, 0), mask)
