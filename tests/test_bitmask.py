"""The bitmask formats of compressed-tensors against numpy and against its compressor, written group by group from what it does."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights24 import BITS, any_sparse, array, bits, full_weight, group_weight, same

from sparsekit import Sparse24, format, ops
from sparsekit.format import DTYPES

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def magnitude(w: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """As that tool compares weights: fp8 by its bytes, and int8 without a sign for -128."""
    return np.abs(w.view(np.int8)) if dtype.itemsize == 1 else np.abs(torch.from_numpy(w).view(dtype).float().numpy())


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1, 4), (5, 12), (33, 72), (2, 8)], ids=str)
def test_bitmask24_is_what_compressed_tensors_makes(shape, dtype, device):
    # Its definition, group by group: the two largest are kept, in place; bits by numpy.
    w = full_weight(*shape, dtype)
    raw, size = array(w), magnitude(array(w), dtype)
    mask = np.zeros(shape, bool)
    for row, group in np.ndindex(shape[0], shape[1] // 4):
        largest = np.argsort(size[row, 4 * group : 4 * group + 4], kind="stable")[2:]
        mask[row, 4 * group + largest] = True
    s = ops.compress24(w.to(device))
    values, bitmask, sizes = format.to_bitmask24(s)
    assert (array(values) == raw[mask].reshape(shape[0], shape[1] // 2)).all() and values.is_contiguous()
    assert (bitmask.cpu().numpy() == np.packbits(mask, axis=-1, bitorder="little")).all() and bitmask.dtype == torch.uint8
    assert same(sizes, torch.tensor(shape).reshape(-1, 1))
    for form in (sizes, sizes.flatten(), shape, list(shape)):
        assert same(format.from_bitmask24(values, bitmask, form), s)


@EVERY_DTYPE
def test_bitmask24_keeps_zeros(dtype, device):
    # A group with fewer than two non-zeros has two bits all the same, where our nibble says; any two are read.
    s = any_sparse(9, 44, dtype)
    s = Sparse24(s.values.to(device), s.meta.to(device), s.shape)
    values, bitmask, sizes = format.to_bitmask24(s)
    mask = np.unpackbits(bitmask.cpu().numpy(), axis=-1, bitorder="little")[:, :44].reshape(9, 11, 4)
    assert (mask.sum(-1) == 2).all() and not (bitmask[:, -1] >> 4).any()
    dense = np.zeros((9, 44), array(values).dtype)
    dense[mask.reshape(9, 44).astype(bool)] = array(values).reshape(-1)
    assert (dense == array(ops.expand24(s))).all()
    assert same(format.from_bitmask24(values, bitmask, sizes), s)


@pytest.mark.parametrize("bit", [0, 3, 21], ids=["more", "more", "fewer"])
def test_bitmask24_names_the_first_bad_group(bit):
    s = ops.compress24(group_weight((1, 2), 3, 24, torch.float16))
    values, bitmask, sizes = format.to_bitmask24(s)
    bitmask[1, bit // 8] ^= 1 << bit % 8
    bitmask[2] = 0
    count, group = {0: 3, 3: 3, 21: 1}[bit], bit // 4
    with pytest.raises(ValueError, match=rf"two bits set, got {count} in row 1, columns {4 * group} to {4 * group + 3}$"):
        format.from_bitmask24(values, bitmask, sizes)


@pytest.mark.parametrize("k", [2, 6, 9, 11])
def test_bitmask24_has_no_part_of_a_group(k):
    with pytest.raises(ValueError, match=f"to_bitmask24: sparse-24-bitmask needs columns in multiples of 4, got {k}"):
        format.to_bitmask24(any_sparse(2, k, torch.float16))
    with pytest.raises(ValueError, match=f"from_bitmask24: sparse-24-bitmask needs columns in multiples of 4, got {k}"):
        format.from_bitmask24(torch.zeros(2, k // 2), torch.zeros(2, -(-k // 8), dtype=torch.uint8), (2, k))


def by_numpy(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four tensors of sparse-bitmask, from numpy."""
    raw, nonzero = array(w), (w.double() != 0).numpy()
    offsets = np.concatenate([[0], nonzero.sum(1).cumsum()])[:-1].astype(np.int64)
    values = torch.from_numpy(raw[nonzero]).view(BITS[w.dtype.itemsize]).view(w.dtype)
    packed = torch.from_numpy(np.packbits(nonzero, axis=-1, bitorder="little")).reshape(len(w), -(-w.shape[1] // 8))
    return values, packed, torch.from_numpy(offsets[: len(w)]), torch.tensor(w.shape)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (33, 72), (4, 0), (0, 12), (0, 0)], ids=str)
def test_bitmask(shape, dtype, device):
    s = any_sparse(*shape, dtype)
    w = ops.expand24(s)
    ours = format.to_bitmask(Sparse24(s.values.to(device), s.meta.to(device), s.shape))
    assert same(tuple(t.cpu() for t in ours), by_numpy(w))
    # What comes back: the non-zeros exactly, zeros as +0, and in the canonical place.
    back, canonical = format.from_bitmask(*ours), ops.compress24(w)
    assert same(Sparse24(back.values.cpu(), back.meta.cpu(), back.shape), canonical)
    assert same(format.to_bitmask(back), ours)
    for form in (tuple(shape), list(shape)):
        assert same(format.from_bitmask(*ours[:2], None, form), back)
    assert same(format.bitmask_to_dense(*ours).cpu(), ops.expand24(canonical))
    assert same(format.dense_to_bitmask(w.to(device)), ours)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint16, torch.bool], ids=str)
