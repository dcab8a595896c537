"""The canonical 2:4 format, as it lies in memory and on disk, and converters to and from the layouts of kernels and other tools.

A weight ``w`` (n, k) has output features as rows and input features as columns. Columns are cut into groups of four, each keeps
two. Columns past k, up to the next multiple of 8, count as zeros.

::

    columns     0    1    2    3  |  4    5    6    7      one row of w, two groups
                .    a    .    b  |  c    .    d    .      . is zero
    values      a    b    c    d                           (n, kp/2), in column order, dtype of w
    meta        1000 1101                                  (n, kp/8) uint8: even group in the low nibble
                |    idx1 idx0 = 3, 1 of group 0
                idx1 idx0 = 2, 0 of group 1

A nibble is ``idx1 << 2 | idx0`` with idx0 < idx1, hence one of 4, 8, 9, C, D, E. A group with fewer than two non-zeros keeps its
non-zeros and then its lowest free columns, so ``compress24(expand24(s)) == s`` bit for bit. -0.0 counts as zero and is stored as
0.0. Read as little-endian words, a row of meta is the order in which ``mma.sp`` takes it (PTX ISA, "sparse matrix storage").

Converters come in pairs, ``to_x(s)`` and ``from_x(...)``, and run on the device of their input. They move bits: values and nibbles
survive a round trip exactly, under-full groups included, unless the docstring says otherwise. Pictures: docs/format.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 1
VALID_NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)

# The dtypes of which a weight can be stored 2:4.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)


def padded_columns(k: int) -> int:
    """Columns after padding: k rounded up to whole bytes of metadata, two groups each."""
    return (k + 7) // 8 * 8


def nbytes24(n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of an (n, k) weight stored 2:4, metadata included."""
    kp = padded_columns(k)
    return n * (kp // 2 * dtype.itemsize + kp // 8)


class Sparse24(NamedTuple):
    """A weight stored 2:4: values (n, kp/2), meta (n, kp/8) uint8, and the shape (n, k) before padding."""

    values: Tensor
    meta: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.meta.nbytes

    def to(self, *args, **kwargs) -> Sparse24:
        """As ``torch.Tensor.to``; the metadata follows to the device and keeps its dtype."""
        values = self.values.to(*args, **kwargs)
        return Sparse24(values, self.meta.to(values.device), self.shape)

    def validate(self) -> None:
        """Raises ValueError, naming the first bad place, where the layout above does not hold."""
        k = _checked("Sparse24", self)[1]
        nibbles = torch.stack((self.meta & 0xF, self.meta >> 4), dim=-1).flatten(1)  # [n, kp/4]
        bad = ~torch.isin(nibbles, torch.tensor(VALID_NIBBLES, dtype=torch.uint8, device=nibbles.device))
        if bad.any():
            row, group = bad.nonzero()[0].tolist()
            raise ValueError(
                f"Sparse24: a nibble of meta must be one of 4, 8, 9, C, D, E, got {int(nibbles[row, group]):X} in row {row}, "
                f"group {group}; the metadata is not in canonical order"
            )
        columns = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).flatten(1) + 4 * (
            torch.arange(self.values.shape[1], device=nibbles.device) // 2
        )
        past = (columns >= k) & (widened(self.values) != 0)
        if past.any():
            row, place = past.nonzero()[0].tolist()
            raise ValueError(
                f"Sparse24: columns past k = {k} must be zero, got a value in row {row}, column {int(columns[row, place])}"
            )


def check_layout(op: str, values: Tensor, meta: Tensor, k: int) -> None:
    """Raises where dtypes or sizes are not those of an (n, k) weight stored 2:4. Reads no data."""
    if values.dtype not in DTYPES:
        raise TypeError(f"{op}: values must be one of {', '.join(str(d) for d in DTYPES)}, got {values.dtype}")
    if meta.dtype != torch.uint8:
        raise TypeError(f"{op}: meta must be torch.uint8, got {meta.dtype}")
    if k < 0:
        raise ValueError(f"{op}: k must not be negative, got {k}")
    kp = padded_columns(k)
    if values.dim() != 2 or meta.dim() != 2 or values.shape[1] != kp // 2 or meta.shape != (values.shape[0], kp // 8):
        raise ValueError(
            f"{op}: for k = {k} values must be (n, {kp // 2}) and meta (n, {kp // 8}), "
            f"got {tuple(values.shape)} and {tuple(meta.shape)}"
        )
    if values.device != meta.device:
        raise ValueError(f"{op}: values and meta must be on one device, got {values.device} and {meta.device}")


