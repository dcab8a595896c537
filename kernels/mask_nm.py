"""N:M masks: of every M neighbouring columns (or pairs of columns) of a row exactly N are kept, those with the highest scores.

A program owns a tile of whole groups. A last group of t < M columns keeps the best min(N, t).
Memory floor for scores of b bytes: b read, rows * cols written.
Where M is a power of two, a thread reads 16 bytes of a row-major matrix at a time. The limit of any other M: a group takes the room
of the next power of two, neighbouring threads hold neighbouring groups, and one access is no wider than a run, as many columns
(pairs) as the largest power of two that divides M: for 3:5 in bf16 2-byte loads and 1-byte stores. Not yet run on hardware.
"""

import torch
import triton
import triton.language as tl

from .bits import FP32_LARGEST, FP64_LARGEST, as_bits, is_nan, largest, lowest, order, to_float, widen
from .select import keep_by_cut, keep_by_rank
from .tiles import foldable, new_status, report, tile_origin, tiling


@triton.jit
def by_group(member, GROUPS: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr):
    """[R, GROUPS * PLACES] in the order of a tile's slots, in runs of RUN members -> [R, GROUPS, PLACES]."""
    if RUN != PLACES:
        member = tl.permute(tl.reshape(member, [member.shape[0], PLACES // RUN, GROUPS, RUN]), 0, 2, 1, 3)
    return tl.reshape(member, [member.shape[0], GROUPS, PLACES])


@triton.jit(do_not_specialize=["groups", "n"])
def mask_nm_kernel(
    scores_ptr,  # [rows, cols] bits, any strides
    mask_ptr,  # [rows, cols] uint8
    status_ptr,  # [1] int64: first group with a NaN
    rows, cols, groups,
    row_stride, col_stride,
    n, M: tl.constexpr,
    bits,  # of a key: the dtype's own, or those of a pair's sum
    WIDTH: tl.constexpr,  # columns a member of a group has: 1, or 2 for pairs
    LARGEST: tl.constexpr, LOWEST: tl.constexpr,  # see bits.py
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    # A tile's columns are slots; a group takes SPAN of them, the power of two that holds its SIZE columns.
    SIZE: tl.constexpr = M * WIDTH
    SPAN: tl.constexpr = PLACES * WIDTH
    GROUPS: tl.constexpr = BLOCK_COLS // SPAN
    RUN: tl.constexpr = (M & -M) * WIDTH  # the columns of one access, unless M is a power of two
    row0, slot0 = tile_origin(BLOCK_ROWS, BLOCK_COLS)
    group0 = slot0 // SPAN
    row = (row0 + tl.arange(0, BLOCK_ROWS))[:, None]
    slot = tl.arange(0, BLOCK_COLS)
    if PLACES == M:
        col = (slot0 + slot)[None, :]
        inside = (row < rows) & (col < cols)
    else:  # slots are [SPAN / RUN, GROUPS, RUN]: the first run of every group, then the second
        place = slot // (GROUPS * RUN) * RUN + slot % RUN
        col = ((group0 + slot // RUN % GROUPS) * SIZE + place)[None, :]
        inside = (row < rows) & (col < cols) & (place < SIZE)[None, :]
    ptrs = scores_ptr + row * row_stride + col * col_stride
    if WIDTH == 1:
        wide = widen(tl.load(ptrs, mask=inside, other=LOWEST))  # the last places of a group: they lose every tie
        key, nan = order(wide, LARGEST), is_nan(wide, LARGEST)
    else:
        score = to_float(tl.load(ptrs, mask=inside, other=0), LARGEST)
        left, right = tl.split(tl.reshape(score, [BLOCK_ROWS, BLOCK_COLS // 2, 2]))
        WHOLE: tl.constexpr = score.dtype.primitive_bitwidth
        INTEGER: tl.constexpr = tl.int64 if WHOLE == 64 else tl.int32
        SUM_LARGEST: tl.constexpr = FP64_LARGEST if WHOLE == 64 else FP32_LARGEST
        wide = (left + right).to(INTEGER, bitcast=True)  # a column past the end adds nothing to its pair
        exists, _ = tl.split(tl.reshape(inside, [BLOCK_ROWS, BLOCK_COLS // 2, 2]))
        key = tl.where(exists, order(wide, SUM_LARGEST), -(1 << (WHOLE - 1)))
        nan = is_nan(wide, SUM_LARGEST)
    key = by_group(key, GROUPS, PLACES, RUN // WIDTH)
    if PLACES <= 8:
        kept = keep_by_rank(key, n, PLACES)
    else:
        kept = keep_by_cut(key, n, bits, 2)
    if PLACES != M:
        kept = tl.permute(tl.reshape(kept, [BLOCK_ROWS, GROUPS, SPAN // RUN, RUN // WIDTH]), 0, 2, 1, 3)
    if WIDTH == 2:
        kept = tl.join(kept, kept)
    kept = tl.reshape(kept, [BLOCK_ROWS, BLOCK_COLS])
    tl.store(mask_ptr + row * cols + col, kept.to(tl.uint8), mask=inside)
    bad = tl.max(by_group(nan, GROUPS, PLACES, RUN // WIDTH).to(tl.int32), 2) != 0
    report(status_ptr, bad, row0, group0, groups, BLOCK_ROWS, GROUPS)


def mask_nm(
    scores: torch.Tensor, n: int, m: int, pairs: bool = False, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """scores (rows, cols) -> mask (rows, cols) bool, status (1,) int64. Keeps exactly n of each m columns; 0 <= n <= m <= 32.

    scores: fp64, fp32, fp16, bf16, fp8 or int8, any strides; the higher score is kept, a tie goes to the lower column.
    pairs: a group is m pairs of columns, n kept whole; the score of a pair is the sum of its two in fp32 (fp64 for fp64).
    Where m is no power of two, a row-major matrix is read and written in narrow accesses: see the head of this file.
    out: the mask to write to, contiguous; a new one by default.
    A last group that is not full keeps min(n, what it has). status[0] is the flat index (row * groups a row + group) of the first
    group with a NaN (or with a pair whose sum is one), tiles.NOTHING where there is none.
    """
    rows, cols = scores.shape
    mask = torch.empty((rows, cols), dtype=torch.bool, device=scores.device) if out is None else out
    status = new_status(1, scores.device)
    if rows == 0 or cols == 0:
        return mask, status
    width = 2 if pairs else 1
    if foldable(m * width, scores):
        rows, cols = 1, rows * cols
    groups = triton.cdiv(cols, m * width)
    itembits = 8 * scores.element_size()
    places = triton.next_power_of_2(m)
    tile = tiling(rows, groups * places * width, scores)
    block_cols = max(tile.block_cols, places * width)
    warps = 4 if places == m else max(1, min(4, tile.block_rows * block_cols // (places * width * 32)))  # a thread a group
    mask_nm_kernel[tile.grid](
        as_bits(scores), mask.view(torch.uint8), status, rows, cols, groups, *scores.stride(), n,
        M=m, bits=max(itembits, 32) if pairs else itembits, WIDTH=width, LARGEST=largest(scores.dtype), LOWEST=lowest(scores.dtype),
        BLOCK_ROWS=tile.block_rows, BLOCK_COLS=block_cols, PLACES=places, num_warps=warps,
    )  # fmt: skip
    return mask, status
