"""Pruners as functions: equal to the pruners, in any dtype and any rank of activations."""

import pytest
import torch

from sparsekit import NM, SparsekitError, magnitude_prune, sparsegpt_prune, wanda_prune
from sparsekit.patterns import Unstructured


def prune_by(function, weight: torch.Tensor, x: torch.Tensor, pattern: str) -> torch.Tensor:
    return function(weight, *(() if function is magnitude_prune else (x,)), pattern=pattern)


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 16, generator=generator).to(dtype), torch.randn(2, 20, 16, generator=generator).to(dtype)


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8]
FUNCTIONS = [magnitude_prune, wanda_prune, sparsegpt_prune]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wanda_is_its_formula(dtype):
    weight, x = tensors(dtype)
    scores = weight.double().abs() * x.double().flatten(0, 1).norm(dim=0)
    for pattern in (NM(2, 4), Unstructured(0.5)):
        out = wanda_prune(weight, x, pattern)
        expected = torch.where(pattern.mask(scores, rowwise=True), weight.double(), 0)
        assert out.dtype == dtype and torch.equal(out.double(), expected)
    assert torch.equal(wanda_prune(weight, x.flatten(0, 1)), wanda_prune(weight, x))
    assert torch.equal(wanda_prune(weight, list(x)), wanda_prune(weight, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_and_sparsegpt_hold_the_pattern_in_the_weights_dtype(dtype):
    weight, x = tensors(dtype)
    kept = weight.clone()
    expected = torch.where(Unstructured(0.5).mask(weight.double().abs()), weight.double(), 0)
    assert torch.equal(magnitude_prune(weight, "50%").double(), expected)
    out = sparsegpt_prune(weight, x, "2:4")
    assert out.dtype == dtype and NM(2, 4).check(out) is None and torch.equal(weight, kept)

    def error(pruned: torch.Tensor) -> float:
        return ((weight.double() - pruned.double()) @ x.flatten(0, 1).double().T).square().sum().item()

    assert error(out) < error(wanda_prune(weight, x)) and error(out) < error(magnitude_prune(weight))


@pytest.mark.parametrize("pattern", ["2:4", "4:8 pairs", "50%", "block:4x4@50%"])
@pytest.mark.parametrize("shape", [(0, 16), (6, 0), (0, 0)], ids=["no rows", "no columns", "neither"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_weight_of_nothing_comes_back(function, shape, pattern):
    assert prune_by(function, torch.zeros(shape, dtype=torch.bfloat16), torch.randn(2, 20, shape[1]), pattern).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, *FP8], ids=str)
def test_an_update_beyond_the_largest_number_stays_finite(dtype):
    """Two inputs alike: each weight that goes is given to the one beside it, which is as large as the dtype has it already."""
    largest = torch.finfo(dtype).max
    weight = torch.full((3, 8), largest).to(dtype)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
    out = sparsegpt_prune(weight, x, "1:2").double()
    assert (out.view(3, 4, 2) != 0).sum(-1).eq(1).all() and out.max() == largest and torch.isfinite(out).all()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.complex64, torch.int8], ids=str)
def test_a_dtype_that_cannot_hold_a_pruned_weight(dtype, function):
    # Of the first, powers of two alone: it has no zero.
    weight, x = tensors(torch.float32)
    with pytest.raises(ValueError, match=rf"{function.__name__}: weight must be .* that has a zero, .*, got \(6, 16\) in {dtype}"):
        prune_by(function, weight.abs().to(dtype), x, "2:4")


@pytest.mark.parametrize("dtype", [torch.float32, *FP8], ids=str)
def test_a_weight_that_is_not_finite_is_named(dtype):
    weight, x = tensors(dtype)
    weight = weight.float()
    weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf, the first in row 3, column 5"):
        sparsegpt_prune(weight.to(dtype), x, "2:4")
    with pytest.raises(ValueError, match="no NaN, got one in row 3, column 5"):
        wanda_prune(weight.to(dtype), x, "2:4")


@pytest.mark.parametrize("function", [wanda_prune, sparsegpt_prune], ids=lambda f: f.__name__)
def test_refused(function):
    weight, x = tensors(torch.float32)
    for arguments, says in (
        ((weight[0], x), r"weight must be \(n, k\) of a float dtype .*, got \(16,\)"),
        ((weight.int(), x), "got .* in torch.int32"),
        ((weight, x[..., :8]), r"activations must be \(..., tokens, 16\) of a float dtype, got \(2, 20, 8\)"),
        ((weight, x[0, 0]), r"got \(16,\)"),
        ((weight, ()), "observed none"),
        ((weight, x * torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            function(*arguments)
    with pytest.raises(SparsekitError, match="a pattern must be"):
        function(weight, x, "half")
