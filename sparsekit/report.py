"""What a pruning run did, a linear at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class LinearReport:
    """One pruned matrix. shape is (out_features, in_features); output_error and damping as in PruneResult.

    statistics: what is known of its inputs, "own", or of an expert that saw too few tokens "layer", those of all experts, or
    "magnitude", none. tokens: how many it saw itself."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    output_error: float | None
    damping: float | None
    seconds: float
    statistics: str
    tokens: int

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> LinearReport:
        return cls(**{**row, "shape": tuple(row["shape"])})


@dataclass
class PruneReport:
    """skipped maps each module with a weight matrix that was not pruned to the reason. format: how a folder's weights
    were stored, "compressed" or "dense". fingerprint: of a folder's run, what
    has to be the same for it to be resumed."""

    method: str
    pattern: str
    group: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    linears: list[LinearReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned linears."""
        weights = [linear.shape[0] * linear.shape[1] for linear in self.linears]
        zeros = sum(linear.sparsity * n for linear, n in zip(self.linears, weights))
        return zeros / sum(weights) if weights else 0.0

    def to_dict(self) -> dict:
        return {**asdict(self), "sparsity": self.sparsity}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> PruneReport:
        kept = {field.name: found[field.name] for field in fields(cls)}
        return cls(**{**kept, "linears": [LinearReport.from_dict(row) for row in found["linears"]]})
