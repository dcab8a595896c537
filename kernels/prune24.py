"""Dense weight to a dense weight of which two of every four columns are left, in one pass: what expand24 makes of prune_compress24.

A program owns a tile of whole groups; a thread owns whole groups, so nothing is exchanged inside a row-major tile.
Memory floor for a weight of b bytes: b read, b written; scores or a mask are read once on top.
"""

import torch
import triton
import triton.language as tl

from .bits import as_bits, narrow
from .pack24 import keep_groups, merge_groups
from .rank24 import load_ranked, ranking
from .tiles import foldable, new_status, tile_origin, tiling


@triton.jit(do_not_specialize=["groups"])
def prune24_kernel(
    w_ptr, rank_ptr,  # see load_ranked
    out_ptr,  # [rows, cols]
    status_ptr,
    rows, cols, groups,
    w_row_stride, w_col_stride,
    rank_row_stride, rank_col_stride,
    BY: tl.constexpr, LARGEST: tl.constexpr, RANK_LARGEST: tl.constexpr, RANK_LOWEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row0, col0 = tile_origin(BLOCK_ROWS, BLOCK_COLS)
    w0, w1, w2, w3, k0, k1, k2, k3 = load_ranked(
        w_ptr, rank_ptr, status_ptr, rows, cols, groups, w_row_stride, w_col_stride, rank_row_stride, rank_col_stride,
        row0, col0, BY, LARGEST, RANK_LARGEST, RANK_LOWEST, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
    w0, w1, w2, w3 = keep_groups(w0, w1, w2, w3, k0, k1, k2, k3, LARGEST)
    row = (row0 + tl.arange(0, BLOCK_ROWS))[:, None]
    col = (col0 + tl.arange(0, BLOCK_COLS))[None, :]
    out = narrow(merge_groups(w0, w1, w2, w3), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * cols + col, out, mask=(row < rows) & (col < cols))


def prune24(
    w: torch.Tensor, scores: torch.Tensor | None = None, mask: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (rows, cols) -> out (rows, cols) in its dtype, contiguous, new unless given, and status (2,) int64.

    Arguments, choice and status are those of prune_compress24. What is dropped is +0, and so is a kept -0.0."""
    rows, cols = w.shape
    out = torch.empty((rows, cols), dtype=w.dtype, device=w.device) if out is None else out
    status = new_status(2, w.device)
    if rows == 0 or cols == 0:
        return out, status
    rank, constants = ranking(w, scores, mask)
    tile = tiling(1, rows * cols, w) if foldable(8, w, rank) else tiling(rows, cols, w)
    prune24_kernel[tile.grid](
        as_bits(w), as_bits(rank), as_bits(out), status,
        tile.rows, tile.cols, triton.cdiv(tile.cols, 8) * 2, *w.stride(), *rank.stride(), **constants,
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols,
    )  # fmt: skip
    return out, status
