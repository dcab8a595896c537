"""What the doctor knows of a pruned folder, and what comes of a check of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import SparsekitError
from ..linear import NM24
from ..patterns import Pattern
from ..report import LinearReport, PruneReport
from .sensitivity import Sensitivity

QUALITY, SPEED, SEMI = "quality dropped", "no speed-up", "2:4 hurts"
TREES = (QUALITY, SPEED, SEMI)
OK, FINDING, NOT_MADE = "ok", "finding", "not made"
SEVERITIES = ("error", "warning", "note")  # it cannot work so; it costs much; it may be worth a look

# What the folder's own matrices are held against: the pattern itself, one with the same zeros freer, and any place at all.
LEVELS = ("50%", "4:8", "2:4")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. tree: which question it belongs to. result: "ok", "finding", or "not made" and why. severity:
    of a finding, one of SEVERITIES. do: what to do about it."""

    tree: str
    name: str
    result: str
    checked: str
    found: str
    severity: str | None = None
    do: str | None = None


@dataclass(frozen=True)
class Matrix:
    """What a folder holds of one weight matrix, (out_features, in_features). broken: where it does not hold the pattern that was
    asked of it, or None. changed: the share of its non-zero weights that differ from the dense model's, or None."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    finite: bool
    broken: str | None
    holds24: bool
    compressed: bool
    saves: bool  # whether the 2:4 format would take fewer bytes
    changed: float | None


@dataclass
class Patient:
    """All that the checks look at. sensitivity: of sensitivity.json, if it is there. perplexities: of the dense model and of this
    one. errors: by name a matrix's output error on the text given, and what SparseGPT's would be at each of LEVELS."""

    folder: Path
    report: PruneReport | None
    matrices: list[Matrix]
    format: str
    dtype: torch.dtype  # of what is stored
    compute: torch.dtype  # of activations
    device: torch.device
    gpu: str | None  # asked about, in place of this machine's
    batch: int
    structured: bool = False  # whether parts were taken out whole
    sensitivity: Sensitivity | None = None
    perplexities: tuple[float, float] | None = None
    errors: dict[str, tuple[float, tuple[float, ...]]] = field(default_factory=dict)

    @property
    def rows(self) -> list[LinearReport]:
        return self.report.linears if self.report else []

    @property
    def patterns(self) -> list[Pattern]:
        """Every pattern that was asked for, once; without a report 2:4 where a matrix holds it."""
        if self.rows:
            return list(dict.fromkeys(Pattern.parse(row.pattern) for row in self.rows))
        return [NM24] if any(matrix.holds24 for matrix in self.matrices) else []


Checker = Callable[[Patient], Check]


def read_checks(found: Mapping[str, Any], path: Path) -> list[Check]:
    """What ``sparsekit doctor --json`` printed into that file. Raises SparsekitError for anything else."""
    try:
        return [Check(**row) for row in found["checks"]]
    except (KeyError, TypeError) as error:
        raise SparsekitError(f"{path} must be what sparsekit doctor --json prints, got {error!r}") from None
