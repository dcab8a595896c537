"""The perplexity to expect of a plan, with an interval, from a model's layer errors and a few prunings that were really done.

A plan's damage D is the sum over its linears of d, their errors by what these cost (``gradient_weights``): the second order of the
loss, in nats. Of the higher orders the next one grows with a linear's amplitude, sqrt(d), and costs d sqrt(d). So log(rise / D) is
taken for a line in the plan's amplitude, the mean of sqrt(d) weighed by d, where rise is the log of the perplexity over the dense
model's. The line goes through the probes; how they scatter about it is how the next pruning is expected to.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import pipeline
from ..errors import SparsekitError, listed
from ..evaluate import perplexity
from ..patterns import Pattern, Unstructured
from ..pipeline.blocks import Target
from ..plan import Plan
from .allocation import weight_of
from .curves import Curve, error_curves
from .planning import SHARES, check_curves
from .regression import FEWEST, Line
from .sensitivity import Sensitivity
from .weights import gradient_weights

LEVEL = 0.8  # of the interval: that share of prunings should end within it
PROBES = 12
# How far the shares of a probe's blocks, and those of the linears of a block, lie from their middle at most: a probe shall differ
# from a uniform pruning as much as the plans do that are asked about.
_APART = 0.15
_SPAN = 10  # of the most to the least damage of the probes, at least
# How far beyond the most harmful probe a forecast goes: so many times its damage, and the root of that times the largest amplitude.
REACH = 1.5


@dataclass(frozen=True)
class Expected:
    """A perplexity, and the ends of its interval; infinite where it is beyond any number, or beyond what the probes reach."""

    perplexity: float
    low: float
    high: float


@dataclass(frozen=True)
class Probe:
    """A pruning that was done and evaluated. damage, amplitude: of ``Harm``. predicted: what the other probes forecast of it."""

    pattern: str
    damage: float
    amplitude: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Harm:
    """Of a plan the damage, in nats, and the amplitude: the mean of the roots of its linears' damages, weighed by these."""

    damage: float
    amplitude: float


@dataclass(frozen=True)
class Damages:
    """Of each matrix by name its errors, and what an error of 1 costs in nats."""

    curves: Mapping[str, Curve]
    weights: Mapping[str, float]

    def of(self, plan: Plan) -> float:
        """The damage of a plan for this model. Raises SparsekitError for a level that the curves do not reach."""
        return self.harm(plan).damage

    def harm(self, plan: Plan) -> Harm:
        """The same with its amplitude."""
        asked = {name: pattern for name, pattern in plan.patterns.items() if pattern is not None}
        each = [self.weights[name] * error_at(self.curves[name], pattern) for name, pattern in asked.items()]
        damage = math.fsum(each)
        return Harm(damage, math.fsum(one**1.5 for one in each) / damage if damage > 0 else 0.0)


def error_at(curve: Curve, pattern: Pattern) -> float:
    """The error of the curve's matrix at a pattern: as measured, or for a share between two measured shares with its logarithm on
    the straight line between theirs. Raises SparsekitError for any other pattern, and beyond the measured shares."""
    if str(pattern) in curve.levels:
        return curve.errors[curve.levels.index(str(pattern))]
    shares = {level.share: error for text, error in zip(curve.levels, curve.errors) if _is_share(level := Pattern.parse(text))}
    if isinstance(pattern, Unstructured):
        if pattern.share in (0, 1):
            return pattern.share
        below, above = (pick((s for s in shares if side(s)), default=None) for pick, side in _sides(pattern.share))
        if below is not None and above is not None:
            part = (pattern.share - below) / (above - below) if above > below else 0.0
            ends = max(shares[below], 1e-12), max(shares[above], 1e-12)  # an error of 0 has no logarithm
            return math.exp((1 - part) * math.log(ends[0]) + part * math.log(ends[1]))
    raise SparsekitError(f"the curves must be measured at {pattern}, and that of {curve.name} is at {', '.join(curve.levels)}")


def _sides(share: float) -> tuple:
    return (max, lambda one: one <= share), (min, lambda one: one >= share)


def _is_share(pattern: Pattern) -> bool:
    return isinstance(pattern, Unstructured)


