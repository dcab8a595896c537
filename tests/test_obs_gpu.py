"""The kernels of pruning on a GPU: the OBS step of every pattern and class of shape and of 200 random ones, masks of long rows, the
Gram matrix; against the reference and fp64. The same sources run without a GPU in test_prune_triton.py. Not yet run on hardware."""

import random

import pytest
import torch
from obs_problems import check, problem

from sparsekit import ops

pytestmark = pytest.mark.gpu
PATTERNS = {"2:4": (2, 4, False), "1:3": (1, 3, False), "4:8": (4, 8, False), "16:32": (16, 32, False), "4:8 pairs": (2, 4, True)}
SHAPES = {
    (1, 1): "one weight",
    (5, 128): "a ragged program",
    (4096, 128): "a layer's block",
    (33, 100): "a ragged panel",
    (70, 32): "two panels",
    (3, 300): "no power of two",
}


def checked(w, upper, mask=None, n=0, m=0, pairs=False) -> None:
    """As obs_problems.check, for the op; two runs agree bit for bit."""
    again = w.clone()

    def op(w, upper, mask, n, m, pairs):
        return *ops.obs_block_(w, upper, mask=mask, n=n, m=m, pairs=pairs), torch.tensor(torch.iinfo(torch.int64).max)

    rows = w.shape[-2]
    check(op, w, upper, mask, n, m, pairs, ties=max(1, rows // 1000) if rows >= 20 else 0)
    ops.obs_block_(again, upper, mask=mask, n=n, m=m, pairs=pairs)
    assert torch.equal(again, w), "two runs differ"


# The sanitizer sees the kinds of group, not every size of one.
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPES.get)
@pytest.mark.parametrize(
    "pattern",
    [pytest.param(name, marks=[pytest.mark.sanitize] * (name in ("2:4", "4:8 pairs", "a mask"))) for name in (*PATTERNS, "a mask")],
)
def test_every_pattern_at_every_shape(pattern, shape):
    w, upper = problem(*shape, "cuda")
    if pattern == "a mask":
        checked(w, upper, w.abs() > 0.5)
    else:
        checked(w, upper, None, *PATTERNS[pattern])


@pytest.mark.sanitize
def test_blocks_of_a_wider_weight_and_batches():
    wide, upper = problem(40, 96, "cuda", batch=3)
    for begin, end in ((0, 32), (3, 67), (32, 96)):
        block = slice(begin, end)
        checked(wide.clone()[..., block], upper[:, block, block], None, 2, 4)
        checked(wide.clone()[0, :, block], upper[0, block, block], (wide > 0)[0, :, block])


@pytest.mark.parametrize("twenty", range(10))
def test_two_hundred_random_shapes(twenty):
    chance = random.Random(twenty)
    for i in range(20 * twenty, 20 * twenty + 20):
        m = chance.choice([1, 2, 3, 4, 7, 8, 16, 31, 32])  # each is compiled anew
        batch = chance.choice([None, None, chance.randint(1, 4)])
        w, upper = problem(chance.randint(1, 200), chance.randint(1, 160), "cuda", batch, seed=i)
        checked(w, upper, *((w > 0, 0, 0, False) if i % 4 == 0 else (None, chance.randint(0, m), m, i % 4 == 1)))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.sanitize), torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows, cols", [(1, 4096 * 128), (3, 100_003), (127, 16_385)])
def test_masks_of_few_long_rows(dtype, rows, cols):
    scores = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[:, ::3] = scores[:, 1:2]  # ties, by the thousand
    for kept in (0, 1, cols // 2, cols):
        mask = ops.mask_rows(scores.cuda(), kept)
        assert torch.equal(mask.cpu(), ops.mask_rows(scores, kept))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize)], ids=str)
@pytest.mark.parametrize("tokens, k", [(1, 1), (70, 130), (1000, 2047), (2048, 2176)])
def test_gram(tokens, k, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, k, generator=g, device="cuda").to(dtype)
    total, again = torch.ones(k, k, device="cuda"), torch.ones(k, k, device="cuda")
    ops.gram_(total, x)
    ops.gram_(again, x)
    bound = (1 + x.double().abs().T @ x.double().abs()) * (tokens + 1) * 2.0**-24
    assert ((total.double() - 1 - x.double().T @ x.double()).abs() <= bound).all()
    below = torch.ones(k, k, device="cuda", dtype=torch.bool).tril(-128)  # off the tiles on the diagonal
    assert torch.equal(total[below], total.T[below]) and torch.equal(total, again)
