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
non-zeros and then its lowest free columns, so ``compress24(expand24(s)) == s`` bit for bit for every s that compress24 made. What a
mask or scores keep is kept as given, even where a kept weight is zero. -0.0 counts as zero and is stored as 0.0. Read as
little-endian words, a row of meta is the order in which ``mma.sp`` takes it (PTX ISA, "sparse matrix storage").

Converters come in pairs, ``to_x(s)`` and ``from_x(...)``, and run on the device of their input. They move bits: values and nibbles
survive a round trip exactly, under-full groups included, unless the docstring says otherwise; results may share memory with what
they are made of. Pictures: docs/format.md.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 1
VALID_NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)

# The dtypes of which a weight can be stored 2:4.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)

Size = Tensor | tuple[int, int] | list[int]  # a shape (rows, columns) as other tools' files hold it


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
        how = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        return Sparse24(values, self.meta.to(values.device, **how), self.shape)

    def validate(self) -> None:
        """Raises ValueError, naming the first bad place, where the layout above does not hold."""
        k = _check_sparse("Sparse24", self)[1]
        nibbles = unpack_nibbles(self.meta)
        bad = (nibbles & 3) >= (nibbles >> 2)
        if bad.any():
            row, group = bad.nonzero()[0].tolist()
            raise ValueError(
                f"Sparse24: a nibble of meta must be one of 4, 8, 9, C, D, E, got {int(nibbles[row, group]):X} in row {row}, "
                f"group {group}; the metadata is not in canonical order"
            )
        last = nibbles[:, -2:]  # columns past k belong to the last byte alone
        first = padded_columns(k) - 8 + 4 * torch.arange(last.shape[1], device=last.device)[:, None]
        columns = (torch.stack((last & 3, last >> 2), dim=-1) + first).flatten(1)
        past = (columns >= k) & (widened(self.values[:, -4:]) != 0)
        if past.any():
            row, place = past.nonzero()[0].tolist()
            raise ValueError(
                f"Sparse24: columns past k = {k} must be zero, got a value in row {row}, column {int(columns[row, place])}"
            )


def _is_integer(x: object) -> bool:
    return isinstance(x, (Integral, torch.SymInt))


def check_shape(op: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The pair (rows, columns) that a shape must be. Raises ValueError where it is not two integers, or one is negative."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(_is_integer(size) and size >= 0 for size in shape):
        raise ValueError(f"{op}: shape must be (rows, columns), two integers that are not negative, got {shape}")
    return shape[0], shape[1]


def check_layout(op: str, values: Tensor, meta: Tensor, k: int) -> None:
    """Raises where dtypes or sizes are not those of an (n, k) weight stored 2:4. Reads no data."""
    _check_dtype(op, "values", values, DTYPES)
    _check_dtype(op, "meta", meta, (torch.uint8,))
    if k < 0:
        raise ValueError(f"{op}: k must not be negative, got {k}")
    kp, held, stored = padded_columns(k), values.shape, meta.shape
    if len(held) != 2 or held[1] != kp // 2 or stored != (held[0], kp // 8):
        raise ValueError(
            f"{op}: for k = {k} values must be (n, {kp // 2}) and meta (n, {kp // 8}), got {tuple(held)} and {tuple(stored)}"
        )
    _check_device(op, "values and meta", values, meta)


def _check_sparse(op: str, s: Sparse24, dtypes: tuple[torch.dtype, ...] = DTYPES, why: str = "") -> tuple[int, int]:
    """The shape (n, k) of s. Raises where its tensors have not the sizes that belong to it, or another dtype."""
    n, k = check_shape(op, s.shape)
    check_layout(op, s.values, s.meta, k)
    if s.values.shape[0] != n:
        raise ValueError(f"{op}: values must have the {n} rows of shape, got {s.values.shape[0]}")
    _check_dtype(op, "values", s.values, dtypes, why)
    return n, k


def _check_dtype(op: str, name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], why: str = "") -> None:
    if t.dtype not in dtypes:
        one_of = "one of " if len(dtypes) > 1 else ""
        raise TypeError(f"{op}: {name} must be {one_of}{', '.join(str(d) for d in dtypes)}, got {t.dtype}{why}")


