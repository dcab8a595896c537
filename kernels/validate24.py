"""What a 2:4 form from outside may hold wrong: a nibble that stands for no two columns, or a weight past the last column.

The first programs share the metadata, 4 bytes a word where it can be read so; the others look at the end of each row, if a row
ends inside a metadata byte. Memory floor: the metadata read once, and of each such row the last byte and its four values.
"""

import torch
import triton
import triton.language as tl

from .bits import as_bits, largest, magnitude, widen
from .tiles import new_status, report

_WORDS, _ROWS = 2048, 256  # words of metadata, or ends of rows, that a program takes


@triton.jit
def invalid(packed, WIDTH: tl.constexpr):
    """The lowest WIDTH bits, nibbles idx1 << 2 | idx0 -> bit 1 of every nibble: idx0 is not below idx1."""
    below = ~packed & (packed >> 2)  # bits 1 and 0: those that idx1 has and idx0 has not
    differ = packed ^ (packed >> 2)
    return ~(below | (~differ & (below << 1))) & (0x22222222 >> (32 - WIDTH))


@triton.jit
def check_nibbles(packed_ptr, status_ptr, word0, words, WORDS: tl.constexpr):
    WIDTH: tl.constexpr = packed_ptr.dtype.element_ty.primitive_bitwidth
    NIBBLES: tl.constexpr = WIDTH // 4
    word = tl.arange(0, WORDS)
    packed = tl.load(packed_ptr + word0 + word, mask=word0 + word < words, other=0x44444444 >> (32 - WIDTH))
    bad = invalid(packed.to(tl.int32), WIDTH)
    first = tl.min(tl.where(bad != 0, word, WORDS))
    if first < WORDS:
        lowest = tl.max(tl.where(word == first, bad, 0))
        lowest &= -lowest
        below = (2 << 4 * tl.arange(0, NIBBLES)) < lowest
        tl.atomic_min(status_ptr, (word0 + first) * NIBBLES + tl.sum(below.to(tl.int64)), sem="relaxed")


@triton.jit
def check_ends(values_ptr, meta_ptr, status_ptr, row0, rows, blocks, cols, LARGEST: tl.constexpr, ROWS: tl.constexpr):
    row, place = row0 + tl.arange(0, ROWS)[:, None], tl.arange(0, 4)[None, :]
    meta = tl.load(meta_ptr + (row + 1) * blocks - 1, mask=row < rows, other=0x44).to(tl.int32)
    kept = tl.load(values_ptr + (row + 1) * (blocks * 4) - 4 + place, mask=row < rows, other=0)
    col = place // 2 * 4 + (meta >> place * 2 & 3)
    past = (magnitude(widen(kept), LARGEST) != 0) & (col >= cols)
    report(status_ptr, past, row0, (blocks - 1) * 4, blocks * 4, ROWS, 4)


@triton.jit(do_not_specialize=["rows", "cols"])
def validate24_kernel(
    values_ptr,  # [rows, 4 * blocks] bits of the kept weights; unread when row ends are whole bytes
    meta_ptr,  # [rows, blocks] bytes
    packed_ptr,  # the same memory as [words]
    status_ptr,  # [2] int64: first invalid nibble, first kept weight past the last column
    rows, blocks, words,
    cols,  # of a row that its last byte describes
    LARGEST: tl.constexpr,  # see bits.py
    WORDS: tl.constexpr, ROWS: tl.constexpr,  # ROWS is 0 when row ends are whole bytes
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.cdiv(words, WORDS)
    if ROWS == 0:
        check_nibbles(packed_ptr, status_ptr, program * WORDS, words, WORDS)
    elif program < programs:
        check_nibbles(packed_ptr, status_ptr, program * WORDS, words, WORDS)
    else:
        check_ends(values_ptr, meta_ptr, status_ptr + 1, (program - programs) * ROWS, rows, blocks, cols, LARGEST, ROWS)


def validate24(values: torch.Tensor, meta: torch.Tensor, cols: int) -> torch.Tensor:
    """values (rows, kp / 2), meta (rows, kp / 8) uint8, cols -> status (2,) int64; kp: cols rounded up to 8. Nothing is copied.

    Both contiguous; values: fp32, fp16, bf16, fp8 or int8. status[0] is the flat index (row * kp / 4 + group) of the first nibble
    other than 4, 8, 9, C, D, E; status[1] the flat index (row * kp / 2 + place) of the first kept weight that belongs to a column
    >= cols and is not zero, as NaN is not; tiles.NOTHING where there is none.
    """
    rows, blocks = meta.shape
    status = new_status(2, meta.device)
    if rows == 0 or blocks == 0:
        return status
    packed = meta.view(-1)
    if all(size % 4 == 0 for size in (packed.numel(), packed.data_ptr(), packed.storage_offset())):
        packed = packed.view(torch.int32)
    ends = triton.cdiv(rows, _ROWS) if cols % 8 else 0
    validate24_kernel[(triton.cdiv(packed.numel(), _WORDS) + ends,)](
        as_bits(values), meta, packed, status, rows, blocks, packed.numel(), cols % 8,
        LARGEST=largest(values.dtype), WORDS=_WORDS, ROWS=_ROWS if ends else 0,
    )  # fmt: skip
    return status
