"""How sparsity grows over the steps of a gradual pruning: value objects, read from and printed as text.

A schedule says which share of the target is reached after step i of n. Every schedule grows or stands still, is above zero after
the first step, and is exactly 1 after the last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from .errors import SparsekitError, listed
from .patterns import percent, share_of

_KNOWN = (
    *("constant", "linear", "cubic", "exponential"),
    'the latter with a rate, such as "exponential:5"',
    'the sparsities themselves, such as "20%,35%,50%"',
)


class Schedule:
    """The share of the target after each step. ``Schedule.parse`` reads one; ``str`` gives the text back."""

    @staticmethod
    def parse(text: str | Schedule | Sequence[float]) -> Schedule:
        """Reads "constant", "linear", "cubic", "exponential", "exponential:5", "20%,35%,50%", or the latter as a list of shares.

        Raises SparsekitError, listing what is known, for anything else."""
        if isinstance(text, Schedule):
            return text
        if isinstance(text, Sequence) and not isinstance(text, str):
            return Listed(tuple(text))
        name, colon, rate = str(text).strip().partition(":")
        if name in _NAMED and not colon:
            return _NAMED[name]()
        number = r"\d+(?:\.\d*)?|\.\d+"
        if name == "exponential" and re.fullmatch(number, rate):
            return Exponential(float(rate))
        if re.fullmatch(rf"\s*(?:{number})\s*%(\s*,\s*(?:{number})\s*%)*\s*", str(text)):
            return Listed(tuple(share_of(part.strip().removesuffix("%").strip()) for part in str(text).split(",")))
        raise SparsekitError(f"a schedule must be {listed(_KNOWN, 'or')}, got {text!r}")

    def reached(self, step: int, steps: int) -> float:
        """The share of the way to the target, 0 to 1, that step ``step`` of 1..steps ends at."""
        if not 1 <= step <= steps:
            raise SparsekitError(f"the step must be from 1 to the schedule's {steps} steps, got {step}")
        return 1.0 if step == steps else self._partway(step / steps)

    def _partway(self, t: float) -> float:
        raise NotImplementedError

    def check(self, target: float, steps: int, start: float = 0.0) -> None:
        """Raises SparsekitError where the schedule cannot go from sparsity ``start`` to ``target`` in that many steps."""
        if steps < 1:
            raise SparsekitError(f"a schedule must have at least one step, got {steps}")
        if not 0 <= start <= target <= 1:
            raise SparsekitError(f"a schedule must go up, from at least 0 to at most 1, got {start:g} to {target:g}")

    def sparsities(self, target: float, steps: int, start: float = 0.0) -> tuple[float, ...]:
        """The sparsity after each step, from above ``start`` to exactly ``target``. Raises as ``check`` does."""
        self.check(target, steps, start)
        way = (self.reached(i, steps) for i in range(1, steps + 1))
        return tuple(target if share == 1 else start + (target - start) * share for share in way)


@dataclass(frozen=True)
class Constant(Schedule):
    """All of it in the first step."""

    def __str__(self) -> str:
        return "constant"

    def _partway(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """As much in each step."""

    def __str__(self) -> str:
        return "linear"

    def _partway(self, t: float) -> float:
        return t


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast at first, slow where little is left: s_f + (s_i - s_f)(1 - t)^3. Source: Zhu and Gupta 2017, arXiv:1710.01878."""

    def __str__(self) -> str:
        return "cubic"

    def _partway(self, t: float) -> float:
        return 1 - (1 - t) ** 3


@dataclass(frozen=True)
class Exponential(Schedule):
    """What is left to go shrinks by a factor of exp(-rate) over the whole: (1 - exp(-rate t)) / (1 - exp(-rate)), 1 at the end."""

    rate: float = 3.0

    def __post_init__(self):
        if not (0 < self.rate < 700):
            raise SparsekitError(f"the rate of an exponential schedule must be above 0 and below 700, got {self.rate:g}")

    def __str__(self) -> str:
        return "exponential" if self.rate == 3.0 else f"exponential:{Decimal(repr(float(self.rate))):f}"

    def _partway(self, t: float) -> float:
        return math.expm1(-self.rate * t) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Listed(Schedule):
    """The sparsity after each step, written out; the last one is the target, and there are as many steps as entries."""

    shares: tuple[float, ...]

    def __post_init__(self):
        before = 0.0
        for i, share in enumerate(self.shares):
            if not (isinstance(share, (int, float)) and before <= share <= 1 and share > 0):
                raise SparsekitError(
                    f"listed sparsities must lie above 0, up to 1, and never fall, got {share!r} as entry {i + 1} after {before:g}"
                )
            before = share
        if not self.shares:
            raise SparsekitError("a list of sparsities must have at least one entry, got none")

    def __str__(self) -> str:
        return ",".join(map(percent, self.shares))

    def check(self, target: float, steps: int, start: float = 0.0) -> None:
        super().check(target, steps, start)
        if steps != len(self.shares):
            raise SparsekitError(f"a list of {len(self.shares)} sparsities takes as many steps, got {steps}")
        if not math.isclose(self.shares[-1], target, rel_tol=1e-12, abs_tol=0):
            raise SparsekitError(f"the last of the listed sparsities must be the pattern's {target:g}, got {self.shares[-1]:g}")
        if self.shares[0] < start or (self.shares[0] == start < target):
            raise SparsekitError(f"the first of the listed sparsities must be above the start of {start:g}, got {self.shares[0]:g}")

    def reached(self, step: int, steps: int) -> float:
        """As of any schedule, counted from a dense start."""
        return super().reached(step, len(self.shares))

    def _partway(self, t: float) -> float:
        return self.shares[round(t * len(self.shares)) - 1] / self.shares[-1]

    def sparsities(self, target: float, steps: int, start: float = 0.0) -> tuple[float, ...]:
        self.check(target, steps, start)
        return (*self.shares[:-1], target)


_NAMED = {"constant": Constant, "linear": Linear, "cubic": Cubic, "exponential": Exponential}
