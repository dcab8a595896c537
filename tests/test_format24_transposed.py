"""The CPU kernels of the 2:4 format on matrices whose rows are neighbours in memory, where a lane of a vector is a row.

The truth is definition24.py; format24_cpu.py calls every instruction set that this CPU has and looks for bytes written outside."""

from itertools import product

import format24_cpu
import pytest
import torch
from definition24 import (
    DTYPES,
    NOTHING,
    SCORES,
    as_bits,
    clean,
    equal,
    few_values,
    for_sums,
    keep_nm,
    named,
    nonzero_groups,
    pack_largest,
    pack_nonzero,
    random_bits,
    unpack,
    viewed,
)
from format24_cpu import compress24, mask_nm, prune24, prune_compress24


@pytest.mark.parametrize(
    ("dtype", "cols"),
    [(torch.bfloat16, 17 * 64), (torch.bfloat16, 17 * 64 + 8), (torch.float32, 17 * 64), (torch.int8, 17 * 64)],
    ids=["bfloat16", "rows that are no lines", "float32", "int8"],
)
def test_large_transposed_matrices(dtype, cols, monkeypatch):
    """From 4 MiB on, lines that are aligned are written past the caches. Such a matrix is 16 times one small enough for the
    definition, side by side: 17 words, two whole strips of tiles and a narrow one, and rows that end with a tile's first few."""
    monkeypatch.setattr(format24_cpu.Output, "lines", True)
    w = random_bits(((1 << 18) // (cols * dtype.itemsize) + 5, cols), dtype, seed=3)
    values, meta = pack_largest(w)
    held = unpack(values, meta, cols)

    def large(x):
        return x.view(torch.uint8).repeat(16, 1).view(x.dtype)

    for function, x, want in (
        (prune_compress24, w, (values, meta)),
        (compress24, held, pack_nonzero(held)),
        (prune24, w, (held,)),
        (lambda x: mask_nm(x, 2, 4), held, (keep_nm(held, 2, 4),)),
    ):
        *got, status = function(viewed(large(x), "transposed"))
        assert all(equal(a, large(b)) for a, b in zip(got, want, strict=True)) and clean(status)


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "an odd address"])
@pytest.mark.parametrize("n, m", [(16, 32), (3, 16), (4, 8)])
def test_large_masks_of_large_groups(n, m, lines, monkeypatch):
    """The mask of whole tiles is written where it goes, from 4 MiB on past the caches where that is lines; few values, for ties.
    1088 columns are 17 words: no tile begins with a row, and groups of many rows are chosen at once."""
    monkeypatch.setattr(format24_cpu.Output, "lines", lines)
    generator = torch.Generator().manual_seed(4)
    few = torch.randint(-20, 20, (256, 1088), generator=generator)
    for dtype in (torch.bfloat16, torch.int8):
        small = few.to(dtype)
        mask, status = mask_nm(small.repeat(16, 1), n, m)
        assert equal(mask, keep_nm(small, n, m).repeat(16, 1)) and clean(status)


def repeated(x, rows):
    """As many rows of x as asked for, one after the other and again from the first."""
    return as_bits(x)[torch.arange(rows) % len(x)].view(x.dtype)


def heights(dtype):
    """Of a transposed matrix: less than a vector, a word and one less, a tile of 512 bytes down a column and one less, and more."""
    tile = 512 // dtype.itemsize
    return [3, 63, 64, tile - 1, tile, tile + 71]


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_packing_of_transposed_tiles(dtype):
    """A tile is one word of columns wide, of bytes two; then columns that fill none, whose last are no group."""
    for cols in (64, 128, 330):
        base = random_bits((13, cols), dtype, seed=cols)
        values, meta = pack_largest(base)
        held = unpack(values, meta, cols)
        under_full = nonzero_groups(few_values((13, cols), dtype, seed=cols), 2)
        for rows in heights(dtype):
            for function, w, want in (
                (prune_compress24, base, (values, meta)),
                (compress24, held, pack_nonzero(held)),
                (compress24, under_full, pack_nonzero(under_full)),
            ):
                *got, status = function(viewed(repeated(w, rows), "transposed"))
                assert all(equal(a, repeated(b, rows)) for a, b in zip(got, want, strict=True)) and clean(status)


@pytest.mark.parametrize("dtype", SCORES, ids=named)
def test_masks_of_transposed_tiles(dtype):
    """Of 64 columns, or as many as are whole groups; by the ranks of two of four, and by each size of sorting network."""
    for (n, m), pairs in product([(2, 4), (1, 4), (2, 3), (4, 8), (5, 11), (16, 32)], (False, True)):
        base = for_sums((7, 270 + m), dtype, m) if n % 2 else few_values((7, 270 + m), dtype, seed=n)
        want = keep_nm(base, n, m, pairs)
        for rows in heights(dtype)[1:]:
            mask, status = mask_nm(viewed(repeated(base, rows), "transposed"), n, m, pairs)
            assert equal(mask, repeated(want, rows)) and clean(status)


@pytest.mark.parametrize("col", [0, 1, 2, 3, 63, 64, 127, 129, 131])
@pytest.mark.parametrize("row", [0, 31, 63, 64, 255, 256, 580])
def test_what_is_wrong_in_a_transposed_tile(row, col):
    """In each column of a group; in the first and last vector and word of a tile, in one past it, and in what fills none."""
    rows, cols = 581, 132
    good = nonzero_groups(repeated(few_values((19, cols), torch.bfloat16), rows), 2)
    later = min(row + 40, rows - 1)
    good[[row, later], col // 4 * 4 : col // 4 * 4 + 4] = 0
    over = good.clone()
    over[row, [c for c in range(col // 4 * 4, col // 4 * 4 + 4) if c != col]] = 1
    group = row * 34 + col // 4
    assert compress24(viewed(over, "transposed"))[2].tolist() == [NOTHING, group]
    for sign in (1, -1):
        bad = good.clone()
        as_bits(bad)[row, col] = as_bits(bad)[later, col] = 0x7FC0 if sign > 0 else -64
        assert bad[row, col].isnan()
        bad = viewed(bad, "transposed")
        assert compress24(bad)[2].tolist() == prune_compress24(bad)[2].tolist() == [group, NOTHING]
        for m, pairs in [(4, False), (8, False), (16, False), (32, False), (4, True), (8, True)]:
            width = m * (1 + pairs)
            assert mask_nm(bad, 2, m, pairs)[1].item() == row * -(-cols // width) + col // width