@dataclass(frozen=True)
class Quality:
    """What forecasts go by. dense: the dense model's perplexity. tokens: predicted ones that it was measured on."""

    dense: float
    tokens: int
    damages: Damages
    probes: tuple[Probe, ...]
    line: Line

    def expected(self, plan: Plan) -> Expected:
        """The perplexity after pruning by SparseGPT to the plan, with its interval. Raises SparsekitError as ``Damages.of``.

        Of a plan that lies beyond what the probes reach only the lower end is told: as if it did no more than the probes did."""
        harm = self.damages.harm(plan)
        most = Harm(max(one.damage for one in self.probes), max(one.amplitude for one in self.probes))
        if harm.damage <= REACH * most.damage and harm.amplitude <= REACH**0.5 * most.amplitude:
            return _expected(self.dense, self.line, harm)
        done = Harm(min(harm.damage, most.damage), min(harm.amplitude, most.amplitude))
        return Expected(math.inf, _expected(self.dense, self.line, done).low, math.inf)

    def beyond(self, plan: Plan) -> bool:
        """Whether the plan does more damage than any probe, or less."""
        done = [probe.damage for probe in self.probes]
        return not min(done) <= self.damages.of(plan) <= max(done)

    def by(self, probes: Sequence[Probe]) -> Quality:
        """The same by these of the probes alone, as if no other had been done."""
        return Quality(self.dense, self.tokens, self.damages, *_settled(self.dense, [(p.pattern, p, p.measured) for p in probes]))


def _expected(dense: float, line: Line, harm: Harm | Probe) -> Expected:
    if harm.damage <= 0:
        return Expected(dense, dense, dense)
    middle, reach = line.predict(harm.amplitude, LEVEL)
    return Expected(*(_grown(dense, math.log(harm.damage) + middle + off) for off in (0, -reach, reach)))


def _grown(dense: float, log_rise: float) -> float:
    rise = math.exp(log_rise) if log_rise < 700 else math.inf
    return dense * math.exp(rise) if rise < 700 else math.inf


def _fit(dense: float, done: Sequence[tuple[Harm | Probe, float]]) -> Line:
    """Through the harm and the perplexity of probes that cost something."""
    heights = [math.log(math.log(measured / dense) / harm.damage) for harm, measured in done]
    return Line.through([harm.amplitude for harm, _ in done], heights)


