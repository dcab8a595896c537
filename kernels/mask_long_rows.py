"""Unstructured masks of few long rows: several programs share a row, which mask_rows.py would give to one.

A radix select, eight bits of a score at a time. Each pass counts, among the scores that begin with the digits found so far, how
many have each next digit; integers are added over a row's programs, so the order of the sum does not matter. Every program finds
the digits anew from the counts: nothing else passes from launch to launch, and the host waits for nothing. The last pass also
leaves the counts of each program by itself: where ties go to the lower column, a program must know how many stand before its
part.
Memory floor for scores of b bytes: b read, rows * cols written. This reads them 1 + (bits of a score) / 8 times, from L2 where
they fit: a block of 128 columns of 4096 rows is 2 MB. Not yet run on hardware.
"""

import torch
import triton
import triton.language as tl

from .bits import as_bits, largest, lowest
from .select import load_keys
from .tiles import new_status, report

_BLOCK = 2048
_PROGRAMS = 512  # about four a multiprocessor
BINS = tl.constexpr(256)


@triton.jit
def digits(key):
    """Keys as unsigned integers in the same order."""
    WIDTH: tl.constexpr = key.dtype.primitive_bitwidth
    UNSIGNED: tl.constexpr = tl.uint64 if WIDTH == 64 else tl.uint32
    return (key ^ (-1 << (WIDTH - 1))).to(UNSIGNED, bitcast=True)


@triton.jit
def found_digits(counts_ptr, kept, DONE: tl.constexpr, like):
    """The first DONE digits of the lowest score kept, and how many of those that begin with them are kept; scalars.

    counts_ptr: [DONE, BINS] of one row."""
    bin = tl.arange(0, BINS)
    prefix = tl.full([], 0, like)
    room = tl.cast(kept, tl.int64)
    for done in tl.static_range(DONE):
        counts = tl.load(counts_ptr + done * BINS + bin)
        from_here_up = tl.sum(counts) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(from_here_up >= room, bin, 0))  # room == 0: the highest, of which none is kept
        room -= tl.sum(tl.where(bin > digit, counts, 0))
        prefix = (prefix << 8) | digit.to(like)
    return prefix, room


@triton.jit(do_not_specialize=["kept"])
def count_digits_kernel(
    scores_ptr,  # [rows, cols] bits, any strides
    counts_ptr,  # [rows, PASSES, BINS] int64, zero from this pass on
    parts_ptr,  # [rows, parts, BINS] int32: of the last pass, by program
    status_ptr,  # [1] int64: first row with a NaN
    cols, span,  # span: columns of a program
    row_stride, col_stride,
    kept,
    LARGEST: tl.constexpr, LOWEST: tl.constexpr,  # see bits.py
    DONE: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    KEY: tl.constexpr = tl.uint64 if scores_ptr.dtype.element_ty == tl.int64 else tl.uint32
    scores_ptr += row * row_stride
    counts_ptr += row * PASSES * BINS
    prefix, _room = found_digits(counts_ptr, kept, DONE, KEY)
    begin = tl.cast(span, tl.int64) * part
    counts = tl.zeros([BINS], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, tl.minimum(begin + span, cols), BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < cols
        key, nan = load_keys(scores_ptr + col * col_stride, inside, LARGEST, LOWEST)
        number = digits(key)
        among = inside
        if DONE == 0:
            bad |= nan.to(tl.int32)
        else:
            among &= (number >> (KEY.primitive_bitwidth - 8 * DONE)) == prefix
        digit = (number >> (KEY.primitive_bitwidth - 8 * DONE - 8)).to(tl.int32) & (BINS - 1)
        counts += tl.histogram(digit, BINS, mask=among)
    bin = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + DONE * BINS + bin, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if DONE == PASSES - 1:
        tl.store(parts_ptr + (row * tl.num_programs(0) + part) * BINS + bin, counts)
    if DONE == 0:
        report(status_ptr, tl.max(bad, 0, keep_dims=True) > 0, row, 0, 1, 1, 1)


@triton.jit(do_not_specialize=["kept"])
def keep_above_kernel(
    scores_ptr, counts_ptr, parts_ptr,  # as above
    mask_ptr,  # [rows, cols] uint8
    cols, span, row_stride, col_stride, kept,
    LARGEST: tl.constexpr, LOWEST: tl.constexpr,
    PASSES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    KEY: tl.constexpr = tl.uint64 if scores_ptr.dtype.element_ty == tl.int64 else tl.uint32
    scores_ptr += row * row_stride
    mask_ptr += row * cols
    cut, room = found_digits(counts_ptr + row * PASSES * BINS, kept, PASSES, KEY)
    other = tl.arange(0, PARTS)
    ties_ptr = parts_ptr + (row * tl.num_programs(0) + other) * BINS + (cut & (BINS - 1)).to(tl.int32)
    room -= tl.sum(tl.load(ties_ptr, mask=other < part, other=0).to(tl.int64))
    begin = tl.cast(span, tl.int64) * part
    for start in range(begin, tl.minimum(begin + span, cols), BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < cols
        key, _nan = load_keys(scores_ptr + col * col_stride, inside, LARGEST, LOWEST)
        number = digits(key) >> (KEY.primitive_bitwidth - 8 * PASSES)
        tie = (number == cut).to(tl.int32)
        keep = (number > cut) | ((tie != 0) & (tl.cumsum(tie, 0) <= room))
        tl.store(mask_ptr + col, keep.to(tl.uint8), mask=inside)
        room -= tl.sum(tie)


def mask_long_rows(scores: torch.Tensor, k: int, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What mask_rows gives for scores (rows, cols) of at least one column: mask (rows, cols) bool, status (1,) int64."""
    rows, cols = scores.shape
    mask = torch.empty((rows, cols), dtype=torch.bool, device=scores.device) if out is None else out
    status = new_status(1, scores.device)
    if rows == 0:
        return mask, status
    passes = scores.element_size()
    span = triton.cdiv(triton.cdiv(cols, max(1, _PROGRAMS // rows)), _BLOCK) * _BLOCK
    parts = triton.cdiv(cols, span)
    counts = torch.zeros((rows, passes, BINS.value), dtype=torch.int64, device=scores.device)
    own = torch.empty((rows, parts, BINS.value), dtype=torch.int32, device=scores.device)
    sizes = (cols, span, *scores.stride(), k)
    # Left to choose, the ptxas of Triton 3.6 spills a register for the sake of one more block on a multiprocessor.
    same = dict(LARGEST=largest(scores.dtype), LOWEST=lowest(scores.dtype), PASSES=passes, BLOCK=_BLOCK, maxnreg=128)
    for done in range(passes):
        count_digits_kernel[(parts, rows)](as_bits(scores), counts, own, status, *sizes, DONE=done, **same)
    keep_above_kernel[(parts, rows)](
        as_bits(scores), counts, own, mask.view(torch.uint8), *sizes, PARTS=triton.next_power_of_2(parts), **same
    )
    return mask, status