def _check_sizes(op: str, shape: tuple[int, int], wanted: dict[str, tuple[int, ...]], *tensors: Tensor) -> None:
    """Raises where tensors, in the order of their names in `wanted`, have not those sizes."""
    if [tuple(t.shape) for t in tensors] != [*wanted.values()]:
        sizes = " and ".join(f"{name} {size}" for name, size in wanted.items())
        raise ValueError(f"{op}: shape {tuple(shape)} needs {sizes}, got {' and '.join(str(tuple(t.shape)) for t in tensors)}")


def _check_device(op: str, names: str, a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{op}: {names} must be on one device, got {a.device} and {b.device}")


def widened(t: Tensor) -> Tensor:
    """The tensor in a dtype with arithmetic: fp8 as fp32, int8 as int16 (so that abs(-128) exists), others as they are."""
    if t.dtype == torch.float8_e4m3fn:
        return t.float()
    return t.short() if t.dtype == torch.int8 else t


def _round_up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def _padded(t: Tensor, rows: int, columns: int, fill: int = 0) -> Tensor:
    """t with rows and columns of `fill` behind it; t itself where nothing is to be added."""
    if t.shape == (rows, columns):
        return t
    out = t.new_full((rows, columns), fill)
    out[: t.shape[0], : t.shape[1]] = t
    return out


def _raw(t: Tensor) -> Tensor:
    """The tensor as integers, which can be picked and scattered; fp8 and uint16 cannot everywhere."""
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(t.dtype.itemsize, t.dtype))


def _picked(t: Tensor, mask: Tensor) -> Tensor:
    """The elements of t where the mask is set, in order: t[mask], for every dtype."""
    return _raw(t).flatten().index_select(0, mask.flatten().nonzero()[:, 0]).view(t.dtype)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of _picked: the values in order where the mask is set, zeros elsewhere."""
    out = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
    _raw(out).masked_scatter_(mask, _raw(values))
    return out


def unpack_nibbles(meta: Tensor) -> Tensor:
    """The half-bytes (n, kp/4) of bytes (n, kp/8), low ones first."""
    return torch.stack((meta & 0xF, meta >> 4), dim=-1).flatten(1)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """The bytes (n, kp/8) of half-bytes (n, kp/4)."""
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


class _Order(NamedTuple):
    """A layout that permutes: a matrix cut into the axes `split`, which lie in memory in the sequence `axes`."""

    split: tuple[int, ...]
    axes: tuple[int, ...]

    def apply(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The matrix t in this order, contiguous, as a tensor of `shape`."""
        return t.reshape(self.split).permute(self.axes).reshape(shape).contiguous()

    def undo(self, t: Tensor, rows: int, columns: int) -> Tensor:
        """The matrix (rows, columns) whose elements t holds in this order."""
        back = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return t.reshape([self.split[axis] for axis in self.axes]).permute(back).reshape(rows, columns)


# ---- fragment order: what the tensor-core kernels read ----


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
        how = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        return Fragments24(values, self.meta.to(values.device, **how), self.shape)


FRAGMENT_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)
_FP32_IS_1_2 = "; tensor cores take fp32 as tf32, and there the pattern is 1:2"


def to_fragments(s: Sparse24) -> Fragments24:
    """Fragment order of a weight (n, k) stored 2:4, any n and k; fp16, bf16, fp8 e4m3 or int8. Layout: Fragments24.
    Raises TypeError for fp32 and where the dtypes of s are wrong, ValueError where its sizes are."""
    n, k = _check_sparse("to_fragments", s, FRAGMENT_DTYPES, _FP32_IS_1_2)
    values_order, values_shape, meta_order, meta_shape = _fragment_layout(n, k, s.values.dtype)
    tiles, quads = meta_shape[:2]
    values = values_order.apply(_padded(s.values, 16 * tiles, 32 * values_shape[1]), values_shape)
    meta = _as_words(meta_order.apply(_padded(s.meta, 16 * tiles, 32 * quads, 0x44), (tiles, quads, 32, 16)))
    return Fragments24(values, meta, (n, k))


