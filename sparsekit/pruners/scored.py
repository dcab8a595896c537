"""Pruning by scores: of the weights compared with one another the lowest go, and no other changes its value."""

from __future__ import annotations

import torch
from torch import Tensor

from ..criteria import CRITERIA, Criterion, Gram, SquaredGradients
from ..patterns import Pattern
from ..timing import Phases
from .base import Pruner, PruneResult


class Scored:
    """Keeps the weights with the highest scores of its class's criterion; ``scored`` makes such a class."""

    criterion: Criterion
    rowwise: bool
    gathers: type | None

    def __init__(self, columns: int, pattern: Pattern, device: torch.device | str = "cpu"):
        self.pattern = pattern
        self.statistics = self.gathers(columns, device) if self.gathers and not by_gradient(self) else None

    def observe(self, x: Tensor) -> None:
        """Takes the tokens x (..., columns); a criterion that looks at no inputs ignores them."""
        if self.gathers and not by_gradient(self):
            self.statistics.update(x)

    def scores(self, weight: Tensor) -> Tensor:
        """Of a weight (n, k), fp32, higher is kept. Raises ValueError where what they need was not observed or is not finite."""
        what = "gradients" if by_gradient(self) else "inputs"
        if self.gathers and (self.statistics is None or self.statistics.tokens == 0):
            raise ValueError(f"{self.criterion.name} needs the linear's {what}, and observed none")
        if self.gathers and not torch.isfinite(self.statistics.sum).all():
            raise ValueError(f"its {what} hold NaN or Inf")
        scores = self.criterion.scores(weight, self.statistics)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape or not scores.is_floating_point():
            got = f"{tuple(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"{self.criterion.name} must give each weight of {tuple(weight.shape)} a float, and gave {got}")
        return scores

    def prune(self, weight: Tensor) -> PruneResult:
        phases = Phases(weight.device)
        with phases("mask"):
            mask = self.pattern.mask(self.scores(weight), rowwise=self.rowwise)
            pruned = torch.where(mask, weight, 0)
        if not isinstance(self.statistics, Gram):
            return PruneResult(pruned, mask, seconds=phases.seconds())
        with phases("error"):
            error = self.statistics.output_error(weight, pruned)
        return PruneResult(pruned, mask, error, damping=self.statistics.factor.damping, seconds=phases.seconds())


def by_gradient(pruner: Pruner | type[Pruner]) -> bool:
    """Whether what it gathers are gradients of the whole model, and not the linear's inputs."""
    return pruner.gathers is not None and issubclass(pruner.gathers, SquaredGradients)


_MADE: dict[tuple[int, bool], type[Pruner]] = {}  # by identity, which they keep alive: one's own may have no hash


def scored(criterion: Criterion, rowwise: bool | None = None) -> type[Pruner]:
    """The pruner of a criterion; rowwise: whether an unstructured pattern is counted in each row, by default as it prefers."""
    rowwise = criterion.rowwise if rowwise is None else rowwise
    if (key := (id(criterion), rowwise)) not in _MADE:
        members = {"criterion": criterion, "rowwise": rowwise, "gathers": criterion.statistics, "__doc__": type(criterion).__doc__}
        _MADE[key] = type(type(criterion).__name__, (Scored,), members)
    return _MADE[key]


Magnitude = scored(CRITERIA["magnitude"])
Wanda = scored(CRITERIA["wanda"])
