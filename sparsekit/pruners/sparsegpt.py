"""SparseGPT: what is pruned is made up for by the weights to its right. Source: Frantar and Alistarh 2023, arXiv:2301.00774.

With H = 2 X X' / tokens and H^-1 = U' U, U upper: the weights that remain after columns < j are fixed have the inverse Hessian
U[j:, j:]' U[j:, j:], so removing w_j costs w_j^2 / U_jj^2 and is best made up for by w[j:] -= w_j / U_jj * U[j, j:].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import ops
from ..criteria import Gram, factorise
from ..patterns import NM, Given, PairNM, Pattern, Share, keep_top
from ..precision import full_precision
from ..timing import Phases
from .base import PruneResult


class SparseGPT:
    """Prunes a weight column by column, left to right, updating the columns that are left.

    An N:M group chooses its mask when its first column is reached, on the weights as updated by then. A pattern that counts over
    the whole weight chooses once a block of columns, over all rows: after each block exactly the share asked for is gone. Its
    blocks are the paper's 128 columns from 2048 inputs on, and narrower below, so that there too most are chosen after updates."""

    gathers, rowwise = Gram, False

    BLOCK = 128  # columns that one call of ops.obs_block_ prunes; rounded up to whole groups
    CHOICES, NARROWEST = 16, 8  # how often a share is chosen from at least, each time from so many units of a row
    PANEL = 512  # columns that are brought up to date after each block; those after the panel once, by one large product

    def __init__(self, columns: int, pattern: Pattern, device: torch.device | str = "cpu"):
        self.pattern, self.statistics = pattern, Gram(columns, device)
        self.beside: Sequence[Gram] = ()  # of other pruners, to be factorised with its own: all in the calls of one

    def observe(self, x: Tensor) -> None:
        self.statistics.update(x)

    def prune(self, weight: Tensor) -> PruneResult:
        return self.prune_levels(weight, [self.pattern])[0]

    def prune_levels(self, weight: Tensor, levels: Sequence[Pattern]) -> list[PruneResult]:
        """What a pruner of each of these patterns makes of the weight, bit for bit, from one factorisation."""
        if self.statistics.tokens == 0:
            raise ValueError("sparsegpt needs the linear's inputs, and observed none")
        scales = _scales(weight)
        found = [self._prune(weight, level, scales) for level in levels]
        if not found:
            return []
        shared = found[0][-1]
        with shared("error"):
            after_and_masked = chain.from_iterable((pruned, torch.where(kept, weight, 0)) for pruned, kept, *_ in found)
            errors = self.statistics.output_errors(weight, after_and_masked)
        damping = self.statistics.factor.damping
        return [
            PruneResult(pruned, kept, after, masked, loss, damping, phases.seconds())
            for (pruned, kept, loss, phases), after, masked in zip(found, errors[::2], errors[1::2])
        ]

    def width(self, level: Pattern, k: int) -> int:
        """Columns of k that are pruned at a time, whole groups or blocks."""
        least = self.NARROWEST * level.columns
        width = min(self.BLOCK, max(k // self.CHOICES, least)) if isinstance(level, Share) else self.BLOCK
        return math.ceil(width / level.columns) * level.columns

    @full_precision()
    def _prune(self, weight: Tensor, level: Pattern, scales: Tensor | None) -> tuple[Tensor, Tensor, float, Phases]:
        """The pruned weight, its mask, the loss, and the clock of the phases. scales: of ``_scales``."""
        phases = Phases(weight.device)
        with phases("factor"):
            factorise([self.statistics, *self.beside])
            factor = self.statistics.factor
        w = weight.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # not the memory of weight
        w.masked_fill_(factor.dead, 0)
        if scales is not None:
            w /= scales
        (n, k), width = w.shape, self.width(level, w.shape[1])
        panel = max(self.PANEL // width, 1) * width
        kept, loss = torch.empty_like(w, dtype=torch.bool), w.new_zeros(n, dtype=torch.float64)
        for begin in range(0, k, panel):
            end, errors = min(begin + panel, k), []
            for left in range(begin, end, width):
                right = min(left + width, end)
                rows, block = factor.unit[left:right], w[:, left:right]
                with phases("loop"):
                    choice = _choice(level, block, rows.diagonal(left), left, scales)
                    kept[:, left:right], error, lost = ops.obs_block_(block, rows[:, left:right], **choice, check=False)
                    errors.append(error)
                    loss += lost
                with phases("trailing"):
                    w[:, right:end].addmm_(error, rows[:, right:end], alpha=-1)
            with phases("trailing"):
                w[:, end:].addmm_(torch.cat(errors, 1), factor.unit[begin:end, end:], alpha=-1)
        if scales is not None:
            w *= scales
            loss *= scales[:, 0].double().square()
        loss.masked_fill_(~torch.isfinite(w).all(1), math.nan)
        lost = loss.sum().item()  # a GPU is waited for here alone, so that the blocks' launches run ahead of it
        if math.isnan(lost):
            raise ValueError(f"making up for what goes gives NaN or Inf, the first in row {int(loss.isnan().nonzero()[0])}")
        if weight.element_size() < 4:  # what is beyond its largest number would become Inf, or NaN
            w.clamp_(-torch.finfo(weight.dtype).max, torch.finfo(weight.dtype).max)
        return w.to(weight.dtype), kept, lost * factor.scale / 2, phases


def _scales(weight: Tensor) -> Tensor | None:
    """Of each row (n, 1) a power of two, so that the squares of its weights in that unit neither over- nor underflow in fp32; None
    where that is 1 for all. Raises ValueError, naming the first place, for NaN and Inf."""
    plain = weight.float() if weight.element_size() == 1 else weight  # of fp8 torch knows little
    largest = torch.linalg.vector_norm(plain, math.inf, 1, keepdim=True) if plain.numel() else plain.new_zeros(len(plain), 1)
    exponents = (torch.frexp(largest.float()).exponent / 64).round().mul_(64).clamp_(-126, 126)
    finite, scaled = torch.stack((torch.isfinite(largest).all(), exponents.any())).tolist()  # a GPU is waited for once
    if not finite:
        row, column = (~torch.isfinite(plain)).nonzero()[0].tolist()
        raise ValueError(f"its weight holds NaN or Inf, the first in row {row}, column {column}")
    return ((exponents.int() + 127) << 23).view(torch.float32) if scaled else None  # its bits: a GPU's power may be off by one


def _choice(level: Pattern, block: Tensor, diagonal: Tensor, left: int, scales: Tensor | None) -> dict:
    """What ops.obs_block_ is to be told of a block (n, b) that begins at column ``left``: N:M, or the mask, a given one's part.

    Of a share the mask: after every block the share of all units so far is to be gone. Rows in units of their own, scales (n, 1),
    are compared by what they stand for, whose squares fp64 holds."""
    if isinstance(level, Given):
        return {"mask": level.kept[:, left : left + block.shape[1]].to(block.device)}
    if isinstance(level, NM):
        return {"n": level.n, "m": level.m}
    if isinstance(level, PairNM):
        return {"n": level.n // 2, "m": level.m // 2, "pairs": True}
    scores = (block / diagonal if scales is None else block.double() * scales / diagonal).square()
    units, before = level.units(scores), left // level.columns
    lines, across = units.shape
    gone = level.removed(lines * (before + across)) - level.removed(lines * before)
    kept = keep_top(units.flatten(), units.numel() - gone, check=False)  # a NaN shows in the loss
    return {"mask": level.spread(kept.view(units.shape), scores.shape)}
