"""Groups of four columns to two weights and a nibble, all in registers: the device functions that every 2:4 writer shares.

A tile [R, C] of columns becomes four tensors [R, C // 8, 2], one for each column of a group; axis 2 is the even or odd group of a
metadata byte. Each thread holds whole groups, so a selection is comparisons and selects, with no exchange between threads.
"""

import triton
import triton.language as tl

from .bits import narrow

MINUS_ZERO = tl.constexpr(-(1 << 31))


@triton.jit
def split_groups(x):
    """[R, C] -> columns 0, 1, 2, 3 of every group, each [R, C // 8, 2]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 2, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def keep_two(k0, k1, k2, k3):
    """Whether each column of a group is among its two highest keys; a tie goes to the lower column. Exactly two are."""
    ge01, ge02, ge03 = k0 >= k1, k0 >= k2, k0 >= k3
    ge12, ge13, ge23 = k1 >= k2, k1 >= k3, k2 >= k3
    # A column is kept when it wins at least two of its three comparisons.
    keep0 = (ge01 & ge02) | (ge03 & (ge01 | ge02))
    keep1 = (~ge01 & ge12) | (ge13 & (~ge01 | ge12))
    keep2 = (~ge02 & ~ge12) | (ge23 & (~ge02 | ~ge12))
    keep3 = (~ge03 & ~ge13) | (~ge23 & (~ge03 | ~ge13))
    return keep0, keep1, keep2, keep3


@triton.jit
def more_than_two(on0, on1, on2, on3):
    return (on0 & on1 & (on2 | on3)) | (on2 & on3 & (on0 | on1))


@triton.jit
def pack_groups(w0, w1, w2, w3, keep0, keep1, keep2, keep3, LARGEST: tl.constexpr):
    """Widened weights of a group, and which two are kept -> first and second kept weight, widened, and the nibble (int32).

    A kept -0.0 becomes +0.0: compressing what was expanded then gives the same bits."""
    first = tl.where(keep0, w0, tl.where(keep1, w1, w2))
    second = tl.where(keep3, w3, tl.where(keep2, w2, w1))
    if LARGEST >= 0:
        first = tl.where(first == MINUS_ZERO, 0, first)
        second = tl.where(second == MINUS_ZERO, 0, second)
    nibble = tl.where(keep0, 0, tl.where(keep1, 1, 2)) | tl.where(keep3, 12, tl.where(keep2, 8, 4))
    return first, second, nibble


@triton.jit
def store_groups(values_ptr, meta_ptr, first, second, nibble, rows, blocks, row0, col0, RUN: tl.constexpr):
    """Writes a tile's values [rows, 4 * blocks] and metadata [rows, blocks]; row0, col0: the tile's place in the weight.

    RUN bounds what one thread stores at once, so that stores keep the layout of the loads (RUN columns a thread)."""
    R: tl.constexpr = first.shape[0]
    BYTES: tl.constexpr = first.shape[1]
    row = row0 + tl.arange(0, R)
    slot = tl.max_contiguous(col0 // 2 + tl.arange(0, BYTES * 4), RUN // 2)
    byte = tl.max_contiguous(col0 // 8 + tl.arange(0, BYTES), RUN // 8 if RUN > 8 else 1)
    inside = (row < rows)[:, None]
    VALUE: tl.constexpr = values_ptr.dtype.element_ty
    kept = tl.reshape(tl.join(narrow(first, VALUE), narrow(second, VALUE)), [R, BYTES * 4])
    tl.store(values_ptr + row[:, None] * (blocks * 4) + slot[None, :], kept, inside & (slot < blocks * 4)[None, :])
    low, high = tl.split(nibble)
    packed = (low | (high << 4)).to(tl.uint8)
    tl.store(meta_ptr + row[:, None] * blocks + byte[None, :], packed, inside & (byte < blocks)[None, :])
