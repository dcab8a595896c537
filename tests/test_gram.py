"""The Gram op against fp64, and what it refuses."""

import pytest
import torch

from sparsekit import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "tokens, k", [(300, 600), (30, 600), (300, 40), (0, 8), (5, 0)], ids=["panels", "few tokens", "one panel", "empty", "no k"]
)
def test_gram(tokens, k, dtype, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k + 3, generator=g).to(device, dtype)[:, 1 : 1 + k]
    before = torch.randn(k, k, generator=g)
    total = (before + before.T).to(device)
    want = total.double() + x.double().T @ x.double()
    bound = (total.double().abs() + x.double().abs().T @ x.double().abs()) * (tokens + 3) * 2.0**-24
    ops.gram_(total, x)
    assert ((total.double() - want).abs() <= bound).all() and torch.allclose(total, total.T, rtol=0, atol=1e-3)


def test_gram_is_an_op():
    torch.library.opcheck(torch.ops.sparsekit.gram_.default, (torch.zeros(6, 6), torch.randn(4, 6)))


@pytest.mark.parametrize(
    "total, x, error, text",
    [
        (torch.zeros(4, 4).double(), torch.ones(2, 4), TypeError, "total must be torch.float32"),
        (torch.zeros(4, 4), torch.ones(2, 4).int(), TypeError, "x of a float dtype, got torch.float32 and torch.int32"),
        (torch.zeros(4, 4), torch.ones(2, 5), ValueError, r"got \(4, 4\), strides \(4, 1\), on cpu and \(2, 5\) on cpu"),
        (torch.zeros(4, 4), torch.ones(1, 2, 4), ValueError, r"and \(1, 2, 4\)"),
        (torch.zeros(4, 8)[:, ::2], torch.ones(2, 4), ValueError, r"strides \(8, 2\)"),
    ],
    ids=["fp64 total", "integers", "sizes", "three dimensions", "strides"],
)
def test_what_gram_refuses(total, x, error, text):
    with pytest.raises(error, match=text):
        ops.gram_(total, x)
