"""The OBS block step against the reference, and the reference against the definition: solving for what is left, in fp64."""

import pytest
import torch
from format24_cpu import CHOSEN, PATHS
from obs_problems import problem64 as problem
from torch import Tensor

from sparsekit import _C, ops, reference

PATTERNS = {"2:4": (2, 4, False), "1:4": (1, 4, False), "4:8": (4, 8, False), "pairs": (2, 4, True), "3:5": (3, 5, False)}
# Of the kernel also: whole groups kept or gone, groups of one, wider than a step and not whole steps, of pairs, past a block.
MORE = PATTERNS | {
    "0:4": (0, 4, False),
    "4:4": (4, 4, False),
    "1:1": (1, 1, False),
    "5:11": (5, 11, False),
    "3:5 pairs": (3, 5, True),
    "16:32": (16, 32, False),
    "70:200": (70, 200, False),
}
SHAPES = {
    "one weight": (1, 1),
    "one column": (19, 1),
    "one row": (1, 37),
    "a tile and a row": (33, 128),
    "tails of groups, of masks' words and of tiles": (70, 131),
    "no rows": (0, 8),
}


@pytest.fixture(params=PATHS)
def isa(request):
    """Each instruction set that this CPU has."""
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(CHOSEN)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_solves_for_what_is_left(pattern):
    # Given its mask, the result minimises (w - q) H (w - q)' subject to the zeros column by column: the OBS step of each column is
    # the exact minimiser over the columns to its right, with those before it fixed.
    w, h, upper = problem(6, 20)
    w = w.double()
    q, kept, errors, loss = reference.obs_block(w, upper, None, *PATTERNS[pattern])
    for row in range(len(w)):
        now = w[row].clone()
        for j in range(w.shape[1]):
            if kept[row, j]:
                continue
            free = slice(j + 1, None)
            step = torch.zeros_like(now)
            step[j] = -now[j]
            if j + 1 < len(now):
                step[free] = torch.linalg.solve(h[free, free], h[free, j] * now[j])
            now += step
            now[j] = 0
        assert torch.allclose(now, q[row], rtol=1e-9, atol=1e-9)
    assert torch.allclose(loss, errors.square().sum(-1))
    d = w - q
    assert torch.allclose((d @ h * d).sum(-1), loss, rtol=1e-8)  # what is lost is the sum of the steps' losses


def check(found: tuple[Tensor, ...], w: Tensor, upper: Tensor, mask: Tensor | None, n: int = 0, m: int = 1, pairs: bool = False):
    """weights, mask, errors and loss as the reference has them in fp64; of fp32, within what 131 columns' roundings add up to."""
    new, kept, errors, loss = found
    wanted, mask, wanted_errors, wanted_loss = reference.obs_block(w.double(), upper.double(), mask, n, m, pairs)
    assert torch.equal(kept, mask)
    for ours, truth in ((new, wanted), (errors, wanted_errors), (loss, wanted_loss)):
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        assert ((ours - truth).abs() <= 1e-5 * truth.abs().max()).all() if truth.numel() else True
    assert not new.view(torch.int32)[~kept].any(), "what goes is +0.0 to the bit"
    assert not errors[kept].any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pattern", MORE.values(), ids=MORE)
def test_patterns(isa, pattern, shape):
    w, _, upper = problem(*shape)
    upper, new = upper.float(), w.clone()
    check((new, *ops.obs_block_(new, upper, n=pattern[0], m=pattern[1], pairs=pattern[2])), w, upper, None, *pattern)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_a_given_mask(isa, share, shape):
    w, _, upper = problem(*shape)
    upper, new = upper.float(), w.clone()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) >= share
    kept, *rest = ops.obs_block_(new, upper, mask=mask)
    check((new, kept, *rest), w, upper, mask)
    assert kept.data_ptr() != mask.data_ptr() or not mask.numel()


