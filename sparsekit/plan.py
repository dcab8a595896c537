"""A pattern for each weight matrix of a model: what an allocation decides, a person can edit, and a pruning follows.

As a file it is YAML: ``version``, ``method`` where the plan was made for one, ``made`` (how it came to be), and under ``linears``,
of each matrix by name, its ``shape`` [out_features, in_features] and its ``pattern``, "dense" where it is to be left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .documents import read_document, write_whole
from .errors import SparsekitError
from .patterns import Given, Pattern

VERSION = 1
DENSE = "dense"  # the text of no pattern
FILE = "plan.yaml"  # its name in the folder that it was followed to


class Matrix(Protocol):
    """What a plan asks of a weight matrix: its name, and a weight (out_features, in_features), which may be on the meta device."""

    name: str
    weight: Any


@dataclass(frozen=True)
class Plan:
    """patterns: of each matrix by name, a Pattern or its text, or None (or "dense") to leave it as it is. shapes: (out_features,
    in_features) of the same names. method: whom it was made for, None for anyone. made: how it came to be, for a reader.

    Raises SparsekitError where the two do not name the same, or a pattern or shape is none."""

    patterns: Mapping[str, Pattern | None]
    shapes: Mapping[str, tuple[int, int]]
    method: str | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if other := next(
            (name for name in [*self.patterns, *self.shapes] if name not in self.patterns or name not in self.shapes), 0
        ):
            raise SparsekitError(f"a plan must say pattern and shape of every linear, got one of them for {other}")
        if not self.patterns:
            raise SparsekitError("a plan must name at least one linear, got none")
        put = object.__setattr__  # the way in for a frozen dataclass
        put(
            self, "patterns", {name: None if text in (None, DENSE) else Pattern.parse(text) for name, text in self.patterns.items()}
        )
        if given := next((name for name, pattern in self.patterns.items() if isinstance(pattern, Given)), None):
            raise SparsekitError(f"a plan's patterns must be such as text can say, got a mask for {given}; give masks alone")
        put(self, "shapes", {name: _shape(name, shape) for name, shape in self.shapes.items()})

    @property
    def sparsity(self) -> float:
        """The share of all weights that go, tails aside."""
        sizes = {name: n * k for name, (n, k) in self.shapes.items()}
        gone = sum(sizes[name] * pattern.sparsity for name, pattern in self.patterns.items() if pattern is not None)
        return gone / max(sum(sizes.values()), 1)

    def __str__(self) -> str:
        """Two plans of the same text ask for the same."""
        asked = json.dumps(self.to_dict()["linears"], sort_keys=True)
        return f"plan {hashlib.sha256(asked.encode()).hexdigest()[:12]} ({len(self.patterns)} linears, {self.sparsity:.2%})"

    def check(self, matrices: Iterable[Matrix]) -> None:
        """Raises SparsekitError where these are not the matrices that the plan is for, naming the first that differs."""
        found = {matrix.name: tuple(matrix.weight.shape) for matrix in matrices}
        for name in (*found, *self.shapes):
            if found.get(name) != self.shapes.get(name):
                is_, was = (f"of shape {shape}" if shape else "absent" for shape in (found.get(name), self.shapes.get(name)))
                raise SparsekitError(f"the plan must be for this model, and {name} is {is_} in the model, {was} in the plan")

    # ---- as text ----

    def to_dict(self) -> dict[str, Any]:
        """Text and numbers alone; ``from_dict`` reads it back."""
        linears = {
            name: {"pattern": DENSE if pattern is None else str(pattern), "shape": list(self.shapes[name])}
            for name, pattern in self.patterns.items()
        }
        method = {} if self.method is None else {"method": self.method}
        return {"version": VERSION, **method, "made": dict(self.made), "linears": linears}

    @classmethod
    def from_dict(cls, found: Any) -> Plan:
        """What ``to_dict`` gave, or a person wrote. Raises SparsekitError where that is no plan."""
        if not isinstance(found, dict) or not isinstance(found.get("linears"), dict):
            raise SparsekitError(f'a plan must hold "linears", a pattern and a shape by name, got {_short(found)}')
        if found.get("version") != VERSION:
            raise SparsekitError(f"a plan must be of version {VERSION}, got {found.get('version')!r}")
        if unknown := sorted(str(name) for name in found if name not in ("version", "method", "made", "linears")):
            raise SparsekitError(f"a plan holds version, method, made and linears, got {unknown[0]!r}; put notes under made")
        method, made = found.get("method"), found.get("made") or {}
        if not isinstance(method, str | None) or not isinstance(made, dict):
            raise SparsekitError(f"a plan's method must be text and made a table, got {_short(method if made == {} else made)}")
        for name, row in found["linears"].items():
            if not isinstance(row, dict) or set(row) != {"pattern", "shape"} or not isinstance(row["pattern"], str):
                raise SparsekitError(f"a plan must say pattern and shape of {name}, got {_short(row)}")
        rows = {str(name): row for name, row in found["linears"].items()}
        patterns, shapes = ({name: row[what] for name, row in rows.items()} for what in ("pattern", "shape"))
        return cls(patterns, shapes, method, made)

    def dump(self) -> str:
        """As YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=132)

    def save(self, path: str | Path) -> None:
        """Writes it as YAML, the file whole or not at all."""
        write_whole(Path(path), lambda part: part.write_text(self.dump(), encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what ``save`` wrote. Raises SparsekitError where that is no plan."""
        found = read_document(Path(path), "plan", as_yaml=True)
        return cls.from_dict(found)


class Masks:
    """A mask for some weight matrices of a model, by name, (out_features, in_features) bool, True where kept; the others are to be
    left as they are. Raises SparsekitError for a mask of another dtype or without rows and columns, and where there is none."""

    def __init__(self, masks: Mapping[str, Tensor]):
        if not masks:
            raise SparsekitError("there must be a mask for at least one linear, got none")
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
                got = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
                raise SparsekitError(f"a mask must be (out_features, in_features) of torch.bool, got {got} for {name}")
        self.patterns: dict[str, Pattern | None] = {name: Given(mask) for name, mask in masks.items()}

    def __str__(self) -> str:
        """Masks of the same text are the same."""
        seen = hashlib.sha256()
        for name, given in self.patterns.items():
            seen.update(f"{name} {tuple(given.kept.shape)};".encode())
            seen.update(given.kept.cpu().contiguous().numpy().tobytes())
        return f"masks {seen.hexdigest()[:12]} ({len(self.patterns)} linears)"

    def check(self, matrices: Iterable[Matrix]) -> None:
        """Raises SparsekitError for a mask of no matrix among these, or of another shape than its matrix."""
        shapes = {matrix.name: tuple(matrix.weight.shape) for matrix in matrices}
        for name, given in self.patterns.items():
            if name not in shapes:
                raise SparsekitError(f"a mask must be for a linear of the blocks, such as {next(iter(shapes), None)}, got {name!r}")
            if tuple(given.kept.shape) != shapes[name]:
                raise SparsekitError(f"the mask of {name} must be {shapes[name]}, got {tuple(given.kept.shape)}")


Asked = Pattern | Plan | Masks  # of a model


def parse(text: str | Pattern | Plan | Masks | Mapping[str, Tensor]) -> Asked:
    """What is asked of a model: the one pattern of all its linears, a plan, or masks."""
    if isinstance(text, Plan | Masks):
        return text
    return Masks(text) if isinstance(text, Mapping) else Pattern.parse(text)


def pattern_of(asked: Asked, name: str) -> Pattern | None:
    """What is asked of the linear of that name, None to leave it as it is."""
    return asked if isinstance(asked, Pattern) else asked.patterns.get(name)


def patterns_in(asked: Asked) -> list[Pattern]:
    """Every pattern that is asked for, once."""
    return [asked] if isinstance(asked, Pattern) else [p for p in dict.fromkeys(asked.patterns.values()) if p is not None]


def _shape(name: str, shape: Any) -> tuple[int, int]:
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(type(side) is int and side >= 0 for side in shape):
        raise SparsekitError(f"a plan's shape must be [out_features, in_features], got {_short(shape)} for {name}")
    return tuple(shape)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