def widened(t: Tensor) -> Tensor:
    """The tensor in a dtype with arithmetic: fp8 as fp32, int8 as int16 (so that abs(-128) exists), others as they are."""
    if t.dtype == torch.float8_e4m3fn:
        return t.float()
    return t.short() if t.dtype == torch.int8 else t


def _checked(op: str, s: Sparse24, dtypes: tuple[torch.dtype, ...] = DTYPES, why: str = "") -> tuple[int, int]:
    """The shape (n, k) of s, whose tensors must have the sizes that belong to it, and one of dtypes."""
    n, k = s.shape
    check_layout(op, s.values, s.meta, k)
    if s.values.shape[0] != n:
        raise ValueError(f"{op}: values must have the {n} rows of shape, got {s.values.shape[0]}")
    if s.values.dtype not in dtypes:
        raise TypeError(f"{op}: values must be one of {', '.join(str(d) for d in dtypes)}, got {s.values.dtype}{why}")
    return n, k


def _round_up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def _padded(t: Tensor, rows: int, columns: int, fill: int = 0) -> Tensor:
    """t with rows and columns of `fill` behind it; t itself where nothing is to be added."""
    if t.shape == (rows, columns):
        return t
    out = t.new_full((rows, columns), fill)
    out[: t.shape[0], : t.shape[1]] = t
    return out


# ---- fragment order: what the tensor-core kernels read ----

EMPTY_NIBBLES = 0x44  # two groups that keep columns 0 and 1: the metadata of padding


class Fragments24(NamedTuple):
    """A 2:4 weight in the order in which the lanes of a warp hold it for ``mma.sp``, 16 bytes a load. Picture: docs/format.md.

    R = ceil(n / 16) row tiles, B = ceil(k / 64) blocks of values, C = ceil(k / 256) blocks of metadata; padding is zero values and
    nibbles of 4.

    values  (R, B, 2, 32, 8) of 16 bits: [row tile][k64 block][k32 step][lane][registers a0..a3 of mma.sp.m16n8k32]
            (R, B, 1, 32, 16) of 8 bits: [row tile][k64 block][one step][lane][registers a0..a3 of mma.sp.m16n8k64]
    meta    (R, C, 32, 4) int32: [row tile][k256 block][lane][the metadata register of each of its four k64 blocks]
            16 bits: selector 0 takes the first k32 step of the block from the register, selector 1 the second. 8 bits: selector 0.
    shape   (n, k) before padding

    For the register form of wgmma.sp (m64nNk32, m64nNk64) the same memory serves: warp w of the warpgroup reads row tile 4 t + w.
    Source: PTX ISA, "Matrix fragments for multiply-accumulate operation with sparse matrix A", of mma.sp and wgmma.mma_async.sp.
    """

    values: Tensor
    meta: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.meta.nbytes

    def to(self, *args, **kwargs) -> Fragments24:
        """As ``torch.Tensor.to``; the metadata follows to the device. Raises TypeError for a dtype of another size."""
        values = self.values.to(*args, **kwargs)
        if values.dtype.itemsize != self.values.dtype.itemsize:
            raise TypeError(f"Fragments24: the dtype must stay {self.values.dtype.itemsize} bytes wide, got {values.dtype}")
        return Fragments24(values, self.meta.to(values.device), self.shape)


FRAGMENT_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)
_NO_FP32 = "; tensor cores take fp32 as tf32, where the pattern is 1:2"


