"""Exactly n of a set of keys, ties to the lower place: the device functions of the mask kernels.

Keys are integers from bits.order: BITS significant ones at the top of an int32 or int64.
"""

import triton
import triton.language as tl

from .bits import is_nan, order, widen


@triton.jit
def load_keys(ptrs, inside, LARGEST: tl.constexpr, LOWEST: tl.constexpr):
    """Keys of scores, and which scores are NaN. Places past the end are the last of a set: they lose every tie."""
    wide = widen(tl.load(ptrs, mask=inside, other=LOWEST))
    return order(wide, LARGEST), is_nan(wide, LARGEST)


@triton.jit
def keep_by_rank(key, n, PLACES: tl.constexpr):
    """key [R, G, PLACES] -> bool, the n highest along axis 2. PLACES comparisons a key: for sets that one thread holds.

    Counts in twos: a sum of eight booleans is to LLVM a byte whose set bits it counts, and it puts the byte together in memory."""
    place = tl.arange(0, PLACES)[None, None, :]
    beaten_by = tl.zeros_like(key)
    for other in tl.static_range(PLACES):
        rival = tl.sum(tl.where(place == other, key, 0), 2, keep_dims=True)  # no arithmetic where a thread holds the set
        beaten_by += tl.where(tl.where(place > other, rival >= key, rival > key), 2, 0).to(key.dtype)
    return beaten_by < 2 * n


@triton.jit
def count(hits, AXIS: tl.constexpr):
    return tl.sum(tl.where(hits, 2, 0), AXIS, keep_dims=True) >> 1  # in twos, see keep_by_rank


@triton.jit
def keep_by_cut(key, n, bits, AXIS: tl.constexpr):
    """key -> bool, the n highest along AXIS. Finds the n-th highest key bit by bit: `bits` counts, whatever the size of the set.

    bits is no constant, so that the loop stays a loop: unrolled it would not fit the instruction cache."""
    TOP: tl.constexpr = 1 << (key.dtype.primitive_bitwidth - 1)
    cut = tl.where(count(key >= 0, AXIS) >= n, 0, -TOP).to(key.dtype)
    step = tl.full([], TOP >> 1, key.dtype)
    for _bit in range(1, bits):
        cut = tl.where(count(key >= cut + step, AXIS) >= n, cut + step, cut)
        step >>= 1
    room = n - count(key > cut, AXIS)
    tie = (key == cut).to(tl.int32)
    return (key > cut) | ((tie != 0) & (tl.cumsum(tie, AXIS) <= room))
