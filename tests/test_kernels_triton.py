"""The Triton kernels against the definition of what they compute, which definition24.py gives in plain Python.

Without a CUDA device they run in Triton's interpreter. That has to be chosen before Triton is imported, so this file then runs
itself in a process of its own; TRITON_INTERPRET=1 in the environment runs the tests here, one by one.
"""

import functools
import importlib
import operator
import random

import definition24
import pytest
import torch
from definition24 import (
    DTYPES,
    FLOATS,
    NIBBLES,
    NOTHING,
    SCORES,
    SHAPES,
    VIEWS,
    as_bits,
    drop,
    equal,
    few_values,
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
)
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, IN_A_PROCESS_OF_ITS_OWN, launches, patched_once, poisoned_memory, run_in_the_interpreter  # noqa: F401

pytest.importorskip("triton")

import triton
import triton.language as tl

from sparsekit import format, reference
from sparsekit.format import FRAGMENT_DTYPES, Sparse24, to_fragments
from sparsekit.kernels.bits import largest, to_float
from sparsekit.kernels.compress24 import compress24
from sparsekit.kernels.expand24 import expand24
from sparsekit.kernels.expand_fragments import expand_fragments
from sparsekit.kernels.mask_nm import mask_nm
from sparsekit.kernels.mask_rows import mask_rows
from sparsekit.kernels.prune24 import prune24
from sparsekit.kernels.prune_compress24 import prune_compress24
from sparsekit.kernels.tiles import tiling
from sparsekit.kernels.validate24 import validate24

viewed = functools.partial(definition24.viewed, device=DEVICE)


# ---- prune_compress24, prune24, compress24, expand24 ----


def check_pruned(w: torch.Tensor, want_values: torch.Tensor, want_meta: torch.Tensor, **by):
    values, meta, status = prune_compress24(w, **by)
    assert equal(meta, want_meta) and equal(values, want_values)
    out, out_status = prune24(w, **by)
    assert out.is_contiguous() and equal(out, unpack(want_values, want_meta, w.shape[1]))
    assert status.tolist() == out_status.tolist() == [NOTHING, NOTHING]


@pytest.mark.parametrize("shape", SHAPES, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_the_two_largest_are_kept(shape, dtype):
    for w in (random_bits(shape, dtype), few_values(shape, dtype)):
        check_pruned(w.to(DEVICE), *pack_largest(w))


@pytest.mark.sanitize
@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=named)
def test_every_layout_gives_the_same(how, dtype):
    # A tile of a transposed matrix is 32, 64 or 128 rows tall and 64 columns wide.
    for shape in [(5, 24), (66, 70), (1, 8), (8, 1)]:
        w = few_values(shape, dtype)
        check_pruned(viewed(w, how), *pack_largest(w))
        held = unpack(*pack_largest(w), shape[1])
        values, meta, _ = compress24(viewed(held, how))
        assert equal(values, pack_largest(held)[0]) and equal(meta, pack_largest(held)[1])


@pytest.mark.parametrize("scores_dtype", SCORES, ids=named)
@pytest.mark.parametrize("how", ["row-major", "transposed"])
def test_scores_decide(scores_dtype, how):
    # Negative scores too: a column that is missing loses to every one that is there.
    for shape in [(6, 16), (5, 13), (3, 71)]:
        w = random_bits(shape, torch.bfloat16, seed=2)
        for scores in (random_bits(shape, scores_dtype, seed=3), few_values(shape, scores_dtype, seed=4)):
            check_pruned(w.to(DEVICE), *pack_scored(w, scores), scores=viewed(scores, how))


def test_scores_of_fp64_are_not_narrowed():
    scores = torch.tensor([[1.0, 1.0 + 2**-50, 1.0 + 2**-51, 1.0]], dtype=torch.float64, device=DEVICE)
    _, meta, _ = prune_compress24(torch.ones(1, 4, device=DEVICE), scores=scores)
    assert meta[0, 0] & 15 == NIBBLES[1, 2]
    mask, _ = mask_nm(scores, 1, 4)
    assert mask.tolist() == [[False, True, False, False]]
    mask, _ = mask_rows(scores, 2)
    assert mask.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8], ids=named)
