"""What a pruning run did, a linear or a part at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class LinearReport:
    """One pruned matrix. shape is (out_features, in_features); output_error, output_error_masked (before the update), loss and
    damping as in PruneResult.

    seconds: by phase as in PruneResult, and "forward" of the linear alone, twice as of the block; "gram" of the one that gathers
    the statistics for all that share its input; "write", its own tensors rounded, compressed and handed to the file. An expert in
    one parameter with the others has no forward and no write of its own: they are the block's.
    peak_memory: the most bytes that the process had held when it was pruned, of the device's memory on a GPU.
    statistics: what is known of its inputs, "own", or of an expert that saw too few tokens "layer", those of all experts, or
    "magnitude", none. tokens: how many it saw itself; of gradients, how many sequences reached it."""

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    output_error: float | None
    output_error_masked: float | None
    loss: float | None
    damping: float | None
    seconds: dict[str, float]
    statistics: str
    tokens: int
    peak_memory: int = 0

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> LinearReport:
        return cls(**{**row, "shape": tuple(row["shape"])})


@dataclass
class BlockReport:
    """One block. seconds: by phase, but for what its matrices have of it: read, forward (twice: to observe, and to go on), write.
    peak_memory: the most bytes that the process had held when it was done, of the device's memory on a GPU."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0


@dataclass
class PruneReport:
    """skipped maps each module with a weight matrix that was not pruned to the reason. seconds: of the last run alone, where blocks
    were finished by earlier ones. processes: how many pruned it together; times and memory of blocks are of one. Of a folder also
    format, how its weights are stored ("compressed" or "dense"), and fingerprint: what has to be the same for the run to be
    resumed."""

    method: str
    pattern: str
    group: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    linears: list[LinearReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    processes: int = 1
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned linears."""
        weights = [linear.shape[0] * linear.shape[1] for linear in self.linears]
        zeros = sum(linear.sparsity * n for linear, n in zip(self.linears, weights))
        return zeros / sum(weights) if weights else 0.0

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, over all blocks and their matrices."""
        found: dict[str, float] = {}
        for part in (*self.blocks, *self.linears):
            for name, seconds in part.seconds.items():
                found[name] = found.get(name, 0.0) + seconds
        return found

    @property
    def peak_memory(self) -> int:
        """The most bytes that a block took."""
        return max((block.peak_memory for block in self.blocks), default=0)

    def to_dict(self) -> dict:
        return {**asdict(self), "sparsity": self.sparsity, "phases": self.phases, "peak_memory": self.peak_memory}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> PruneReport:
        kept = {field.name: found[field.name] for field in fields(cls)}
        linears = [LinearReport.from_dict(row) for row in found["linears"]]
        return cls(**{**kept, "linears": linears, "blocks": [BlockReport(**row) for row in found["blocks"]]})


@dataclass
class StructuredStep:
    """One kind of part that went: "layers", "attention", "mlp", "experts", "heads" or "ffn".

    removed: of layers and sub-layers the numbers of blocks, as they were before this step, in the order in which they went; of
    the others, for each block, the numbers of those that went, heads by their key-value head, experts' neurons through its experts.
    importance: of layers and sub-layers what each of them had when its turn came; of experts and heads, for each block, what each
    had; of neurons, for each block, the share of their importance that went.
    output_error_plain, output_error, damping: for each block whose heads or neurons went, of the linear that reads them, squared
    error of its outputs over their square without and with compensation, and what that had to add to the diagonal."""

    part: str
    removed: list
    importance: list
    method: str | None = None
    output_error_plain: list[float | None] | None = None
    output_error: list[float | None] | None = None
    damping: list[float | None] | None = None
    seconds: float = 0.0


@dataclass
class StructuredReport:
    """What was taken out of a model: steps, in their order. asked: amounts by part. parameters_predicted: reckoned from the sizes
    of what went; parameters: counted afterwards. per_layer_config: what the config says of blocks that differ."""

    asked: dict[str, int | float]
    tokens: int = 0
    parameters_before: int = 0
    parameters: int = 0
    parameters_predicted: int = 0
    steps: list[StructuredStep] = field(default_factory=list)
    per_layer_config: list[dict[str, Any]] | None = None
    format: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict:
        return {"structured": True, **asdict(self)}
