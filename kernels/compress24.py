"""A weight that is already 2:4 to its packed form, with proof: a group with more than two non-zeros is reported, never dropped.

A program owns a tile of whole metadata bytes; a thread owns whole groups of four.
Memory floor for a weight of b bytes: b read, b / 2 + rows * cols / 8 written.
"""

import torch
import triton
import triton.language as tl

from .bits import any_nan, as_bits, largest, magnitude, widen
from .pack24 import more_than_two, pack_groups, split_groups, store_groups
from .tiles import foldable, new_status, report, tile_origin, tiling


@triton.jit
def compress24_kernel(
    w_ptr,  # [rows, cols] bits of the weight, any strides
    values_ptr,  # [rows, 4 * blocks]
    meta_ptr,  # [rows, blocks] uint8
    status_ptr,  # [2] int64: first group with a NaN, first group with more than two non-zeros
    rows, cols, blocks,
    w_row_stride, w_col_stride,
    LARGEST: tl.constexpr,  # see bits.py
    RUN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cast(blocks, tl.int64)  # a folded matrix has up to 2**31 of them, and they are multiplied below
    row0, col0 = tile_origin(BLOCK_ROWS, BLOCK_COLS)
    row = (row0 + tl.arange(0, BLOCK_ROWS))[:, None]
    col = (col0 + tl.arange(0, BLOCK_COLS))[None, :]
    w = tl.load(w_ptr + row * w_row_stride + col * w_col_stride, mask=(row < rows) & (col < cols), other=0)
    w0, w1, w2, w3 = split_groups(w)  # [BLOCK_ROWS, BLOCK_COLS // 8, 2] each
    w0, w1, w2, w3 = widen(w0), widen(w1), widen(w2), widen(w3)
    k0, k1 = magnitude(w0, LARGEST), magnitude(w1, LARGEST)  # -0.0 is zero
    k2, k3 = magnitude(w2, LARGEST), magnitude(w3, LARGEST)
    # The two largest are the non-zeros, and zeros tie: the lowest free columns follow.
    first, second, nibble = pack_groups(w0, w1, w2, w3, k0, k1, k2, k3, LARGEST)
    store_groups(values_ptr, meta_ptr, first, second, nibble, rows, blocks, row0, col0, RUN)
    over = more_than_two(k0, k1, k2, k3)
    report(status_ptr + 1, over, row0, col0 // 4, blocks * 2, BLOCK_ROWS, BLOCK_COLS // 4)
    if LARGEST >= 0:
        nan = any_nan(w0, w1, w2, w3, LARGEST)
        report(status_ptr, nan, row0, col0 // 4, blocks * 2, BLOCK_ROWS, BLOCK_COLS // 4)


def compress24(
    w: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """2:4 weight (rows, cols) -> values (rows, kp / 2), meta (rows, kp / 8) uint8, status (2,) int64; kp: cols rounded up to 8.

    out: the values and meta to write to, contiguous; new ones by default.
    w: fp32, fp16, bf16, fp8 or int8, any strides; nothing is copied, nothing waits for the device. A group keeps its non-zeros,
    then its lowest free columns. status[0] is the flat index (row * kp / 4 + group) of the first group with a NaN, status[1] that
    of the first group with more than two non-zeros; tiles.NOTHING where there is none. Such a group's output has no meaning.
    """
    rows, cols = w.shape
    blocks = triton.cdiv(cols, 8)
    values = torch.empty((rows, blocks * 4), dtype=w.dtype, device=w.device) if out is None else out[0]
    meta = torch.empty((rows, blocks), dtype=torch.uint8, device=w.device) if out is None else out[1]
    status = new_status(2, w.device)
    if rows == 0 or cols == 0:
        return values, meta, status
    tile = tiling(1, rows * cols, w) if foldable(8, w) else tiling(rows, cols, w)
    compress24_kernel[tile.grid](
        as_bits(w), as_bits(values), meta, status,
        tile.rows, tile.cols, triton.cdiv(tile.cols, 8), *w.stride(),
        LARGEST=largest(w.dtype), RUN=tile.run, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols,
    )  # fmt: skip
    return values, meta, status
