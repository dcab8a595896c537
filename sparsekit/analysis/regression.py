"""A straight line through few points, and the interval in which the next one is to be expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SparsekitError

FEWEST = 3  # points: a line takes two, and from none beyond them nothing is known of the scatter


@dataclass(frozen=True)
class Line:
    """y = at + slope (x - center), by least squares over ``count`` points; scatter is the standard deviation of what it leaves
    (count - 2 degrees of freedom), spread the sum of (x - center)^2."""

    at: float
    slope: float
    center: float
    scatter: float
    spread: float
    count: int

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        """Raises SparsekitError for fewer than 3 points, and where all x are the same."""
        count = len(x)
        if count < FEWEST:
            raise SparsekitError(f"a line with an interval takes at least {FEWEST} points, got {count}")
        center, at = math.fsum(x) / count, math.fsum(y) / count
        spread = math.fsum((one - center) ** 2 for one in x)
        if not spread > 0:
            raise SparsekitError(f"a line takes points at different places, got {count} at {center:g}")
        slope = math.fsum((one - center) * other for one, other in zip(x, y)) / spread
        left = math.fsum((other - at - slope * (one - center)) ** 2 for one, other in zip(x, y))
        return cls(at, slope, center, math.sqrt(left / (count - 2)), spread, count)

    def predict(self, x: float, level: float) -> tuple[float, float]:
        """y at x, and how far from it the next point lies at most with the probability ``level``, where the scatter is normal and
        the same everywhere: wider the fewer points there are, and the farther x lies from them."""
        width = student_quantile((1 + level) / 2, self.count - 2)
        near = 1 + 1 / self.count + (x - self.center) ** 2 / self.spread
        return self.at + self.slope * (x - self.center), width * self.scatter * math.sqrt(near)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile, for a probability of at least one half, of Student's t with so many degrees of freedom; to 1e-9 of itself."""
    low, high = 0.0, 1.0
    while _student(high, freedom) < probability:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < probability else (low, middle)
    return high


def _student(t: float, freedom: int) -> float:
    """The probability that Student's t is at most t >= 0. Source: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (i - 1) / i
        total += term
    if odd:
        within = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    else:
        within = sine * total
    return (1 + within) / 2