@pytest.mark.parametrize("given", [False, True], ids=["2:4", "mask"])
@pytest.mark.parametrize("batch", [(), (3,), (0,)], ids=["a weight", "three weights", "none"])
def test_views_of_wider_weights(isa, batch, given):
    # A block of the columns of a whole weight and of a whole factor, and of a mask; what lies beside them is left alone.
    w, _, upper = problem(21, 60, batch=batch)
    whole = torch.full((*batch, 30, 83), 7.0)
    part, factor = whole[..., 4:25, 10:70], torch.full((*batch, 71, 90), torch.nan)[..., 5:65, 11:71]
    part.copy_(w)
    factor.copy_(upper)
    mask = torch.rand(*batch, 60, 21, generator=torch.Generator().manual_seed(1)).mT > 0.5 if given else None
    found = ops.obs_block_(part, factor, n=2, m=4, mask=mask)
    assert found[0].shape == found[1].shape == (*batch, 21, 60) and found[2].shape == (*batch, 21)
    for i in range(*batch or (1,)):
        one = (lambda t: t[i]) if batch else lambda t: t  # noqa: B023
        ours = [one(t).contiguous() for t in (part, *found)]
        check(ours, one(w), one(upper.float()), one(mask) if given else None, 2, 4)
    part.fill_(7.0)
    assert (whole == 7).all()


def test_a_row_is_the_same_wherever_it_stands(isa):
    # Alone, among others, and whichever thread takes it: to the bit.
    w, _, upper = problem(97, 75)
    upper, threads, found = upper.float(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            new = w.clone()
            found.append((new, *ops.obs_block_(new, upper, n=2, m=4)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    for row in (0, 15, 31, 32, 96):
        new = w[row : row + 1].clone()
        alone = (new, *ops.obs_block_(new, upper, n=2, m=4))
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(found[0], alone))


def test_a_tie_goes_to_the_lower_column(isa):
    # Powers of two on the diagonal: the scores are exact, and so are their ties. No update: the factor is diagonal.
    upper = torch.diag(torch.tensor([1.0, 2, 4, 1, 0.5, 1, 1, 1, 1]))
    w = torch.tensor([[1.0, -2, 4, -1, 3, 3, -3, 3, 0], [2, 2, 2, 2, 0, -0.0, 0, 0, 5]])
    kept, errors, loss = ops.obs_block_(w, upper, n=2, m=4)
    # scores 1 1 1 1 | 36 9 9 9 | 0, and 4 1 1/4 4 | 0 0 0 0 | 25
    assert kept.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1, 0, 0, 1]]
    assert w.tolist() == [[1, -2, 0, 0, 3, 3, 0, 0, 0], [2, 0, 0, 2, 0, 0, 0, 0, 5]]
    assert errors.tolist() == [[0, 0, 1, -1, 0, 0, -3, 3, 0], [0, 1, 0.5, 0, 0, 0, 0, 0, 0]] and loss.tolist() == [20, 1.25]
    pairs = torch.tensor([[1.0, 2, -2, 1, 1, 1, 3, 0, 1, 9]])
    assert ops.obs_block_(pairs, torch.eye(10), n=1, m=2, pairs=True)[0].int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1, 1, 1]]


def test_the_choice_is_made_on_updated_weights(isa):
    # Removing column 0 turns column 4 from the smallest of its group into the largest, and column 1 from a removed into a kept one
    # if the mask of its own group waited: it does not, a group is chosen when its first column is reached.
    upper = torch.eye(8)
    upper[0, 1], upper[0, 4] = -50, -100
    w = torch.tensor([[1.0, 2, 3, 4, 1, 2, 3, 4]])
    kept, errors, _ = ops.obs_block_(w, upper, n=2, m=4)
    assert kept.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 1]]
    assert errors.tolist() == [[1, 52, 0, 0, 0, 2, 3, 0]] and w.tolist() == [[0, 0, 3, 4, 101, 0, 0, 4]]


