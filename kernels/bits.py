"""Numbers as integers: every dtype is read by its bit pattern, so comparisons are exact and one code serves all dtypes.

A pattern is moved to the top of an int32 (fp64: an int64). Then one sign bit, one mask and one order fit every dtype, fp8 needs no
instruction that only newer chips have, and no comparison flushes a subnormal.
"""

import torch
import triton
import triton.language as tl

_LARGEST = {  # the largest magnitude that is not NaN, as a pattern at the top of an int32 (fp64: an int64)
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000,
    torch.bfloat16: 0x7F80_0000,
    torch.float16: 0x7C00_0000,
    torch.float8_e4m3fn: 0x7E00_0000,  # has no infinity: 448
    torch.float8_e5m2: 0x7C00_0000,
    torch.int8: -1,  # below zero: patterns are two's complement, and there is no NaN
}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FP32_LARGEST = tl.constexpr(_LARGEST[torch.float32])
FP64_LARGEST = tl.constexpr(_LARGEST[torch.float64])


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the same size."""
    return x.view(_SIGNED[x.element_size()])


def largest(dtype: torch.dtype) -> int:
    """LARGEST for the device functions below. Raises TypeError for a dtype that no kernel here reads."""
    if dtype not in _LARGEST:
        raise TypeError(f"sparsekit.kernels: dtype must be one of {', '.join(map(str, _LARGEST))}, got {dtype}")
    return _LARGEST[dtype]


def lowest(dtype: torch.dtype) -> int:
    """The pattern, in the dtype's own width, that no other is ordered below: -inf, or the most negative number."""
    info = torch.iinfo(dtype) if not dtype.is_floating_point else torch.finfo(dtype)
    if not dtype.is_floating_point:
        return info.min
    top = _LARGEST[dtype] >> max(32 - info.bits, 0)
    return top - (1 << (info.bits - 1))


@triton.jit
def widen(bits):
    """Signed integers of 8 to 64 bits -> int32 (int64), the pattern at the top."""
    WIDTH: tl.constexpr = bits.dtype.primitive_bitwidth
    if WIDTH < 32:
        return bits.to(tl.int32) << (32 - WIDTH)
    else:
        return bits


@triton.jit
def narrow(wide, to: tl.constexpr):
    """Undoes widen for integers of the type `to`."""
    WIDTH: tl.constexpr = wide.dtype.primitive_bitwidth
    return (wide >> (WIDTH - to.primitive_bitwidth)).to(to)


@triton.jit
def magnitude(wide, LARGEST: tl.constexpr):
    """Integers >= 0 in the order of |x|."""
    if LARGEST < 0:
        return tl.abs(wide >> 1)  # an int8 leaves the low bits free, so |-128| has room
    else:
        return wide & ((1 << (wide.dtype.primitive_bitwidth - 1)) - 1)


@triton.jit
def order(wide, LARGEST: tl.constexpr):
    """Signed integers in the order of x, -0.0 equal to +0.0."""
    if LARGEST < 0:
        return wide
    else:
        size = magnitude(wide, LARGEST)
        return tl.where(wide < 0, -size, size)


@triton.jit
def is_nan(wide, LARGEST: tl.constexpr):
    if LARGEST < 0:
        return wide != wide
    else:
        return magnitude(wide, LARGEST) > LARGEST


@triton.jit
def any_nan(wide0, wide1, wide2, wide3, LARGEST: tl.constexpr):
    if LARGEST < 0:
        return wide0 != wide0
    else:
        size01 = tl.maximum(magnitude(wide0, LARGEST), magnitude(wide1, LARGEST))
        size23 = tl.maximum(magnitude(wide2, LARGEST), magnitude(wide3, LARGEST))
        return tl.maximum(size01, size23) > LARGEST


@triton.jit
def to_float(bits, LARGEST: tl.constexpr):
    """The numbers themselves: fp64 stays, every other dtype becomes fp32, exactly."""
    WIDTH: tl.constexpr = bits.dtype.primitive_bitwidth
    wide = widen(bits)
    if LARGEST < 0:
        return bits.to(tl.float32)
    elif WIDTH == 64:
        return bits.to(tl.float64, bitcast=True)
    elif LARGEST == FP32_LARGEST:  # fp32 and bf16 share sign and exponent
        return wide.to(tl.float32, bitcast=True)
    elif WIDTH == 16:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif LARGEST == 0x7C00_0000:  # e5m2 is the upper byte of an fp16
        return (wide >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # e4m3: its exponent field, moved into fp32's, is 120 too small; the product is exact for subnormals too
        small = (wide & -2147483648) | ((wide & 0x7FFFFFFF) >> 4)
        number = small.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where(is_nan(wide, LARGEST), float("nan"), number)