def calibrate(
    model: nn.Module,
    targets: Sequence[Sequence[Target]],
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    tokens: Tensor,
    seq_len: int,
    plans: Sequence[Plan],
    *,
    probes: int = PROBES,
    seed: int = 0,
    max_tokens: int | None = None,
    sensitivity: Sensitivity | None = None,
    stored: torch.dtype | None = None,
    blocks: nn.ModuleList | None = None,
    skip: Iterable[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Quality:
    """Measures the curves and what their errors cost, unless both are known; prunes the model to ``probes`` random plans of about
    as much damage as ``plans`` do, evaluates each, and brings the model back bit for bit.

    targets: the matrices by block, of ``find_targets``. batches, stored, blocks, skip: as for ``prune``. tokens, seq_len,
    max_tokens: as for ``perplexity``. seed: chooses the probes. sensitivity: what ``measure_sensitivity`` found of the model.
    Raises SparsekitError for fewer than 4 probes, or than 4 that cost perplexity, and for curves of another model."""
    if probes <= FEWEST:
        raise SparsekitError(f"a forecast with an interval takes at least {FEWEST + 1} probes, got {probes}")
    skip, batches, tell = tuple(skip), list(batches), progress or (lambda *_: None)
    if sensitivity is not None:
        check_curves(sensitivity.curves, [target for matrices in targets for target in matrices])
        _check_span(sensitivity.curves)
    evaluated = perplexity(model, tokens, seq_len, max_tokens, progress=lambda *now: tell("the dense model", *now))
    flat, held = [target for matrices in targets for target in matrices], dict(skip=skip, blocks=blocks, progress=progress)
    if sensitivity is None:
        curves, weights = error_curves(model, batches, dict.fromkeys([*SHARES, *_levels(plans)]), **held), {}
    else:
        curves, weights = sensitivity.curves, sensitivity.weights
    weights = weights or gradient_weights(model, batches, **held)
    damages = Damages({curve.name: curve for curve in curves}, {curve.name: weight_of(weights, curve) for curve in curves})
    done: list[tuple[str, Harm, float]] = []
    asked = [damage for plan in plans if (damage := damages.of(plan)) > 0]
    for i, plan in enumerate(probe_plans(damages, [[t.name for t in matrices] for matrices in targets], asked, probes, seed)):
        tell(f"probe {i + 1}: {plan.sparsity:.0%}", i, probes)
        with restored(flat):
            pipeline.prune(model, batches, "sparsegpt", plan, skip=skip, blocks=blocks, stored=stored)
            done.append((str(plan), damages.harm(plan), perplexity(model, tokens, seq_len, max_tokens)["perplexity"]))
    return Quality(evaluated["perplexity"], evaluated["tokens"], damages, *_settled(evaluated["perplexity"], done))


def _settled(dense: float, done: Sequence[tuple[str, Harm | Probe, float]]) -> tuple[tuple[Probe, ...], Line]:
    """What was pruned to, the harm that it does and the perplexity measured, as probes, and the line through them."""
    cost = [(text, harm, measured) for text, harm, measured in done if measured > dense and harm.damage > 0]
    if len(cost) <= FEWEST:
        raise SparsekitError(
            f"at least {FEWEST + 1} probes must cost perplexity for an interval, and {len(cost)} of {len(done)} did; "
            f"evaluate on a longer text or forecast higher sparsities"
        )
    points = [(harm, measured) for _, harm, measured in cost]
    told = []
    for i, (text, harm, measured) in enumerate(cost):
        others = _fit(dense, points[:i] + points[i + 1 :])
        told.append(Probe(text, harm.damage, harm.amplitude, _expected(dense, others, harm).perplexity, measured))
    return tuple(told), _fit(dense, points)


def _check_span(curves: Iterable[Curve]) -> None:
    """Raises SparsekitError where curves that were measured before do not reach as far as probes may."""
    for curve in curves:
        if not {SHARES[0], SHARES[-1]} <= set(curve.levels):
            raise SparsekitError(
                f"probes take shares from {SHARES[0]} to {SHARES[-1]}, and the curve of {curve.name} was measured at "
                f"{listed(curve.levels)}; measure at those levels too"
            )


def _levels(plans: Iterable[Plan]) -> Iterator[str]:
    """The levels that curves must have, beside SHARES, for these plans: of shares that are many the first and the last."""
    patterns = dict.fromkeys(pattern for plan in plans for pattern in plan.patterns.values() if pattern is not None)
    shares = sorted((p for p in patterns if _is_share(p) and 0 < p.share < 1), key=lambda p: p.share)
    yield from map(str, (p for p in patterns if not _is_share(p)))
    yield from map(str, shares if len(shares) <= len(SHARES) else (shares[0], shares[-1]))


def probe_plans(
    damages: Damages, groups: Sequence[Sequence[str]], asked: Sequence[float], count: int, seed: int = 0
) -> Iterator[Plan]:
    """Plans of shares that differ by block and by linear, at random, whose damages are spread evenly, by ratio, over those asked
    for and somewhat beyond: a tenth of the most if they are all alike; as far as shares of SHARES reach. groups: the names by
    block."""
    chance, shapes = random.Random(seed), {name: curve.shape for name, curve in damages.curves.items()}
    lowest, highest = float(SHARES[0][:-1]) / 100, float(SHARES[-1][:-1]) / 100
    reach = damages.of(Plan(dict.fromkeys(shapes, SHARES[-1]), shapes)) or math.inf
    least, most = (min(end, reach) for end in ((min(asked), max(asked)) if asked else (1e-2, 1e-1)))
    wider = max(_SPAN * least / most, 1) ** 0.5
    over = max(most * wider / reach, 1)  # beyond it all probes would be one
    least, most = least / wider / over, most * wider / over
    for i in range(count):
        wanted = least * (most / least) ** ((i + 0.5) / count)
        off = {
            name: one + chance.uniform(-_APART, _APART) for of in groups for one in [chance.uniform(-_APART, _APART)] for name in of
        }

        def plan(center: float, off=off) -> Plan:
            shares = {name: Unstructured(round(min(max(center + by, lowest), highest), 3)) for name, by in off.items()}
            return Plan(shares, shapes, "sparsegpt", {"by": "probe"})

        low, high = lowest - 2 * _APART, highest + 2 * _APART
        for _ in range(20):
            center = (low + high) / 2
            low, high = (center, high) if damages.of(plan(center)) < wanted else (low, center)
        yield plan(center)


@contextmanager
def restored(targets: Iterable[Target]) -> Iterator[None]:
    """Afterwards the targets' parameters hold what they held before, bit for bit. A copy of them waits in main memory."""
    parameters = {id(p): p for p in (getattr(target.module, target.parameter) for target in targets)}.values()
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept):
                parameter.copy_(before)
