"""What every pruner is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..criteria import Gram, SquaredGradients, SquaredNorm
from ..patterns import Pattern


@dataclass(frozen=True)
class PruneResult:
    """weight (n, k) in the dtype it came in, zero where pruned; mask (n, k) bool, True where kept.

    output_error: squared error of the outputs over their square, on the observed tokens; None where no Gram matrix was kept.
    output_error_masked: that error if the mask alone were applied to the weight as it came in.
    loss: what the pruner itself reckons to have lost, in squared error of the outputs a token, the damping's share included.
    damping: share of the mean diagonal added to the Hessian; None for methods without one, as are the two before it.
    seconds: by phase. What several results share is in the first alone, so that all of them add up."""

    weight: Tensor
    mask: Tensor
    output_error: float | None = None
    output_error_masked: float | None = None
    loss: float | None = None
    damping: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Pruner(Protocol):
    """One linear's pruner. Two linears with the same input may share ``statistics``: observe one, assign it to the other."""

    pattern: Pattern
    statistics: Gram | SquaredNorm | SquaredGradients | None
    rowwise: bool  # whether an unstructured pattern is counted per output row
    gathers: type | None  # the class of its statistics; None where it needs no inputs

    def __init__(self, columns: int, pattern: Pattern, device: torch.device | str = "cpu"): ...

    def observe(self, x: Tensor) -> None:
        """Takes the tokens x (..., columns) that the linear receives."""

    def prune(self, weight: Tensor) -> PruneResult:
        """Prunes weight (n, columns) to the pattern; the argument is left as it is. Arithmetic in fp32."""