def test_bitmask_of_any_pattern(dtype, device):
    g = torch.Generator().manual_seed(3)
    w = (torch.randint(-9, 10, (6, 21), generator=g) * (torch.rand(6, 21, generator=g) < 0.7)).to(dtype)
    w[2], w[4] = 0, 1  # an empty row, and a full one
    wide = torch.cat((w, w), 1)[:, 21:].to(device)  # not contiguous
    ours = format.dense_to_bitmask(wide)
    assert same(tuple(t.cpu() for t in ours), by_numpy(w))
    assert torch.equal(format.bitmask_to_dense(*ours).cpu().double(), w.double())
    assert format.bitmask_to_dense(*ours).dtype == dtype


def test_bitmask_stores_no_zeros():
    w = torch.tensor([[-0.0, 1, 0, 0, -2, -0.0]])
    values, bitmask, offsets, _ = format.dense_to_bitmask(w)
    assert values.tolist() == [1, -2] and bitmask.tolist() == [[0b010010]] and offsets.tolist() == [0]
    assert same(format.bitmask_to_dense(values, bitmask, offsets, (1, 6)), torch.tensor([[0.0, 1, 0, 0, -2, 0]]))


def test_from_bitmask_names_the_first_bad_group():
    w = torch.zeros(3, 11)
    w[1, 8:] = w[2, :4] = 1
    with pytest.raises(ValueError, match="at most two non-zeros, got 3 in row 1, columns 8 to 10; bitmask_to_dense takes any"):
        format.from_bitmask(*format.dense_to_bitmask(w))


def test_bits_past_the_columns_are_not_read():
    # numpy.unpackbits(count=k) does not either.
    s = any_sparse(3, 12, torch.float16)
    values, bitmask, shape = format.to_bitmask24(s)
    bitmask[:, -1] |= 0xF0
    before = bitmask.clone()
    assert same(format.from_bitmask24(values, bitmask, shape), s) and same(bitmask, before)
    tensors = format.to_bitmask(s)
    tensors[1][:, -1] |= 0xF0
    assert same(format.from_bitmask(*tensors), ops.compress24(ops.expand24(s)))


def outcome(call):
    """What a call returns, or the place that its error names."""
    try:
        return call()
    except ValueError as error:
        return re.search(r"got (one|\d) in row \d+, columns? \d+( to \d+)?", str(error))[0]


@given(st.data())
def test_from_bitmask_is_compress24_of_the_dense_weight(data):
    # As other tools may write it: zeros of both signs are stored, so groups have more than two bits; and what is to be refused.
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    n, k = data.draw(st.integers(1, 9), label="n"), data.draw(st.integers(1, 40), label="k")
    share = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="share of the zeros that is stored")
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    w = ops.expand24(any_sparse(n, k, dtype))
    zero = w.double() == 0
    bits(w)[zero & (torch.rand(n, k, generator=g) < 0.5)] = bits(torch.tensor([-0.0]).to(dtype))
    mask = ~zero | (torch.rand(n, k, generator=g) < share)
    for number in data.draw(st.lists(st.sampled_from([1.0, torch.nan]), max_size=5), label="more"):
        row, column = int(torch.randint(n, (), generator=g)), int(torch.randint(k, (), generator=g))
        w[row, column], mask[row, column] = 1 if dtype == torch.int8 else number, True
    bitmask = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    stored = bits(w)[mask].view(dtype), bitmask, None, (n, k)
    want = outcome(lambda: ops.compress24(format.bitmask_to_dense(*stored)))
    assert same(outcome(lambda: format.from_bitmask(*stored)), want)


@EVERY_DTYPE
def test_zeros_that_are_stored(dtype, device):
    # Columns 0 and 3 of the first group, where 3 is a zero, and all but the third of the second, where the first is one.
    values = torch.tensor([1.0, -0.0, -0.0, 1, 1]).to(device, dtype)
    bitmask = torch.tensor([[0b1011_1001]], dtype=torch.uint8, device=device)
    s = format.from_bitmask(values, bitmask, torch.tensor([0]), (1, 8))
    assert same(s.values, torch.tensor([[1.0, 0, 1, 1]]).to(dtype)) and s.meta.tolist() == [[0xD4]]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
def test_from_bitmask_refuses_nan(dtype, device):
    w = torch.zeros(3, 11)
    w[0, 2], w[1, 9], w[2, 1], w[1, :4] = 1, torch.nan, torch.nan, 1  # before three non-zeros in a group, as compress24
    stored = [t.to(device) for t in format.dense_to_bitmask(w.to(dtype))]
    with pytest.raises(ValueError, match=r"from_bitmask: values must hold no NaN, got one in row 1, column 9$"):
        format.from_bitmask(*stored)
