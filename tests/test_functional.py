"""Pruners as functions: equal to the pruners, in any dtype and any rank of activations."""

import pytest
import torch

from sparsekit import NM, SparsekitError, magnitude_prune, sparsegpt_prune, wanda_prune
from sparsekit.patterns import Unstructured


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 16, generator=generator).to(dtype), torch.randn(2, 20, 16, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_wanda_is_its_formula(dtype):
    weight, x = tensors(dtype)
    scores = weight.double().abs() * x.double().flatten(0, 1).norm(dim=0)
    for pattern in (NM(2, 4), Unstructured(0.5)):
        out = wanda_prune(weight, x, pattern)
        assert out.dtype == dtype and torch.equal(out, torch.where(pattern.mask(scores, rowwise=True), weight, 0))
    assert torch.equal(wanda_prune(weight, x.flatten(0, 1)), wanda_prune(weight, x))
    assert torch.equal(wanda_prune(weight, list(x)), wanda_prune(weight, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_magnitude_and_sparsegpt_hold_the_pattern_in_the_weights_dtype(dtype):
    weight, x = tensors(dtype)
    kept = weight.clone()
    assert torch.equal(magnitude_prune(weight, "50%"), torch.where(Unstructured(0.5).mask(weight.abs()), weight, 0))
    out = sparsegpt_prune(weight, x, "2:4")
    assert out.dtype == dtype and NM(2, 4).check(out) is None and torch.equal(weight, kept)

    def error(pruned: torch.Tensor) -> float:
        return ((weight - pruned).double() @ x.flatten(0, 1).double().T).square().sum().item()

    assert error(out) < error(wanda_prune(weight, x)) and error(out) < error(magnitude_prune(weight))


@pytest.mark.parametrize("function", [wanda_prune, sparsegpt_prune], ids=lambda f: f.__name__)
def test_refused(function):
    weight, x = tensors(torch.float32)
    for arguments, says in (
        ((weight[0], x), r"weight must be \(n, k\) of a float dtype, got \(16,\)"),
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
