"""The 2:4 form back to a dense weight: every element is written once, the dropped ones as zeros.

A program owns a tile of the dense weight; a thread reads a metadata byte and its four values and writes the eight columns.
Memory floor for a dense weight of b bytes: b / 2 + rows * cols / 8 read, b written.
"""

import torch
import triton
import triton.language as tl

from .bits import as_bits
from .pack24 import merge_groups, place_pairs
from .tiles import tile_origin, tiling


@triton.jit(do_not_specialize=["rows"])
def expand24_kernel(
    values_ptr,  # [rows, 4 * blocks] bits of the kept weights
    meta_ptr,  # [rows, blocks] uint8
    w_ptr,  # [rows, cols]
    rows, cols, blocks,
    RUN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cast(blocks, tl.int64)  # a folded matrix has up to 2**31 of them, and they are multiplied below
    row0, col0 = tile_origin(BLOCK_ROWS, BLOCK_COLS)
    row = (row0 + tl.arange(0, BLOCK_ROWS))[:, None]
    # The hints keep the loads in the layout of the store, RUN columns a thread.
    slot = tl.max_contiguous(col0 // 2 + tl.arange(0, BLOCK_COLS // 2), RUN // 2)[None, :]
    byte = tl.max_contiguous(col0 // 8 + tl.arange(0, BLOCK_COLS // 8), RUN // 8 if RUN > 8 else 1)[None, :]
    kept = tl.load(values_ptr + row * (blocks * 4) + slot, mask=(row < rows) & (slot < blocks * 4), other=0)
    meta = tl.load(meta_ptr + row * blocks + byte, mask=(row < rows) & (byte < blocks), other=0).to(tl.int32)
    first, second = tl.split(tl.reshape(kept, [BLOCK_ROWS, BLOCK_COLS // 8, 2, 2]))  # [BLOCK_ROWS, BLOCK_COLS // 8, 2]
    nibble = tl.join(meta & 15, meta >> 4)  # likewise, the even group first
    w = merge_groups(*place_pairs(first, second, nibble))
    col = (col0 + tl.arange(0, BLOCK_COLS))[None, :]
    tl.store(w_ptr + row * cols + col, w, mask=(row < rows) & (col < cols))


def expand24(values: torch.Tensor, meta: torch.Tensor, cols: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """values (rows, kp / 2), meta (rows, kp / 8) uint8 -> dense (rows, cols) in the dtype of values; cols <= kp, kp by default.

    All contiguous; out is written to where it is given. meta holds valid nibbles only (4, 8, 9, C, D, E). Any dtype of 1, 2 or 4
    bytes."""
    rows, blocks = meta.shape
    cols = blocks * 8 if cols is None else cols
    w = torch.empty((rows, cols), dtype=values.dtype, device=values.device) if out is None else out
    if rows == 0 or cols == 0:
        return w
    tile = tiling(1, rows * cols, w) if cols == blocks * 8 else tiling(rows, cols, w)
    expand24_kernel[tile.grid](
        as_bits(values), meta, as_bits(w), tile.rows, tile.cols, rows // tile.rows * blocks,
        RUN=tile.run, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols,
    )  # fmt: skip
    return w
