"""Dense weight to its 2:4 form in one pass: choose two of every four columns, pack them, write values and metadata.

A program owns a tile of whole metadata bytes; a thread owns whole groups of four, so nothing is exchanged inside a row-major tile.
Memory floor for a weight of b bytes: b read, b / 2 + rows * cols / 8 written; scores or a mask are read once on top.
"""

import torch
import triton
import triton.language as tl

from .bits import any_nan, as_bits, largest, lowest, magnitude, order, widen
from .pack24 import more_than_two, pack_groups, split_groups, store_groups
from .tiles import foldable, new_status, report, tile_origin, tiling


@triton.jit
def prune_compress24_kernel(
    w_ptr,  # [rows, cols] bits of the weight, any strides
    rank_ptr,  # [rows, cols] bits of the scores, or the mask as int8, any strides; unread when BY is "weight"
    values_ptr,  # [rows, 4 * blocks]
    meta_ptr,  # [rows, blocks] uint8
    status_ptr,  # [2] int64: first group with a NaN, first group whose mask keeps more than two
    rows, cols, blocks,
    w_row_stride, w_col_stride,
    rank_row_stride, rank_col_stride,
    BY: tl.constexpr,  # "weight", "scores" or "mask"
    LARGEST: tl.constexpr, RANK_LARGEST: tl.constexpr, RANK_LOWEST: tl.constexpr,  # see bits.py
    RUN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cast(blocks, tl.int64)  # a folded matrix has up to 2**31 of them, and they are multiplied below
    row0, col0 = tile_origin(BLOCK_ROWS, BLOCK_COLS)
    row = (row0 + tl.arange(0, BLOCK_ROWS))[:, None]
    col = (col0 + tl.arange(0, BLOCK_COLS))[None, :]
    inside = (row < rows) & (col < cols)
    # Columns past the end read as zeros (scores: as the lowest): being the last, they lose every tie.
    w = tl.load(w_ptr + row * w_row_stride + col * w_col_stride, mask=inside, other=0)
    w0, w1, w2, w3 = split_groups(w)  # [BLOCK_ROWS, BLOCK_COLS // 8, 2] each
    w0, w1, w2, w3 = widen(w0), widen(w1), widen(w2), widen(w3)
    nan = any_nan(w0, w1, w2, w3, LARGEST)

    rank_ptrs = rank_ptr + row * rank_row_stride + col * rank_col_stride
    if BY == "weight":
        k0, k1 = magnitude(w0, LARGEST), magnitude(w1, LARGEST)
        k2, k3 = magnitude(w2, LARGEST), magnitude(w3, LARGEST)
    elif BY == "scores":
        s0, s1, s2, s3 = split_groups(tl.load(rank_ptrs, mask=inside, other=RANK_LOWEST))
        s0, s1, s2, s3 = widen(s0), widen(s1), widen(s2), widen(s3)
        nan |= any_nan(s0, s1, s2, s3, RANK_LARGEST)
        k0, k1 = order(s0, RANK_LARGEST), order(s1, RANK_LARGEST)
        k2, k3 = order(s2, RANK_LARGEST), order(s3, RANK_LARGEST)
    else:
        m0, m1, m2, m3 = split_groups(tl.load(rank_ptrs, mask=inside, other=0))
        on0, on1, on2, on3 = m0 != 0, m1 != 0, m2 != 0, m3 != 0
        # What the mask drops is zero even where a group with fewer than two kept has to store it.
        w0, w1 = tl.where(on0, w0, 0), tl.where(on1, w1, 0)
        w2, w3 = tl.where(on2, w2, 0), tl.where(on3, w3, 0)
        k0, k1, k2, k3 = on0.to(tl.int32), on1.to(tl.int32), on2.to(tl.int32), on3.to(tl.int32)
        over = more_than_two(k0, k1, k2, k3)
        report(status_ptr + 1, over, row0, col0 // 4, blocks * 2, BLOCK_ROWS, BLOCK_COLS // 4)

    first, second, nibble = pack_groups(w0, w1, w2, w3, k0, k1, k2, k3, LARGEST)
    store_groups(values_ptr, meta_ptr, first, second, nibble, rows, blocks, row0, col0, RUN)
    if LARGEST >= 0 or RANK_LARGEST >= 0:
        report(status_ptr, nan, row0, col0 // 4, blocks * 2, BLOCK_ROWS, BLOCK_COLS // 4)


def prune_compress24(
    w: torch.Tensor, scores: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight (rows, cols) -> values (rows, kp / 2), meta (rows, kp / 8) uint8, status (2,) int64; kp: cols rounded up to 8.

    w: fp32, fp16, bf16, fp8 or int8. The two weights of a group with the largest |w| are kept, or those with the highest `scores`
    (rows, cols; any float dtype), or those that `mask` (rows, cols; bool, uint8 or int8) keeps; ties and free places go to the
    lower column. At most one of scores and mask. Any strides; nothing is copied, nothing waits for the device.
    status[0] is the flat index (row * kp / 4 + group) of the first group with a NaN in w or in scores, status[1] that of the first
    group in which the mask keeps more than two; tiles.NOTHING where there is none. Such a group's output has no meaning.
    """
    rows, cols = w.shape
    blocks = triton.cdiv(cols, 8)
    values = torch.empty((rows, blocks * 4), dtype=w.dtype, device=w.device)
    meta = torch.empty((rows, blocks), dtype=torch.uint8, device=w.device)
    status = new_status(2, w.device)
    if rows == 0 or cols == 0:
        return values, meta, status
    rank, by = (scores, "scores") if scores is not None else (mask, "mask") if mask is not None else (w, "weight")
    tile = tiling(1, rows * cols, w) if foldable(8, w, rank) else tiling(rows, cols, w)
    prune_compress24_kernel[tile.grid](
        as_bits(w), as_bits(rank), as_bits(values), meta, status,
        tile.rows, tile.cols, triton.cdiv(tile.cols, 8), *w.stride(), *rank.stride(),
        BY=by, LARGEST=largest(w.dtype),
        RANK_LARGEST=largest(scores.dtype) if by == "scores" else -1,
        RANK_LOWEST=lowest(scores.dtype) if by == "scores" else 0,
        RUN=tile.run, BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols,
    )  # fmt: skip
    return values, meta, status
