"""mask_rows on the CPU where a row is long enough for a sample, and where threads share one: rows made to mislead it.

The truth is a stable sort. format24_cpu.py makes the calls, on every instruction set that this CPU has."""

import numpy as np
import pytest
import torch
from definition24 import NOTHING, SCORES, as_bits, equal, few_values, named, random_bits, viewed
from format24_cpu import mask_rows

# Below a sample; the shortest with one; one with a rest of a word; one that threads share, of nine parts and a rest.
COLUMNS = [1023, 1024, 5003, 9 * 16384 + 77]


def ends(dtype) -> tuple[float, float]:
    """The lowest number of a dtype and the highest; infinities where there are any."""
    if dtype == torch.int8:
        return -128, 127
    end = torch.finfo(dtype).max if dtype == torch.float8_e4m3fn else float("inf")
    return -end, end


def sampled(cols: int, dtype) -> np.ndarray:
    """The columns that the kernel's sample takes: format24_rows.h. Another sample would make the rows built on it no trap."""
    neighbours = 16 // dtype.itemsize
    pieces = max(512, min(cols // 16, 1024) // 64 * 64) // neighbours
    return (np.arange(pieces)[:, None] * (cols // pieces) + np.arange(neighbours)).ravel()


def trap(cols, dtype, inside, g):
    """The sample sees `inside` alone, the rest of the row is of 100 numbers about zero."""
    x = g.integers(-50, 50, cols).astype(np.float64)
    if dtype != torch.int8:
        x = x / 16
    at = sampled(cols, dtype)
    x[at] = np.resize(inside, len(at))
    return x


ROWS = {
    "a range, rising": lambda cols, low, high, g: np.linspace(-100, 100, cols),
    "a range, falling": lambda cols, low, high, g: np.linspace(100, -100, cols),
    "an organ pipe": lambda cols, low, high, g: 100 - np.abs(np.linspace(-200, 200, cols)),
    "as often one as two": lambda cols, low, high, g: g.permutation(np.arange(cols) % 2 + 1.0),
    "one in a hundred": lambda cols, low, high, g: (g.random(cols) < 0.01) * 3.0,
    "all the same": lambda cols, low, high, g: np.full(cols, -2.0),
    "all the lowest": lambda cols, low, high, g: np.full(cols, low),
    "all the highest": lambda cols, low, high, g: np.full(cols, high),
    "the ends alone": lambda cols, low, high, g: np.where(g.random(cols) < 0.5, low, high),
    "both zeros and little else": lambda cols, low, high, g: g.choice([0.0, -0.0, 1.0, -1.0], cols, p=[0.4, 0.4, 0.1, 0.1]),
    "three heavy numbers among many": lambda cols, low, high, g: np.where(
        g.random(cols) < 0.6, g.choice([-1.0, 0.5, 0.75], cols), g.normal(size=cols)
    ),
    "a normal distribution": lambda cols, low, high, g: g.normal(size=cols) * 4,
}
TRAPS = {
    "all too high": lambda low, high: [high],
    "all too low": lambda low, high: [low],
    "too wide": lambda low, high: [low, high],
}


def counts(row: np.ndarray) -> set[int]:
    """One, nearly all, between; and where the most frequent number begins and ends."""
    values, times = np.unique(row, return_counts=True)
    heavy = values[times.argmax()]
    above, least = int((row > heavy).sum()), int((row >= heavy).sum())
    edges = {above - 1, above, above + 1, least - 1, least, least + 1}
    return {1, len(row) // 3, len(row) // 2, len(row) - 1, *(k for k in edges if 0 <= k <= len(row))}


def keep(scores: torch.Tensor, kept: int) -> torch.Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.uint8)
    for row, values in enumerate(scores.double().numpy()):
        mask[row, np.argsort(-values, kind="stable")[:kept]] = 1
    return mask


@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_rows_of_every_kind(dtype, cols):
    g = np.random.default_rng(cols)
    rows = {name: make(cols, *ends(dtype), g) for name, make in ROWS.items()}
    rows |= {name: trap(cols, dtype, make(*ends(dtype)), g) for name, make in TRAPS.items()}
    for name, row in rows.items():
        scores = torch.from_numpy(row)[None].to(dtype)
        assert not scores.double().isnan().any()
        for kept in counts(scores[0].double().numpy()):
            mask, status = mask_rows(scores, kept)
            assert equal(mask, keep(scores, kept)) and status.item() == NOTHING, (name, kept)


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_any_bits(dtype):
    """Three rows that differ from one another: what was found in the one before is only where to begin."""
    for cols in COLUMNS:
        for scores in (random_bits((3, cols), dtype, seed=cols), few_values((3, cols), dtype, seed=cols)):
            as_bits(scores)[1] = as_bits(torch.zeros(1).to(dtype))
            for kept in (1, cols // 7, cols // 2, cols - 1):
                assert equal(mask_rows(scores, kept)[0], keep(scores, kept))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_threads_that_share_a_row(dtype, rows):
    """Ties in every part, of which some parts keep all, one keeps some and the rest none."""
    for make in (few_values, random_bits):
        scores = make((rows, COLUMNS[-1]), dtype, seed=rows)
        for kept in (0, COLUMNS[-1] // 3, COLUMNS[-1] // 2, COLUMNS[-1]):
            want = keep(scores, kept)
            for threads in (1, 2, 3, 300):
                mask, status = mask_rows(scores, kept, threads=threads)
                assert equal(mask, want) and status.item() == NOTHING


def extremes(dtype) -> tuple[float, float]:
    """A small and a large scale, at which no number of a normal distribution is zero or past the highest."""
    if dtype == torch.int8:
        return 1.0, 25.0
    info = torch.finfo(dtype)
    return info.tiny * 8, min(info.max / 16, 1e30)


# Rows one below the other, of a standard normal x each: where to look first in one is told by the one before.
SEQUENCES = {
    "alike": lambda x, small, large: x * large,
    "their scales rise": lambda x, small, large: x * np.geomspace(small, large, len(x))[:, None],
    "their scales fall": lambda x, small, large: x * np.geomspace(large, small, len(x))[:, None],
    "their scales alternate": lambda x, small, large: x * np.resize([small, large], len(x))[:, None],
    "their signs alternate": lambda x, small, large: abs(x) * np.resize([large, -large], len(x))[:, None],
    "each of one number": lambda x, small, large: np.linspace(-4 * large, 4 * large, len(x))[:, None] + 0 * x,
    "one number, then many": lambda x, small, large: x * np.resize([0.0, 0.0, large], len(x))[:, None],
    "they come near the highest": lambda x, small, large: x / 8 * large + np.linspace(0, 4.5 * large, len(x))[:, None],
    "they come near the lowest": lambda x, small, large: x / 8 * large - np.linspace(0, 4.5 * large, len(x))[:, None],
    "one row again and again": lambda x, small, large: x[:1] * large + 0 * x,
}


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_a_row_owes_nothing_to_the_row_before(dtype, sequence):
    """Whoever has which row, in whatever order."""
    cols = 1100  # a sample, a rest of a word
    x = np.random.default_rng(0).normal(size=(40, cols)).clip(-4, 4)
    rows = SEQUENCES[sequence](x, *extremes(dtype))
    scores = torch.from_numpy(rows.clip(-128, 127) if dtype == torch.int8 else rows).to(dtype)
    for kept in (1, cols // 3, cols // 2, cols - 1):
        want = keep(scores, kept)
        for threads in (1, 3):
            mask, status = mask_rows(scores, kept, threads=threads)
            assert equal(mask, want) and status.item() == NOTHING
    assert equal(mask_rows(scores.flip(0), kept, threads=1)[0], want.flip(0))


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_as_many_ties_as_are_put_aside_and_one_more(dtype):
    """kFew of format24_search.h is 96. The numbers next above and next below are all the others, so that a bracket one key too wide
    holds everything; the ties that are kept end in the first word, in a later one, and with the row."""
    cols, rows = 3000, 3  # columns: three of the steps in which ties are counted
    for tied in (1, 95, 96, 97, 2000):
        higher = (cols - tied) // 3
        for cut in (3.0, -3.0):
            numbers = torch.full((rows, cols), cut).to(dtype)
            order = torch.rand(rows, cols, generator=torch.Generator().manual_seed(tied)).argsort(dim=1)
            up = 1 if cut > 0 or not dtype.is_floating_point else -1  # of a negative number's bits
            bits = as_bits(numbers)
            bits.scatter_add_(1, order[:, :higher], torch.full_like(bits[:, :higher], up))
            bits.scatter_add_(1, order[:, higher + tied :], torch.full_like(bits[:, higher + tied :], -up))
            for room in {0, 1, tied // 2, tied - 1, tied}:
                mask, status = mask_rows(numbers, higher + room, threads=1)
                assert equal(mask, keep(numbers, higher + room)) and status.item() == NOTHING


@pytest.mark.parametrize("edge", [1, -1], ids=["the highest", "the lowest"])
@pytest.mark.parametrize("cols", COLUMNS[1:])
@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_a_cut_at_an_edge_of_a_bracket_that_holds_too_much(dtype, cols, edge):
    """The sample sees 10 and -10 alone: between them lies the cut, the key next to one of them, of which 40 % of the row are, more
    than a list has room for. A bracket that is one key narrower than what is known loses it.

    One that is a key wider finds the same: of a shared row every answer is made of the counts of the pass that gave it, and what is
    between only says where to look next. So `low = b.low` for `b.low + 1` there, and `high = b.high + 1` for `b.high`, are no
    mistakes that a test could see."""
    ten = torch.tensor([10.0, -10.0, 20.0, -20.0]).to(dtype)
    inside = ten.clone()
    as_bits(inside)[:2] += -1 if dtype.is_floating_point else torch.tensor([-1, 1], dtype=torch.int8)
    shares = [0.0, 0.4, 0.3, 0.3] if edge < 0 else [0.4, 0.0, 0.3, 0.3]
    g = np.random.default_rng(cols)
    row = inside[torch.from_numpy(g.choice(4, cols, p=shares))]
    row[sampled(cols, dtype)] = ten[torch.arange(len(sampled(cols, dtype))) % 2]
    scores = row[None]
    kept = cols // 2
    mask, status = mask_rows(scores, kept)
    assert equal(mask, keep(scores, kept)) and status.item() == NOTHING


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=named)
def test_a_sample_of_a_very_long_row_has_room(dtype):
    """More of it is sampled than of a shorter one; turned over first, so that its copy lies behind the sample."""
    scores = few_values((1, 2**21 + 5), dtype)
    mask, status = mask_rows(viewed(scores, "every third column of every second row"), 2**20)
    assert equal(mask, keep(scores, 2**20)) and status.item() == NOTHING


@pytest.mark.parametrize("dtype", [d for d in SCORES if d.is_floating_point], ids=named)
@pytest.mark.parametrize("cols", COLUMNS)
def test_a_nan_is_found_wherever_it_is(dtype, cols):
    """Of either sign: they rank above all numbers or below, so that the search itself may pass them by."""
    for place in (0, cols // 2, cols - 1):
        for sign in (0, 1):
            scores = torch.ones((3, cols), dtype=torch.float64).to(dtype)
            as_bits(scores)[1, place] = -1 if sign else torch.iinfo(as_bits(scores).dtype).max
            for kept in (0, 5, cols):
                assert mask_rows(scores, kept)[1].item() == 1
