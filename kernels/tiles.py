"""Which program owns which part of a matrix, and how it reports what it finds wrong there."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

NOTHING = torch.iinfo(torch.int64).max  # a status word that no program wrote
_MAX_GRID_Y = 65535


class Tiling(NamedTuple):
    """A grid of block_rows x block_cols tiles over rows x cols; run: neighbouring columns that one thread holds."""

    rows: int
    cols: int
    block_rows: int
    block_cols: int
    run: int

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.cols, self.block_cols), triton.cdiv(self.rows, self.block_rows)


def tiling(rows: int, cols: int, like: torch.Tensor) -> Tiling:
    """Tiles for a matrix that lies in memory as `like` does: its unit stride decides along which axis a tile is long.

    Row-major: every thread reads 16 bytes at a time and keeps those columns to itself, so nothing is exchanged.
    Column-major: a tile is 128 bytes tall, so reads along columns of memory and writes along rows are both whole sectors.
    """
    itemsize = like.element_size()
    if rows > 1 and like.stride(0) < like.stride(1):
        block_rows, block_cols, run = 128 // itemsize, 64, 16
    else:
        tile = max(2048, 4096 // itemsize)
        block_cols = min(tile, max(16, triton.next_power_of_2(cols)))
        block_rows, run = tile // block_cols, 16 // itemsize
    needed = triton.next_power_of_2(triton.cdiv(rows, _MAX_GRID_Y))
    return Tiling(rows, cols, max(block_rows, needed), block_cols, run)


def foldable(unit: int, *matrices: torch.Tensor) -> bool:
    """Whether the matrices may be read as one long row: no gaps, and no row ends inside a unit of columns.

    A single column is contiguous to torch whatever its stride, by which the long row would then be read."""
    return matrices[0].shape[1] % unit == 0 and all(m.is_contiguous() and m.stride(1) == 1 for m in matrices)


def new_status(words: int, device: torch.device) -> torch.Tensor:
    """int64 words that report() lowers to the first bad place; NOTHING where there is none."""
    return torch.full((words,), NOTHING, dtype=torch.int64, device=device)


@triton.jit
def tile_origin(BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """First row and first column of this program's tile; int64, for a folded matrix may have more than 2**31 columns."""
    return tl.program_id(1).to(tl.int64) * BLOCK_ROWS, tl.program_id(0).to(tl.int64) * BLOCK_COLS


@triton.jit
def report(word_ptr, bad, row0, item0, items, ROWS: tl.constexpr, ITEMS: tl.constexpr):
    """Lowers *word_ptr to the flat index of the first bad item, counting `items` a row of the matrix.

    bad holds ROWS x ITEMS booleans in row-major order whatever its shape; its first is item `item0` of row `row0`.
    """
    NONE: tl.constexpr = ROWS * ITEMS
    place = tl.reshape(tl.arange(0, ROWS * ITEMS), bad.shape)
    first = tl.min(tl.where(bad, place, NONE))
    flat = (row0 + first // ITEMS) * items + item0 + first % ITEMS
    tl.atomic_min(word_ptr, flat, mask=first < NONE, sem="relaxed")
