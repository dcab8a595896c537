"""What every pruner is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..criteria import Gram, SquaredNorm
from ..patterns import Pattern


@dataclass(frozen=True)
class PruneResult:
    """weight (n, k) in the dtype it came in, zero where pruned; mask (n, k) bool, True where kept.

    output_error: squared error of the outputs over their square, on the observed tokens; None where no Gram matrix was kept.
    damping: share of the mean diagonal added to the Hessian; None for methods without one."""

    weight: Tensor
    mask: Tensor
    output_error: float | None = None
    damping: float | None = None


class Pruner(Protocol):
    """One linear's pruner. Two linears with the same input may share ``statistics``: observe one, assign it to the other."""

    statistics: Gram | SquaredNorm | None
    rowwise: bool  # whether an unstructured pattern is counted per output row
    needs_inputs: bool

    def __init__(self, columns: int, pattern: Pattern, device: torch.device | str = "cpu"): ...

    def observe(self, x: Tensor) -> None:
        """Takes the tokens x (..., columns) that the linear receives."""

    def prune(self, weight: Tensor) -> PruneResult:
        """Prunes weight (n, columns) to the pattern; the argument is left as it is. Arithmetic in fp32."""
