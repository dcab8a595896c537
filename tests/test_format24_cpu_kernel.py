"""The CPU kernels of the 2:4 format, called by address, on every instruction set that this CPU has.

The truth is definition24.py; format24_cpu.py makes the calls and looks for bytes written outside."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import format24_cpu
import pytest
import torch
from definition24 import (
    DTYPES,
    FLOATS,
    INTEGERS,
    NIBBLES,
    NOTHING,
    SCORES,
    VIEWS,
    as_bits,
    best,
    check,
    clean,
    equal,
    few_values,
    for_sums,
    keep_nm,
    keep_rows,
    named,
    nonzero_groups,
    pack_largest,
    pack_masked,
    pack_nonzero,
    pack_scored,
    random_bits,
    unpack,
    viewed,
)
from format24_cpu import CODE, compress24, expand24, mask_nm, mask_rows, prune24, prune_compress24, validate24
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import _C

# Every tail of a word of 64 columns and of a byte of metadata; words, and a tile of 32 of them, with and without a rest.
COLUMNS = [*range(1, 21), 63, 64, 65, 66, 127, 128, 129, 130, 260, 2048, 2051]
SHAPES = [
    (1, 4),
    (70, 84),  # two tiles of a transposed matrix both ways
    (33, 3),  # more rows than a tile has
    (130, 200),  # several tasks
    (2, 2064),  # rows that fold
    (0, 8),
    (3, 0),
]


def agrees(w, want, view=lambda x: x, **rank):
    """prune_compress24 gives `want`, prune24 the same in dense form, and neither complains."""
    values, meta, status = prune_compress24(view(w), **rank)
    assert equal(meta, want[1]) and equal(values, want[0]) and clean(status)
    dense, status = prune24(view(w), **rank)
    assert equal(dense, unpack(*want, w.shape[1])) and clean(status)


# ---- prune, compress, expand ----


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_the_two_largest_of_every_number_of_columns(dtype):
    for cols in COLUMNS:
        for w in (random_bits((3, cols), dtype, seed=cols), few_values((3, cols), dtype, seed=cols)):
            want = pack_largest(w)
            agrees(w, want)
            assert equal(expand24(*want, cols), unpack(*want, cols))


@pytest.mark.parametrize("lines", [True, False], ids=["aligned", "at odd addresses"])
@pytest.mark.parametrize("cols", [1080, 1083], ids=["one long row", "rows that are no lines"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8], ids=named)
def test_large_matrices(dtype, cols, lines, monkeypatch):
    """From 4 MiB on, what is written goes past the caches, but for the ends of rows that share a line. Such a matrix is 256 times
    one small enough for the definition, one below the other."""
    monkeypatch.setattr(format24_cpu.Output, "lines", lines)
    w = random_bits(((1 << 14) // (cols * dtype.itemsize) + 5, cols), dtype, seed=3)
    values, meta = pack_largest(w)
    held = unpack(values, meta, cols)
    mask, sums = nonzero_groups(torch.ones(w.shape, dtype=torch.uint8), 1), for_sums(w.shape, dtype, seed=3)

    def large(x):
        return x.view(torch.uint8).repeat(256, 1).view(x.dtype)

    for function, x, want in (
        (prune_compress24, w, (values, meta)),
        (lambda x: prune_compress24(x, mask=large(mask)), w, pack_masked(w, mask)),
        (compress24, held, pack_nonzero(held)),
        (prune24, w, (held,)),
        (lambda x: mask_nm(x, 2, 4, pairs=True), sums, (keep_nm(sums, 2, 4, pairs=True),)),
    ):
        *got, status = function(large(x))
        assert all(equal(a, large(b)) for a, b in zip(got, want, strict=True)) and clean(status)


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_every_layout_gives_the_same(how, dtype):
    for shape in SHAPES:
        w = few_values(shape, dtype, seed=2)
        want = pack_largest(w)
        agrees(w, want, lambda x: viewed(x, how))
        held = unpack(*want, shape[1])
        values, meta, status = compress24(viewed(held, how))
        assert equal(values, pack_nonzero(held)[0]) and equal(meta, pack_nonzero(held)[1]) and clean(status)
        assert equal(expand24(values, meta, shape[1]), held)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_views_that_repeat_a_row_or_a_column(dtype):
    row, column = random_bits((1, 150), dtype), random_bits((70, 1), dtype)
    for w in (as_bits(row).expand(40, 150), as_bits(column).expand(70, 150), as_bits(column)[:1].expand(40, 150)):
        whole = w.contiguous().view(dtype)
        agrees(whole, pack_largest(whole), lambda _, w=w: w.view(dtype))


@pytest.mark.parametrize("scores_dtype", SCORES, ids=named)
@pytest.mark.parametrize("how", VIEWS)
def test_scores_decide(scores_dtype, how):
    """Negative ones too: a column past the end loses to every one that is there."""
    for shape, dtype in zip([(6, 16), (5, 13), (3, 71), (67, 130), (3, 129)], DTYPES):
        w = random_bits(shape, dtype, seed=2)
        for scores in (random_bits(shape, scores_dtype, seed=3), few_values(shape, scores_dtype, seed=4)):
            want = pack_scored(w, scores)
            agrees(w, want, scores=viewed(scores, how))
            agrees(w, want, lambda x: viewed(x, "transposed"), scores=viewed(scores, how))
            agrees(w, want, lambda x: viewed(x, how), scores=scores)


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_the_lowest_score_is_above_what_is_past_the_end(dtype):
    lowest = best_of(dtype, -1)
    for cols in (1, 2, 3, 5, 61, 62, 63, 65):
        w, scores = random_bits((2, cols), torch.bfloat16), lowest.expand(2, cols)
        agrees(w, pack_scored(w, scores.contiguous()), scores=scores)
        assert equal(mask_nm(scores, 2, 4)[0], keep_nm(scores, 2, 4))
        assert equal(mask_nm(scores, 2, 5)[0], keep_nm(scores, 2, 5))


def best_of(dtype, sign):
    """The highest number of a dtype, or the lowest; an infinity where there is one."""
    if dtype == torch.int8:
        return torch.tensor([[127 if sign > 0 else -128]], dtype=dtype)
    end = torch.finfo(dtype).max if dtype == torch.float8_e4m3fn else float("inf")
    return torch.tensor([[sign * end]], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("per_group", [2, 1], ids=["full", "under-full"])
def test_a_mask_is_kept_as_given(dtype, per_group):
    """Zeros that it keeps stay kept; weights that it drops are gone even from the places that fill a group up."""
    for shape in [(6, 16), (5, 13), (3, 70), (66, 140)]:
        for w in (few_values(shape, dtype, seed=5), random_bits(shape, dtype, seed=6)):
            mask = nonzero_groups(torch.randint(1, 256, shape, dtype=torch.uint8), per_group)
            want = pack_masked(w, mask)
            for how in VIEWS:
                agrees(w, want, mask=viewed(mask, how))
                agrees(w, want, lambda x, how=how: viewed(x, how), mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_compress24_keeps_non_zeros_then_the_lowest_free_columns(dtype):
    for cols in COLUMNS:
        for per_group in (2, 1):
            for w in (few_values((3, cols), dtype, seed=cols), random_bits((3, cols), dtype, seed=cols)):
                w = nonzero_groups(w, per_group)
                values, meta, status = compress24(w)
                want = pack_nonzero(w)
                assert equal(meta, want[1]) and equal(values, want[0]) and clean(status)


@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_minus_zero_is_stored_as_zero(dtype):
    w = torch.full((3, 70), -0.0).to(dtype)
    scores, mask = few_values((3, 70), torch.float32), nonzero_groups(torch.ones(3, 70, dtype=torch.uint8), 2)
    for found in (compress24(w), prune_compress24(w), prune_compress24(w, scores), prune_compress24(w, mask=mask), prune24(w)):
        assert not as_bits(found[0]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_expand24_places_every_pair_of_nibbles(dtype):
    """At every place of a word of 64 columns, and with every number of columns cut off."""
    meta = torch.tensor([low | high << 4 for low in NIBBLES.values() for high in NIBBLES.values()], dtype=torch.uint8)
    meta = torch.stack([meta.roll(shift) for shift in range(8)])
    values = random_bits((8, 144), dtype, seed=6)
    for cols in range(281, 289):
        assert equal(expand24(values, meta, cols), unpack(values, meta, cols))


@pytest.mark.parametrize("path", format24_cpu.PATHS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_expand24_of_any_metadata_stays_inside(size, path, monkeypatch):
    """The numbers mean nothing, but they are the row's values or zeros and nothing beside them is touched."""
    monkeypatch.setattr(format24_cpu, "PATHS", [path])  # each has another nothing
    g = torch.Generator().manual_seed(size)
    meta = torch.randint(0, 256, (5, 40), dtype=torch.uint8, generator=g)
    values = torch.full((5, 160), 7, dtype=INTEGERS[size])
    for cols in (320, 313):
        assert set(expand24(values, meta, cols).unique().tolist()) <= {0, 7}


