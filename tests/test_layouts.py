"""Converters between the canonical format and the layouts of kernels and other tools, against the other side's own rules:

fragment order against the ISA's tables (isa_model) and CuTe's (cutlass_model), PyTorch's layout against PyTorch's functions,
CUTLASS's against its layout expressions. The bitmasks are in test_bitmask.py; round trips of all layouts are here.
"""

import itertools
import re

import cutlass_model
import isa_model
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse import _semi_structured_conversions as conversions
from weights24 import UNDER_FULL, any_sparse, array, full_weight, group_weight, same

from sparsekit import Sparse24, format, ops
from sparsekit.format import DTYPES, FRAGMENT_DTYPES, Fragments24, nbytes24, padded_columns

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TENSOR_CORE_DTYPES = pytest.mark.parametrize("dtype", FRAGMENT_DTYPES, ids=str)
TORCH_DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)

# ---- fragment order ----

SHAPES = [
    pytest.param((16, 64), id="one tile"),
    pytest.param((64, 256), id="a warpgroup, one block of metadata"),
    pytest.param((80, 320), id="tiles and blocks left over"),
    pytest.param((33, 300), id="ragged both ways"),
    pytest.param((1, 1), id="one weight"),
    pytest.param((17, 72), id="just past a tile and a block"),
]


def registers(f: Fragments24) -> tuple[np.ndarray, np.ndarray]:
    """(R, B, steps, 32, 4) and (R, C, 32, 4) uint32."""
    return array(f.values).view("u1").reshape(*f.values.shape[:4], 16).view("<u4"), array(f.meta)


def elements(f: Fragments24, dense: np.ndarray) -> np.ndarray:
    """Asserts that rows and columns past the shape are zero, and cuts them off."""
    n, k = f.shape
    assert not dense[n:].any() and not dense[:, k:].any()
    return dense[:n, :k]