@pytest.mark.parametrize("per_group", [2, 1], ids=["full", "under-full"])
def test_a_mask_is_kept_as_given(dtype, mask_dtype, per_group):
    # Zeros that it keeps stay kept; weights that it drops are gone even from the places that fill a group up.
    for shape in [(6, 16), (5, 13), (3, 70)]:
        w = few_values(shape, dtype, seed=5)
        mask = nonzero_groups(torch.ones(shape, dtype=torch.uint8), per_group)
        for how in ("row-major", "transposed"):
            check_pruned(w.to(DEVICE), *pack_masked(w, mask), mask=viewed(mask, how).view(mask_dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_compress24_keeps_non_zeros_then_the_lowest_free_columns(shape, dtype):
    for per_group in (2, 1):
        w = nonzero_groups(few_values(shape, dtype), per_group)
        values, meta, status = compress24(w.to(DEVICE))
        want_values, want_meta = pack_nonzero(w)
        assert equal(meta, want_meta) and equal(values, want_values)
        assert status.tolist() == [NOTHING, NOTHING]
        assert equal(expand24(values, meta, shape[1]), drop(w, w.double() != 0))


def test_under_full_groups_by_hand():
    groups = [[0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 5, 0], [0, 5, 0, 0], [5, 0, 0, 0], [-0.0, -0.0, -0.0, 5]]
    values, meta, _ = compress24(torch.tensor(groups, device=DEVICE).reshape(1, 24))
    assert values.tolist() == [[0, 0, 0, 5, 0, 5, 0, 5, 5, 0, 0, 5]]
    assert meta.tolist() == [[0xC4, 0x48, 0xC4]]
    assert not values.signbit().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_expand24_places_every_pair_of_nibbles(dtype):
    bytes_of_meta = [low | high << 4 for low in NIBBLES.values() for high in NIBBLES.values()]
    meta = torch.tensor(bytes_of_meta, dtype=torch.uint8).reshape(4, 9)
    values = random_bits((4, 36), dtype, seed=6)
    for cols in (72, 71, 65, 30, 1, 0):
        assert equal(expand24(values.to(DEVICE), meta.to(DEVICE), cols), unpack(values, meta, cols))
    assert equal(expand24(values.to(DEVICE), meta.to(DEVICE)), unpack(values, meta, 72))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (16, 64), (17, 70), (5, 260), (40, 1000), (8, 520), (0, 8), (8, 0)],
    ids=["one weight", "a block", "past it", "past a k256 block", "four, the last short", "three", "no row", "no column"],
)
@pytest.mark.parametrize("dtype", FRAGMENT_DTYPES, ids=named)
def test_expand_fragments(shape, dtype, monkeypatch):
    """Of random bits and nibbles. What lies past the rows and columns is not looked at: it becomes NaN and nibbles of 9 here."""
    (n, k), kp, generator = shape, -(-shape[1] // 8) * 8, torch.Generator().manual_seed(17)
    values = random_bits((n, kp // 2), dtype, seed=16)
    nibbles = torch.tensor([*NIBBLES.values()], dtype=torch.uint8)[torch.randint(6, (n, kp // 4), generator=generator)]
    meta = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    monkeypatch.setattr(format, "_padded", padded_with_rubbish)
    f = to_fragments(Sparse24(values, meta, shape))
    got = expand_fragments(f.values.to(DEVICE), f.meta.to(DEVICE), n, k)
    assert equal(got, unpack(values, meta, k)) and got.is_contiguous()


def padded_with_rubbish(t: torch.Tensor, rows: int, columns: int, fill: int = 0x7F) -> torch.Tensor:
    """In the place of format._padded. 0x44, the padding of metadata, becomes 0x99."""
    out = t.new_empty(rows, columns)
    out.view(torch.uint8).fill_(0x99 if fill == 0x44 else fill)
    out[: t.shape[0], : t.shape[1]] = t
    return out


@pytest.mark.sanitize
def test_expand24_past_a_tile():
    w = random_bits((3, 4104), torch.float16, seed=7)
    values, meta = pack_largest(w)
    want = drop(w, keep_nm(w.abs(), 2, 4) != 0)
    want[want == 0] = 0.0
    for cols in (4104, 4101):
        assert equal(expand24(values.to(DEVICE), meta.to(DEVICE), cols), want[:, :cols])


# ---- what is reported ----


# In every layout; of several tiles in the two whose tiles differ.
@pytest.mark.parametrize("shape, how", [*(((3, 21), how) for how in VIEWS), *(((35, 68), how) for how in VIEWS[:2])], ids=str)
def test_the_first_bad_group_is_named(shape, how):
    groups = 2 * -(-shape[1] // 8)
    clean = nonzero_groups(random_bits(shape, torch.float16), 2)
    for places in ([(shape[0] - 1, 19)], [(2, 17), (1, 5), (1, 9)], [(0, 0), (2, 0)]):
        first = min(row * groups + col // 4 for row, col in places)
        w, scores, over = clean.clone(), torch.ones(shape), clean.clone()
        for row, col in places:
            w[row, col] = scores[row, col] = float("nan")
            over[row, col // 4 * 4 : col // 4 * 4 + 3] = 1
        for prune in (prune_compress24, prune24):
            assert prune(viewed(w, how))[-1].tolist() == [first, NOTHING]
            for held in (clean, torch.ones(shape, dtype=torch.int8)):  # int8 has no NaN of its own
                assert prune(held.to(DEVICE), scores=viewed(scores, how))[-1].tolist() == [first, NOTHING]
            assert prune(viewed(w, how), scores=torch.ones(shape, device=DEVICE))[-1].tolist() == [first, NOTHING]
        assert compress24(viewed(w, how))[2][0] == first
        assert compress24(viewed(over, how))[2].tolist() == [NOTHING, first]
        mask = viewed((over != 0).to(torch.uint8), how)
        assert prune_compress24(clean.to(DEVICE), mask=mask)[2].tolist() == [NOTHING, first]
        assert prune24(clean.to(DEVICE), mask=mask)[1].tolist() == [NOTHING, first]
    w = clean.clone()
    w[1, -1] = float("nan")  # in a last group of one, where there is one
    assert prune_compress24(viewed(w, how))[2].tolist() == [groups + (shape[1] - 1) // 4, NOTHING]


@pytest.mark.parametrize("kept", range(16), ids="{:04b}".format)
def test_more_than_two_of_four(kept):
    w = torch.tensor([[float(kept >> i & 1) for i in range(4)]], device=DEVICE)
    bad = 0 if kept.bit_count() > 2 else NOTHING
    assert compress24(w)[2].tolist() == [NOTHING, bad]
    assert prune_compress24(w, mask=w != 0)[2].tolist() == [NOTHING, bad]
    assert prune_compress24(w)[2].tolist() == [NOTHING, NOTHING]


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS, torch.float8_e5m2], ids=named)
def test_what_is_nan(dtype):
    info = torch.finfo(dtype)
    top = as_bits(torch.tensor([info.max if dtype == torch.float8_e4m3fn else float("inf")], dtype=torch.float64).to(dtype))
    sign = torch.iinfo(top.dtype).min
    nans = torch.cat([top + 1, top + 1 + sign, torch.full_like(top, -1)]).view(dtype)  # the smallest by magnitude, and the largest
    zeros_and_ends = torch.tensor([info.max, info.min, 0.0, -0.0], dtype=torch.float64).to(dtype)
    numbers = torch.cat([top, top + sign, as_bits(zeros_and_ends)]).view(dtype)
    assert nans.double().isnan().all() and not numbers.double().isnan().any()
    for x in nans.reshape(3, 1, 1).to(DEVICE):
        assert mask_rows(x, 1)[1].item() == mask_nm(x, 1, 4)[1].item() == 0
        if dtype in DTYPES:
            assert prune_compress24(x)[2].tolist() == [0, NOTHING]
    numbers = numbers.reshape(2, 3).to(DEVICE)
    assert mask_rows(numbers, 1)[1].item() == mask_nm(numbers, 1, 3)[1].item() == NOTHING


# ---- validate24 ----


def damaged(values, meta, chance, nibbles=0, weights=0):
    """Copies with some nibbles that may mean nothing, and some values that may belong to no column."""
    values, meta = values.clone(), meta.clone()
    for _ in range(nibbles):
        meta.view(-1)[chance.randrange(meta.numel())] = chance.randrange(256)
    for _ in range(weights):
        row = chance.randrange(len(values))
        as_bits(values)[row, chance.randrange(max(0, values.shape[1] - 4), values.shape[1])] = chance.randrange(-128, 128)
    return values, meta


@pytest.mark.parametrize("shape", SHAPES, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_validate24_finds_nothing_in_what_is_whole(shape, dtype):
    values, meta = pack_largest(random_bits(shape, dtype, seed=12))
    assert validate24(values.to(DEVICE), meta.to(DEVICE), shape[1]).tolist() == [NOTHING, NOTHING]


@pytest.mark.parametrize("nibble", range(16), ids="{:x}".format)
def test_which_nibbles_are_valid(nibble):
    # One byte at a time, and four.
    for blocks in (1, 3, 4, 8):
        values = torch.zeros((1, 4 * blocks), device=DEVICE)
        for group in range(2 * blocks):
            meta = torch.full((1, blocks), 0xE4, dtype=torch.uint8)
            meta[0, group // 2] = nibble << 4 | 4 if group % 2 else 0xE0 | nibble
            want = NOTHING if nibble in NIBBLES.values() else group
            assert validate24(values, meta.to(DEVICE), 8 * blocks).tolist() == [want, NOTHING]


VALIDATED = {
    (3, 5, 0): "bytes that make no words",
    (3, 4, 4): "words, each row ends in half a byte",
    (4, 5, 7): "words that end inside rows",
    (3, 2051, 5): "bytes, four programs",
    (4, 2051, 1): "words, two programs",
    (600, 4, 2): "three programs of row ends",
    (1, 1, 3): "one byte",
}


@pytest.mark.parametrize("case", VALIDATED, ids=VALIDATED.get)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=named)
def test_the_first_damage_is_named(case, dtype):
    rows, blocks, rest = case
    cols, chance = 8 * blocks - (8 - rest if rest else 0), random.Random(sum(case))
    whole = pack_largest(few_values((rows, cols), dtype, seed=13))
    for nibbles, weights in [(1, 0), (0, 1), (3, 3), (0, 40), (40, 0)]:
        for offset in (0, 1):  # in memory, so that bytes do not lie as words
            values, meta = damaged(*whole, chance, nibbles, weights)
            moved = torch.empty(meta.numel() + offset, dtype=torch.uint8, device=DEVICE)[offset:].view(rows, blocks).copy_(meta)
            assert validate24(values.to(DEVICE), moved, cols).tolist() == definition24.check(values, meta, cols)


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("skip", range(4))
def test_validate24_of_memory_that_starts_anywhere(start, skip):
    meta = torch.frombuffer(bytearray(32), dtype=torch.uint8, offset=start)[skip : skip + 8].view(1, 8)
    meta.fill_(0x44)[0, 6] = 0x40
    assert validate24(torch.zeros((1, 32), device=DEVICE), meta.to(DEVICE), 64).tolist() == [12, NOTHING]


@pytest.mark.parametrize("cols", range(1, 9))
def test_every_place_past_the_last_column(cols):
    # Of the dtypes by turns: each meets every place, nibble and bit pattern.
    for i, nibbles in enumerate(NIBBLES.values()):
        meta = torch.full((2, 1), nibbles * 0x11, dtype=torch.uint8)
        for place in range(4):
            dtype = (torch.float32, torch.float8_e4m3fn, torch.int8)[(i + place) % 3]
            patterns = (1, -1, torch.iinfo(definition24.INTEGERS[dtype.itemsize]).min)  # the least; NaN or -1; -0.0 or -128
            values = torch.zeros((2, 4), dtype=dtype)
            as_bits(values)[1, place] = patterns[(i + cols) % 3]
            assert validate24(values.to(DEVICE), meta.to(DEVICE), cols).tolist() == definition24.check(values, meta, cols)


# ---- masks ----


@pytest.mark.parametrize(
    "n, m", [(2, 4), (1, 4), (0, 4), (4, 4), (1, 1), (1, 2), (2, 3), (4, 8), (7, 12), (8, 16), (16, 32), (5, 31)]
)
def test_mask_nm(n, m):
    for shape, how in [((3, 2 * m), "row-major"), ((5, 3 * m + m // 2 + 1), "row-major"), ((66, m + 1), "transposed")]:
        for scores in (random_bits(shape, torch.float32, seed=m), few_values(shape, torch.float16, seed=n)):
            mask, status = mask_nm(viewed(scores, how), n, m)
            assert mask.dtype == torch.bool and status.item() == NOTHING
            assert equal(mask.view(torch.uint8), keep_nm(scores, n, m))


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_masks_of_every_dtype(dtype):
    for scores in (random_bits((4, 70), dtype, seed=8), few_values((4, 70), dtype, seed=9)):
        for how in ("row-major", "transposed"):
            x = viewed(scores, how)
            assert equal(mask_nm(x, 2, 4)[0].view(torch.uint8), keep_nm(scores, 2, 4))
            assert equal(mask_nm(x, 9, 16)[0].view(torch.uint8), keep_nm(scores, 9, 16))
            assert equal(mask_rows(x, 33)[0].view(torch.uint8), keep_rows(scores, 33))
    scores = few_values((4, 70), dtype, seed=10)
    scores = scores * 3 if dtype == torch.int8 else (scores.double() * 0.3).to(dtype)
    assert equal(mask_nm(scores.to(DEVICE), 2, 4, pairs=True)[0].view(torch.uint8), keep_nm(scores, 2, 4, pairs=True))


@triton.jit
def to_float_kernel(bits_ptr, out_ptr, LARGEST: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(out_ptr + place, to_float(tl.load(bits_ptr + place), LARGEST))


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_numbers_are_read_exactly(dtype):
    if dtype.itemsize == 1:
        x = torch.arange(256).to(torch.uint8).view(dtype)
    else:
        x = random_bits((256,), dtype, seed=11)
    got = torch.empty(256, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    to_float_kernel[(1,)](as_bits(x).to(DEVICE), got, LARGEST=largest(dtype))
    assert torch.equal(got.cpu().double().nan_to_num(nan=0.125), x.double().nan_to_num(nan=0.125))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (3, 5), (9, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=named)
def test_mask_nm_of_pairs(n, m, dtype):
    # An odd last column is a pair by itself; a negative pair still beats one that is not there.
    for shape in [(3, 4 * m), (2, 4 * m + 1), (4, 2 * m + 3)]:
        scores = random_bits(shape, dtype, seed=m)
        as_bits(scores)[scores.double().isinf()] = 3  # inf - inf would be NaN
        mask, status = mask_nm(scores.to(DEVICE), n, m, pairs=True)
        assert equal(mask.view(torch.uint8), keep_nm(scores, n, m, pairs=True)) and status.item() == NOTHING


def test_the_sum_of_a_pair_is_fp32():
    # 2048 + 1 is no fp16: rounded to one, the second pair would only tie, and lose to the first.
    scores = torch.tensor([[2048.0, 0.0, 2048.0, 1.0]], dtype=torch.float16, device=DEVICE)
    assert mask_nm(scores, 1, 2, pairs=True)[0].tolist() == [[False, False, True, True]]
    infinite = torch.tensor([[1.0, 1.0, 1.0, 1.0], [float("inf"), float("-inf"), 0.0, 0.0]], device=DEVICE)
    assert mask_nm(infinite, 1, 2, pairs=True)[1].item() == 1


@pytest.mark.parametrize("how", VIEWS)
def test_masks_name_the_first_nan(how):
    scores = few_values((40, 50), torch.float32)
    scores[39, 3] = scores[5, 49] = scores[6, 0] = float("nan")
    assert mask_nm(viewed(scores, how), 2, 4)[1].item() == 5 * 13 + 12
    assert mask_nm(viewed(scores, how), 3, 5)[1].item() == 5 * 10 + 9
    assert mask_nm(viewed(scores, how), 2, 4, pairs=True)[1].item() == 5 * 7 + 6
    assert mask_rows(viewed(scores, how), 7)[1].item() == 5
    assert mask_nm(scores.to(DEVICE).T[:, 39:], 1, 1)[1].item() == 3  # one column, to torch contiguous whatever its stride


def test_a_nan_in_any_part_of_a_long_row():
    for col in (0, 599):  # 256 columns of 8 rows at a time
        scores = torch.zeros((10, 600), dtype=torch.float32)
        scores[9, col] = float("nan")
        assert mask_rows(viewed(scores, "transposed"), 7)[1].item() == 9


ROW_CASES = {
    (7, 40): "several rows a program",
    (1, 1): "one column",
    (2, 2100): "one row a program",
    (1, 16390): "a row that does not fit registers",
}


@pytest.mark.parametrize("shape", ROW_CASES, ids=ROW_CASES.get)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_mask_rows(shape, dtype):
    cols = shape[1]
    for scores in (random_bits(shape, dtype), few_values(shape, dtype)):
        for k in {0, 1, cols // 2, cols} if cols < 10000 else {cols // 2}:
            mask, status = mask_rows(scores.to(DEVICE), k)
            assert equal(mask.view(torch.uint8), keep_rows(scores, k)) and status.item() == NOTHING


@pytest.mark.sanitize
@pytest.mark.parametrize("k", [0, 150, 300])
def test_mask_rows_across_memory(k):
    # 16 rows of fp16 a program, 128 columns at a time.
    scores = few_values((33, 300), torch.float16)
    assert equal(mask_rows(viewed(scores, "transposed"), k)[0].view(torch.uint8), keep_rows(scores, k))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=named)
def test_masks_of_nothing(shape):
    scores = torch.ones(shape, device=DEVICE)
    for mask, status in (mask_nm(scores, 2, 4), mask_nm(scores, 2, 4, pairs=True), mask_rows(scores, 0)):
        assert mask.shape == shape and status.item() == NOTHING


# ---- the CUDA half of each op ----


@pytest.fixture
def ops(launches):  # noqa: F811
    """The module of the ops."""
    return importlib.import_module("sparsekit.ops.format")


def all_equal(got, want) -> bool:
    got, want = ((one,) if isinstance(one, torch.Tensor) else one for one in (got, want))
    return len(got) == len(want) and all(map(equal, got, want))


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_the_cuda_halves_of_the_2_4_ops(ops, dtype, how):
    w, scores = random_bits((5, 38), dtype, seed=14), few_values((5, 38), torch.float16, seed=15)
    mask = nonzero_groups(torch.ones(w.shape, dtype=torch.uint8), 2)
    for name, t in ((None, None), ("scores", scores), ("mask", mask)):
        by = {"scores": None, "mask": None} | ({name: t} if name else {})
        on = {key: None if rank is None else viewed(rank, how) for key, rank in by.items()}
        assert all_equal(ops._prune_compress24_cuda(viewed(w, how), **on), reference.prune_compress24(w, **by))
        assert all_equal(ops._prune24_cuda(viewed(w, how), **on), reference.prune24(w, **by))
    held = reference.prune24(w, None, None)
    packed = reference.compress24(held)
    assert all_equal(ops._compress24_cuda(viewed(held, how)), packed)
    strided = [viewed(part, how) for part in packed]
    assert all_equal(ops._expand24_cuda(*strided, 38), held)
    if dtype in FRAGMENT_DTYPES:
        f = to_fragments(Sparse24(*packed, (5, 38)))
        assert all_equal(ops._expand_fragments_cuda(f.values.transpose(0, 1).contiguous().transpose(0, 1), f.meta, 5, 38), held)
    assert ops._validate24_cuda(*strided, 38).tolist() == [NOTHING, NOTHING]
    packed[1][3, 2] = packed[1][4, 0] = 0x50  # neither 0 nor 5 is a nibble
    packed[1][2, 4] = 0xE4  # columns 38 and 39 of row 2, past the last
    as_bits(packed[0])[2, 18], as_bits(packed[0])[2, 19] = 0, 1
    assert ops._validate24_cuda(*(viewed(part, how) for part in packed), 38).tolist() == [3 * 10 + 4, 2 * 20 + 19]


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_the_cuda_halves_of_the_masks(ops, dtype, how):
    scores = few_values((5, 39), dtype, seed=16)
    for n, m, pairs in ((2, 4, False), (3, 5, False), (9, 16, False), (2, 3, True)):
        assert all_equal(ops._mask_nm_cuda(viewed(scores, how), n, m, pairs), reference.mask_nm(scores, n, m, pairs))
    assert all_equal(ops._mask_rows_cuda(viewed(scores, how), 7), reference.mask_rows(scores, 7))


@pytest.mark.parametrize("how", VIEWS)
def test_the_cuda_halves_refuse(ops, how):
    w = nonzero_groups(few_values((5, 38), torch.float16, seed=17), 2)
    bad, full = w.clone(), w.clone()
    bad[3, 21] = bad[4, 0] = float("nan")
    full[2, 16:20] = torch.tensor([1, 1, 0, 1])
    full[3, :4] = 1
    mask, infinite = (full != 0).to(torch.uint8), w.clone()
    infinite[1, 6], infinite[1, 7] = float("inf"), float("-inf")
    on = functools.partial(viewed, how=how)
    where = "must hold no NaN, got one in row 3, column 21"
    for call, error in (
        (lambda: ops._compress24_cuda(on(bad)), f"compress24: w {where}"),
        (lambda: ops._compress24_cuda(on(full)), "compress24: .* at most two non-zeros, got 3 in row 2, columns 16 to 19"),
        (lambda: ops._prune24_cuda(on(bad), None, None), f"prune24: w {where}"),
        (lambda: ops._prune24_cuda(on(w), on(bad), None), f"prune24: scores {where}"),
        (lambda: ops._prune24_cuda(on(w), None, on(mask)), "prune24: mask .* got 3 in row 2, columns 16 to 19"),
        (lambda: ops._prune_compress24_cuda(on(bad), None, None), f"prune_compress24: w {where}"),
        (lambda: ops._prune_compress24_cuda(on(w), on(bad), None), f"prune_compress24: scores {where}"),
        (lambda: ops._prune_compress24_cuda(on(w), None, on(mask)), "prune_compress24: mask .* got 3 in row 2, columns 16 to 19"),
        (lambda: ops._mask_nm_cuda(on(bad), 2, 4, False), f"mask_nm: scores {where}"),
        (lambda: ops._mask_nm_cuda(on(bad), 3, 5, True), f"mask_nm: scores {where}"),
        (lambda: ops._mask_nm_cuda(on(infinite), 1, 2, True), "mask_nm: .* got inf and -inf in row 1, columns 6 and 7"),
        (lambda: ops._mask_rows_cuda(on(bad), 7), f"mask_rows: scores {where}"),
    ):
        with pytest.raises(ValueError, match=f"^{error}"):
            call()


def test_the_cuda_halves_write_to_what_is_given(ops):
    w = few_values((5, 38), torch.float16).to(DEVICE)
    values, meta, _ = prune_compress24(w)
    held = prune24(w)[0]
    for call, args in (
        (ops._prune_compress24_cuda, (w, None, None)),
        (ops._compress24_cuda, (held,)),
        (ops._prune24_cuda, (w, None, None)),
        (ops._expand24_cuda, (values, meta, 38)),
        (ops._mask_nm_cuda, (w, 2, 4, False)),
        (ops._mask_rows_cuda, (w, 7, True)),
    ):
        new = call(*args)
        out = tuple(torch.full_like(t, 1) for t in (new if isinstance(new, tuple) else (new,)))
        found = call(*args, out)
        assert all(map(operator.is_, found if len(out) > 1 else [found], out)), call.__name__
        assert all_equal([t.cpu() for t in out], [t.cpu() for t in new] if len(out) > 1 else new.cpu()), call.__name__


# ---- properties ----


@st.composite
def weights(draw):
    dtype = draw(st.sampled_from(DTYPES))
    make = draw(st.sampled_from([random_bits, few_values]))
    return make((draw(st.integers(1, 9)), draw(st.integers(1, 41))), dtype, seed=draw(st.integers(0, 2**31)))


@settings(max_examples=40)
@given(weights(), st.randoms(use_true_random=False), st.sampled_from(VIEWS))
def test_properties_of_the_2_4_form(w, chance, how):
    values, meta, _ = prune_compress24(viewed(w, how))
    assert equal(prune24(viewed(w, how))[0], expand24(values, meta, w.shape[1]).cpu())
    nibbles = torch.stack([meta & 15, meta >> 4])
    assert set(nibbles.flatten().tolist()) <= set(NIBBLES.values())
    rows = chance.sample(range(len(w)), len(w))
    moved_values, moved_meta, _ = prune_compress24(as_bits(w)[rows].view(w.dtype).to(DEVICE))
    assert equal(moved_values, as_bits(values)[rows].view(w.dtype).cpu()) and equal(moved_meta, meta[rows].cpu())
    held = expand24(values, meta, w.shape[1])
    again = compress24(viewed(held.cpu(), how))
    assert equal(again[0], values.cpu()) and equal(again[1], meta.cpu())
    assert again[2].tolist() == [NOTHING, NOTHING]
    want = drop(w, keep_nm(w.double().abs(), 2, 4) != 0)
    as_bits(want)[want.double() == 0] = 0
    assert equal(held, want)


@settings(max_examples=30)
@given(weights(), st.data())
def test_exactly_n_are_kept_and_none_that_scores_less(scores, data):
    m = data.draw(st.integers(1, 32))
    n = data.draw(st.integers(0, m))
    mask = mask_nm(scores.to(DEVICE), n, m)[0].cpu()
    for start in range(0, scores.shape[1], m):
        kept, group = mask[:, start : start + m], scores[:, start : start + m].double()
        assert (kept.sum(1) == min(n, group.shape[1])).all()
        least, most = group.masked_fill(~kept, float("inf")).amin(1), group.masked_fill(kept, -float("inf")).amax(1)
        assert (least >= most).all()
    k = data.draw(st.integers(0, scores.shape[1]))
    assert (mask_rows(scores.to(DEVICE), k)[0].sum(1) == k).all()


@settings(max_examples=200)
@given(st.integers(1, 2**40), st.integers(1, 2**36), st.sampled_from(DTYPES), st.booleans())
def test_tiles_cover_the_matrix_within_the_grid(rows, cols, dtype, transposed):
    cols = min(cols, 2**44 // rows)
    rows, cols = (rows, cols) if cols else (2**30, 1)
    meta = torch.empty_strided((2, 3), (1, 2) if transposed else (3, 1), dtype=dtype)
    tile = tiling(rows, cols, meta)
    across, down = tile.grid
    assert (across - 1) * tile.block_cols < cols <= across * tile.block_cols
    assert (down - 1) * tile.block_rows < rows <= down * tile.block_rows
    assert down <= 65535 and tile.block_cols % 8 == 0


# ---- without the interpreter chosen, the tests above run in a process that chooses it ----

if IN_A_PROCESS_OF_ITS_OWN:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    def test_this_file_in_the_interpreter(tmp_path):
        run_in_the_interpreter(__file__, tmp_path)
