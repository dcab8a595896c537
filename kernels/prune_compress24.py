"""Dense weight to its 2:4 form in one pass: choose two of every four columns, pack them, write values and metadata.

A program owns a tile of whole metadata bytes; a thread owns whole groups of four, so nothing is exchanged inside a row-major tile.
Memory floor for a weight of b bytes: b read, b / 2 + rows * cols / 8 written; scores or a mask are read once on top.
"""

import torch
import triton
import triton.language as tl

from .bits import as_bits
from .pack24 import pack_groups, store_groups
from .rank24 import load_ranked, ranking
from .tiles import foldable, new_status, tile_origin, tiling


@triton.jit
def prune_compress24_kernel(
    w_ptr, rank_ptr,  # see load_ranked
    values_ptr,  # [rows, 4 * blocks]
    meta_ptr,  # [rows, blocks] uint8
    status_ptr,
    rows, cols, blocks,
    w_row_stride, w_col_stride,
    rank_row_stride, rank_col_stride,
    BY: tl.constexpr, LARGEST: tl.constexpr, RANK_LARGEST: tl.constexpr, RANK_LOWEST: tl.constexpr,
    RUN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cast(blocks, tl.int64)  # a folded matrix has up to 2**31 of them, and they are multiplied below
    row0, col0 = tile_origin(BLOCK_ROWS, BLOCK_COLS)
    w0, w1, w2, w3, k0, k1, k2, k3 = load_ranked(
        w_ptr, rank_ptr, status_ptr, rows, cols, blocks * 2, w_row_stride, w_col_stride, rank_row_stride, rank_col_stride,
        row0, col0, BY, LARGEST, RANK_LARGEST, RANK_LOWEST, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
    first, second, nibble = pack_groups(w0, w1, w2, w3, k0, k1, k2, k3, LARGEST)
    store_groups(values_ptr, meta_ptr, first, second, nibble, rows, blocks, row0, col0, RUN)


def prune_compress24(
    w: torch.Tensor,
    scores: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight (rows, cols) -> values (rows, kp / 2), meta (rows, kp / 8) uint8, status (2,) int64; kp: cols rounded up to 8.

    w: fp32, fp16, bf16, fp8 or int8. The two weights of a group with the largest |w| are kept, or those with the highest `scores`
    (rows, cols; any float dtype), or those that `mask` (rows, cols; bool, uint8 or int8) keeps; ties and free places go to the
    lower column. At most one of scores and mask. Any strides; nothing is copied, nothing waits for the device.
    out: the values and meta to write to, contiguous; new ones by default.
    status[0] is the flat index (row * kp / 4 + group) of the first group with a NaN in w or in scores, status[1] that of the first
    group in which the mask keeps more than two; tiles.NOTHING where there is none. Such a group's output has no meaning.
    """
    rows, cols = w.shape
    blocks = triton.cdiv(cols, 8)
    values = torch.empty((rows, blocks * 4), dtype=w.dtype, device=w.device) if out is None else out[0]
    meta = torch.empty((rows, blocks), dtype=torch.uint8, device=w.device) if out is None else out[1]
    status = new_status(2, w.device)
    if rows == 0 or cols == 0:
        return values, meta, status
    rank, constants = ranking(w, scores, mask)
    tile = tiling(1, rows * cols, w) if foldable(8, w, rank) else tiling(rows, cols, w)
    prune_compress24_kernel[tile.grid](
        as_bits(w), as_bits(rank), as_bits(values), meta, status,
        tile.rows, tile.cols, triton.cdiv(tile.cols, 8), *w.stride(), *rank.stride(), **constants,
        RUN=tile.run, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols,
    )  # fmt: skip
    return values, meta, status
