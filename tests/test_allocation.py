"""Allocation: targets met to the weight, bounds, and no plan better, against brute force over every plan of small models."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, token_batches, weight_of

from sparsekit import Plan, SparsekitError
from sparsekit.analysis import (
    Curve,
    Outliers,
    allocate,
    allocate_choices,
    allocate_latency,
    allocate_owl,
    error_curves,
    outlier_shares,
)  # fmt: skip
from sparsekit.analysis.allocation import read_share, share_of
from sparsekit.analysis.costs import holds_24
from sparsekit.analysis.solve import apportion, choose, lower_hull, spend
from sparsekit.patterns import NM, Pattern, Unstructured
from sparsekit.pipeline import prune

TENTHS = tuple(f"{p}%" for p in range(10, 100, 10))
LEVELS = ("20%", "50%", "4:8", "2:4", "80%")


def curve(name: str, shape: tuple[int, int], errors, levels=TENTHS) -> Curve:
    return Curve(name, shape, tuple(levels), tuple(errors))


def size(one: Curve) -> int:
    return math.prod(one.shape)


def removed(plan: Plan) -> dict[str, int]:
    """Of each linear the weights that its pattern removes, which must be a share."""
    found = {}
    for name, pattern in plan.patterns.items():
        assert pattern is None or isinstance(pattern, Unstructured)
        found[name] = 0 if pattern is None else pattern.removed(math.prod(plan.shapes[name]))
    return found


def damage(curves, counts: dict[str, float], weights) -> float:
    """By the straight lines between the levels, in another way than the code under test."""
    total = 0.0
    for one in curves:
        xs = [0, *(Pattern.parse(level).removed(size(one)) for level in one.levels)]
        weight = size(one) if weights is None else weights[one.name]
        total += weight * np.interp(counts[one.name], xs, [0, *one.errors])
    return total


# One weight, a row, a prime number of weights; and a million, at which a millionth is a weight.
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(1, 1), (1, 7), (31, 17), (1024, 1024), (4096, 999)])


@st.composite
def models(draw):
    """Curves of one to six linears, all zero, of any form, or rising as errors do; their weights; target and bounds."""
    curves = []
    for i in range(draw(st.integers(1, 6))):
        form = draw(st.sampled_from(["zero", "any", "rising"]))
        errors = [0.0] * 9 if form == "zero" else draw(st.lists(st.floats(0, 1), min_size=9, max_size=9))
        curves.append(curve(f"l{i}", draw(SHAPES), sorted(errors) if form == "rising" else errors))
    weights = draw(st.none() | st.lists(st.sampled_from([0.0, 1e-6, 1.0, 3.5, 1e9]), min_size=6, max_size=6))
    weights = weights and {one.name: weight for one, weight in zip(curves, weights)}
    low, target, high = sorted(draw(st.lists(st.integers(0, 900), min_size=3, max_size=3)))
    return curves, weights, f"{target / 10}%", f"{low / 10}%", f"{high / 10}%"


@given(models(), st.booleans())
def test_the_target_is_met_within_the_bounds_and_no_worse_than_uniformly(made, grouped):
    curves, weights, target, low, high = made
    groups = {one.name: f"g{i // 2}" for i, one in enumerate(curves)} if grouped else None
    shares = [Fraction(text.rstrip("%")) / 100 for text in (low, target, high)]
    total = math.floor(shares[1] * sum(map(size, curves)))
    sums = [sum(turn(share * size(one)) for one in curves) for turn, share in ((math.ceil, shares[0]), (math.floor, shares[2]))]
    fits = sums[0] <= total <= sums[1] and all(math.ceil(shares[0] * size(o)) <= math.floor(shares[2] * size(o)) for o in curves)
    try:
        plan = allocate(curves, target, weights=weights, low=low, high=high, groups=groups)
    except SparsekitError as error:  # of few weights the last level, rounded down, may not reach what the target is rounded to
        assert "must reach the target" in str(error) and not fits
        return
    counts = removed(plan)
    assert sum(counts.values()) == total
    assert abs(plan.sparsity - float(shares[1])) <= 1e-6
    out = 0 if fits else 1
    for one in curves:
        assert math.ceil(shares[0] * size(one)) - out <= counts[one.name] <= math.floor(shares[2] * size(one)) + out
    if all(shares[1] * size(one) == int(shares[1] * size(one)) for one in curves):
        even = {one.name: int(shares[1] * size(one)) for one in curves}
        assert damage(curves, counts, weights) <= damage(curves, even, weights) * (1 + 1e-9) + 1e-12
    assert plan.made["damage"] == pytest.approx(damage(curves, counts, weights), rel=1e-9, abs=1e-12)
    for group in set(groups.values()) if groups else ():
        members = [one for one in curves if groups[one.name] == group]
        together = Fraction(sum(counts[one.name] for one in members), sum(map(size, members)))
        for one in members:  # one share, within one weight of where the bounds, and the last level, allow it
            assert abs(counts[one.name] - together * size(one)) <= 2 + out


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted), min_size=1, max_size=3), st.integers(0, 30))
def test_no_plan_is_better_for_convex_curves(rises, percent):
    # Rising slopes make a convex curve; ten weights a linear, so that all plans can be tried.
    curves = [curve(f"l{i}", (2, 5), np.cumsum(rise) / 3, ("30%", "60%", "90%")) for i, rise in enumerate(rises)]
    target = f"{3 * percent}%"
    plan = allocate(curves, target, high=0.9)
    total = math.floor(Fraction(3 * percent, 100) * 10 * len(curves))
    plans = [p for p in itertools.product(range(10), repeat=len(curves)) if sum(p) == total]
    best = min(damage(curves, dict(zip(removed(plan), counts)), None) for counts in plans)
    assert damage(curves, removed(plan), None) <= best + 1e-9


OPTIONS = st.lists(st.tuples(st.integers(-3, 12), st.sampled_from([0.0, 0.5, 1.0, 1.1, 7.0])), min_size=1, max_size=4)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(-6, 60), st.sampled_from([1, 2, 1 << 18]))
def test_a_choice_is_the_best_or_within_its_gap(options, least, limit):
    every = [(sum(gain for gain, _ in picked), sum(cost for _, cost in picked)) for picked in itertools.product(*options)]
    if max(gain for gain, _ in every) < least:
        with pytest.raises(ValueError, match="cannot be gained"):
            choose(options, least, limit)
        return
    picks, gap = choose(options, least, limit)
    assert sum(points[pick][0] for points, pick in zip(options, picks)) >= least
    found = sum(points[pick][1] for points, pick in zip(options, picks))
    best = min(cost for gain, cost in every if gain >= least)
    assert best - 1e-9 <= found <= best + gap + 1e-9
    assert gap == 0 or limit < 1 << 18


def test_the_solvers_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="9 cannot be spent on curves from 0 to 8"):
        spend([[(0, 0.0), (8, 1.0)]], 9)
    with pytest.raises(ValueError, match="1 cannot be spent on curves from 2 to 8"):
        spend([[(2, 0.0), (8, 1.0)]], 1)
    with pytest.raises(ValueError, match="5 cannot be shared out between 0 and 4"):
        apportion(5, [2.5, 2.5], [0, 0], [2, 2])
    assert apportion(5, [2.5, 1.25, 1.25], [0, 0, 0], [9, 9, 9]) == [3, 1, 1]
    assert apportion(5, [2.5, 1.25, 1.25], [0, 0, 2], [2, 9, 9]) == [2, 1, 2]
    assert lower_hull([(0, 0.0), (1, 3.0), (2, 2.0), (3, 3.0), (4, 10.0)]) == [(0, 0.0), (3, 3.0), (4, 10.0)]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 144_272_509, 10**9 - 1, 10**9])  # the fifth is such a one
def test_a_share_removes_its_count(count):
    # A thousand million weights: the float nearest to a share may lie below it, and would remove one weight less.
    for of in (7, 31 * 17, 10**9):
        if count <= of:
            pattern = share_of(count, of)
            assert (0 if pattern is None else Pattern.parse(str(pattern)).removed(of)) == count
            assert share_of(count, of) is None or share_of(count, of) == Pattern.parse(str(share_of(count, of)))


def test_a_cheap_linear_gives_more_and_curves_that_do_not_matter_give_most():
    steep = [0.1 * (2**i) / 2**8 for i in range(9)]
    curves = [curve("cheap", (100, 100), [e / 100 for e in steep]), curve("dear", (100, 100), steep)]
    counts = removed(allocate(curves, "60%"))
    assert counts["cheap"] == 8000 > counts["dear"] == 4000  # by default up to halfway from the target to all
    turned = removed(allocate(curves, "60%", weights={"cheap": 1e4, "dear": 1.0}))
    assert turned == {"cheap": 4000, "dear": 8000}


@pytest.mark.parametrize("weights", [None, {"a": 0.0, "b": 0.0}])
def test_where_nothing_costs_anything_all_are_pruned_alike(weights):
    curves = [curve("a", (10, 10), [0.0] * 9), curve("b", (30, 10), [0.0] * 9)]
    assert removed(allocate(curves, "60%", weights=weights)) == {"a": 60, "b": 180}


def test_one_linear_and_everything_or_nothing():
    one = [curve("only", (9, 9), [0.1] * 9)]
    assert removed(allocate(one, "50%")) == {"only": 40}
    assert allocate(one, 0).patterns == {"only": None}
    full = [curve("only", (9, 9), [1.0], ("100%",))]
    assert removed(allocate(full, 1.0)) == {"only": 81}


def test_a_curve_with_a_bump_never_costs_more_than_the_uniform_plan():
    # The hull skips the bump at 50 %; a plan that stops there must not be taken for as cheap as the hull.
    bump = curve("bump", (10, 10), [0.0, 0.0, 0.0, 0.9, 1.0, 0.9, 0.1, 0.1, 0.1])
    flat = curve("flat", (10, 10), [0.01 * i for i in range(1, 10)])
    for percent in range(5, 90, 5):
        plan = allocate([bump, flat], f"{percent}%", high=0.9)
        even = {"bump": percent, "flat": percent}
        assert damage([bump, flat], removed(plan), None) <= damage([bump, flat], even, None) + 1e-12
        assert plan.made["damage of the uniform plan"] == pytest.approx(damage([bump, flat], even, None))


@pytest.mark.parametrize("share", ["60%", "60.0 %", "0.6", " .6", 0.6, "6e-1", np.float64(0.6)])
def test_a_share_as_people_write_it(share):
    assert read_share(share) == Fraction(3, 5)


# ---- choices ----


def by_hand(curves, patterns, weights, feasible):
    """The least damage of every assignment of patterns that is feasible."""
    costs = []
    for picked in itertools.product(patterns, repeat=len(curves)):
        if feasible(dict(zip([one.name for one in curves], picked))):
            rows = [0 if p == "dense" else weights[one.name] * one.errors[one.levels.index(p)] for one, p in zip(curves, picked)]
            costs.append(sum(rows))
    return min(costs)


@settings(max_examples=50)
@given(st.data())
def test_choices_are_the_best_that_reach_the_target(data):
    shapes = st.sampled_from([(8, 8), (8, 24), (3, 7)])  # alike, three times as large, and of tails
    errors = st.lists(st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.3]), min_size=5, max_size=5)
    curves = [curve(f"l{i}", data.draw(shapes), data.draw(errors), LEVELS) for i in range(data.draw(st.integers(1, 5)))]
    weights = {one.name: data.draw(st.sampled_from([0.0, 1.0, 2.0])) for one in curves}
    target = data.draw(st.sampled_from(["0%", "12.5%", "33.3%", "50%", "50.1%", "80%"]))
    choices = ("dense", "4:8", "2:4", "80%")
    plan = allocate_choices(curves, target, choices, weights=weights)
    texts = {name: str(pattern or "dense") for name, pattern in plan.patterns.items()}
    assert set(texts.values()) <= set(choices) and plan.sparsity >= float(target.rstrip("%")) / 100 - 1e-12
    gone = {"dense": Fraction(0), "4:8": Fraction(1, 2), "2:4": Fraction(1, 2), "80%": Fraction(4, 5)}

    least = Fraction(target.rstrip("%")) / 100 * sum(map(size, curves))

    def feasible(patterns) -> bool:
        return sum(gone[patterns[one.name]] * size(one) for one in curves) >= least

    best = by_hand(curves, choices, weights, feasible)
    mine = sum(0 if texts[o.name] == "dense" else weights[o.name] * o.errors[LEVELS.index(texts[o.name])] for o in curves)
    assert mine == pytest.approx(best, abs=1e-9) and plan.made["gap"] == 0 and plan.made["damage"] == pytest.approx(mine)


def test_choices_by_block_and_within_bounds():
    errors = {"a.q": 0.1, "a.o": 0.1, "b.q": 0.3, "b.o": 0.01}
    curves = [curve(name, (8, 8), (0.0, 0.0, error / 2, error, 1.0), LEVELS) for name, error in errors.items()]
    groups = {name: name[0] for name in errors}
    plan = allocate_choices(curves, "25%", groups=groups)
    assert [str(plan.patterns[name]) for name in errors] == ["4:8", "4:8", "None", "None"]
    plan = allocate_choices(curves, "25%", low="10%")
    assert {str(pattern) for pattern in plan.patterns.values()} == {"4:8"}


# ---- latency ----

EVERY = ("2:4", "1:4", "1:2", "2:8", "0:1", "1:1", "1:3", "2:3", "3:4", "4:8", "4:8 pairs", "50%", "block:4x4@50%")


def test_latency_buys_time_where_it_is_cheap():
    curves = [
        curve("slow", (8, 8), (0.1,), ("2:4",)),  # saves 50 us
        curve("fast", (8, 16), (0.01,), ("2:4",)),  # saves 10 us
        curve("worse", (16, 8), (0.0,), ("2:4",)),  # the sparse kernel is slower there, and costs nothing else
    ]
    times = {(8, 8): (100.0, 50.0), (8, 16): (20.0, 10.0), (16, 8): (10.0, 15.0)}
    weights = dict.fromkeys(("slow", "fast", "worse"), 1.0)

    def chosen(speedup):
        plan = allocate_latency(curves, speedup, times, weights=weights)
        assert plan.made["speedup of the products"] >= speedup - 1e-9
        return {name for name, pattern in plan.patterns.items() if pattern == NM(2, 4)}

    assert chosen(1.0) == set()
    assert chosen(130 / 120) == {"fast"}
    assert chosen(130 / 115) == {"slow"}
    assert chosen(130 / 70) == {"slow", "fast"}
    with pytest.raises(SparsekitError, match=r"must reach a speed-up of 2, and dense and 2:4 reach 1.857 on this machine"):
        chosen(2)


def test_what_does_not_hold_two_of_four_gains_no_time():
    curves = [curve("a", (8, 8), (0.1, 0.2), ("4:8", "2:4"))]
    plan = allocate_latency(curves, 1.5, {(8, 8): (100.0, 50.0)}, ("dense", "4:8", "2:4"))
    assert plan.patterns == {"a": NM(2, 4)} and plan.made["microseconds"] == 50
    held = {text for text in EVERY if holds_24(Pattern.parse(text))}
    assert held == {"2:4", "1:4", "1:2", "2:8", "0:1", "1:3"} and not holds_24(None)


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "2:8", "2:12"])
def test_what_is_said_to_hold_two_of_four_does(text):
    mask = Pattern.parse(text).mask(torch.rand(64, 48, generator=torch.Generator().manual_seed(0)))
    assert mask.view(64, -1, 4).sum(-1).max() <= 2


# ---- OWL ----


def test_outliers_are_those_of_the_definition():
    model, batches = build("llama"), token_batches((2, 24), (3, 16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs: dict[str, list] = {}
    found = outlier_shares(model, batches, above=3.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for block in found
        for name in block.shapes
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    assert [block.block for block in found] == [f"model.layers.{i}" for i in range(3)]
    for block in found:
        scores = []
        for name, shape in block.shapes.items():
            weight = weight_of(model, name).double()
            assert tuple(weight.shape) == shape
            x = torch.cat([part.flatten(0, 1) for part in inputs[name]]).double()
            scores.append((weight.abs() * x.square().sum(0).sqrt()).flatten())
        scores = torch.cat(scores)
        assert block.share == pytest.approx((scores > 3 * scores.mean()).double().mean().item(), abs=2e-4)  # ties with 3 in fp32
        assert block.share > 0.01


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 1)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.01, 0.08, 0.5, 1.0]),
    st.lists(st.integers(0, 1000), min_size=3, max_size=3).map(sorted),
)
def test_owl_meets_the_target_and_stays_near_it(rows, spread, bounds):
    low, target, high = (bound / 1000 for bound in bounds)
    blocks = [Outliers(f"b{i}", {f"b{i}.q": (n, 3), f"b{i}.o": (1, n)}, share) for i, (n, share) in enumerate(rows)]
    plan = allocate_owl(blocks, target, spread=spread, low=low, high=high)
    counts, sizes = removed(plan), {name: math.prod(shape) for name, shape in plan.shapes.items()}
    assert sum(counts.values()) == math.floor(Fraction(bounds[1], 1000) * sum(sizes.values()))
    assert abs(plan.sparsity - target) <= 1e-6
    for name, count in counts.items():
        assert max(target - spread, low) * sizes[name] - 2 <= count <= min(target + spread, high) * sizes[name] + 2
    for one, other in itertools.permutations(blocks, 2):
        if one.share > other.share:  # more outliers, no more removed
            mine, theirs = (
                counts[f"{one.block}.q"] / sizes[f"{one.block}.q"],
                counts[f"{other.block}.q"] / sizes[f"{other.block}.q"],
            )
            assert mine <= theirs + 2 / sizes[f"{one.block}.q"] + 2 / sizes[f"{other.block}.q"]


def test_owl_spreads_as_far_as_it_is_told():
    blocks = [Outliers(f"b{i}", {f"b{i}": (100, 100)}, share) for i, share in enumerate((0.01, 0.02, 0.03))]
    assert removed(allocate_owl(blocks, "60%", spread=0.1)) == {"b0": 7000, "b1": 6000, "b2": 5000}
    # Of a block ten times as large the mean is nearly its own: the other is at the edge, and the target holds.
    blocks = [Outliers("small", {"small": (100, 100)}, 0.5), Outliers("large", {"large": (1000, 100)}, 0.0)]
    counts = removed(allocate_owl(blocks, "60%", spread=0.1))
    assert counts == {"small": 5000, "large": 61000}
    assert removed(allocate_owl(blocks[:1], "60%")) == {"small": 6000}


def test_owl_does_not_tell_blocks_apart_that_are_alike():
    """The mean of these, by weights and in fp64, is not their share: one rounding would be stretched to the whole spread."""
    blocks = [Outliers(name, {name: (n, 5)}, 0.18158651997927613) for name, n in (("a", 262), ("b", 1239))]
    assert removed(allocate_owl(blocks, "60%")) == {"a": 786, "b": 3717}
    alike = [Outliers(name, {name: (10, 10)}, 0.0) for name in "ab"]
    assert removed(allocate_owl(alike, "60%")) == {"a": 60, "b": 60}


# ---- a model ----


def test_a_model_pruned_to_a_plan_has_lost_what_the_plan_says():
    model, batches = build("llama"), token_batches((2, 24), (3, 16))
    curves = error_curves(model, batches, TENTHS)
    plan = allocate(curves, "60%", high="90%")
    report = prune(model, batches, plan.method, plan)
    total = sum(map(size, curves))
    zeros = sum(int((weight_of(model, one.name) == 0).sum()) for one in curves)
    assert zeros == math.floor(Fraction(3, 5) * total)
    assert abs(plan.sparsity - 0.6) <= 1e-12 and report.sparsity == pytest.approx(0.6, abs=1 / total)
    assert len(set(plan.patterns.values())) > 5


# ---- what is refused ----

TWO = [curve("a", (10, 10), [0.01 * i for i in range(1, 10)]), curve("b", (10, 10), [0.02 * i for i in range(1, 10)])]
NONE = [curve("a", (10, 10), (0.1,), ("2:4",))]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: allocate(TWO, "60%", low="70%"), "the target must lie within the bounds, 70% to 80%, got 60%"),
        (lambda: allocate(TWO, "60%", high="50%"), "the target must lie within the bounds, 0% to 50%, got 60%"),
        (lambda: allocate(TWO, "60%", low="80%", high="20%"), "the target must lie within the bounds, 80% to 20%, got 60%"),
        (lambda: allocate(TWO, "95%"), "must reach the target and the lower bound, 95.00% and 0%, and together reach 90.00%"),
        (lambda: allocate(TWO, "96%", low="95%"), "must reach the target and the lower bound, 96.00% and 95%, .* measure"),
        (lambda: allocate([], "60%"), "there must be one curve for each linear, got 0 of 0 linears"),
        (lambda: allocate([TWO[0], TWO[0]], "60%"), "there must be one curve for each linear, got 2 of 1 linears"),
        (lambda: allocate_choices([], "0%"), "there must be one curve for each linear, got 0 of 0 linears"),
        (lambda: allocate(TWO, "2:4"), "the target must be a share of the weights, 0 to 1 or a text such as .*, got '2:4'"),
        (lambda: allocate(TWO, "abc"), "the target must be a share of the weights, 0 to 1 or a text such as .*, got 'abc'"),
        (lambda: allocate(TWO, "110%"), "the target must be a share of the weights, .*, got '110%'"),
        (lambda: allocate(TWO, "50%", low="-5%"), "the lower bound must be a share of the weights, .*, got '-5%'"),
        (lambda: allocate(TWO, None), "the target must be a share of the weights, .*, got None"),
        (lambda: allocate(TWO, 60), "the target must be a share of the weights, 0 to 1 .* got 60"),
        (lambda: allocate(TWO, math.nan), "the target must be a share of the weights, 0 to 1 .* got nan"),
        (lambda: allocate(TWO, "60%", low=-0.1), "the lower bound must be a share .* got -0.1"),
        (lambda: allocate(NONE, "60%"), "each curve must have levels that are shares, .* and that of a has none"),
        (lambda: allocate(TWO, "60%", weights={"a": 1.0}), "every linear's error must have a weight of 0 or more, got None for b"),
        (lambda: allocate(TWO, "60%", weights={"a": 1.0, "b": math.nan}), "a weight of 0 or more, got nan for b"),
        (lambda: allocate(TWO, "60%", groups={"a": "x"}), "every linear must have a group, and b has none"),
        (lambda: allocate_choices(TWO, "60%"), "must reach the target of 60%, and dense, 4:8 and 2:4 remove less"),
        (lambda: allocate_choices(TWO, "20%", low="60%"), "target of 20%, and none of the choices is within the bounds"),
        (lambda: allocate_choices(TWO, "20%"), "each curve must hold the choice 4:8, and a has 10%, .* and 90%; measure it"),
        (lambda: allocate_choices(TWO, "20%", ("2:4", "2:4")), "the choices must be patterns, or dense, each once, got 2:4, 2:4"),
        (lambda: allocate_choices(TWO, "20%", ()), "the choices must be patterns, or dense, each once, got none"),
        (lambda: allocate_latency(NONE, 1.1, {}), "every linear's product must be measured, and that of a, 10x10, is not"),
        (lambda: allocate_latency(NONE, 0, {}), "the speed-up must be a number above 0, such as 1.2, got 0"),
        (lambda: allocate_owl([Outliers("b", {"a": (2, 2)}, 0.1)], "60%", low="70%"), "the target must lie within the bounds"),
        (lambda: allocate_owl([Outliers("b", {"a": (2, 2)}, 0.1)], "60%", spread=8), "the spread must be 0 to 1, got 8"),
        (lambda: outlier_shares(build("llama"), token_batches((1, 8)), above=0), "a number above 0 such as 5, got 0"),
    ],
)  # fmt: skip
def test_refused(call, says):
    with pytest.raises(SparsekitError, match=says):
        call()
