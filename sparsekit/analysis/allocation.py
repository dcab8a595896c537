"""Which linear is pruned how far, so that a budget of removed weights, or of time, is spent where it hurts least: plans.

What is made least is damage: the sum over all linears of weight * error, the error of a linear's outputs at its pattern (its curve)
times how much that matters (``gradient_weights``, ``loss_weights``; by default its number of weights), linears taken one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

from ..errors import SparsekitError, listed
from ..patterns import Pattern, Unstructured
from ..plan import DENSE, Plan
from .costs import holds_24
from .curves import Curve
from .solve import Point, apportion, between, choose, spend, value_at

Weights = Mapping[str, float]
Groups = Mapping[str, str]


def read_share(value: str | float, what: str = "the target") -> Fraction:
    """The share of weights that "60%", "0.6" or 0.6 is, exactly. Raises SparsekitError for anything else, and outside 0 to 1."""
    text, share = str(value).strip(), None
    with suppress(ValueError, ZeroDivisionError):
        share = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if share is None or not 0 <= share <= 1:
        raise SparsekitError(f'{what} must be a share of the weights, 0 to 1 or a text such as "60%", got {value!r}')
    return share.limit_denominator(10**9)


def read_target(target: str | float, low: str | float, high: str | float | None) -> tuple[Fraction, tuple[Fraction, Fraction]]:
    """The target and the bounds; high is by default halfway from the target to 1. Raises SparsekitError where it lies outside."""
    share, least = read_share(target), read_share(low, "the lower bound")
    most = (share + 1) / 2 if high is None else read_share(high, "the upper bound")
    if not least <= share <= most:
        raise SparsekitError(f"the target must lie within the bounds, {_text(least)} to {_text(most)}, got {_text(share)}")
    return share, (least, most)


def allocate(
    curves: Sequence[Curve],
    target: str | float,
    *,
    weights: Weights | None = None,
    low: str | float = 0.0,
    high: str | float | None = None,
    groups: Groups | None = None,
    method: str | None = "sparsegpt",
) -> Plan:
    """A share for each linear, so that of all their weights together floor(target * count) go and the damage is least.

    curves: those of ``error_curves`` at shares such as "10%" to "90%"; between levels they are taken for straight, and no linear is
    pruned further than its last one. low, high: no linear's share is below or above these (where no whole number of weights lies
    between them: within one weight); high is by default halfway from the target to all, since far out the damage of several linears
    is more than its sum. groups: the name of each linear's group, where all of a group are to have one share (within one weight).
    method: the plan's.
    Exact on the lower hulls of the curves; where one level in the middle of a hull would cost that, the uniform plan is given.
    Raises SparsekitError where bounds or levels leave no room for the target, and where a curve has no level that is a share."""
    share, bounds = read_target(target, low, high)
    sizes = {name: math.prod(curve.shape) for name, curve in _by_name(curves).items()}
    points = {curve.name: _points(curve, weight_of(weights, curve)) for curve in curves}
    names, total = list(sizes), math.floor(share * sum(sizes.values()))
    least, most = _room(total, sizes, {name: of[-1][0] for name, of in points.items()}, *bounds)
    members = _members(names, groups)
    items = [_sum([between(points[name], least[name], most[name]) for name in of]) for of in members]
    counts = {}
    for spent, of in zip(spend(items, total), members):
        together = max(sum(sizes[name] for name in of), 1)
        counts |= _shared_out(spent, {name: Fraction(spent * sizes[name], together) for name in of}, least, most)
    even = _shared_out(total, {name: share * size for name, size in sizes.items()}, least, most)
    damage, alike = (sum(value_at(points[name], removed[name]) for name in names) for removed in (counts, even))
    if alike <= damage:
        counts, damage = even, alike
    made = {"by": "curves", "target": float(share), "low": float(bounds[0]), "high": float(bounds[1])}
    shapes = {curve.name: curve.shape for curve in curves}
    return _plan(shapes, counts, share, method, {**made, "damage": damage, "damage of the uniform plan": alike})


def allocate_choices(
    curves: Sequence[Curve],
    target: str | float,
    choices: Iterable[str | Pattern | None] = (DENSE, "4:8", "2:4"),
    *,
    weights: Weights | None = None,
    low: str | float = 0.0,
    high: str | float = 1.0,
    groups: Groups | None = None,
    method: str | None = "sparsegpt",
) -> Plan:
    """One of the choices for each linear, so that of all weights together at least the target goes and the damage is least.

    curves must hold every choice but "dense" among their levels; the other arguments are those of ``allocate``. The plan's ``made``
    says under ``gap`` by how much another could be better: 0.0, it is the best.
    Raises SparsekitError where the choices within the bounds cannot reach the target, or a curve lacks one of them."""
    share, patterns = read_share(target), _read_choices(choices)
    removes = {pattern: Fraction(0 if pattern is None else pattern.sparsity).limit_denominator(10**9) for pattern in patterns}
    allowed = [p for p in patterns if read_share(low, "the lower bound") <= removes[p] <= read_share(high, "the upper bound")]
    if not allowed or max(removes[p] for p in allowed) < share:
        reach = (
            f"{listed([str(p or DENSE) for p in allowed])} remove less" if allowed else "none of the choices is within the bounds"
        )
        raise SparsekitError(f"the choices must reach the target of {_text(share)}, and {reach}; give another choice or bound")
    unit = math.lcm(*(removes[p].denominator for p in allowed), share.denominator)
    gains = {curve.name: [int(removes[p] * unit) * math.prod(curve.shape) for p in allowed] for curve in curves}
    least = int(share * unit) * sum(math.prod(curve.shape) for curve in curves)
    made = {"by": "choices", "target": float(share), "choices": [str(p or DENSE) for p in allowed]}
    return _chosen(curves, allowed, gains, least, weights, groups, method, made)


def allocate_latency(
    curves: Sequence[Curve],
    speedup: float,
    times: Mapping[tuple[int, int], tuple[float, float]],
    choices: Iterable[str | Pattern | None] = (DENSE, "2:4"),
    *,
    weights: Weights | None = None,
    groups: Groups | None = None,
    method: str | None = "sparsegpt",
) -> Plan:
    """One of the choices for each linear, so that all products together take at most 1 / speedup of their dense time and the damage
    is least.

    times: of each weight's shape the measured microseconds of the dense product and of the fastest kernel for a 2:4 weight. What
    does not hold 2:4 takes the dense time. The other arguments are those of ``allocate_choices``.
    Raises SparsekitError where a shape has no times, or the choices cannot reach the speed-up: it says what they reach."""
    if not (isinstance(speedup, int | float) and 0 < speedup < math.inf):
        raise SparsekitError(f"the speed-up must be a number above 0, such as 1.2, got {speedup!r}")
    patterns = _read_choices(choices)
    if unmeasured := next((curve for curve in curves if curve.shape not in times), None):
        n, k = unmeasured.shape
        raise SparsekitError(f"every linear's product must be measured, and that of {unmeasured.name}, {n}x{k}, is not")
    nanoseconds = {shape: [round(1e3 * us) for us in pair] for shape, pair in times.items()}
    gains = {
        curve.name: [nanoseconds[curve.shape][0] - nanoseconds[curve.shape][holds_24(p)] for p in patterns] for curve in curves
    }
    dense = sum(nanoseconds[curve.shape][0] for curve in curves)
    least = math.ceil(dense * (1 - 1 / Fraction(speedup).limit_denominator(10**6)))
    if (most := sum(map(max, gains.values()))) < least:
        raise SparsekitError(
            f"the choices must reach a speed-up of {speedup:g}, and {listed([str(p or DENSE) for p in patterns])} reach "
            f"{dense / (dense - most):.3f} on this machine's measured products; ask for less"
        )
    made = {"by": "latency", "speedup asked for": float(speedup), "choices": [str(p or DENSE) for p in patterns]}
    plan = _chosen(curves, patterns, gains, least, weights, groups, method, made)
    spent = sum(nanoseconds[curve.shape][holds_24(plan.patterns[curve.name])] for curve in curves)
    told = {"speedup of the products": dense / spent, "microseconds": spent / 1e3, "dense microseconds": dense / 1e3}
    return Plan(plan.patterns, plan.shapes, method, {**plan.made, **told})


# ---- what the allocations share ----


def _read_choices(choices: Iterable[str | Pattern | None]) -> list[Pattern | None]:
    found = [None if choice in (None, DENSE) else Pattern.parse(choice) for choice in choices]
    if not found or len(set(found)) < len(found):
        raise SparsekitError(
            f"the choices must be patterns, or dense, each once, got {', '.join(str(p or DENSE) for p in found) or 'none'}"
        )
    return found


def _chosen(
    curves: Sequence[Curve],
    patterns: Sequence[Pattern | None],
    gains: Mapping[str, Sequence[int]],
    least: int,
    weights: Weights | None,
    groups: Groups | None,
    method: str | None,
    made: dict[str, Any],
) -> Plan:
    """The plan of least damage whose gains, of each linear by pattern, sum to ``least`` or more."""
    by_name = _by_name(curves)
    costs = {name: [_damage(curve, p, weight_of(weights, curve)) for p in patterns] for name, curve in by_name.items()}
    members = _members(list(by_name), groups)
    options = [
        [(sum(gains[name][j] for name in of), sum(costs[name][j] for name in of)) for j in range(len(patterns))] for of in members
    ]
    divisor = math.gcd(least, *(gain for points in options for gain, _ in points)) or 1
    picks, gap = choose([[(gain // divisor, cost) for gain, cost in points] for points in options], least // divisor)
    chosen = {name: patterns[pick] for of, pick in zip(members, picks) for name in of}
    damage = sum(points[pick][1] for points, pick in zip(options, picks))
    shapes = {name: curve.shape for name, curve in by_name.items()}
    return Plan({name: chosen[name] for name in by_name}, shapes, method, {**made, "damage": damage, "gap": gap})


def _by_name(curves: Sequence[Curve]) -> dict[str, Curve]:
    found = {curve.name: curve for curve in curves}
    if not found or len(found) < len(curves):
        raise SparsekitError(f"there must be one curve for each linear, got {len(curves)} of {len(found)} linears")
    return found


def weight_of(weights: Weights | None, curve: Curve) -> float:
    """What the curve's errors are weighed with. Raises SparsekitError where that is no number of 0 or more."""
    if weights is None:
        return float(math.prod(curve.shape))
    weight = weights.get(curve.name)
    if weight is None or not 0 <= weight < math.inf:
        raise SparsekitError(f"every linear's error must have a weight of 0 or more, got {weight} for {curve.name}")
    return weight


