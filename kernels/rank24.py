"""A tile of a weight and what ranks the four columns of its groups: the part that every 2:4 pruner shares."""

import torch
import triton
import triton.language as tl

from .bits import any_nan, largest, lowest, magnitude, order, widen
from .pack24 import more_than_two, split_groups
from .tiles import report


def ranking(w: torch.Tensor, scores: torch.Tensor | None, mask: torch.Tensor | None) -> tuple[torch.Tensor, dict]:
    """What ranks the columns (rank_ptr below), and the constants of load_ranked that follow from it."""
    rank, by = (scores, "scores") if scores is not None else (mask, "mask") if mask is not None else (w, "weight")
    scored = by == "scores"
    return rank, {
        "BY": by,
        "LARGEST": largest(w.dtype),
        "RANK_LARGEST": largest(rank.dtype) if scored else -1,
        "RANK_LOWEST": lowest(rank.dtype) if scored else 0,
    }


@triton.jit
def load_ranked(
    w_ptr,  # [rows, cols] bits of the weight, any strides
    rank_ptr,  # [rows, cols] bits of the scores, or the mask as int8, any strides; unread when BY is "weight"
    status_ptr,  # [2] int64: first group with a NaN, first group whose mask keeps more than two
    rows, cols, groups,
    w_row_stride, w_col_stride,
    rank_row_stride, rank_col_stride,
    row0, col0,
    BY: tl.constexpr,  # "weight", "scores" or "mask"
    LARGEST: tl.constexpr, RANK_LARGEST: tl.constexpr, RANK_LOWEST: tl.constexpr,  # see bits.py
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The tile at row0, col0: four widened weights and four keys, [BLOCK_ROWS, BLOCK_COLS // 8, 2] each. The two highest keys of a
    group are kept, ties to the lower column. Reports what is bad, counting `groups` a row."""
    row = (row0 + tl.arange(0, BLOCK_ROWS))[:, None]
    col = (col0 + tl.arange(0, BLOCK_COLS))[None, :]
    inside = (row < rows) & (col < cols)
    # Columns past the end read as zeros (scores: as the lowest): being the last, they lose every tie.
    w0, w1, w2, w3 = split_groups(tl.load(w_ptr + row * w_row_stride + col * w_col_stride, mask=inside, other=0))
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
        # What the mask drops is zero even where it fills a group with fewer than two kept, which columns 0 and 1 alone do.
        w0, w1 = tl.where(on0, w0, 0), tl.where(on1, w1, 0)
        k0, k1, k2, k3 = on0.to(tl.int32), on1.to(tl.int32), on2.to(tl.int32), on3.to(tl.int32)
        over = more_than_two(k0, k1, k2, k3)
        report(status_ptr + 1, over, row0, col0 // 4, groups, BLOCK_ROWS, BLOCK_COLS // 4)
    if LARGEST >= 0 or RANK_LARGEST >= 0:
        report(status_ptr, nan, row0, col0 // 4, groups, BLOCK_ROWS, BLOCK_COLS // 4)
    return w0, w1, w2, w3, k0, k1, k2, k3
