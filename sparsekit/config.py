"""The settings of a gradual pruning: one value, checked when it is made, to and from JSON and YAML."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .documents import read_document, write_json, write_whole
from .errors import SparsekitError, listed
from .patterns import GROUPS, Given, Pattern, check_group
from .schedules import Schedule

CRITERIA = ("magnitude", "gradient")


@dataclass(frozen=True)
class PruningConfig:
    """pattern, schedule: value objects or their text. sparsity: the pattern's own, for one who wants it checked; None takes it.
    criterion: "magnitude" or "gradient": (g w)^2, summed over the sequences of the backward passes since the last pruning, each
    with its own gradient. Of experts, whose tokens do not tell their sequence, a pass is one sample.
    group: what weights are compared within, a "row" (output feature), a "layer", a decoder "block" or the whole "model"; it says
    nothing where the pattern has its own groups (N:M), and must then be "layer".
    begin, end, every: prunes after optimiser step ``begin``, then every so many steps, and for the last time after ``end``.
    start: the sparsity before the first pruning. skip: names, or shell patterns of names, of linears to leave alone.
    Raises SparsekitError for what is unknown, contradicts itself or cannot reach the pattern."""

    pattern: Pattern | str = "2:4"
    criterion: str = "magnitude"
    group: str = "layer"
    schedule: Schedule | str = "cubic"
    begin: int = 0
    end: int = 0
    every: int = 1
    start: float = 0.0
    sparsity: float | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        put = object.__setattr__  # the way in for a frozen dataclass
        put(self, "pattern", Pattern.parse(self.pattern))
        if isinstance(self.pattern, Given):
            raise SparsekitError("a pruning config is of the whole model, got the mask of one matrix; give a pattern in its place")
        put(self, "schedule", Schedule.parse(self.schedule))
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip
        if not isinstance(skip, list | tuple | set) or not all(isinstance(name, str) for name in skip):
            raise SparsekitError(f"skip must be names of linears, got {self.skip!r}")
        put(self, "skip", tuple(skip))
        for name in ("start", "sparsity"):
            if not isinstance(value := getattr(self, name), int | float) and (name, value) != ("sparsity", None):
                raise SparsekitError(f"{name} must be a number from 0 to 1, got {value!r}")
        for name, known in (("criterion", CRITERIA), ("group", GROUPS)):
            if getattr(self, name) not in known:
                raise SparsekitError(f"the {name} must be {listed(known, 'or')}, got {getattr(self, name)!r}")
        for name, least in (("begin", 0), ("end", 0), ("every", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SparsekitError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if (self.end - self.begin) % self.every or self.end < self.begin:
            raise SparsekitError(
                f"end must come a whole number of times every = {self.every} steps after begin = {self.begin}, got {self.end}"
            )
        if self.group != "layer":
            check_group([self.pattern], self.group)
        own = self.pattern.sparsity
        if self.sparsity is not None and not math.isclose(self.sparsity, own, rel_tol=1e-12):  # 1 - 7/10 is not the float 0.3
            raise SparsekitError(f"the sparsity of {self.pattern} is {own:g}, got {self.sparsity}; leave one of them out")
        put(self, "sparsity", own)
        self.schedule.check(own, self.prunings, self.start)

    @property
    def prunings(self) -> int:
        """How many times it prunes."""
        return (self.end - self.begin) // self.every + 1

    def pattern_after(self, pruning: int) -> Pattern:
        """The pattern that the model holds after pruning 1, 2, ... ``prunings``; the last one is the pattern itself."""
        whole = self.pattern.sparsity
        if pruning == self.prunings or whole == 0:
            return self.pattern
        return self.pattern.partway(self.schedule.sparsities(whole, self.prunings, self.start)[pruning - 1] / whole)

    # ---- as text ----

    def to_dict(self) -> dict:
        """Of JSON's types alone."""
        return {**asdict(self), "pattern": str(self.pattern), "schedule": str(self.schedule), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, found: dict) -> PruningConfig:
        """Raises SparsekitError, listing the known names, for a setting that there is not."""
        if not isinstance(found, dict):
            raise SparsekitError(f"a pruning config must be an object of settings, got a {type(found).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in found if name not in known]
        if unknown:
            raise SparsekitError(f"a pruning config has the settings {listed(known)}, got {unknown[0]!r}")
        return cls(**found)

    def save(self, path: str | Path) -> None:
        """Writes a .json, .yaml or .yml file, whole or not at all."""
        path = Path(path)
        if _is_yaml(path):
            import yaml

            write_whole(path, lambda part: part.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False)))
        else:
            write_whole(path, lambda part: write_json(part, self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> PruningConfig:
        """Reads what ``save`` wrote, or a person. Raises SparsekitError where that is not a pruning config."""
        path = Path(path)
        found = read_document(path, "pruning config", _is_yaml(path))
        return cls.from_dict(found)


def _is_yaml(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise SparsekitError(f"a pruning config must be a .json, .yaml or .yml file, got {path}")
    return path.suffix != ".json"
