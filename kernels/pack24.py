"""Groups of four columns and the two of each that stay, all in registers: the device functions that every 2:4 writer shares.

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
def merge_groups(x0, x1, x2, x3):
    """Undoes split_groups."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [x0.shape[0], x0.shape[1] * 8])


@triton.jit
def place_pairs(first, second, nibble):
    """The two kept of every group, at the columns that its nibble names: columns 0, 1, 2, 3, zeros elsewhere."""
    at0, at1 = nibble & 3, nibble >> 2
    zero = tl.zeros_like(first)
    w0 = tl.where(at0 == 0, first, zero)  # the first of two is never column 3, the second never column 0
    w1 = tl.where(at0 == 1, first, tl.where(at1 == 1, second, zero))
    w2 = tl.where(at0 == 2, first, tl.where(at1 == 2, second, zero))
    w3 = tl.where(at1 == 3, second, zero)
    return w0, w1, w2, w3


@triton.jit
def more_than_two(k0, k1, k2, k3):
    """Whether three or four keys of a group, all >= 0, are above zero: then each half has one, and one half has two."""
    halves = tl.minimum(tl.maximum(k0, k1), tl.maximum(k2, k3))
    pairs = tl.maximum(tl.minimum(k0, k1), tl.minimum(k2, k3))
    return tl.minimum(halves, pairs) > 0


@triton.jit
def choose(k0, k1, k2, k3):
    """The two highest keys of a group, ties to the lower column: whether both are of the lower half or both of the upper, and
    which of a half's columns is the higher. Both of a half are kept when its loser beats the other half's winner."""
    lower_half = tl.minimum(k0, k1) >= tl.maximum(k2, k3)
    upper_half = tl.minimum(k2, k3) > tl.maximum(k0, k1)
    return lower_half, upper_half, k1 > k0, k3 > k2


@triton.jit
def plus_zero(wide, LARGEST: tl.constexpr):
    """-0.0 becomes +0.0: compressing what was expanded then gives the same bits."""
    if LARGEST < 0:
        return wide
    else:
        return tl.where(wide == MINUS_ZERO, 0, wide)


@triton.jit
def keep_groups(w0, w1, w2, w3, k0, k1, k2, k3, LARGEST: tl.constexpr):
    """Widened weights and keys of a group -> its weights, those without one of the two highest keys as +0."""
    lower_half, upper_half, one_beats_0, three_beats_2 = choose(k0, k1, k2, k3)
    w0 = tl.where(upper_half | (one_beats_0 & ~lower_half), 0, plus_zero(w0, LARGEST))
    w1 = tl.where(lower_half | (one_beats_0 & ~upper_half), plus_zero(w1, LARGEST), 0)
    w2 = tl.where(lower_half | (three_beats_2 & ~upper_half), 0, plus_zero(w2, LARGEST))
    w3 = tl.where(upper_half | (three_beats_2 & ~lower_half), plus_zero(w3, LARGEST), 0)
    return w0, w1, w2, w3


@triton.jit
def pack_groups(w0, w1, w2, w3, k0, k1, k2, k3, LARGEST: tl.constexpr):
    """Widened weights and keys of a group -> its two weights with the highest keys, in column order, and its nibble (int32)."""
    lower_half, upper_half, one_beats_0, three_beats_2 = choose(k0, k1, k2, k3)
    first_is_1 = one_beats_0 & ~lower_half
    second_is_3 = three_beats_2 | upper_half
    first = tl.where(upper_half, w2, tl.where(first_is_1, w1, w0))
    second = tl.where(lower_half, w1, tl.where(second_is_3, w3, w2))
    nibble = tl.where(upper_half, 2, tl.where(first_is_1, 1, 0)) | tl.where(lower_half, 4, tl.where(second_is_3, 12, 8))
    return plus_zero(first, LARGEST), plus_zero(second, LARGEST), nibble


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
