"""Exactly n of a set of keys, ties to the lower place: the device functions of the mask kernels.

Keys are integers from bits.order: BITS significant ones at the top of an int32 or int64.
"""

import triton
import triton.language as tl


@triton.jit
def keep_by_rank(key, n, PLACES: tl.constexpr):
    """key [R, G, PLACES] -> bool, the n highest along axis 2. PLACES comparisons a key: for sets that one thread holds."""
    place = tl.arange(0, PLACES)[None, None, :]
    beaten_by = tl.zeros_like(key)
    for other in tl.static_range(PLACES):
        rival = tl.sum(tl.where(place == other, key, 0), 2, keep_dims=True)  # no arithmetic where a thread holds the set
        beaten_by += tl.where(place > other, rival >= key, rival > key).to(key.dtype)
    return beaten_by < n


@triton.jit
def count(hits, AXIS: tl.constexpr):
    return tl.sum(hits.to(tl.int32), AXIS, keep_dims=True)


@triton.jit
def keep_by_cut(key, n, AXIS: tl.constexpr, BITS: tl.constexpr):
    """key -> bool, the n highest along AXIS. Finds the n-th highest key bit by bit: BITS counts, whatever the size of the set."""
    WIDTH: tl.constexpr = key.dtype.primitive_bitwidth
    cut = tl.where(count(key >= 0, AXIS) >= n, 0, -(1 << (WIDTH - 1))).to(key.dtype)
    for bit in tl.static_range(1, BITS):
        higher = cut + (1 << (WIDTH - 1 - bit))
        cut = tl.where(count(key >= higher, AXIS) >= n, higher, cut)
    above, tie = key > cut, key == cut
    room = n - count(above, AXIS)
    return above | (tie & (tl.cumsum(tie.to(tl.int32), AXIS) <= room))
