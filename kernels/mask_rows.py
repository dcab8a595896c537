"""Unstructured masks: exactly k columns of every row are kept, those with the highest scores.

A program owns whole rows. A row that fits in registers is read once; the k-th highest score is found bit by bit, counting.
A longer row, or rows that lie across memory, is read once for each bit, which the caches serve. Long rows too few to fill a GPU go
to mask_long_rows.py, several programs a row.
Memory floor for scores of b bytes: b read, rows * cols written.
"""

import torch
import triton
import triton.language as tl

from .bits import as_bits, largest, lowest
from .mask_long_rows import mask_long_rows
from .select import count, keep_by_cut, load_keys
from .tiles import new_status, report

_RESIDENT_COLS = 16384  # 16 keys a thread for 1024 threads: twice as many would not fit the registers
_ENOUGH_ROWS = 128  # about the multiprocessors of a GPU


@triton.jit(do_not_specialize=["k"])
def mask_rows_kernel(
    scores_ptr,  # [rows, cols] bits, any strides
    mask_ptr,  # [rows, cols] uint8
    status_ptr,  # [1] int64: first row with a NaN
    rows, cols,
    row_stride, col_stride,
    k, bits,  # bits of a score
    LARGEST: tl.constexpr, LOWEST: tl.constexpr,  # see bits.py
    RESIDENT: tl.constexpr,  # BLOCK_COLS covers the row
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    KEY: tl.constexpr = tl.int64 if scores_ptr.dtype.element_ty == tl.int64 else tl.int32
    UNSIGNED: tl.constexpr = tl.uint64 if KEY == tl.int64 else tl.uint32
    TOP: tl.constexpr = 1 << (KEY.primitive_bitwidth - 1)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = (row0 + tl.arange(0, BLOCK_ROWS))[:, None]
    place = tl.arange(0, BLOCK_COLS)[None, :].to(tl.int64)
    scores_ptr += row * row_stride
    mask_ptr += row * cols
    if RESIDENT:
        inside = (row < rows) & (place < cols)
        key, nan = load_keys(scores_ptr + place * col_stride, inside, LARGEST, LOWEST)
        bad = count(nan, 1) > 0
        tl.store(mask_ptr + place, keep_by_cut(key, k, bits, 1).to(tl.uint8), mask=inside)
    else:
        # As keep_by_cut, with the row read again for each bit.
        cut = tl.full([BLOCK_ROWS, 1], -TOP, KEY)
        step = tl.full([], TOP, UNSIGNED)
        for _bit in range(bits):
            higher = cut + step.to(KEY, bitcast=True)
            hits = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.int32)
            for start in range(0, cols, BLOCK_COLS):
                col = start + place
                inside = (row < rows) & (col < cols)
                key, nan = load_keys(scores_ptr + col * col_stride, inside, LARGEST, LOWEST)
                hits += (key >= higher).to(tl.int32)
            cut = tl.where(tl.sum(hits, 1, keep_dims=True) >= k, higher, cut)
            step >>= 1
        above = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.int32)
        for start in range(0, cols, BLOCK_COLS):
            col = start + place
            inside = (row < rows) & (col < cols)
            key, nan = load_keys(scores_ptr + col * col_stride, inside, LARGEST, LOWEST)
            above += (key > cut).to(tl.int32)
        room = k - tl.sum(above, 1, keep_dims=True)
        bad = tl.zeros([BLOCK_ROWS, 1], tl.int1)
        for start in range(0, cols, BLOCK_COLS):
            col = start + place
            inside = (row < rows) & (col < cols)
            key, nan = load_keys(scores_ptr + col * col_stride, inside, LARGEST, LOWEST)
            tie = (key == cut).to(tl.int32)
            kept = (key > cut) | ((tie != 0) & (tl.cumsum(tie, 1) <= room))
            tl.store(mask_ptr + col, kept.to(tl.uint8), mask=inside)
            room -= tl.sum(tie, 1, keep_dims=True)
            bad |= count(nan, 1) > 0
    report(status_ptr, bad, row0, 0, 1, BLOCK_ROWS, 1)


def mask_rows(scores: torch.Tensor, k: int, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """scores (rows, cols) -> mask (rows, cols) bool, status (1,) int64. Keeps exactly k columns of each row; 0 <= k <= cols.

    scores: fp64, fp32, fp16, bf16, fp8 or int8, any strides, rows of any length; the higher score is kept, a tie goes to the lower
    column. out: the mask to write to, contiguous; a new one by default. status[0] is the first row with a NaN, tiles.NOTHING where
    there is none.
    """
    rows, cols = scores.shape
    if cols > _RESIDENT_COLS and rows < _ENOUGH_ROWS:
        return mask_long_rows(scores, k, out)
    mask = torch.empty((rows, cols), dtype=torch.bool, device=scores.device) if out is None else out
    status = new_status(1, scores.device)
    if rows == 0 or cols == 0:
        return mask, status
    across = rows > 1 and scores.stride(0) < scores.stride(1)
    resident = not across and cols <= _RESIDENT_COLS
    if resident:
        block_cols = triton.next_power_of_2(cols)
        block_rows = max(1, 2048 // block_cols)
    else:  # across: one 32-byte sector of a column of memory
        block_rows = 32 // scores.element_size() if across else 1
        block_cols = 2048 // block_rows
    # Left to choose, ptxas spills a register or two of the loops for the sake of one more block on a multiprocessor.
    limits = {"num_warps": min(32, max(4, block_rows * block_cols // 512))} if resident else {"num_warps": 8, "maxnreg": 128}
    mask_rows_kernel[(triton.cdiv(rows, block_rows),)](
        as_bits(scores), mask.view(torch.uint8), status, rows, cols, *scores.stride(), k, 8 * scores.element_size(),
        LARGEST=largest(scores.dtype), LOWEST=lowest(scores.dtype),
        RESIDENT=resident, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, **limits,
    )  # fmt: skip
    return mask, status
