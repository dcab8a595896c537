"""The canonical 2:4 format, as it lies in memory and on disk.

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
        n, k = self.shape
        check_layout("Sparse24", self.values, self.meta, k)
        if self.values.shape[0] != n:
            raise ValueError(f"Sparse24: values must have the {n} rows of shape, got {self.values.shape[0]}")
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