def by_mma_sp(f: Fragments24) -> np.ndarray:
    """The dense matrix that a warp a row tile multiplies with, from what its lanes hold."""
    a, metadata = registers(f)
    tiles, blocks, steps = a.shape[:3]
    mma = isa_model.mma_sp_m16n8k32 if steps == 2 else isa_model.mma_sp_m16n8k64
    dense = np.zeros((16 * tiles, 64 * blocks), array(f.values).dtype)
    for tile, block, step in np.ndindex(tiles, blocks, steps):
        columns = 64 * block + 32 * step
        word = metadata[tile, block // 4, :, block % 4]
        dense[16 * tile : 16 * tile + 16, columns : columns + 64 // steps] = mma(a[tile, block, step], word, selector=step)
    return elements(f, dense)


def by_wgmma_sp(f: Fragments24, wgmma) -> np.ndarray:
    """The same by warpgroups of four row tiles; tiles past the last hold nothing."""
    a, metadata = registers(f)
    missing = -a.shape[0] % 4
    a = np.concatenate([a, np.zeros((missing, *a.shape[1:]), "u4")])
    metadata = np.concatenate([metadata, np.full((missing, *metadata.shape[1:]), 0x44444444, "u4")])
    groups, (blocks, steps) = len(a) // 4, a.shape[1:3]
    dense = np.zeros((64 * groups, 64 * blocks), array(f.values).dtype)
    for t, block, step in np.ndindex(groups, blocks, steps):
        lanes = a[4 * t : 4 * t + 4, block, step].reshape(128, 4)
        words = metadata[4 * t : 4 * t + 4, block // 4, :, block % 4].reshape(128)
        columns = 64 * block + 32 * step
        dense[64 * t : 64 * t + 64, columns : columns + 64 // steps] = wgmma(lanes, words, step)
    return elements(f, dense)


@TENSOR_CORE_DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_fragments_by_the_tables_of_the_isa(shape, dtype, device):
    s = any_sparse(*shape, dtype)
    f = format.to_fragments(Sparse24(s.values.to(device), s.meta.to(device), s.shape))
    assert f.values.device.type == f.meta.device.type == device.type and f.values.is_contiguous() and f.meta.is_contiguous()
    want = array(ops.expand24(s))
    assert (by_mma_sp(f) == want).all()
    wgmma = isa_model.wgmma_sp_m64k32 if dtype.itemsize == 2 else isa_model.wgmma_sp_m64k64
    assert (by_wgmma_sp(f, wgmma) == want).all()
    assert same(format.from_fragments(f), Sparse24(s.values.to(device), s.meta.to(device), s.shape))


@TENSOR_CORE_DTYPES
def test_fragments_by_the_layouts_of_cute(dtype):
    # A second reading of the ISA's figures, from other hands: CuTe's register layouts of A and E.
    s = any_sparse(70, 130, dtype)
    layouts = [(cutlass_model.A_64X32, cutlass_model.E_64X32), (cutlass_model.A_64X64, cutlass_model.E_64X64)][dtype.itemsize == 1]

    def wgmma(lanes, words, step):
        held = np.ascontiguousarray(lanes, "<u4").view(array(s.values).dtype)
        return cutlass_model.wgmma_sp(held, words, *layouts, selector=step)

    assert (by_wgmma_sp(format.to_fragments(s), wgmma) == array(ops.expand24(s))).all()


@TENSOR_CORE_DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_of_fragments(shape, dtype):
    # All nibbles of the weight E, so that each 4 is padding; the table of the ISA says above where they lie.
    n, k = shape
    s = Sparse24(
        torch.zeros(n, padded_columns(k) // 2, dtype=dtype), torch.full((n, padded_columns(k) // 8), 0xEE, dtype=torch.uint8), shape
    )
    f = format.to_fragments(s)
    assert not array(f.values).any()
    nibbles = np.stack([array(f.meta) >> shift & 15 for shift in range(0, 32, 4)])
    assert (nibbles == 0xE).sum() == n * padded_columns(k) // 4 and np.isin(nibbles, (0x4, 0xE)).all()
    blocks = f.values.shape[1]
    past = array(f.meta).transpose(1, 3, 0, 2).reshape(-1, len(f.meta), 32)[blocks:]  # [k64 block][row tile][lane]
    assert (past == 0x44444444).all() and len(past) == -blocks % 4


@TENSOR_CORE_DTYPES
@pytest.mark.parametrize("shape", [(0, 0), (0, 72), (5, 0)], ids=["nothing", "no rows", "no columns"])
def test_fragments_of_nothing(shape, dtype):
    n, k = shape
    f = format.to_fragments(any_sparse(n, k, dtype))
    assert f.values.shape[:2] == (-(-n // 16), -(-k // 64)) and f.meta.shape == (-(-n // 16), -(-k // 256), 32, 4)
    assert f.nbytes == 0 and same(format.from_fragments(f), any_sparse(n, k, dtype))


def test_what_fragment_order_says_of_itself():
    s = any_sparse(48, 512, torch.float16)
    f = format.to_fragments(s)
    assert f.values.shape == (3, 8, 2, 32, 8) and f.meta.shape == (3, 2, 32, 4) and f.meta.dtype == torch.int32
    assert f.nbytes == s.nbytes == nbytes24(48, 512, torch.float16)  # no padding here
    # Lane 5 is row 1, second quarter: of the first step kept columns 2 and 3 of it, of the row 8 below, and those 8 further on.
    rows = s.values[[1, 9]]
    assert same(f.values[0, 0, 0, 5], torch.cat((rows[:, 2:4].flatten(), rows[:, 10:12].flatten())))
    far = f.to("meta")
    assert far.values.device.type == far.meta.device.type == "meta" and far.shape == f.shape
    assert same(f.to(torch.bfloat16).values, f.values.bfloat16()) and f.to(torch.bfloat16).meta is f.meta
    assert f.to("cpu", copy=True).meta.data_ptr() != f.meta.data_ptr()
    with pytest.raises(TypeError, match=r"Fragments24: the dtype must stay 2 bytes wide, got torch.float32"):
        f.to(torch.float32)
    eight = format.to_fragments(any_sparse(48, 512, torch.int8))
    assert eight.values.shape == (3, 8, 1, 32, 16) and eight.nbytes == nbytes24(48, 512, torch.int8)


def test_padding_of_fragments_is_not_read():
    f = format.to_fragments(any_sparse(33, 300, torch.bfloat16))
    want = format.from_fragments(f)
    columns = format.to_fragments(
        Sparse24(torch.ones(33, 152, dtype=torch.bfloat16), torch.zeros(33, 38, dtype=torch.uint8), (33, 300))
    )
    inside, words = array(columns.values) != 0, array(columns.meta)
    values = torch.where(torch.from_numpy(inside), f.values, torch.nan)
    meta = f.meta | torch.from_numpy(words & 0x44444444).view(torch.int32) * -1  # the padding's nibbles 4 negated, others kept
    assert not same(values, f.values) and not same(meta, f.meta)
    assert same(format.from_fragments(Fragments24(values, meta, f.shape)), want)


# ---- PyTorch's CUTLASS layout ----

TORCH_SHAPES = [(32, 64), (64, 64), (32, 256), (96, 320), (160, 128)]


@TORCH_DTYPES
@pytest.mark.parametrize("shape", TORCH_SHAPES, ids=str)
def test_torch_cutlass_is_what_torch_makes(shape, dtype, device):
    for n, k in {shape, (shape[0] // 2, shape[1]), (shape[0], shape[1] // 2)}:
        if n % (16 if dtype == torch.int8 else 32) or k % (64 if dtype == torch.int8 else 32):
            continue  # smaller multiples, where the dtype has them
        w = full_weight(n, k, dtype).to(device)
        s = ops.compress24(w)
        theirs = conversions.sparse_semi_structured_from_dense_cutlass(w)
        ours = format.to_torch_cutlass(s)
        assert same(ours, theirs) and all(t.is_contiguous() for t in ours)
        assert same(format.from_torch_cutlass(*theirs), s)


@TORCH_DTYPES
def test_torch_reads_what_we_write(dtype, device):
    # Under-full groups, zeros that are kept and -0.0 too: to torch it is metadata like any other.
    s = any_sparse(64, 192, dtype)
    s = Sparse24(s.values.to(device), s.meta.to(device), s.shape)
    ours = format.to_torch_cutlass(s)
    assert same(conversions.sparse_semi_structured_to_dense_cutlass(*ours), ops.expand24(s))
    assert same(format.from_torch_cutlass(*ours), s)


@TORCH_DTYPES
def test_we_read_what_torch_writes(dtype, device):
    picks = torch.randint(len(UNDER_FULL), (64, 48), generator=torch.Generator().manual_seed(0))
    w = torch.stack([group_weight(columns, 1, 4, dtype)[0] for columns in UNDER_FULL])[picks].view(64, 192).to(device)
    s = format.from_torch_cutlass(*conversions.sparse_semi_structured_from_dense_cutlass(w))
    s.validate()
    assert same(ops.expand24(s), w)
    canonical = ops.compress24(w)
    assert not same(s, canonical) and same(ops.compress24(ops.expand24(s)), canonical)


@TORCH_DTYPES
@pytest.mark.parametrize("columns, ours, theirs", [((), 4, 14), ((0,), 4, 8), ((1,), 4, 9), ((2,), 8, 14), ((3,), 12, 14)], ids=str)
def test_torch_keeps_other_zeros(columns, ours, theirs, dtype):
    # Where a group has fewer than two non-zeros the two rules never agree: docs/format.md has this table.
    w = group_weight(columns, 32, 64, dtype)
    both = ours * 0x11, theirs * 0x11
    s = format.from_torch_cutlass(*conversions.sparse_semi_structured_from_dense_cutlass(w))
    assert (ops.compress24(w).meta.unique().tolist(), s.meta.unique().tolist()) == ([both[0]], [both[1]])


def test_torch_itself_refuses_what_we_refuse():
    # An odd number of words in a row does not fit into pairs, and rows come in whole tiles.
    for dtype, n, k in [(torch.float16, 32, 48), (torch.float16, 16, 64), (torch.int8, 16, 96), (torch.int8, 8, 64)]:
        with pytest.raises(RuntimeError):
            conversions.sparse_semi_structured_from_dense_cutlass(torch.zeros(n, k, dtype=dtype))
        with pytest.raises(ValueError, match=rf"to_torch_cutlass: .* needs multiples of .*, got \({n}, {k}\)"):
            format.to_torch_cutlass(any_sparse(n, k, dtype))
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        # As the docstring says, its class wants twice the columns.
        asked = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[dtype]
        n, k = asked.sparse_min_rows, asked.sparse_min_cols // 2
        assert format.to_torch_cutlass(any_sparse(n, k, dtype))[0].shape == (n, k // 2)
        with pytest.raises(ValueError, match=f"multiples of {n} rows and {k} columns"):
            format.to_torch_cutlass(any_sparse(n, k // 2, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_torch_cutlass_refuses_fp32_and_fp8(dtype):
    with pytest.raises(TypeError, match=f"got {dtype}; torch's CUTLASS backend stores fp32 as 1:2 and takes no fp8"):
        format.to_torch_cutlass(any_sparse(32, 64, dtype))
    assert torch.float8_e4m3fn not in SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS


# ---- CUTLASS for sm_90 ----

SM90_SHAPES = [
    pytest.param((64, 128), id="one atom"),
    pytest.param((130, 264), id="past atoms both ways"),
    pytest.param((3, 8), id="less than an atom"),
    pytest.param((65, 64), id="one row more"),
]


@TENSOR_CORE_DTYPES
@pytest.mark.parametrize("tile_k", [64, 128])
@pytest.mark.parametrize("shape", SM90_SHAPES)
def test_sm90_is_what_the_compressor_of_cutlass_makes(shape, tile_k, dtype, device):
    w = full_weight(*shape, dtype)
    s = ops.compress24(w.to(device))
    values, metadata = format.to_cutlass_sm90(s, tile_k)
    want_values, want_metadata = cutlass_model.compress(array(w), tile_k, dtype.is_floating_point)
    assert (array(values) == want_values).all() and (array(metadata).reshape(-1) == want_metadata).all()
    n, k = shape
    assert metadata.shape == (-(-n // 64) * 64, -(-k // tile_k) * tile_k // 8) and values.is_contiguous()
    assert same(format.from_cutlass_sm90(values, metadata, shape, tile_k), s)


@TENSOR_CORE_DTYPES
@pytest.mark.parametrize("tile_k", [64, 128])
def test_sm90_keeps_our_nibbles(tile_k, dtype):
    s = any_sparse(70, 268, dtype)
    values, metadata = format.to_cutlass_sm90(s, tile_k)
    layout, data = cutlass_model.metadata_layout(70, 268, 8 * dtype.itemsize, tile_k), array(metadata).reshape(-1)
    for row, byte in itertools.product(range(70), range(34)):
        assert data[layout(row, 8 * byte) // 8] == s.meta[row, byte]
    assert np.count_nonzero(data) == 70 * 34 and same(values[:, :136], s.values) and not array(values[:, 136:]).any()
    assert same(format.from_cutlass_sm90(values, metadata, torch.tensor([70, 268]), tile_k), s)


def test_sm90_by_lanes():
    # Where the metadata of (warp, lane, step) lies for 16 bits and tile_k 128: one 16-byte load holds a lane's four steps.
    s = any_sparse(64, 128, torch.float16)
    words = array(format.to_cutlass_sm90(s)[1]).reshape(-1).view("<u4")
    meta16 = array(s.meta).view("<u2")  # [row][16 columns]
    for warp, lane, step in np.ndindex(4, 32, 4):
        row, half = 16 * warp + lane // 4, lane % 2
        word = words[(256 * warp + 128 * half + 16 * (lane // 4) + 4 * step) // 4]
        assert word == int(meta16[row, 2 * step + half]) | int(meta16[row + 8, 2 * step + half]) << 16


@TENSOR_CORE_DTYPES
def test_we_read_what_the_compressor_of_cutlass_writes(dtype):
    picks = torch.randint(len(UNDER_FULL), (67, 33), generator=torch.Generator().manual_seed(1))
    w = torch.stack([group_weight(columns, 1, 4, dtype)[0] for columns in UNDER_FULL])[picks].view(67, 132)
    values, metadata = (torch.from_numpy(t) for t in cutlass_model.compress(array(w), 128, dtype.is_floating_point))
    s = format.from_cutlass_sm90(values.view(dtype), metadata.view(128, 32), (67, 132))
    s.validate()
    assert same(ops.expand24(s), w) and same(ops.compress24(ops.expand24(s)), ops.compress24(w))
    # Its choice of zeros, as docs/format.md has it; the nibble 0 of an empty group is not valid and becomes 4.
    nibbles = torch.stack((s.meta & 15, s.meta >> 4), -1).flatten(1)[:, :33]
    assert (nibbles == torch.tensor([4, 12, 13, 14, 12])[picks]).all()


@pytest.mark.parametrize("kept", [(1, 0), (0, 1), (1, 1)], ids=str)
def test_sm90_does_not_hide_bad_metadata(kept):
    # Nibble 0 where a value is not zero: no compressor wrote that.
    values, metadata = format.to_cutlass_sm90(any_sparse(64, 128, torch.float16))
    values[0, :2] = torch.tensor(kept)
    metadata[0, 0] = 0x40
    with pytest.raises(ValueError, match="got 0 in row 0, group 0"):
        format.from_cutlass_sm90(values, metadata, (64, 128)).validate()


# ---- every layout ----


def layouts(s: Sparse24):
    """The round trips that a weight allows: name, what is written, how it is read back."""
    (n, k), small = s.shape, s.values.dtype.itemsize
    if small <= 2:
        yield "fragments", format.to_fragments, format.from_fragments
        if k % 4 == 0:
            for tile in (64, 128):
                yield (
                    f"sm90 {tile}",
                    lambda s, tile=tile: format.to_cutlass_sm90(s, tile),
                    lambda x, tile=tile: format.from_cutlass_sm90(*x, s.shape, tile),
                )
    if s.values.dtype in (torch.float16, torch.bfloat16, torch.int8):
        if n % (16 * small) == 0 and k % (64 // small) == 0:
            yield "torch", format.to_torch_cutlass, lambda x: format.from_torch_cutlass(*x)
    if k % 4 == 0:
        yield "bitmask24", format.to_bitmask24, lambda x: format.from_bitmask24(*x)


@given(st.data())
def test_any_weight_comes_back(data):
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    n = data.draw(st.one_of(st.integers(0, 70), st.sampled_from([32, 64])), label="n")
    k = data.draw(st.one_of(st.integers(0, 300), st.sampled_from([32, 64, 128])), label="k")
    s = any_sparse(n, k, dtype, data.draw(st.integers(0, 99), label="seed"))
    for name, write, read in layouts(s):
        there = write(s)
        back = read(there)
        assert same(back, s) and back.values.is_contiguous() and back.meta.is_contiguous(), name
        assert same(tuple(write(back)), tuple(there)), name
    canonical = ops.compress24(ops.expand24(s))
    assert same(format.from_bitmask(*format.to_bitmask(s)), canonical)


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["transposed", "every other column", "columns of wider ones", "one row for all"])
def test_strided_weights(layout, dtype):
    s = any_sparse(64, 128, dtype)  # nothing to pad, in any layout

    def strided(t):
        if layout == "transposed":
            return t.T.contiguous().T
        if layout == "every other column":
            return torch.stack((t, t), -1).flatten(1)[:, ::2]
        if layout == "columns of wider ones":
            return torch.cat((t[:, :3], t), 1)[:, 3:]
        return t[:1].expand(*t.shape)

    if layout == "one row for all":
        s = Sparse24(s.values[:1].repeat(64, 1), s.meta[:1].repeat(64, 1), s.shape)
    apart = Sparse24(strided(s.values), strided(s.meta), s.shape)
    assert not apart.values.is_contiguous() and same(apart, s)
    for name, write, read in layouts(s):
        there = write(apart)
        assert same(tuple(there), tuple(write(s))), name
        assert all(t.is_contiguous() for t in there if isinstance(t, torch.Tensor)), name
        # Read from strided tensors too.
        turned = [strided_copy(t) if isinstance(t, torch.Tensor) else t for t in there]
        back = read(Fragments24(*turned) if name == "fragments" else tuple(turned))
        assert same(back, s) and back.values.is_contiguous() and back.meta.is_contiguous(), name
    assert same(format.to_bitmask(apart), format.to_bitmask(s))


def strided_copy(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def test_nothing_is_read_on_the_way():
    # On fake tensors a converter that waited for data would fail: these do not, whatever the device.
    s = Sparse24(
        torch.empty(64, 64, dtype=torch.float16, device="meta"), torch.empty(64, 16, dtype=torch.uint8, device="meta"), (64, 128)
    )
    for name, write, read in layouts(s):
        there = write(s)
        if name != "bitmask24":
            assert read(there).shape == s.shape, name


@TENSOR_CORE_DTYPES
def test_weights_under_vmap(dtype):
    # Their metadata are the batch; in the top byte of a word 0xE and 0x9 set the sign.
    weights = [any_sparse(35, 300, dtype, seed) for seed in (0, 1)]
    values, meta = (torch.stack(parts) for parts in zip(*(s[:2] for s in weights)))
    want = [torch.stack(parts) for parts in zip(*(format.to_fragments(s)[:2] for s in weights))]
    there = torch.func.vmap(lambda v, m: tuple(format.to_fragments(Sparse24(v, m, (35, 300))))[:2])(values, meta)
    assert same(there, want) and (there[1] < 0).any()
    back = torch.func.vmap(lambda v, m: tuple(format.from_fragments(Fragments24(v, m, (35, 300))))[:2])(*there)
    assert same(back, (values, meta))


def test_symbolic_shapes():
    # Where torch traces dynamic shapes, sizes are SymInt: one trace serves other rows.
    def there_and_back(values, meta):
        s = Sparse24(values, meta, (values.shape[0], 2 * values.shape[1]))
        return tuple(format.from_fragments(format.to_fragments(s)))[:2]

    s = any_sparse(35, 192, torch.float16)
    traced = make_fx(there_and_back, tracing_mode="symbolic")(s.values, s.meta)
    for n in (35, 41):
        s = any_sparse(n, 192, torch.float16)
        assert same(traced(s.values, s.meta), (s.values, s.meta))


@pytest.mark.parametrize("write", ["to_fragments", "to_torch_cutlass", "to_cutlass_sm90", "to_bitmask24", "to_bitmask"], ids=str)
def test_a_weight_whose_parts_do_not_fit(write):
    convert = getattr(format, write)
    s = any_sparse(32, 64, torch.float16)
    for broken, error, text in [
        (Sparse24(s.values.double(), s.meta, s.shape), TypeError, "values must be one of .*, got torch.float64"),
        (Sparse24(s.values, s.meta.char(), s.shape), TypeError, "meta must be torch.uint8, got torch.int8"),
        (Sparse24(s.values, s.meta[:, :7], s.shape), ValueError, r"for k = 64 values must be \(n, 32\) and meta \(n, 8\), got "),
        (Sparse24(s.values, s.meta, (32, 64, 1)), ValueError, r"shape must be \(rows, columns\), .*, got \(32, 64, 1\)"),
        (Sparse24(s.values, s.meta, 64), ValueError, r"shape must be \(rows, columns\), .*, got 64"),
        (Sparse24(s.values, s.meta, (-32, 64)), ValueError, r"that are not negative, got \(-32, 64\)"),
        (Sparse24(s.values, s.meta, (31, 64)), ValueError, "values must have the 31 rows of shape, got 32"),
        (Sparse24(s.values, s.meta.to("meta"), s.shape), ValueError, "on one device, got cpu and meta"),
    ]:
        with pytest.raises(error, match=f"{write}: .*{text}"):
            convert(broken)


def bad_calls():
    half, int8 = any_sparse(32, 64, torch.float16), any_sparse(32, 64, torch.int8)
    f = format.to_fragments(half)
    shape = r"from_fragments: shape \(32, 64\) needs values \(2, 1, 2, 32, 8\) and meta \(2, 1, 32, 4\), got "
    for fp32 in (format.to_fragments, format.to_cutlass_sm90):
        yield (
            lambda fp32=fp32: fp32(any_sparse(32, 64, torch.float32)),
            TypeError,
            "got torch.float32; tensor cores take fp32 as tf32",
        )
    yield lambda: format.from_fragments(f._replace(values=f.values.float())), TypeError, "values must be .*, got torch.float32"
    yield lambda: format.from_fragments(f._replace(meta=f.meta.short())), TypeError, "meta must be torch.int32, got torch.int16"
    yield lambda: format.from_fragments(f._replace(values=f.values[:1])), ValueError, shape
    yield lambda: format.from_fragments(f._replace(meta=f.meta.flatten())), ValueError, shape
    yield lambda: format.from_fragments(f._replace(values=f.values.view(2, 1, 1, 32, 16))), ValueError, shape
    yield lambda: format.from_fragments(f._replace(shape=(33, 64))), ValueError, r"shape \(33, 64\) needs values \(3, 1"
    for wrong in ((-1, 64), (32, 64, 1), 64, (32.0, 64)):
        text = rf"from_fragments: shape must be \(rows, columns\), .*, got {re.escape(str(wrong))}$"
        yield lambda wrong=wrong: format.from_fragments(f._replace(shape=wrong)), ValueError, text
    yield lambda: format.from_fragments(f._replace(meta=f.meta.to("meta"))), ValueError, "on one device, got cpu and meta"
    values, meta = format.to_torch_cutlass(half)
    yield lambda: format.from_torch_cutlass(values.float(), meta), TypeError, "values must be .*, got torch.float32"
    yield lambda: format.from_torch_cutlass(values, meta.int()), TypeError, "float16 must be torch.int16, got torch.int32"
    yield lambda: format.from_torch_cutlass(int8.values, meta), TypeError, "int8 must be torch.int32, got torch.int16"
    yield lambda: format.from_torch_cutlass(values.flatten(), meta), ValueError, r"values must be \(n, k/2\), got shape \(1024,\)"
    yield lambda: format.from_torch_cutlass(values, meta[:, :3]), ValueError, r"needs meta \(32, 4\), got \(32, 3\)"
    yield lambda: format.from_torch_cutlass(values, meta[:31]), ValueError, r"needs meta \(32, 4\), got \(31, 4\)"
    yield lambda: format.from_torch_cutlass(values[:31], meta[:31]), ValueError, r"multiples of 32 rows .* got \(31, 64\)"
    yield lambda: format.from_torch_cutlass(values[:, :24], meta[:, :3]), ValueError, r"and 32 columns, got \(32, 48\)"
    yield lambda: format.from_torch_cutlass(values, meta.to("meta")), ValueError, "on one device, got cpu and meta"
    for wrong in (32, 64.0, "64"):
        text = f"to_cutlass_sm90: tile_k must be 64 or 128, got {wrong}$"
        yield lambda wrong=wrong: format.to_cutlass_sm90(half, wrong), ValueError, text
    yield lambda: format.to_cutlass_sm90(any_sparse(4, 6, torch.int8)), ValueError, "columns in multiples of 4, got 6"
    sm90 = format.to_cutlass_sm90(half)
    need = r"shape \(32, 64\) needs values \(32, 32\) and metadata \(64, 16\), got "
    yield lambda: format.from_cutlass_sm90(sm90[0].float(), sm90[1], (32, 64)), TypeError, "values must be .*, got torch.float32"
    yield lambda: format.from_cutlass_sm90(sm90[0], sm90[1].char(), (32, 64)), TypeError, "metadata must be torch.uint8"
    yield lambda: format.from_cutlass_sm90(sm90[0][:, :31], sm90[1], (32, 64)), ValueError, need
    yield lambda: format.from_cutlass_sm90(sm90[0], sm90[1][:63], (32, 64)), ValueError, need
    yield lambda: format.from_cutlass_sm90(*sm90, (32, 64), 64), ValueError, r"and metadata \(64, 8\), got "
    yield lambda: format.from_cutlass_sm90(*sm90, (32, 64), 256), ValueError, "from_cutlass_sm90: tile_k must be 64 or 128, got 256"
    yield lambda: format.from_cutlass_sm90(sm90[0], sm90[1].to("meta"), (32, 64)), ValueError, "on one device, got cpu and meta"
    values24, mask24, _ = format.to_bitmask24(half)
    yield lambda: format.from_bitmask24(values24.double(), mask24, (32, 64)), TypeError, "values must be .*, got torch.float64"
    yield lambda: format.from_bitmask24(values24, mask24.char(), (32, 64)), TypeError, "bitmask must be torch.uint8, got torch.int8"
    yield lambda: format.from_bitmask24(values24, mask24[:, :7], (32, 64)), ValueError, r"needs bitmask \(32, 8\), got \(32, 7\)"
    yield lambda: format.from_bitmask24(values24[:31], mask24, (32, 64)), ValueError, r"needs values \(32, 32\), got \(31, 32\)"
    yield lambda: format.from_bitmask24(values24, mask24.to("meta"), (32, 64)), ValueError, "on one device, got cpu and meta"
    for wrong in ((32,), (32, 64, 1), (-32, 64), 64, None, torch.tensor(64), torch.tensor([32.5, 64])):
        text = r"from_bitmask24: shape must be \(rows, columns\), two integers that are not negative, got "
        yield lambda wrong=wrong: format.from_bitmask24(values24, mask24, wrong), ValueError, text
    kept, mask, offsets, _ = format.to_bitmask(half)
    total = len(kept)
    for op in (format.from_bitmask, format.bitmask_to_dense):
        name = op.__name__
        yield (
            lambda op=op: op(kept[1:], mask, offsets, (32, 64)),
            ValueError,
            rf"{name}: .* the {total} bits .* got shape \({total - 1},\)",
        )
        yield lambda op=op: op(kept, mask, offsets + 1, (32, 64)), ValueError, f"{name}: row_offsets must say how many bits are set"
        yield lambda op=op: op(kept, mask, offsets[1:], (32, 64)), ValueError, f"{name}: row_offsets must say how many bits are set"
        yield lambda op=op: op(kept, mask.char(), offsets, (32, 64)), TypeError, f"{name}: bitmask must be torch.uint8"
        yield (
            lambda op=op: op(kept, mask[:31], offsets, (32, 64)),
            ValueError,
            rf"{name}: .* needs bitmask \(32, 8\), got \(31, 8\)",
        )
    yield lambda: format.from_bitmask(kept.double(), mask, offsets, (32, 64)), TypeError, "values must be .*, got torch.float64"
    yield (
        lambda: format.dense_to_bitmask(torch.zeros(2, 3, 4)),
        ValueError,
        r"must be \(out_features, in_features\), got shape \(2, 3, 4\)",
    )


@pytest.mark.parametrize("call, error, text", list(bad_calls()))
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=text):
        call()
