"""SparseGPT: what is pruned is made up for by the weights to its right. Source: Frantar and Alistarh 2023, arXiv:2301.00774.

With H = 2 X X' / tokens and H^-1 = U' U, U upper: the weights that remain after columns < j are fixed have the inverse Hessian
U[j:, j:]' U[j:, j:], so removing w_j costs w_j^2 / U_jj^2 and is best made up for by w[j:] -= w_j / U_jj * U[j, j:].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..criteria import Gram
from ..patterns import NM, PairNM, Pattern, Unstructured, keep_top
from .base import PruneResult


class SparseGPT:
    """Prunes a weight column by column, left to right, updating the columns that are left.

    An N:M group chooses its mask when its first column is reached, on the weights as updated by then. An unstructured pattern
    chooses once a block of columns, over all rows, so that after each block exactly the share asked for is gone."""

    needs_inputs, rowwise = True, False

    BLOCK = 128  # columns between two trailing updates; rounded up to whole groups

    def __init__(self, columns: int, pattern: Pattern, device: torch.device | str = "cpu"):
        self.pattern, self.statistics = pattern, Gram(columns, device)

    def observe(self, x: Tensor) -> None:
        self.statistics.update(x)

    def prune(self, weight: Tensor) -> PruneResult:
        if self.statistics.tokens == 0:
            raise ValueError("sparsegpt needs the linear's inputs, and observed none")
        factor = self.statistics.factor
        # Columns of the weight are rows of w: a step then reads and writes whole lines.
        w = weight.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # [k, n], not the memory of weight
        w[factor.dead] = 0
        kept = torch.ones_like(w, dtype=torch.bool)
        group = self.pattern.m if isinstance(self.pattern, (NM, PairNM)) else 1
        size = math.ceil(self.BLOCK / group) * group
        removed = 0
        for begin in range(0, w.shape[0], size):
            end = min(begin + size, w.shape[0])
            if isinstance(self.pattern, Unstructured):
                quota = self.pattern.removed(w[:end].numel()) - removed
                removed += quota
                scores = _saliency(w[begin:end], factor.upper, begin)
                kept[begin:end] = keep_top(scores.T.reshape(-1), scores.numel() - quota).view(scores.T.shape).T
            errors = self._prune_block(w[begin:end], kept[begin:end], factor.upper[begin:end, begin:end])
            w[end:].addmm_(factor.upper[begin:end, end:].T, errors, alpha=-1)
        pruned = w.T.to(weight.dtype).contiguous()
        return PruneResult(pruned, kept.T.contiguous(), self.statistics.output_error(weight, pruned), factor.damping)

    def _prune_block(self, w: Tensor, kept: Tensor, upper: Tensor) -> Tensor:
        """Prunes the block w (b, n) in place and returns what each column leaves to the later ones, (b, n)."""
        errors = torch.empty_like(w)
        diagonal = upper.diagonal().tolist()
        for j in range(w.shape[0]):
            if isinstance(self.pattern, (NM, PairNM)) and j % self.pattern.m == 0:
                scores = _saliency(w[j : j + self.pattern.m], upper, j)
                kept[j : j + self.pattern.m] = self.pattern.mask(scores.T).T
            gone = ~kept[j]
            torch.mul(w[j], gone, out=errors[j]).div_(diagonal[j])
            w[j:].addr_(upper[j, j:], errors[j], alpha=-1)
            w[j].masked_fill_(gone, 0)  # an exact zero, neither the rounding of w - w nor -0.0
        return errors


def _saliency(w: Tensor, upper: Tensor, begin: int) -> Tensor:
    """w_j^2 / U_jj^2 of the columns w (b, n) that start at ``begin``."""
    diagonal = upper.diagonal()[begin : begin + w.shape[0]]
    return (w / diagonal[:, None]).square()
