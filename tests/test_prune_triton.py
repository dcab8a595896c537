"""The Triton kernels of pruning: the OBS step, masks of few long rows, the Gram matrix; against fp64 and definition24.py.

Without a CUDA device they run in Triton's interpreter, in a process of their own (interpreted.py). The interpreter's dot product
does not take bf16: the Gram matrix of bf16 is for test_obs_gpu.py."""

import pytest
import torch
from definition24 import NOTHING, SCORES, VIEWS, equal, few_values, keep_rows, random_bits, viewed
from interpreted import DEVICE, IN_A_PROCESS_OF_ITS_OWN, launches, patched_once, poisoned_memory, run_in_the_interpreter  # noqa: F401

pytest.importorskip("triton")

from obs_problems import check, problem

from sparsekit import ops
from sparsekit.kernels import mask_long_rows as long_rows
from sparsekit.kernels.gram import gram
from sparsekit.kernels.mask_rows import mask_rows
from sparsekit.kernels.obs import obs
from sparsekit.ops.gram import _gram_cuda
from sparsekit.ops.obs import _obs_block, _obs_block_cuda

# ---- the OBS step ----

OBS_CASES = {  # (rows, b), n, m, pairs
    "2:4, eight panels": ((3, 128), 2, 4, False),
    "2:4, two programs": ((33, 32), 2, 4, False),
    "1:4, one ragged panel": ((2, 10), 1, 4, False),
    "4:8": ((3, 40), 4, 8, False),
    "2:5, panels of 15 columns, a tail of two": ((3, 47), 2, 5, False),
    "7:12, a tail of four": ((2, 28), 7, 12, False),
    "5:31": ((2, 64), 5, 31, False),
    "16:32, a ragged last panel": ((2, 72), 16, 32, False),
    "2:4 pairs": ((3, 48), 2, 4, True),
    "1:3 pairs, a last group of a pair and a half": ((3, 15), 1, 3, True),
    "9:32 pairs, an odd tail": ((2, 77), 9, 32, True),
    "all go": ((2, 20), 0, 4, False),
    "all stay": ((2, 20), 4, 4, False),
    "one weight": ((1, 1), 1, 2, False),
}


@pytest.mark.parametrize("case", OBS_CASES)
def test_obs(case):
    (rows, b), n, m, pairs = OBS_CASES[case]
    w, upper = problem(rows, b, DEVICE)
    check(obs, w, upper, None, n, m, pairs)


@pytest.mark.parametrize("rows, b", [(40, 45), (1, 16), (2, 128)], ids=["two programs", "one panel", "eight panels"])
def test_obs_by_a_mask(rows, b):
    w, upper = problem(rows, b, DEVICE)
    for share in (0, 0.5, 1):
        check(obs, w, upper, torch.rand(rows, b, generator=torch.Generator().manual_seed(1)).to(DEVICE) < share)


@pytest.mark.parametrize("of_each", [True, False], ids=["a factor each", "one factor"])
def test_obs_of_a_batch(of_each):
    wide, upper = problem(5, 40, DEVICE, batch=3)
    upper = upper if of_each else upper[:1].expand(3, -1, -1)
    mask = (wide > 0)[..., 3:23]
    for given, n, m in ((None, 2, 4), (mask, 0, 0)):
        for block in (slice(3, 23), slice(4, 24)):  # where a row of the block starts at no 16 bytes, and where it does
            view = wide.clone()[..., block]
            check(obs, view, upper[:, block, block], given, n, m)


def test_obs_leaves_the_rest_of_the_weight():
    whole, upper = problem(4, 48, DEVICE)
    before = whole.clone()
    check(obs, whole[:, 16:32], upper[16:32, 16:32], None, 2, 4)
    assert torch.equal(whole[:, :16], before[:, :16]) and torch.equal(whole[:, 32:], before[:, 32:])
    assert not torch.equal(whole[:, 16:32], before[:, 16:32])