def _points(curve: Curve, weight: float) -> list[Point]:
    """The damage by number of weights removed, from none up."""
    size = math.prod(curve.shape)
    levels = [(Pattern.parse(level), error) for level, error in zip(curve.levels, curve.errors)]
    shares = [(level, error) for level, error in levels if isinstance(level, Unstructured)]
    if not shares:
        raise SparsekitError(f'each curve must have levels that are shares, such as "50%", and that of {curve.name} has none')
    return list({0: 0.0, **{level.removed(size): weight * error for level, error in shares}}.items())


def _room(
    total: int, sizes: Mapping[str, int], last: Mapping[str, int], low: Fraction, high: Fraction
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most weights that each linear may lose, of which no more than ``last`` were measured.

    Where whole numbers leave no room between the bounds they are one weight further out."""
    for down, up in ((math.ceil, math.floor), (math.floor, math.ceil)):
        least = {name: down(low * size) for name, size in sizes.items()}
        most = {name: min(up(high * size), last[name]) for name, size in sizes.items()}
        if all(least[name] <= most[name] for name in sizes) and sum(least.values()) <= total <= sum(most.values()):
            return least, most
    reach = sum(most.values()) / max(sum(sizes.values()), 1)
    raise SparsekitError(
        f"the levels of the curves must reach the target and the lower bound, {total / max(sum(sizes.values()), 1):.2%} and "
        f"{_text(low)}, and together reach {reach:.2%} below {_text(high)}; measure at higher ones"
    )


def _damage(curve: Curve, pattern: Pattern | None, weight: float) -> float:
    if pattern is None:
        return 0.0
    if str(pattern) not in curve.levels:
        raise SparsekitError(f"each curve must hold the choice {pattern}, and {curve.name} has {listed(curve.levels)}; measure it")
    return weight * curve.errors[curve.levels.index(str(pattern))]


def _members(names: Sequence[str], groups: Groups | None) -> list[list[str]]:
    """The names that are decided together."""
    found: dict[str, list[str]] = {}
    for name in names:
        if groups is not None and name not in groups:
            raise SparsekitError(f"every linear must have a group, and {name} has none")
        found.setdefault(name if groups is None else groups[name], []).append(name)
    return list(found.values())


def _sum(of: Sequence[Sequence[Point]]) -> list[Point]:
    """The damage of a group by weights removed, all of its linears at the same share of their range."""
    if len(of) == 1:
        return list(of[0])
    spans = [(points[0][0], points[-1][0] - points[0][0]) for points in of]
    shares = sorted({Fraction(x - low, span) for (low, span), points in zip(spans, of) for x, _ in points if span} or {Fraction(0)})
    found = {}
    for share in shares:
        at = [low + span * share for low, span in spans]
        found[math.floor(sum(at))] = sum(value_at(points, float(x)) for points, x in zip(of, at))
    return list(found.items())


def _shared_out(
    total: int, quotas: Mapping[str, Fraction | float], least: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, int]:
    """The weights to remove of each linear, ``total`` together."""
    bounds = ([of[name] for name in quotas] for of in (least, most))
    return dict(zip(quotas, apportion(total, list(quotas.values()), *bounds)))


def _text(share: Fraction) -> str:
    return f"{100 * float(share):.6g}%"


def share_of(count: int, size: int, rest: Fraction = Fraction(0)) -> Pattern | None:
    """The pattern whose share is (count + rest) / size, 0 <= rest < 1, and that removes ``count`` of so many weights, exactly; None
    where the share is zero."""
    if count + rest == 0:
        return None
    for share in ((count + rest) / Fraction(size), (count + Fraction(1, 4)) / size):  # the second where a float is too coarse
        if (pattern := Unstructured(float(min(share, 1)))).removed(size) == count:
            return pattern
    raise ValueError(f"no share removes {count} of {size} weights")


def share_plan(
    shapes: Mapping[str, tuple[int, int]],
    shares: Mapping[str, float],
    target: Fraction,
    bounds: tuple[Fraction, Fraction],
    method: str | None,
    made: dict[str, Any],
) -> Plan:
    """The plan of these shares, rounded to weights so that floor(target * count) go and the bounds hold."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = math.floor(target * sum(sizes.values()))
    counts = _shared_out(total, {name: shares[name] * sizes[name] for name in sizes}, *_room(total, sizes, sizes, *bounds))
    return _plan(shapes, counts, target, method, made)


def _plan(
    shapes: Mapping[str, tuple[int, int]], counts: Mapping[str, int], target: Fraction, method: str | None, made: dict[str, Any]
) -> Plan:
    """The plan that removes these counts. The part of a weight that the target asks for beyond them is in the share of one linear,
    the one that loses most, so that the plan's sparsity is the target."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    most = max(counts, key=lambda name: (counts[name] < sizes[name], counts[name], sizes[name]))
    rests = {most: target * sum(sizes.values()) - sum(counts.values())}
    return Plan({name: share_of(counts[name], sizes[name], rests.get(name, Fraction(0))) for name in sizes}, shapes, method, made)
