"""Schedules against their formulas, and what every one must hold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import SparsekitError
from sparsekit.schedules import Constant, Cubic, Exponential, Linear, Listed, Schedule

NAMED = [Constant(), Linear(), Cubic(), Exponential(), Exponential(0.01), Exponential(50.0)]


@given(st.sampled_from(NAMED), st.floats(0, 1), st.floats(0, 1), st.integers(1, 300))
def test_every_schedule_grows_to_exactly_the_target(schedule, a, b, steps):
    start, target = sorted((a, b))
    path = schedule.sparsities(target, steps, start)
    assert len(path) == steps and path[-1] == target
    assert all(low <= high for low, high in zip((start, *path), path))
    assert path[0] > start or math.isclose(start, target, abs_tol=1e-9)


def test_the_last_step_is_the_target_where_a_sum_would_miss_it_by_a_bit():
    assert 0.03 + (0.29 - 0.03) != 0.29
    assert all(schedule.sparsities(0.29, 4, 0.03)[-1] == 0.29 for schedule in NAMED)


@pytest.mark.parametrize(
    "schedule, formula",
    [
        (Linear(), lambda t: 0.1 + 0.6 * t),
        (Cubic(), lambda t: 0.7 + (0.1 - 0.7) * (1 - t) ** 3),
        (Exponential(5.0), lambda t: 0.1 + 0.6 * (1 - math.exp(-5 * t)) / (1 - math.exp(-5))),
        (Constant(), lambda t: 0.7),
    ],
    ids=["linear", "cubic", "exponential", "constant"],
)
def test_against_the_formula(schedule, formula):
    path = schedule.sparsities(0.7, 10, 0.1)
    assert path == pytest.approx([formula((i + 1) / 10) for i in range(10)], rel=1e-12)


@pytest.mark.parametrize("text", ["constant", "linear", "cubic", "exponential", "exponential:5.0", "20%,35%,50%", "33.3%"])
def test_text_comes_back(text):
    assert str(Schedule.parse(text)) == text and Schedule.parse(str(Schedule.parse(text))) == Schedule.parse(text)


@pytest.mark.parametrize("schedule", [Exponential(1e-20), Listed((1 / 3,)), Listed((1e-7, 0.1 + 0.2))], ids=str)
def test_any_number_comes_back_from_its_text(schedule):
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    "given, schedule",
    [
        ("exponential:5", Exponential(5.0)),
        (" 20% , 50% ", Listed((0.2, 0.5))),
        ([0.2, 0.5], Listed((0.2, 0.5))),
        (Cubic(), Cubic()),
    ],
)
def test_loose_forms(given, schedule):
    assert Schedule.parse(given) == schedule


@pytest.mark.parametrize("text", ["", "quadratic", "cubic:3", "exponential:", "exponential:x", "20,50", "20%,", "-1%", None, 0.5])
def test_unknown_text_lists_the_known(text):
    with pytest.raises(SparsekitError) as caught:
        Schedule.parse(text)
    for part in ("constant", "linear", "cubic", "exponential", "20%,35%,50%", f"got {text!r}"):
        assert part in str(caught.value)


def test_a_list_is_taken_as_it_is():
    assert Listed((0.2, 0.2, 0.45)).sparsities(0.45, 3) == (0.2, 0.2, 0.45)
    assert [Listed((0.1, 0.4)).reached(i, 2) for i in (1, 2)] == [0.25, 1.0]
    shares = tuple(i / 64 for i in range(1, 23))  # 15 / 22 * 22 is a hair below 15
    assert [Listed(shares).reached(i, 22) * shares[-1] for i in range(1, 23)] == pytest.approx(shares, rel=1e-12)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Listed(()), "at least one entry, got none"),
        (lambda: Listed((0.5, 0.4)), "never fall, got 0.4 as entry 2 after 0.5"),
        (lambda: Listed((0.0, 0.4)), "above 0, up to 1, and never fall, got 0.0 as entry 1"),
        (lambda: Listed((0.4, 1.5)), "got 1.5 as entry 2"),
        (lambda: Listed((0.4, math.nan)), "got nan as entry 2"),
        (lambda: Listed((0.2, 0.5)).check(0.6, 2), "the last of the listed sparsities must be the pattern's 0.6, got 0.5"),
        (lambda: Listed((0.2, 0.5)).check(0.5, 3), "a list of 2 sparsities takes as many steps, got 3"),
        (lambda: Listed((0.2, 0.5)).check(0.5, 2, 0.2), "the first of the listed sparsities must be above the start of 0.2, got"),
        (lambda: Linear().check(0.5, 0), "at least one step, got 0"),
        (lambda: Linear().check(0.5, 3, 0.6), "must go up, from at least 0 to at most 1, got 0.6 to 0.5"),
        (lambda: Linear().check(1.5, 3), "got 0 to 1.5"),
        (lambda: Linear().reached(0, 3), "from 1 to the schedule's 3 steps, got 0"),
        (lambda: Linear().reached(4, 3), "from 1 to the schedule's 3 steps, got 4"),
        (lambda: Exponential(0.0), "above 0 and below 700, got 0"),
        (lambda: Exponential(math.nan), "above 0 and below 700, got nan"),
    ],
)  # fmt: skip
def test_refused(make, says):
    with pytest.raises(SparsekitError) as caught:
        make()
    assert says in str(caught.value)
