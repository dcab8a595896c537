"""The arithmetic of a budget: where to spend it so that the least is lost, in whole numbers and exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

Point = tuple[int, float]  # how much, in whole units, and what it costs


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the largest convex function that lies nowhere above the points, which must rise in their first number."""
    hull: list[Point] = []
    for x, y in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def between(points: Sequence[Point], low: int, high: int) -> list[Point]:
    """The part of a piecewise linear function that lies from ``low`` to ``high``, both within it."""
    ends = [(x, value_at(points, x)) for x in dict.fromkeys((low, high))]
    return [ends[0], *(point for point in points if low < point[0] < high), *ends[1:]]


def value_at(points: Sequence[Point], x: float) -> float:
    """The value there of the piecewise linear function through the points; beyond them, that of the nearest."""
    xs, ys = zip(*points)
    return float(np.interp(x, xs, ys))


def spend(curves: Sequence[Sequence[Point]], total: int) -> list[int]:
    """Of each curve a whole number, ``total`` together, so that the sum of the curves' lower hulls is least; exact, since hulls are
    convex: units are taken in the order of their price.

    Each number lies between the first and the last of its curve. The total must lie between the sums of these."""
    hulls = [lower_hull(points) for points in curves]
    spent = [hull[0][0] for hull in hulls]
    left = total - sum(spent)
    pieces = [(_slope(a, b), i, b[0] - a[0]) for i, hull in enumerate(hulls) for a, b in pairwise(hull)]
    for _, i, units in sorted(pieces):
        taken = min(units, left)
        spent[i] += taken
        left -= taken
    if left or total < sum(hull[0][0] for hull in hulls):
        raise ValueError(f"{total} cannot be spent on curves from {sum(h[0][0] for h in hulls)} to {sum(h[-1][0] for h in hulls)}")
    return spent


def apportion(total: int, quotas: Sequence[Fraction | float], low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Whole numbers, ``total`` together, each its quota rounded down, or up where the remainder is large, from ``low`` to ``high``.

    The quotas should sum to the total; what they lack is given where the remainders are largest, one by one. Raises ValueError
    where the total does not lie between the sums of low and high."""
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"{total} cannot be shared out between {sum(low)} and {sum(high)}")
    parts = [min(max(math.floor(quota), least), most) for quota, least, most in zip(quotas, low, high)]
    order = sorted(range(len(quotas)), key=lambda i: (math.floor(quotas[i]) - quotas[i], i))
    while left := total - sum(parts):
        if left > 0:
            room = [i for i in order if parts[i] < high[i]]
        else:
            room = [i for i in reversed(order) if parts[i] > low[i]]
        for i in room[: abs(left)]:
            parts[i] += 1 if left > 0 else -1
    return parts


class Relaxed:
    """What is least lost to gain at least so much, where options may be mixed: a bound from below, and convex.

    options: of each item (gain, cost), no gain negative. pieces lead from one corner of an item's hull to the next: (price, item,
    gain, option), in the order of their price."""

    def __init__(self, options: Sequence[Sequence[Point]]):
        first, self.pieces = [], []
        for i, points in enumerate(options):
            number = {point: j for j, point in reversed(list(enumerate(points)))}
            hull = lower_hull(_rising(points))
            first.append((*hull[0], number[hull[0]]))
            self.pieces += [(_slope(a, b), i, b[0] - a[0], number[b]) for a, b in pairwise(hull)]
        self.pieces.sort()
        self.picks = [option for *_, option in first]
        self.gain, self.base = sum(gain for gain, *_ in first), sum(cost for _, cost, _ in first)
        gains = [0, *accumulate(gain for _, _, gain, _ in self.pieces)]
        costs = [0.0, *accumulate(price * gain for price, _, gain, _ in self.pieces)]
        self._gains, self._costs = np.array(gains, dtype=np.float64), np.array(costs)

    def cost(self, needed: np.ndarray) -> np.ndarray:
        """Infinite where all the options together gain less."""
        beyond = np.asarray(needed - self.gain, dtype=np.float64)
        return np.where(beyond > self._gains[-1], np.inf, self.base + np.interp(beyond, self._gains, self._costs))

    def whole(self, needed: int) -> list[int]:
        """The options, none mixed, that gain so much when pieces are taken in the order of their price, the last one as a whole."""
        picks, gained = list(self.picks), self.gain
        for _, i, gain, option in self.pieces:
            if gained >= needed:
                break
            picks[i], gained = option, gained + gain
        return picks


def _rising(points: Sequence[Point]) -> list[Point]:
    """The options that no other beats: each gains more than the one before, and costs more."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (-point[0], point[1])):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def choose(options: Sequence[Sequence[Point]], least: int, limit: int = 1 << 18) -> tuple[list[int], float]:
    """One option of each item, by its number, so that the gains sum to ``least`` or more and the costs to as little as can be; and
    the most by which a choice could be better than this one: 0.0 where it is the best.

    Item by item all choices so far are kept that no other beats and that may still lead to the best, by the bound of what is to
    come: dynamic programming with bounds, after Nemhauser and Ullmann 1969. Where these are more than ``limit``, of those that gain
    nearly the same the cheapest is kept; then the answer lies within the gap returned. Raises ValueError where the gains cannot sum
    to ``least``."""
    if (most := sum(max(gain for gain, _ in points) for points in options)) < least:
        raise ValueError(f"{least} cannot be gained where all options together gain {most}")
    lows = [min(gain for gain, _ in points) for points in options]
    options = [[(gain - low, cost) for gain, cost in points] for points, low in zip(options, lows)]
    least = max(least - sum(lows), 0)
    rests = [Relaxed(options[i:]) for i in range(len(options))]
    whole = rests[0].whole(least)
    best = sum(points[option][1] for points, option in zip(options, whole))
    bar = best + 1e-9 * max(abs(best), 1e-300)  # sums in another order may be a hair larger
    gains, costs, trail, exact = np.zeros(1, np.int64), np.zeros(1), [], True
    for i, points in enumerate(options):
        gain, cost = np.array([gain for gain, _ in points]), np.array([cost for _, cost in points])
        gains = np.minimum((gains[:, None] + gain).ravel(), least)  # more than is asked for is worth nothing
        costs = (costs[:, None] + cost).ravel()
        rest = rests[i + 1].cost(least - gains) if i + 1 < len(options) else np.where(gains < least, np.inf, 0.0)
        kept = np.flatnonzero(costs + rest <= bar)
        kept = kept[np.lexsort((kept, costs[kept], -gains[kept]))]
        falls = np.minimum.accumulate(costs[kept])
        kept = kept[np.r_[True, falls[1:] < falls[:-1]][: len(kept)]]
        if len(kept) > limit:
            exact = False
            bucket = gains[kept] * limit // max(least, 1)
            kept = kept[np.r_[bucket[1:] != bucket[:-1], True]]  # as gains fall costs do: the last of a bucket is its cheapest
        gains, costs = gains[kept], costs[kept]
        trail.append((kept // len(points), kept % len(points)))
    if len(costs) and costs.min() <= best:
        at, whole = int(np.argmin(costs)), []
        best = float(costs[at])
        for parents, picked in reversed(trail):
            whole.append(int(picked[at]))
            at = int(parents[at])
        whole.reverse()
    return whole, 0.0 if exact else max(best - float(rests[0].cost(least)), 0.0)