def test_what_obs_prunes_is_plus_zero_and_ties_go_to_the_lower_column():
    w = torch.tensor([[-0.0, 1.0, -1.0, 1.0, 2.0, -2.0, -0.0, 0.0]], device=DEVICE)
    mask, errors, loss, _ = obs(w, torch.eye(8, device=DEVICE), None, 2, 4)
    assert mask.tolist() == [[False, True, True, False, True, True, False, False]]
    assert torch.equal(w.view(torch.int32)[~mask], torch.zeros(4, dtype=torch.int32, device=DEVICE))
    assert w[mask].tolist() == [1, -1, 2, -2] and errors.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]] and loss.tolist() == [1]


def test_obs_reads_the_upper_triangle_alone():
    w, upper = problem(3, 40, DEVICE)
    full = upper + torch.full_like(upper, torch.nan).tril(-1)
    want, got = w.clone(), w.clone()
    obs(want, upper, None, 2, 4), obs(got, full, None, 2, 4)
    assert torch.equal(got, want)


def test_obs_names_the_first_row_with_a_nan():
    w, upper = problem(70, 20, DEVICE, batch=2)
    w[1, 65, 19] = w[1, 66, 0] = torch.nan
    loss, status = obs(w.clone(), upper, None, 2, 4)[2:]
    assert status.item() == 70 + 65 and loss.isnan().nonzero().tolist() == [[1, 65], [1, 66]]
    loss = obs(w.clone(), upper, torch.ones_like(w, dtype=torch.bool))[2]  # kept, it adds nothing to the loss
    assert loss.isnan().nonzero().tolist() == [[1, 65], [1, 66]]
    w[0, 3, 0] = torch.inf  # goes or stays, it leaves inf - inf or inf * 0 somewhere
    assert obs(w, upper, torch.zeros_like(w, dtype=torch.bool))[3].item() == 3


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 3, 8)], ids=str)
def test_obs_of_nothing(shape):
    mask, errors, loss, status = obs(torch.ones(shape, device=DEVICE), torch.ones(*shape[:-2], shape[-1], shape[-1], device=DEVICE))
    assert mask.shape == errors.shape == shape and loss.tolist() == torch.zeros(shape[:-1]).tolist() and status.item() == NOTHING


def test_the_cuda_half_of_obs_block(launches):  # noqa: F811
    for batch in (None, 2):
        w, upper = problem(5, 90, DEVICE, batch)
        for mask, n, m, pairs in ((None, 2, 4, False), (None, 1, 3, True), (w > 0, 0, 0, False), (None, 20, 40, False)):
            ours, theirs = w.clone(), w.cpu()
            got = _obs_block_cuda(ours, upper, mask, n, m, pairs)
            want = _obs_block(theirs, upper.cpu(), mask if mask is None else mask.cpu(), n, m, pairs)
            assert torch.equal(got[0].cpu(), want[0])
            for a, b in zip((ours, *got[1:]), (theirs, *want[1:])):
                assert a.shape == b.shape and (a.cpu() - b).norm() <= 1e-5 * b.norm()
    none = _obs_block_cuda(w[:0], upper[:0], None, 20, 40, False)
    assert [t.shape for t in none] == [(0, 5, 90), (0, 5, 90), (0, 5)]
    w[1, 4, 7] = torch.nan
    for n, m in ((2, 4), (33, 33)):  # by the kernel, and of more columns than it takes
        with pytest.raises(ValueError, match=r"^obs_block_: w and upper must give no NaN, got one in row 4 of weight 1$"):
            _obs_block_cuda(w.clone(), upper, None, n, m, False)
        assert _obs_block_cuda(w.clone(), upper, None, n, m, False, check=False)[2].isnan().nonzero().tolist() == [[1, 4]]
    with pytest.raises(ValueError, match=r"^obs_block_: without a mask"):
        _obs_block_cuda(w, upper, None, 5, 4, False)


# ---- masks of few long rows ----