def to_fragments(s: Sparse24) -> Fragments24:
    """Fragment order of a weight (n, k) stored 2:4, any n and k; fp16, bf16, fp8 e4m3 or int8. Layout: Fragments24.
    Raises TypeError for fp32 and where the dtypes of s are wrong, ValueError where its sizes are."""
    n, k = _checked("to_fragments", s, FRAGMENT_DTYPES, _NO_FP32)
    tiles, blocks, quads = _tiling(n, k)
    steps, width = _fragment(s.values.dtype)
    values = _padded(s.values, 16 * tiles, 32 * blocks).reshape(tiles, 2, 8, blocks, steps, 2, 4, width)
    values = values.permute(0, 3, 4, 2, 6, 5, 1, 7)  # [tile, block, step, lane / 4, lane % 4, column half, row half, element]
    meta = _padded(s.meta, 16 * tiles, 32 * quads, EMPTY_NIBBLES)
    if steps == 2:  # 16 columns of row lane / 4 in the low half-word, the same of the row 8 below in the high one
        meta = meta.reshape(tiles, 2, 8, quads, 4, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    else:  # 32 columns of one row: lane % 4 is the row half and twice the column half
        meta = meta.reshape(tiles, 2, 8, quads, 4, 2, 4).permute(0, 3, 2, 5, 1, 4, 6)
    meta = meta.reshape(tiles, quads, 32, 16).view(torch.int32)
    return Fragments24(values.reshape(tiles, blocks, steps, 32, 4 * width), meta, (n, k))


def from_fragments(f: Fragments24) -> Sparse24:
    """The Sparse24 that to_fragments made f from; what the padding holds is not looked at.
    Raises TypeError or ValueError where dtypes or sizes are not those of f.shape."""
    check_fragments("from_fragments", f)
    n, k = f.shape
    tiles, blocks, quads = _tiling(n, k)
    steps, width = _fragment(f.values.dtype)
    kp = padded_columns(k)
    values = f.values.reshape(tiles, blocks, steps, 8, 4, 2, 2, width).permute(0, 6, 3, 1, 2, 5, 4, 7)
    meta = f.meta.contiguous().view(torch.uint8)
    if steps == 2:
        meta = meta.view(tiles, quads, 8, 4, 4, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    else:
        meta = meta.view(tiles, quads, 8, 2, 2, 4, 4).permute(0, 4, 2, 1, 5, 3, 6)
    values, meta = values.reshape(16 * tiles, 32 * blocks), meta.reshape(16 * tiles, 32 * quads)
    return Sparse24(values[:n, : kp // 2].contiguous(), meta[:n, : kp // 8].contiguous(), (n, k))


def check_fragments(op: str, f: Fragments24) -> None:
    """Raises where dtypes or sizes are not those of f.shape in fragment order. Reads no data."""
    if f.values.dtype not in FRAGMENT_DTYPES:
        raise TypeError(f"{op}: values must be one of {', '.join(str(d) for d in FRAGMENT_DTYPES)}, got {f.values.dtype}")
    if f.meta.dtype != torch.int32:
        raise TypeError(f"{op}: meta must be torch.int32, got {f.meta.dtype}")
    n, k = f.shape
    if n < 0 or k < 0:
        raise ValueError(f"{op}: shape must not be negative, got {(n, k)}")
    tiles, blocks, quads = _tiling(n, k)
    steps, width = _fragment(f.values.dtype)
    values, meta = (tiles, blocks, steps, 32, 4 * width), (tiles, quads, 32, 4)
    if f.values.shape != values or f.meta.shape != meta:
        raise ValueError(
            f"{op}: for shape {(n, k)} in {f.values.dtype} values must be {values} and meta {meta}, "
            f"got {tuple(f.values.shape)} and {tuple(f.meta.shape)}"
        )
    if f.values.device != f.meta.device:
        raise ValueError(f"{op}: values and meta must be on one device, got {f.values.device} and {f.meta.device}")


def _tiling(n: int, k: int) -> tuple[int, int, int]:
    """Row tiles of 16, blocks of 64 columns, and blocks of 256 columns."""
    return _round_up(n, 16) // 16, _round_up(k, 64) // 64, _round_up(k, 256) // 256


def _fragment(dtype: torch.dtype) -> tuple[int, int]:
    """Steps of mma.sp in 64 columns, and elements of a 32-bit register."""
    return dtype.itemsize, 4 // dtype.itemsize