def from_fragments(f: Fragments24) -> Sparse24:
    """The Sparse24 that to_fragments made f from. What the padding holds is not looked at.
    Raises TypeError or ValueError where dtypes or sizes are not those of f.shape."""
    check_fragments("from_fragments", f)
    (n, k), kp = f.shape, padded_columns(f.shape[1])
    values_order, values_shape, meta_order, meta_shape = _fragment_layout(n, k, f.values.dtype)
    tiles, quads = meta_shape[:2]
    values = values_order.undo(f.values, 16 * tiles, 32 * values_shape[1])
    meta = meta_order.undo(_as_bytes(f.meta), 16 * tiles, 32 * quads)
    return Sparse24(values[:n, : kp // 2].contiguous(), meta[:n, : kp // 8].contiguous(), (n, k))


def in_transform() -> bool:
    """Whether a transform of torch.func is under way. Asked as torch itself asks: torch.compile has the right answer too, and every
    call of a product can afford it."""
    return torch._C._are_functorch_transforms_active()


def _as_words(t: Tensor) -> Tensor:
    """Bytes (..., 4 c), contiguous, as int32 (..., c), the lowest first. torch 2.11 has no such view under vmap, so by arithmetic
    in a transform."""
    if not in_transform():
        return t.view(torch.int32)
    return (t.unflatten(-1, (-1, 4)).int() << _places(t)).sum(-1, dtype=torch.int32)


def _as_bytes(t: Tensor) -> Tensor:
    """int32 (..., c) as bytes (..., 4 c), as _as_words takes them."""
    if not in_transform():
        return t.contiguous().view(torch.uint8)
    return (t[..., None] >> _places(t) & 0xFF).to(torch.uint8).flatten(-2)


def _places(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 8, dtype=torch.int32, device=like.device)


def check_fragments(op: str, f: Fragments24) -> None:
    """Raises where dtypes or sizes are not those of f.shape in fragment order. Reads no data."""
    _check_dtype(op, "values", f.values, FRAGMENT_DTYPES)
    _check_dtype(op, "meta", f.meta, (torch.int32,))
    n, k = check_shape(op, f.shape)
    _, values, _, meta = _fragment_layout(n, k, f.values.dtype)
    _check_sizes(op, (n, k), {"values": values, "meta": meta}, f.values, f.meta)
    _check_device(op, "values and meta", f.values, f.meta)


def _fragment_layout(n: int, k: int, dtype: torch.dtype) -> tuple[_Order, tuple[int, ...], _Order, tuple[int, ...]]:
    """Order and shape of the values, order of the bytes and shape of the words of the metadata."""
    tiles, blocks, quads = _round_up(n, 16) // 16, _round_up(k, 64) // 64, _round_up(k, 256) // 256
    steps, width = dtype.itemsize, 4 // dtype.itemsize  # of mma.sp in 64 columns; elements of a register
    # Rows are [tile][half][lane / 4], kept columns [block][step][half][lane % 4][element]; a0..a3 are [column half][row half].
    values = _Order((tiles, 2, 8, blocks, steps, 2, 4, width), (0, 3, 4, 2, 6, 5, 1, 7))
    if steps == 2:
        # Bytes of a row are [k256][k64][lane % 4][2]. A word is 16 columns of row lane / 4, then the same of the row 8 below.
        meta = _Order((tiles, 2, 8, quads, 4, 4, 2), (0, 3, 2, 5, 4, 1, 6))
    else:
        # Bytes of a row are [k256][k64][column half][4]. A word is 32 columns of one row; lane % 4 is [column half][row half].
        meta = _Order((tiles, 2, 8, quads, 4, 2, 4), (0, 3, 2, 5, 1, 4, 6))
    return values, (tiles, blocks, steps, 32, 4 * width), meta, (tiles, quads, 32, 4)


# ---- PyTorch's CUTLASS layout: torch.sparse.SparseSemiStructuredTensorCUTLASS ----

# By dtype of the weight: dtype of the metadata, and the multiples of rows and columns that its order needs.
_TORCH_CUTLASS = {torch.float16: (torch.int16, 32, 32), torch.bfloat16: (torch.int16, 32, 32), torch.int8: (torch.int32, 16, 64)}


def to_torch_cutlass(s: Sparse24) -> tuple[Tensor, Tensor]:
    """values (n, k/2) and meta as torch.sparse.SparseSemiStructuredTensorCUTLASS holds them: for fp16 and bf16, n and k multiples
    of 32, (n, k/16) int16; for int8, n a multiple of 16 and k of 64, (n, k/32) int32. The class itself wants twice these columns.

    What ``sparse_semi_structured_from_dense_cutlass`` makes of expand24(s), bit for bit, where every group holds two non-zeros. In
    other groups torch keeps other zeros than we do: docs/format.md.
    Raises TypeError for fp32, which torch stores 1:2, and fp8, which its backend does not take; ValueError for other multiples."""
    n, k = _check_sparse(
        "to_torch_cutlass", s, tuple(_TORCH_CUTLASS), "; torch's CUTLASS backend stores fp32 as 1:2 and takes no fp8"
    )
    order, word = _torch_cutlass_order("to_torch_cutlass", n, k, s.values.dtype)
    meta = order.apply(s.meta, (n * k // 8,)).view(word)
    return s.values.contiguous(), meta.view(n, k // (8 * word.itemsize))


def from_torch_cutlass(values: Tensor, meta: Tensor) -> Sparse24:
    """The Sparse24 of values (n, k/2) and meta as to_torch_cutlass gives them, or torch itself: then groups with fewer than two
    non-zeros keep torch's choice of zeros, valid but not canonical; ``compress24(expand24(s))`` makes them so.
    Raises TypeError for other dtypes, ValueError for other sizes."""
    op = "from_torch_cutlass"
    _check_dtype(op, "values", values, tuple(_TORCH_CUTLASS))
    _check_dtype(op, f"meta of {values.dtype}", meta, (_TORCH_CUTLASS[values.dtype][0],))
    if values.dim() != 2:
        raise ValueError(f"{op}: values must be (n, k/2), got shape {tuple(values.shape)}")
    n, k = values.shape[0], 2 * values.shape[1]
    _check_sizes(op, (n, k), {"meta": (n, k // (8 * meta.dtype.itemsize))}, meta)
    _check_device(op, "values and meta", values, meta)
    order, _ = _torch_cutlass_order(op, n, k, values.dtype)
    return Sparse24(values.contiguous(), order.undo(meta.contiguous().view(torch.uint8), n, k // 8), (n, k))


def _torch_cutlass_order(op: str, n: int, k: int, dtype: torch.dtype) -> tuple[_Order, torch.dtype]:
    """The order of the bytes of metadata, and the dtype of its words. Source: CUTLASS, host_reorder.h, ColumnMajorInterleaved."""
    word, rows, columns = _TORCH_CUTLASS[dtype]
    if n % rows or k % columns:
        raise ValueError(
            f"{op}: torch's CUTLASS layout of {dtype} needs multiples of {rows} rows and {columns} columns, got {(n, k)}"
        )
    # Rows are [tile][rows / 16][half][8], words [pair][2]: words of a pair stand apart, those of the halves of 16 rows together.
    return _Order((n // rows, rows // 16, 2, 8, k // columns, 2, word.itemsize), (4, 0, 3, 1, 5, 2, 6)), word


# ---- the layout of CUTLASS for sm_90 ----


def to_cutlass_sm90(s: Sparse24, tile_k: int = 128) -> tuple[Tensor, Tensor]:
    """values and metadata (E) as CUTLASS reads them for Hopper, A row-major: values (n, ka/2), ka = k rounded up to 16 columns of
    16 bits or 32 of 8; metadata (nt, kt/8) uint8, nt = n rounded up to 64, kt = k rounded up to tile_k; filled up with zeros.
    tile_k is the K of the kernel's tile, or 128 where that is larger: metadata of one does not fit the other.

    Byte for byte what CUTLASS's compressor writes where every group holds two non-zeros and k is a multiple of 8. Beside one
    non-zero it keeps other zeros than we do, and an empty group gets a nibble 0: docs/format.md. Its kernels want k in multiples of
    16, of 32 for 8 bits. Source: cutlass/gemm/collective/builders/sm90_sparse_config.inl.
    Raises TypeError for fp32, which CUTLASS stores 1:2; ValueError for another tile_k and for k that is no multiple of 4."""
    n, k = _check_sparse("to_cutlass_sm90", s, FRAGMENT_DTYPES, _FP32_IS_1_2)
    order, rows, columns, ka = _cutlass_sm90_order("to_cutlass_sm90", n, k, s.values.dtype, tile_k)
    metadata = order.apply(_padded(s.meta, rows, columns // 8), (rows, columns // 8))
    return _padded(s.values, n, ka // 2).contiguous(), metadata


def from_cutlass_sm90(values: Tensor, metadata: Tensor, shape: Size, tile_k: int = 128) -> Sparse24:
    """The Sparse24 (n, k) of what to_cutlass_sm90 gives, or CUTLASS's own compressor; for shape and tile_k see there.
    The compressor's nibble 0, of an empty group, becomes 4; its other nibbles are kept, valid but not all canonical.
    Raises TypeError for other dtypes, ValueError for other sizes."""
    op = "from_cutlass_sm90"
    _check_dtype(op, "values", values, FRAGMENT_DTYPES)
    _check_dtype(op, "metadata", metadata, (torch.uint8,))
    n, k = _size(op, shape)
    order, rows, columns, ka = _cutlass_sm90_order(op, n, k, values.dtype, tile_k)
    _check_sizes(op, (n, k), {"values": (n, ka // 2), "metadata": (rows, columns // 8)}, values, metadata)
    _check_device(op, "values and metadata", values, metadata)
    kp = padded_columns(k)
    values = values[:, : kp // 2].contiguous()
    nibbles = unpack_nibbles(order.undo(metadata, rows, columns // 8)[:n, : kp // 8])
    empty = (widened(values) == 0).view(n, kp // 4, 2).all(-1)
    return Sparse24(values, pack_nibbles(torch.where(empty & (nibbles == 0), 4, nibbles)), (n, k))


def _cutlass_sm90_order(op: str, n: int, k: int, dtype: torch.dtype, tile_k: int) -> tuple[_Order, int, int, int]:
    """The order of the bytes of metadata, the rows and columns it is padded to, and the columns that values are padded to."""
    if not _is_integer(tile_k) or tile_k not in (64, 128):
        raise ValueError(f"{op}: tile_k must be 64 or 128, got {tile_k}")
    if k % 4:
        raise ValueError(f"{op}: CUTLASS needs columns in multiples of 4, got {k}")
    tiles, blocks, steps = _round_up(n, 64) // 64, _round_up(k, tile_k) // tile_k, tile_k // 32
    if dtype.itemsize == 2:
        # Rows are [tile][warp][half][8], bytes [block][k32 step][half][2]: a lane finds its words of all steps side by side.
        order = _Order((tiles, 4, 2, 8, blocks, steps, 2, 2), (4, 0, 1, 6, 3, 5, 2, 7))
    else:
        order = _Order((tiles, 64, blocks, tile_k // 8), (2, 0, 1, 3))
    return order, 64 * tiles, tile_k * blocks, _round_up(k, 32 // dtype.itemsize)


# ---- the bitmasks of compressed-tensors: formats sparse-24-bitmask and sparse-bitmask ----


def to_bitmask24(s: Sparse24) -> tuple[Tensor, Tensor, Tensor]:
    """``compressed`` (n, k/2), ``bitmask`` (n, ceil(k/8)) uint8 and ``shape`` (2, 1) int64 of the format sparse-24-bitmask.
    Column j of a row is bit j % 8 of byte j // 8, set where the column is kept: two of every four, zeros among them.
    Source: compressed_tensors, sparse_24_bitmask.py.
    Raises ValueError where k is no multiple of 4: there its groups run on into the next row."""
    n, k = _check_sparse("to_bitmask24", s)
    _need_whole_groups("to_bitmask24", k)
    nibbles = unpack_nibbles(s.meta)
    bitmask = pack_nibbles(1 << (nibbles & 3) | 1 << (nibbles >> 2))
    return s.values[:, : k // 2].contiguous(), _cut(bitmask, k), torch.tensor([[n], [k]])


def from_bitmask24(values: Tensor, bitmask: Tensor, shape: Size) -> Sparse24:
    """The Sparse24 of a weight in the format sparse-24-bitmask, its choice of zeros in groups with fewer than two non-zeros kept.
    Raises TypeError for other dtypes; ValueError for other sizes, and for a group without exactly two bits, naming the first."""
    op = "from_bitmask24"
    n, k = _size(op, shape)
    _need_whole_groups(op, k)
    _check_dtype(op, "values", values, DTYPES)
    bitmask = _check_bitmask(op, values, bitmask, n, k)
    _check_sizes(op, (n, k), {"values": (n, k // 2)}, values)
    counts = _by_table(_count, unpack_nibbles(bitmask)[:, : k // 4])
    _refuse(op, counts, counts != 2, k, "have two bits set")
    return Sparse24(_padded(values, n, padded_columns(k) // 2).contiguous(), _by_table(_meta_of_bits, bitmask), (n, k))


def to_bitmask(s: Sparse24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dense_to_bitmask(expand24(s)), without the dense weight."""
    n, k = _check_sparse("to_bitmask", s)
    nonzero = widened(s.values) != 0
    nibbles, on = unpack_nibbles(s.meta), nonzero.to(torch.uint8)
    bitmask = pack_nibbles(on[:, 0::2] << (nibbles & 3) | on[:, 1::2] << (nibbles >> 2))
    return _picked(s.values, nonzero), bitmask, _row_offsets(bitmask), torch.tensor([n, k])


def from_bitmask(values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, shape: Size) -> Sparse24:
    """compress24(bitmask_to_dense(...)), without the dense weight. Zeros that are stored count as zeros. Raises as these do."""
    op = "from_bitmask"
    n, k = _size(op, shape)
    _check_dtype(op, "values", values, DTYPES)
    bitmask = _check_bitmask(op, values, bitmask, n, k)
    _check_rows(op, values, bitmask, row_offsets)
    numbers = widened(values)
    nan, nonzero = numbers != numbers, numbers != 0
    if nan.any():
        row, column = _unpacked(bitmask, k).nonzero()[int(nan.nonzero()[0])].tolist()
        raise ValueError(f"{op}: values must hold no NaN, got one in row {row}, column {column}")
    if not nonzero.all():
        bitmask = _packed(_spread(nonzero, _unpacked(bitmask, k)))
        values = _picked(values, nonzero)
    counts = _by_table(_count, unpack_nibbles(bitmask))
    _refuse(op, counts, counts > 2, k, "hold at most two non-zeros", "; bitmask_to_dense takes any")
    kept = _by_table(_kept_nonzero, bitmask).view(torch.bool)
    return Sparse24(_spread(values, kept), _by_table(_meta_of_bits, bitmask), (n, k))


def dense_to_bitmask(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``compressed`` (non-zeros,), ``bitmask`` (n, ceil(k/8)) uint8, ``row_offsets`` (n,) int64 and ``shape`` (2,) int64 of the
    format sparse-bitmask: the non-zeros of w row by row, bits as in to_bitmask24, and how many non-zeros stand before each row.
    w (n, k) of any pattern and dtype. Zeros are not stored: -0.0 comes back as 0.0.
    Source: compressed_tensors, sparse_bitmask.py. Raises ValueError for another rank."""
    if w.dim() != 2:
        raise ValueError(f"dense_to_bitmask: w must be (out_features, in_features), got shape {tuple(w.shape)}")
    nonzero = widened(w) != 0
    bitmask = _packed(nonzero)
    return _picked(w, nonzero), bitmask, _row_offsets(bitmask), torch.tensor(w.shape)


def bitmask_to_dense(values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, shape: Size) -> Tensor:
    """The dense weight (n, k) of the format sparse-bitmask. row_offsets follow from the bitmask and may be None.
    Raises TypeError for a bitmask that is no uint8, ValueError for other sizes, and where bits, offsets and values disagree."""
    op = "bitmask_to_dense"
    n, k = _size(op, shape)
    bitmask = _check_bitmask(op, values, bitmask, n, k)
    _check_rows(op, values, bitmask, row_offsets)
    return _spread(values, _unpacked(bitmask, k))


def _cut(bitmask: Tensor, k: int) -> Tensor:
    """The bitmask with no bits past column k."""
    if k % 8:
        bitmask = bitmask.clone()
        bitmask[:, -1] &= (1 << k % 8) - 1
    return bitmask


def _packed(mask: Tensor) -> Tensor:
    """The bytes (n, ceil(k/8)) of a mask (n, k) bool, column j as bit j % 8 of byte j // 8."""
    n, kp = len(mask), padded_columns(mask.shape[1])
    words = _padded(mask, n, kp).flatten().view(torch.int64).view(n, kp // 8)
    # The product adds byte i of a word, 0 or 1, at bits 8 i + 56 - 7 j for j = 0 to 7: all differ, and j = i lands in bit 56 + i.
    return (words * 0x0102040810204080 >> 56).to(torch.uint8)


def _unpacked(bitmask: Tensor, k: int) -> Tensor:
    """The bits of each row as (n, k) bool."""
    return _by_table(_bits, bitmask).view(torch.bool)[:, :k]


def _by_table(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """f of every byte of t, by a table of what f makes of the 256 bytes as (256, 1)."""
    table = f(torch.arange(256, dtype=torch.uint8, device=t.device)[:, None])
    return table.flatten().index_select(0, t.flatten().int()).view(t.shape)


def _bits(t: Tensor) -> Tensor:
    """The eight bits of bytes (n, 1), a byte each, as one word."""
    return (t >> torch.arange(8, dtype=torch.uint8, device=t.device) & 1).view(torch.int64)


def _count(groups: Tensor) -> Tensor:
    """How many bits of a byte are set."""
    return (groups[..., None] >> torch.arange(8, dtype=torch.uint8, device=groups.device) & 1).sum(-1, dtype=torch.uint8)


def _nibble_of_bits(groups: Tensor) -> Tensor:
    """The nibbles that keep the columns whose bits are set, at most two, and then the lowest free ones."""
    groups = torch.where(groups == 0, 1, groups)
    groups = torch.where((groups & (groups - 1)) == 0, groups | (groups + 1), groups)  # one bit, and the lowest free one
    first = ((groups & 1) == 0).to(torch.uint8) + ((groups & 3) == 0).to(torch.uint8)
    second = 1 + (groups > 3).to(torch.uint8) + (groups > 7).to(torch.uint8)
    return second << 2 | first


def _meta_of_bits(bitmask: Tensor) -> Tensor:
    """The bytes of metadata for bytes of two groups' bits."""
    return pack_nibbles(_nibble_of_bits(unpack_nibbles(bitmask)))


def _kept_nonzero(bitmask: Tensor) -> Tensor:
    """Which of the four columns that _meta_of_bits keeps have their bits set: a byte each, as one word."""
    groups = unpack_nibbles(bitmask)
    nibbles = _nibble_of_bits(groups)
    return (torch.stack((groups >> (nibbles & 3), groups >> (nibbles >> 2)), dim=-1).flatten(1) & 1).view(torch.int32)


def _row_offsets(bitmask: Tensor) -> Tensor:
    """How many bits are set before each row."""
    counts = _by_table(_count, bitmask).sum(-1)
    return counts.cumsum(0) - counts


def _size(op: str, shape: Size) -> tuple[int, int]:
    """(n, k) of a shape as another tool gives it: a tuple, a list, or a tensor of two integers."""
    return check_shape(op, shape.flatten().tolist() if isinstance(shape, Tensor) else shape)


def _need_whole_groups(op: str, k: int) -> None:
    if k % 4:
        raise ValueError(f"{op}: sparse-24-bitmask needs columns in multiples of 4, got {k}")


def _check_bitmask(op: str, values: Tensor, bitmask: Tensor, n: int, k: int) -> Tensor:
    """The bitmask with no bits past column k. Raises where its dtype, size or device is another."""
    _check_dtype(op, "bitmask", bitmask, (torch.uint8,))
    _check_sizes(op, (n, k), {"bitmask": (n, padded_columns(k) // 8)}, bitmask)
    _check_device(op, "values and bitmask", values, bitmask)
    return _cut(bitmask, k)


def _check_rows(op: str, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None) -> None:
    """Raises where the values, the bits and the offsets do not count alike."""
    total = int(_by_table(_count, bitmask).sum())
    if values.shape != (total,):
        raise ValueError(f"{op}: values must be as many as the {total} bits that are set, got shape {tuple(values.shape)}")
    if row_offsets is not None and not torch.equal(row_offsets.to(bitmask.device, torch.int64), _row_offsets(bitmask)):
        raise ValueError(f"{op}: row_offsets must say how many bits are set before each row, got others")


def _refuse(op: str, counts: Tensor, bad: Tensor, k: int, must: str, what_to_do: str = "") -> None:
    """Raises ValueError where a group of four columns, with so many bits set, is bad, naming the first."""
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: every group of four columns must {must}, got {int(counts[row, group])} in row {row}, "
            f"columns {4 * group} to {min(4 * group + 4, k) - 1}{what_to_do}"
        )