@pytest.fixture(params=[512, 3], ids=["a block a program", "two blocks a program"])
def programs(request, monkeypatch):
    monkeypatch.setattr(long_rows, "_PROGRAMS", request.param)
    monkeypatch.setattr(long_rows, "_BLOCK", 256)  # so that a short row is long, in the interpreter


# What a program does with its blocks hangs on no dtype.
@pytest.mark.parametrize(
    "dtype, programs", [*((dtype, 512) for dtype in SCORES), (torch.float32, 3), (torch.int8, 3)], indirect=["programs"], ids=str
)
def test_mask_long_rows(dtype, programs):
    for scores in (random_bits((1, 1100), dtype), few_values((3, 520), dtype)):
        for k in (0, scores.shape[1] // 3, scores.shape[1]):
            mask, status = long_rows.mask_long_rows(scores.to(DEVICE), k)
            assert equal(mask.view(torch.uint8), keep_rows(scores, k)) and status.item() == NOTHING


@pytest.mark.parametrize("how", VIEWS)
def test_long_rows_of_every_layout(how, programs):
    scores = few_values((2, 600), torch.float32, seed=3)
    assert equal(long_rows.mask_long_rows(viewed(scores, how, DEVICE), 177)[0].view(torch.uint8), keep_rows(scores, 177))
    for col in (2, 300, 599):  # in the first, a middle and the last block
        bad = scores.clone()
        bad[1, col] = torch.nan
        assert long_rows.mask_long_rows(viewed(bad, how, DEVICE), 177)[1].item() == 1


def test_mask_rows_shares_few_long_rows_out():
    # 16385 columns do not fit the registers of a program; what each kernel gives is the same.
    scores = few_values((2, 16385), torch.int8, seed=4)
    got = mask_rows(scores.to(DEVICE), 9000)[0]
    assert equal(got.view(torch.uint8), keep_rows(scores, 9000))


# ---- the Gram matrix ----


@pytest.mark.parametrize(
    "tokens, k", [(1, 1), (70, 130), (130, 72), (64, 64)], ids=["one", "six tiles, a ragged end", "ragged", "one tile"]
)
def test_gram(tokens, k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(tokens, k + 5, generator=g).half()[:, 2 : 2 + k]
    before = torch.randn(k, k, generator=g)
    before += before.T.clone()
    for view in (x, x.T.contiguous().T):
        total = before.clone().to(DEVICE)
        gram(total, view.to(DEVICE))
        want = before.double() + x.double().T @ x.double()
        bound = (before.double().abs() + x.double().abs().T @ x.double().abs()) * (tokens + 1) * 2.0**-24
        total = total.cpu()
        assert ((total.double() - want).abs() <= bound).all()
        # Tiles are mirrored, and one on the diagonal is as symmetric as the dot product, which numpy's is not on every machine.
        tile = torch.arange(k) // 64
        mirrored = (tile[:, None] != tile) | (DEVICE == "cuda")
        assert torch.equal(total[mirrored], total.T[mirrored])


def test_gram_takes_the_lower_triangle_to_the_upper():
    total = torch.zeros(130, 130, device=DEVICE)
    total[:64, 64:] = torch.nan
    gram(total, torch.ones(3, 130, device=DEVICE, dtype=torch.float16))
    assert (total == 3).all()


def test_the_cuda_half_of_gram(launches):  # noqa: F811
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.float32, torch.float64):
        got, want = torch.zeros(40, 40, device=DEVICE), torch.zeros(40, 40)
        _gram_cuda(got, x.to(DEVICE, dtype))
        ops.gram_(want, x.to(dtype))
        assert torch.allclose(got.cpu(), want, rtol=0, atol=1e-4)


# ---- without the interpreter chosen, the tests above run in a process that chooses it ----

if IN_A_PROCESS_OF_ITS_OWN:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    def test_this_file_in_the_interpreter(tmp_path):
        run_in_the_interpreter(__file__, tmp_path)
