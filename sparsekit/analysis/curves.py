"""How much of each linear's output is lost at each of several patterns, from one pass and one factorisation a linear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..criteria import CRITERIA, Gram
from ..errors import SparsekitError
from ..patterns import Pattern
from ..pipeline.observe import MAGNITUDE
from ..pipeline.source import Progress
from ..pruners import SparseGPT
from .dense import dense_blocks, source_of


@dataclass(frozen=True)
class Curve:
    """One matrix, (out_features, in_features). levels: patterns as text, of rising sparsity. errors: at each of them the squared
    error of the outputs over their square, after SparseGPT's update, on the calibration tokens."""

    name: str
    shape: tuple[int, int]
    levels: tuple[str, ...]
    errors: tuple[float, ...]

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The share of weights that each level removes."""
        return tuple(Pattern.parse(level).sparsity for level in self.levels)

    def to_dict(self) -> dict[str, Any]:
        """Of JSON's types alone."""
        return {**asdict(self), "shape": list(self.shape), "levels": list(self.levels), "errors": list(self.errors)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Curve:
        """What ``to_dict`` made, or JSON of it. Raises KeyError, TypeError or ValueError for anything else."""
        (n, k), levels, errors = found["shape"], tuple(map(str, found["levels"])), tuple(map(float, found["errors"]))
        if len(levels) != len(errors) or not all(0 <= error < math.inf for error in errors):
            raise ValueError(f"a curve must have an error of 0 or more for each level, got {len(errors)} for {len(levels)} of them")
        return cls(str(found["name"]), (int(n), int(k)), levels, errors)


def read_levels(levels: Iterable[str | Pattern]) -> list[Pattern]:
    """The patterns in the order of their sparsity. Raises SparsekitError for none, and for one that is there twice."""
    found = sorted(map(Pattern.parse, levels), key=lambda level: level.sparsity)
    if not found:
        raise SparsekitError('there must be a level to prune to, such as "50%" or "2:4", got none')
    texts = [str(level) for level in found]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise SparsekitError(f"each level must be given once, got {twice[0]} {texts.count(twice[0])} times")
    return found


def error_curves(
    model: nn.Module | str | Path,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    levels: Iterable[str | Pattern],
    *,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
) -> list[Curve]:
    """The error curve of every matrix that ``sparsekit.prune`` would prune, in its order; the model stays as it is, bit for bit.

    model: one in memory, or the folder of one that need not fit there (device, dtype: as for ``load``). batches, skip, blocks: as
    for ``prune``. Every linear is measured on what the dense model feeds it, so the curves do not depend on one another.
    A level's error is that of ``SparseGPT.prune_levels``. An expert that saw too few tokens is pruned by magnitude, as ``prune``
    does; one that saw none is measured as if its inputs were alike and independent: by the squares of the weights removed.
    Raises SparsekitError as ``prune`` does, and for levels that cannot be read or are given twice."""
    patterns, curves = read_levels(levels), []
    texts = tuple(map(str, patterns))
    for seen in dense_blocks(source_of(model, blocks, device, dtype), batches, SparseGPT, patterns[-1], skip, progress):
        for target in list(seen.pruners):
            pruner, weight = seen.pruners.pop(target), target.weight
            try:
                if seen.origins[target][0] == MAGNITUDE:
                    errors = _by_magnitude(pruner.statistics, weight, patterns)
                else:  # a level at a time: all of their weights together would be as large as the model's block
                    errors = [pruner.prune_levels(weight, [pattern])[0].output_error for pattern in patterns]
            except ValueError as error:
                raise SparsekitError(f"{target.name} cannot be measured: {error}") from error
            curves.append(Curve(target.name, tuple(weight.shape), texts, tuple(errors)))
    return curves


def _by_magnitude(statistics: Gram, weight: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    if not statistics.tokens:
        statistics = Gram(weight.shape[1], weight.device)
        statistics.sum.fill_diagonal_(1)
    scores = CRITERIA["magnitude"].scores(weight, None)
    return statistics.output_errors(weight, (torch.where(pattern.mask(scores), weight, 0) for pattern in patterns))