@pytest.mark.parametrize("given", [False, True], ids=["2:4", "mask"])
def test_nan_names_its_row(isa, given):
    w, _, upper = problem(50, 24, batch=(2,))
    mask = torch.ones(w.shape, dtype=torch.bool) if given else None
    w[1, 41, 17] = w[1, 45, 0] = torch.nan
    with pytest.raises(ValueError, match="obs_block_: w and upper must give no NaN, got one in row 41 of weight 1"):
        ops.obs_block_(w, upper.float(), n=2, m=4, mask=mask)
    w, _, upper = problem(50, 24)
    w[7, 3] = torch.inf  # it goes, and inf - inf is what follows
    with pytest.raises(ValueError, match=r"got one in row 7$"):
        ops.obs_block_(w, upper.float(), n=0, m=4, mask=None if mask is None else ~mask[0])


@pytest.mark.parametrize("given", [False, True], ids=["2:4", "mask"])
def test_nan_that_is_not_checked_for_shows_in_the_loss_of_its_row(isa, given):
    # Also where it is kept, so that nothing of the row's loss is of it. What is checked for and what is not is else the same.
    w, _, upper = problem(50, 24, batch=(2,))
    mask = torch.ones(w.shape, dtype=torch.bool) if given else None
    ours, theirs = w.clone(), w.clone()
    found = ops.obs_block_(ours, upper.float(), n=2, m=4, mask=mask, check=False)
    assert all(map(torch.equal, (ours, *found), (theirs, *ops.obs_block_(theirs, upper.float(), n=2, m=4, mask=mask))))
    w[1, 41, 17] = torch.nan
    loss = ops.obs_block_(w, upper.float(), n=2, m=4, mask=mask, check=False)[2]
    assert loss.isnan().nonzero().tolist() == [[1, 41]]


def test_what_is_refused():
    w, upper = torch.zeros(3, 8), torch.eye(8)
    for bad, error, text in (
        ((w.double(), upper), TypeError, "w must be torch.float32, got torch.float64"),
        ((w, upper.half()), TypeError, "upper must be torch.float32, got torch.float16"),
        ((w, upper, w), TypeError, "mask must be torch.bool, got torch.float32"),
        ((w.T.contiguous().T, upper), ValueError, r"column stride 1, got \(3, 8\), strides \(1, 3\)"),
        ((w[0], upper), ValueError, r"w must be \(rows, b\) or \(batch, rows, b\)"),
        ((w, upper[:4]), ValueError, r"upper must be b x b for each b columns of w \(3, 8\), got \(4, 8\)"),
        ((w[None], upper), ValueError, "upper must be b x b"),
        ((w, upper, w[:2] > 0), ValueError, r"mask must be of the shape of w, \(3, 8\), got \(2, 8\)"),
        ((w, upper.to("meta")), ValueError, "upper must be on the device of w, cpu, got meta"),
    ):
        tensors, mask = bad[:2], bad[2] if len(bad) > 2 else None
        with pytest.raises(error, match=f"obs_block_: .*{text}"):
            ops.obs_block_(*tensors, n=2, m=4, mask=mask)
    for n, m in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match=f"0 <= n <= m and m >= 1 must hold, got n = {n} and m = {m}"):
            ops.obs_block_(w, upper, n=n, m=m)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["a weight", "two weights"])
def test_as_a_torch_op(batch):
    w, _, upper = problem(5, 12, batch=batch)
    torch.library.opcheck(torch.ops.sparsekit.obs_block_.default, (w, upper.float(), None, 2, 4, False, True))
    torch.library.opcheck(torch.ops.sparsekit.obs_block_.default, (w, upper.float(), w > 0, 0, 0, False, False))


def test_a_gradient_that_needs_the_weight_as_it_was_is_refused():
    x, w = torch.ones(4, 8, requires_grad=True), torch.randn(4, 8)
    product = x * w
    ops.obs_block_(w, torch.eye(8), n=2, m=4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
