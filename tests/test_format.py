"""compress24 and expand24 against a packer written group by group from the definition, on bits and not on numbers."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import Sparse24, ops
from sparsekit.format import DTYPES, VALID_NIBBLES, check_layout, check_shape, nbytes24

RAW = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
    torch.int8: torch.int8,
}
SUBSETS = [c for size in range(3) for c in itertools.combinations(range(4), size)]  # the columns of a group that are not zero
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().contiguous().view(RAW[t.dtype])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(raw(a), raw(b))


def zeros_of(dtype: torch.dtype) -> list[int]:
    """The bits of 0 and, for a float, of -0.0."""
    return [0] if dtype == torch.int8 else [0, torch.iinfo(RAW[dtype]).min]


def pack(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values and meta of w (n, k) by the words of sparsekit/format.py."""
    n, k = w.shape
    kp = -(-k // 8) * 8
    values, meta = [], []
    for row in raw(w).tolist():
        row = [0 if bits in zeros_of(w.dtype) else bits for bits in row] + [0] * (kp - k)
        nibbles = []
        for begin in range(0, kp, 4):
            group = row[begin : begin + 4]
            nonzero = [c for c in range(4) if group[c] != 0]
            free = [c for c in range(4) if group[c] == 0]
            first, second = sorted((nonzero + free)[:2])
            values += [group[first], group[second]]
            nibbles.append(second << 2 | first)
        meta += [even | odd << 4 for even, odd in zip(nibbles[0::2], nibbles[1::2])]
    values = torch.tensor(values, dtype=RAW[w.dtype]).view(n, kp // 2).view(w.dtype)
    return values, torch.tensor(meta, dtype=torch.uint8).view(n, kp // 8)


def weight(rows: list[list[tuple[int, ...]]], k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A weight with non-zeros at the given columns of each group, cut to k columns: random bits, so infinities and subnormals
    too but no NaN, and in the other columns both kinds of zero."""
    g = torch.Generator().manual_seed(seed)
    shape, info = (len(rows), -(-k // 4) * 4), torch.iinfo(RAW[dtype])
    bits = torch.randint(info.min, info.max + 1, shape, generator=g)
    bits[torch.isin(bits, torch.tensor(zeros_of(dtype)))] = 1
    numbers = bits.to(RAW[dtype]).view(dtype)
    bits[numbers.float().isnan()] = 1
    zeros = torch.tensor(zeros_of(dtype))[torch.randint(len(zeros_of(dtype)), shape, generator=g)]
    on = torch.zeros(shape, dtype=torch.bool)
    for r, groups in enumerate(rows):
        for i, columns in enumerate(groups):
            on[r, [4 * i + c for c in columns]] = True
    return torch.where(on, bits, zeros).to(RAW[dtype])[:, :k].contiguous().view(dtype)


def random_weight(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    picks = torch.randint(len(SUBSETS), (n, -(-k // 4)), generator=torch.Generator().manual_seed(seed)).tolist()
    return weight([[SUBSETS[p] for p in row] for row in picks], k, dtype, seed)


def check(w: torch.Tensor) -> None:
    s = ops.compress24(w)
    values, meta = pack(w)
    assert s.shape == tuple(w.shape)
    assert s.values.is_contiguous() and s.meta.is_contiguous() and s.values.device == s.meta.device == w.device
    assert same_bits(s.values, values) and torch.equal(s.meta.cpu(), meta)
    s.validate()
    dense = ops.expand24(s)
    plus = torch.where(torch.isin(raw(w), torch.tensor(zeros_of(w.dtype), dtype=RAW[w.dtype])), 0, raw(w)).view(w.dtype)
    assert dense.is_contiguous() and same_bits(dense, plus)
    again = ops.compress24(dense)
    assert same_bits(again.values, s.values) and torch.equal(again.meta, s.meta) and again.shape == s.shape


def test_the_picture_of_the_format():
    s = ops.compress24(torch.tensor([[0, 1.0, 0, 2, 3, 0, 4, 0]]))
    assert s.values.tolist() == [[1, 2, 3, 4]] and s.meta.tolist() == [[0b1000_1101]]


def test_a_row_of_meta_is_the_words_of_mma_sp():
    # Nibble g of a little-endian 16-bit word describes columns 4g to 4g + 3 of its sixteen.
    w = torch.zeros(1, 16)
    for g, columns in enumerate([(0, 3), (1, 2), (2, 3), (0, 2)]):
        w[0, [4 * g + c for c in columns]] = 1
    word = int.from_bytes(bytes(ops.compress24(w).meta[0].tolist()), "little")
    assert [word >> 4 * g & 0xF for g in range(4)] == [0xC, 0x9, 0xE, 0x8]


@EVERY_DTYPE
def test_every_pair_of_groups(dtype, device):
    # The eleven ways a group can be filled, in the low and in the high nibble: all six nibbles, under-full and empty groups.
    w = weight([list(pair) for pair in itertools.product(SUBSETS, SUBSETS)], 8, dtype).to(device)
    check(w)
    assert {n for byte in ops.compress24(w).meta.flatten().tolist() for n in (byte & 15, byte >> 4)} == set(VALID_NIBBLES)


@EVERY_DTYPE
@pytest.mark.parametrize("k", range(18))
def test_every_tail(k, dtype):
    check(random_weight(13, k, dtype, seed=k))


@pytest.mark.parametrize(
    "shape",
    [(0, 0), (0, 12), (5, 0), (1, 1), (5, 13), (130, 260)],
    ids=["nothing", "no rows", "no columns", "one", "ragged", "many"],
)
def test_extreme_shapes(shape, device):
    check(random_weight(*shape, torch.float16).to(device))


@EVERY_DTYPE
@pytest.mark.parametrize(
    "layout", ["transposed", "every other column", "rows of a wider one", "every other row", "one row for all"]
)
def test_layouts(layout, dtype):
    w = random_weight(6, 20, dtype)
    if layout == "transposed":
        strided = w.T.contiguous().T
    elif layout == "every other column":
        strided = torch.stack((w, w), -1).view(6, 40)[:, ::2]
    elif layout == "rows of a wider one":
        strided = torch.cat((w[:, :3], w), 1)[:, 3:]
    elif layout == "every other row":
        strided = torch.cat((w, w), 1).view(12, 20)[::2]
    else:
        w = w[:1].repeat(6, 1)
        strided = w[:1].expand(6, 20)
    assert not strided.is_contiguous() and same_bits(strided, w)
    before = raw(strided).clone()
    check(strided)
    assert torch.equal(raw(strided), before)
    s, want = ops.compress24(strided), ops.expand24(ops.compress24(w))
    apart = Sparse24(s.values.T.contiguous().T, s.meta.T.contiguous().T, s.shape)
    assert same_bits(ops.expand24(apart), want)


@given(st.data())
def test_any_weight(data):
    k = data.draw(st.integers(0, 17), label="k")
    rows = data.draw(st.lists(st.lists(st.sampled_from(SUBSETS), min_size=-(-k // 4), max_size=-(-k // 4)), max_size=4))
    check(weight(rows, k, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99))))


@EVERY_DTYPE
@pytest.mark.parametrize("columns", [c for size in (3, 4) for c in itertools.combinations(range(4), size)], ids=str)
def test_more_than_two_nonzeros(columns, dtype):
    rows = [[(0, 1)] * 4, [(0, 1), (2,), columns, (1, 2)], [columns] * 4]
    with pytest.raises(ValueError, match=rf"two non-zeros, got {len(columns)} in row 1, columns 8 to 11; prune to 2:4"):
        ops.compress24(weight(rows, 16, dtype))


def test_more_than_two_nonzeros_in_the_tail():
    with pytest.raises(ValueError, match="got 3 in row 2, columns 8 to 10;"):
        ops.compress24(weight([[(), (), ()], [(), (), (1, 3)], [(), (), (0, 1, 2)]], 11, torch.float32))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 9), (1, 7)], ids=str)
def test_nan(place, dtype):
    w = torch.zeros(3, 10)
    w[place] = w[2, 9] = torch.nan
    with pytest.raises(ValueError, match=f"no NaN, got one in row {place[0]}, column {place[1]}"):
        ops.compress24(w.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.bool, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_dtypes_that_are_refused(dtype, where):
    with pytest.raises(TypeError, match=f"compress24: w must be one of .*torch.int8, got {dtype}"):
        ops.compress24(torch.zeros(2, 8, device=where).to(dtype))


@pytest.mark.parametrize("shape", [(), (8,), (2, 4, 8)], ids=str)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_ranks_that_are_refused(shape, where):
    with pytest.raises(
        ValueError, match=r"\(out_features, in_features\), got shape " + str(shape).replace("(", r"\(").replace(")", r"\)")
    ):
        ops.compress24(torch.zeros(shape, device=where))


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(VALID_NIBBLES)), ids=hex)
@pytest.mark.parametrize("odd", [0, 1], ids=["low", "high"])
def test_validate_names_a_bad_nibble(nibble, odd):
    s = ops.compress24(random_weight(5, 24, torch.float16))
    s.meta[3, 1] = s.meta[3, 1] & (0x0F if odd else 0xF0) | nibble << 4 * odd
    s.meta[4] = 0  # the first one is named
    with pytest.raises(ValueError, match=f"got {nibble:X} in row 3, group {2 + odd};"):
        s.validate()


@pytest.mark.parametrize("value", [1.0, -1.0, torch.nan, 2.0**-9], ids=str)
@EVERY_DTYPE
def test_validate_finds_a_value_past_k(value, dtype):
    if dtype == torch.int8:
        value = 1
    number = torch.tensor(value).to(dtype).view(RAW[dtype])
    s = Sparse24(torch.zeros(3, 8).to(dtype), torch.full((3, 2), 0x44, dtype=torch.uint8), (3, 10))
    s.validate()
    for nibble, last, first_past in ((0xD, [number, 0], 11), (0x8, [number, 0], 10), (0xE, [0, 0], 10)):
        # Group 2 of row 1 keeps columns 9 and 11, 8 and 10, or 10 and 11; column 9 is the last of the weight.
        s.meta[1, 1] = 0x40 | nibble
        s.values.view(RAW[dtype])[1, 4:6] = torch.tensor(last, dtype=RAW[dtype])
        s.validate()
        s.values.view(RAW[dtype])[1, 4 if nibble == 0xE else 5] = number
        with pytest.raises(ValueError, match=f"past k = 10 must be zero, got a value in row 1, column {first_past}"):
            s.validate()


def bad_layouts():
    values, meta = torch.zeros(4, 8, dtype=torch.float16), torch.full((4, 2), 0x44, dtype=torch.uint8)
    sizes = r"for k = 16 values must be \(n, 8\) and meta \(n, 2\), got "
    yield "values of fp64", values.double(), meta, (4, 16), TypeError, "values must be one of .*got torch.float64"
    yield "meta of int8", values, meta.char(), (4, 16), TypeError, "meta must be torch.uint8, got torch.int8"
    yield "values flat", values.flatten(), meta, (4, 16), ValueError, sizes
    yield "meta flat", values, meta.flatten(), (4, 16), ValueError, sizes
    yield "values narrow", values[:, :7], meta, (4, 16), ValueError, sizes
    yield "meta wide", values, torch.cat((meta, meta), 1), (4, 16), ValueError, sizes
    yield "meta of fewer rows", values, meta[:3], (4, 16), ValueError, sizes
    yield "k past the padding", values, meta, (4, 17), ValueError, r"for k = 17 values must be \(n, 12\) and meta \(n, 3\)"
    yield "k before the padding", values, meta, (4, 8), ValueError, r"for k = 8 values must be \(n, 4\) and meta \(n, 1\)"
    yield "negative k", values[:, :0], meta[:, :0], (4, -3), ValueError, ".* negative, got .*-3"
    yield "two devices", values, meta.to("meta"), (4, 16), ValueError, "values and meta must be on one device, got cpu and meta"


@pytest.mark.parametrize("values, meta, shape, error, text", [pytest.param(*c[1:], id=c[0]) for c in bad_layouts()])
def test_wrong_layouts(values, meta, shape, error, text):
    s = Sparse24(values, meta, shape)
    with pytest.raises(error, match=f"Sparse24: {text}"):
        s.validate()
    with pytest.raises(error, match=f"expand24: {text}"):
        ops.expand24(s)
    with pytest.raises(error, match=f"linear24: {text}"):
        ops.linear24(torch.zeros(1, max(shape[1], 0), dtype=torch.float16), s)


def test_validate_compares_rows_with_the_shape():
    s = ops.compress24(random_weight(4, 16, torch.float16))
    with pytest.raises(ValueError, match="the 5 rows of shape, got 4"):
        Sparse24(s.values, s.meta, (5, 16)).validate()


@pytest.mark.parametrize(
    "shape", [(4, 8, 1), (4,), (), 16, None, "48", (-4, 16), (4, -3), (4.0, 16), (4, 16.5), (4, "16")], ids=str
)
def test_shapes_that_are_none(shape):
    s = ops.compress24(random_weight(4, 16, torch.float16))
    text = re.escape(f"shape must be (rows, columns), two integers that are not negative, got {shape}")
    with pytest.raises(ValueError, match=f"^an op: {text}$"):
        check_shape("an op", shape)
    with pytest.raises(ValueError, match=f"^Sparse24: {text}$"):
        Sparse24(s.values, s.meta, shape).validate()


@pytest.mark.parametrize("shape", [(4, 16), [4, 16], torch.Size([4, 16]), (np.int64(4), np.int32(16)), (0, 0)], ids=repr)
def test_shapes_that_are_some(shape):
    assert check_shape("an op", shape) == tuple(shape)


def test_a_negative_k():
    with pytest.raises(ValueError, match="an op: k must not be negative, got -3"):
        check_layout("an op", torch.zeros(4, 0), torch.zeros(4, 0, dtype=torch.uint8), -3)


@EVERY_DTYPE
def test_nbytes(dtype):
    for n, k in itertools.product((0, 1, 7), range(18)):
        s = ops.compress24(random_weight(n, k, dtype))
        assert s.nbytes == nbytes24(n, k, dtype) == s.values.nbytes + s.meta.nbytes


@pytest.mark.parametrize(
    "dtype, sixteenths", [(torch.float32, 17), (torch.float16, 9), (torch.bfloat16, 9), (torch.int8, 5)], ids=str
)
def test_share_of_the_dense_bytes(dtype, sixteenths):
    # One bit of metadata a weight: 1/2 + 1/32 of fp32, 1/2 + 1/16 of 16 bits, 1/2 + 1/8 of 8 bits.
    dense = 3 * 4096 * dtype.itemsize
    denominator = {4: 32, 2: 16, 1: 8}[dtype.itemsize]
    assert nbytes24(3, 4096, dtype) * denominator == dense * sixteenths


def test_to_moves_both_and_casts_values_alone():
    s = ops.compress24(random_weight(4, 16, torch.float32))
    half = s.to(torch.float16)
    assert same_bits(half.values, s.values.half()) and half.meta is s.meta and half.shape == s.shape
    apart = s.to("cpu", copy=True)
    assert torch.equal(apart.meta, s.meta) and apart.meta.data_ptr() != s.meta.data_ptr()
    far = s.to("meta")
    assert far.values.device.type == far.meta.device.type == "meta" and far.meta.dtype == torch.uint8