# ---- what is reported ----


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS, torch.float8_e5m2], ids=named)
def test_every_nan_and_nothing_else_is_one(dtype):
    """All patterns of the narrow dtypes; of the wide, those about the ends of the exponent, at each place of a word."""
    if dtype.itemsize <= 2:
        bits = torch.arange(2 ** (8 * dtype.itemsize)).to(INTEGERS[dtype.itemsize])
    else:
        top = as_bits(torch.tensor([float("inf"), -float("inf")], dtype=dtype))
        sign = torch.iinfo(top.dtype).min
        bits = torch.cat([top, top + 1, top - 1, torch.tensor([-1, -1 - sign, sign, 0, 1], dtype=top.dtype)])
    numbers = bits.view(dtype)
    for i in range(0, len(numbers), 61 if dtype.itemsize == 2 else 1):
        scores = torch.zeros(3, 70, dtype=torch.float64).to(dtype)
        place = i % 70
        as_bits(scores)[1, place] = bits[i]
        nan = bool(numbers[i].double().isnan())
        assert mask_nm(scores, 2, 4)[1].tolist() == [18 + place // 4 if nan else NOTHING]
        assert mask_nm(scores, 2, 7)[1].tolist() == [10 + place // 7 if nan else NOTHING]
        assert mask_nm(scores, 2, 4, pairs=True)[1].tolist() == [9 + place // 8 if nan else NOTHING]
        assert mask_rows(scores, 5)[1].tolist() == [1 if nan else NOTHING]
        want = [18 + place // 4 if nan else NOTHING, NOTHING]
        assert prune_compress24(torch.ones(3, 70), scores)[2].tolist() == want
        assert prune24(torch.ones(3, 70, dtype=torch.int8), scores)[1].tolist() == want
        if dtype in DTYPES:
            assert prune_compress24(scores)[2].tolist() == want
            for rank in ({"scores": torch.ones(3, 70)}, {"mask": torch.zeros(3, 70, dtype=torch.uint8)}):
                assert prune24(scores, **rank)[1].tolist() == prune_compress24(scores, **rank)[2].tolist() == want
            assert compress24(scores)[2].tolist() == want


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("shape", [(3, 21), (67, 132), (2, 6000), (700, 8)], ids=str)
def test_the_first_bad_group_is_named(how, shape):
    """Whoever finds it, and wherever: in the order of rows and columns, not of tiles."""
    rows, cols = shape
    groups = 2 * -(-cols // 8)
    good = nonzero_groups(random_bits(shape, torch.float16), 2)
    last = (rows - 1, cols - 1)
    for places in ([last], [(rows - 1, 1), (rows - 2, cols - 1)], [(rows - 1, 0), (1, cols - 2), (1, cols - 1)], [(0, 3), last]):
        first = min(row * groups + col // 4 for row, col in places)
        w, scores, over = good.clone(), torch.ones(shape), good.clone()
        wrong = NOTHING
        for row, col in places:
            w[row, col] = scores[row, col] = float("nan")
            four = slice(col // 4 * 4, col // 4 * 4 + 3)
            over[row, four] = 1
            if len(over[row, four]) == 3:
                wrong = min(wrong, row * groups + col // 4)
        w, scores, over = (viewed(x, how) for x in (w, scores, over))
        assert prune_compress24(w)[2].tolist() == prune24(w)[1].tolist() == [first, NOTHING]
        assert prune_compress24(good, scores)[2].tolist() == prune24(good, scores)[1].tolist() == [first, NOTHING]
        assert compress24(w)[2].tolist()[0] == first
        assert compress24(over)[2].tolist() == [NOTHING, wrong]
        mask = viewed((over != 0).to(torch.uint8), how)
        assert prune_compress24(good, mask=mask)[2].tolist() == prune24(good, mask=mask)[1].tolist() == [NOTHING, wrong]
        for m in (3, 4, 8, 11, 32):
            bad = scores.isnan().nonzero().tolist()
            assert mask_nm(scores, 1, m)[1].item() == min(row * -(-cols // m) + col // m for row, col in bad)
            assert mask_nm(scores, 1, m, True)[1].item() == min(row * -(-cols // (2 * m)) + col // (2 * m) for row, col in bad)
        assert mask_rows(scores, 3)[1].item() == min(row for row, _ in places)


@pytest.mark.parametrize("kept", range(16), ids="{:04b}".format)
def test_more_than_two_of_four(kept):
    for group in range(17):
        w = torch.zeros(1, 68)
        w[0, 4 * group : 4 * group + 4] = torch.tensor([float(kept >> i & 1) for i in range(4)])
        bad = [NOTHING, group if kept.bit_count() > 2 else NOTHING]
        assert compress24(w)[2].tolist() == bad
        assert prune_compress24(w, mask=(w != 0).to(torch.uint8))[2].tolist() == bad
        assert prune_compress24(w)[2].tolist() == [NOTHING, NOTHING]


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_validate24(dtype):
    g = torch.Generator().manual_seed(1)
    for cols in (*range(1, 18), 63, 66, 130):
        values, meta = pack_largest(random_bits((4, cols), dtype, seed=cols))
        assert validate24(values, meta, cols) == [NOTHING, NOTHING]
        wild = torch.randint(0, 256, meta.shape, dtype=torch.uint8, generator=g)
        assert validate24(values, wild, cols) == check(values, wild, cols)
        pairs = torch.tensor(list(NIBBLES.values()), dtype=torch.uint8)[torch.randint(6, (2, *meta.shape), generator=g)]
        held = random_bits(values.shape, dtype, seed=cols)
        for part in (held, nonzero_groups(held, 1), few_values(values.shape, dtype)):
            assert validate24(part, pairs[0] | pairs[1] << 4, cols) == check(part, pairs[0] | pairs[1] << 4, cols)


@pytest.mark.parametrize("nibble", range(16), ids="{:X}".format)
def test_which_nibbles_are_valid(nibble):
    for place in range(40):
        meta = torch.full((2, 10), 0x4E, dtype=torch.uint8)
        row, byte, half = place // 20, place // 2 % 10, place % 2
        meta[row, byte] = meta[row, byte] & (0xF0 >> 4 * half) | nibble << 4 * half
        bad = NOTHING if nibble in NIBBLES.values() else place
        assert validate24(torch.zeros(2, 40), meta, 80) == [bad, NOTHING]


@pytest.mark.parametrize("places", [[0], [1023], [1024], [70_001, 1025], [262_000, 131_071], [262_399]], ids=str)
def test_the_first_bad_nibble_of_much_metadata(places):
    """Within a step of 512 bytes, at its ends, in several tasks of 65536, in what is left after the last whole step."""
    meta = torch.full((2, 65_600), 0x4E, dtype=torch.uint8)
    for place in places:
        meta.view(-1)[place // 2] = 0x47 if place % 2 == 0 else 0x7E
    assert validate24(torch.zeros(2, 262_400, dtype=torch.int8), meta, 524_800) == [min(places), NOTHING]


def test_validate24_takes_a_nan_for_a_value_and_minus_zero_for_none():
    meta = torch.full((1, 2), 0xEE, dtype=torch.uint8)  # columns 2, 3, 6, 7 of each eight
    for dtype in FLOATS:
        values = torch.full((1, 8), -0.0).to(dtype)
        assert validate24(values, meta, 11) == [NOTHING, NOTHING]
        as_bits(values)[0, 6] = -1
        assert validate24(values, meta, 11) == [NOTHING, 6] and validate24(values, meta, 15) == [NOTHING, NOTHING]


# ---- masks ----


@pytest.mark.parametrize("dtype", SCORES, ids=named)
@pytest.mark.parametrize("m", range(1, 33))
def test_mask_nm(m, dtype):
    cols = [m, 1, 3 * m + m // 2 + 1, 70, 131][(m + CODE[dtype]) % 2 :: 2] + [260]
    for n in {0, 1, m // 2, m - 1, m}:
        for scores in (random_bits((3, cols[n % 3]), dtype, seed=m), few_values((3, cols[n % 3]), dtype, seed=n)):
            mask, status = mask_nm(scores, n, m)
            assert equal(mask, keep_nm(scores, n, m)) and clean(status)


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_pairs(dtype):
    """Odd numbers of columns too: what has no partner stands alone."""
    for m, n in [(4, 2), (1, 1), (2, 1), (3, 1), (8, 5), (31, 7), (32, 16)]:
        for cols in (2 * m, 2 * m + 1, 131, 4200 + m % 2):
            for scores in (for_sums((2, cols), dtype, m), few_values((2, cols), dtype, n)):
                mask, status = mask_nm(scores, n, m, pairs=True)
                assert equal(mask, keep_nm(scores, n, m, pairs=True)) and clean(status)


@pytest.mark.parametrize("dtype", [d for d in SCORES if d.itemsize == 1], ids=named)
def test_every_sum_of_a_byte_is_that_of_fp32(dtype):
    """Each number against each: a pair of it and zero ranks against a pair of another and zero, and ties are ties."""
    bits = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    numbers = bits[~bits.view(dtype).double().isnan()]
    left, right = numbers.repeat_interleave(len(numbers)), numbers.repeat(len(numbers))
    scores = torch.stack([left, torch.zeros_like(left), right, torch.zeros_like(left)], 1).view(dtype)
    mask = mask_nm(scores, 1, 2, pairs=True)[0]
    assert torch.equal(mask[:, 0] == 1, left.view(dtype).double() >= right.view(dtype).double())
    assert torch.equal(mask.sum(1), torch.full((len(mask),), 2))


@pytest.mark.parametrize("dtype", [d for d in SCORES if d.itemsize == 1], ids=named)
def test_every_pair_of_bytes_ranks_by_its_sum(dtype):
    """Each pair against the next higher and the next lower one: in the order of the sums all of them are told apart."""
    bits = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    numbers = bits[bits.view(dtype).double().isfinite()]
    pairs = torch.cartesian_prod(numbers, numbers).contiguous()
    sums = pairs.view(dtype).double().float().sum(1)
    up = sums.argsort()
    for order in (up, up.flip(0)):
        two = torch.cat([pairs[order[:-1]], pairs[order[1:]]], 1).view(dtype)
        mask = mask_nm(two, 1, 2, pairs=True)[0]
        assert torch.equal(mask[:, 0] == 1, sums[order[:-1]] >= sums[order[1:]])
        assert torch.equal(mask[:, 1:], torch.stack([mask[:, 0], 1 - mask[:, 0], 1 - mask[:, 0]], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2], ids=named)
def test_infinity_minus_infinity_is_reported(dtype):
    scores = torch.zeros(4, 130, dtype=torch.float64)
    scores[2, 100], scores[2, 101] = float("inf"), -float("inf")
    scores[3, 3], scores[3, 4] = float("inf"), -float("inf")  # not a pair
    status = mask_nm(scores.to(dtype), 2, 4, pairs=True)[1]
    assert status.tolist() == [2 * 17 + 12]


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_masks_of_every_layout(how, dtype):
    for shape in SHAPES:
        scores = few_values(shape, dtype, seed=8)
        x = viewed(scores, how)
        for n, m in [(2, 4), (3, 8), (1, 3), (9, 32)]:
            mask, status = mask_nm(x, n, m)
            assert equal(mask, keep_nm(scores, n, m)) and clean(status)
            mask, status = mask_nm(x, n, m, pairs=True)
            assert equal(mask, keep_nm(scores, n, m, pairs=True)) and clean(status)
        for kept in {0, shape[1] // 3, shape[1]}:
            mask, status = mask_rows(x, kept)
            assert equal(mask, keep_rows(scores, kept)) and clean(status)


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_mask_rows(dtype):
    for cols in [*range(1, 10), 63, 64, 65, 130, 700]:
        for scores in (random_bits((2, cols), dtype, seed=cols), few_values((2, cols), dtype, seed=cols)):
            for kept in {0, 1, cols // 3, cols // 2, cols - 1, cols}:
                mask, status = mask_rows(scores, kept)
                assert equal(mask, keep_rows(scores, kept)) and clean(status)


def test_scores_of_fp64_are_not_narrowed():
    scores = torch.tensor([[1.0, 1.0 + 2**-50, 1.0 + 2**-51, 1.0]], dtype=torch.float64)
    assert prune_compress24(torch.ones(1, 4), scores)[1].item() & 15 == NIBBLES[1, 2]
    assert mask_nm(scores, 1, 4)[0].tolist() == [[0, 1, 0, 0]] and mask_rows(scores, 2)[0].tolist() == [[0, 1, 1, 0]]
    sums = torch.cat([scores, scores.flip(1)], 1)
    assert mask_nm(sums, 1, 4, pairs=True)[0].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    sums[0, 0] += 2**-51
    sums[0, 6] += 2**-50
    assert mask_nm(sums, 1, 4, pairs=True)[0].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]


@given(st.data())
def test_n_of_m_by_the_sorted_order(data):
    """Any shape, dtype and pattern, one group at a time."""
    dtype, m = data.draw(st.sampled_from(SCORES)), data.draw(st.integers(1, 32))
    n, cols = data.draw(st.integers(0, m)), data.draw(st.integers(1, 150))
    make, seed = data.draw(st.sampled_from([random_bits, few_values])), data.draw(st.integers(0, 2**31))
    scores = make((2, cols), dtype, seed=seed)
    mask = mask_nm(viewed(scores, data.draw(st.sampled_from(VIEWS))), n, m)[0]
    for start in range(0, cols, m):
        for row in range(2):
            kept = mask[row, start : start + m].nonzero().flatten().tolist()
            assert kept == best(scores[row, start : start + m].double().tolist(), n)


# ---- threads, memory, arguments ----


def everything(w, scores, mask, threads):
    """What every op gives for one weight, with scores and a mask for it."""
    values, meta, status = prune_compress24(w, scores, threads=threads)
    cols = w.shape[1]
    return [
        values, meta, status, *prune_compress24(w, threads=threads), *prune24(w, threads=threads),
        *prune24(w, scores, threads=threads), *prune_compress24(w, mask=mask, threads=threads),
        expand24(values, meta, cols, threads=threads), *compress24(expand24(values, meta, cols), threads=threads),
        *mask_nm(scores, 3, 8, threads=threads), *mask_nm(scores, 2, 4, True, threads=threads),
        *mask_rows(scores, cols // 3, threads=threads), torch.tensor(validate24(values, meta, cols, threads=threads)),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(300, 1100), (1, 400_001), (60_001, 6)], ids=str)
@pytest.mark.parametrize("how", VIEWS)
def test_threads_change_no_bit(how, shape):
    """Enough for more than three threads; repeated, since tasks go to whichever thread is free. One is the definition."""
    w, scores = random_bits(shape, torch.bfloat16), few_values(shape, torch.float32)
    mask = nonzero_groups(torch.ones(shape, dtype=torch.uint8), 2)
    w, scores, mask = (viewed(x, how) for x in (w, scores, mask))
    one = everything(w, scores, mask, 1)
    if shape[0] == 300:
        assert equal(one[0], pack_scored(w, scores)[0]) and equal(one[1], pack_scored(w, scores)[1])
    for threads in (3, 300):
        assert all(equal(a, b) for a, b in zip(one, everything(w, scores, mask, threads)))


def test_callers_at_the_same_time():
    problems = []
    for seed, dtype in enumerate(DTYPES):
        w, scores = random_bits((200, 530), dtype, seed), few_values((200, 530), torch.float32, seed)
        mask = nonzero_groups(torch.ones(200, 530, dtype=torch.uint8), 2, seed)
        problems.append((w, scores, mask, everything(w, scores, mask, 1)))

    def again(i):
        *problem, expected = problems[i % len(problems)]
        return all(equal(a, b) for a, b in zip(everything(*problem, 3), expected))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(again, range(60)))


WALLS = """
import sys
sys.path.insert(0, {folder!r})
import torch
from test_linear24_cpu_kernel import before_a_wall
import test_format24_cpu_kernel as t


def walled(x):
    # The address of the first element of a copy that ends where memory does.
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return before_a_wall(t.as_bits(x).as_strided((extent,), (1,)))


t._C.set_cpu_isa({isa!r})
for dtype in t.SCORES:
    for shape in [(1, 1), (3, 5), (2, 13), (5, 64), (3, 66), (2, 127), (66, 130), (1, 4500)]:
        for how in ("row-major", "transposed"):
            rows, cols = shape
            blocks = -(-cols // 8)
            x = t.viewed(t.random_bits(shape, dtype), how)
            mask = t.viewed(t.nonzero_groups(torch.ones(shape, dtype=torch.uint8), 2), how)
            address, strides, status = walled(x), x.stride(), before_a_wall(torch.zeros(2, dtype=torch.int64))
            w = t.viewed(t.random_bits(shape, torch.bfloat16), how)
            at = walled(w)
            sizes = (8 * rows * blocks, rows * blocks, 2 * rows * cols)
            out = [before_a_wall(torch.empty(n, dtype=torch.uint8)) for n in sizes]
            scored = (at, *shape, *w.stride(), 2, address, 1, t.CODE[x.dtype], *strides)
            t._C.prune_compress24_cpu(*scored, *out[:2], status, 2)
            t._C.prune24_cpu(*scored, out[2], status, 2)
            t._C.expand24_cpu(*out[:2], 2, *shape, out[2], 2)
            t._C.validate24_cpu(*out[:2], 2, *shape, status, 2)
            flags = before_a_wall(torch.empty(rows * cols, dtype=torch.uint8))
            for n, m, pairs in [(2, 4, False), (3, 7, False), (2, 4, True), (5, 32, True)]:
                t._C.mask_nm_cpu(address, *shape, *strides, t.CODE[x.dtype], n, m, pairs, flags, status, 2)
            t._C.mask_rows_cpu(address, *shape, *strides, t.CODE[x.dtype], cols // 2, flags, status, 2)
            if dtype in t.DTYPES:
                size = dtype.itemsize
                kept = before_a_wall(torch.empty(4 * rows * blocks * size, dtype=torch.uint8))
                dense = before_a_wall(torch.empty(rows * cols * size, dtype=torch.uint8))
                own = (address, *shape, *strides, t.CODE[x.dtype])
                t._C.compress24_cpu(*own, kept, out[1], status, 2)
                t._C.prune_compress24_cpu(*own, 0, 0, 0, 0, 0, kept, out[1], status, 2)
                t._C.prune24_cpu(*own, walled(mask), 2, 0, *mask.stride(), dense, status, 2)
                t._C.expand24_cpu(kept, out[1], size, *shape, dense, 2)
            before_a_wall.keep.clear()
print("done")
"""


@pytest.mark.parametrize("isa", format24_cpu.PATHS)
def test_nothing_is_read_or_written_past_an_array(isa):
    """Every array ends at a page that may not be touched; one step too far ends the process."""
    code = WALLS.format(folder=str(Path(__file__).parent), isa=isa)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr[-2000:]


AT = torch.zeros(64, dtype=torch.int64)
MATRIX = dict(rows=2, cols=8, row_stride=8, col_stride=1, dtype=0)
PRUNE = dict(
    rows=2, cols=8, w_row_stride=8, w_col_stride=1, dtype=0, rank_kind=1, rank_dtype=0, rank_row_stride=8, rank_col_stride=1
)
RIGHT = {
    "compress24_cpu": (("w", "values", "meta", "status"), MATRIX),
    "prune_compress24_cpu": (("w", "rank", "values", "meta", "status"), PRUNE),
    "prune24_cpu": (("w", "rank", "out", "status"), PRUNE),
    "expand24_cpu": (("values", "meta", "out"), dict(itemsize=4, rows=2, cols=8)),
    "mask_nm_cpu": (("scores", "mask", "status"), MATRIX | dict(n=2, m=4, pairs=False)),
    "mask_rows_cpu": (("scores", "mask", "status"), MATRIX | dict(kept=3)),
    "validate24_cpu": (("values", "meta", "status"), dict(dtype=0, rows=2, cols=8)),
}
WRONG = {
    "rows": -1, "cols": 2**60, "row_stride": -1, "col_stride": 2**62, "w_row_stride": -1, "w_col_stride": -1, "rank_row_stride": -1,
    "rank_col_stride": -1, "dtype": 7, "rank_kind": 3, "rank_dtype": 7, "itemsize": 3, "n": 5, "m": 33, "kept": 9, "threads": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_arguments_are_checked(name):
    pointers, sizes = RIGHT[name]
    right = {pointer: AT.data_ptr() for pointer in pointers} | sizes | {"threads": 1}
    function = getattr(_C, name)
    function(**right)
    for argument, value in WRONG.items():
        if argument in right:
            with pytest.raises(ValueError, match=f"^{name}: {argument} must be .*got {value}$"):
                function(**right | {argument: value})
    for pointer in pointers:
        with pytest.raises(ValueError, match=f"^{name}: {pointer} must be the address of its data, got 0$"):
            function(**right | {pointer: 0})
        with pytest.raises(TypeError, match="incompatible function arguments"):
            function(**right | {pointer: AT})
    nothing = {pointer: 0 for pointer in pointers if pointer != "status"}
    function(**right | {"rows": 0} | nothing)
