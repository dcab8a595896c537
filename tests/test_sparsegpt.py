"""SparseGPT over the OBS step: against the loop of its paper, at several levels at once, on any Gram matrix, and what it reports.

That it is exact OBS is shown in test_prune.py."""

import math

import pytest
import torch
from test_prune import block_of, correlated, hessian, normal, output_error, same_bits

from benchmarks.sparsegpt import paper_loop
from sparsekit import Pattern, ops
from sparsekit.criteria import Gram, _invert_upper_, factorise
from sparsekit.pruners import SparseGPT

LEVELS = ["2:4", "4:8", "1:4", "3:7", "4:8 pairs", "50%", "33.3%", "0%", "100%", "block:4x8@50%", "block:16x3@30%"]


def pruner(x: torch.Tensor, text: str = "2:4") -> SparseGPT:
    made = SparseGPT(x.shape[1], Pattern.parse(text))
    made.observe(x)
    return made


@pytest.mark.parametrize("text", ["2:4", "4:8", "4:8 pairs", "50%", "33.3%", "3:7"])
@pytest.mark.parametrize("k", [96, 700], ids=["one block", "two panels, ragged"])
def test_the_loop_of_the_paper(k, text):
    # Eager torch in fp64, column by column: where a mask differs, two scores were equal within fp32's rounding, and none are here.
    w, sparsegpt = normal(40, k, seed=1), pruner(correlated(3 * k, k), text)
    factor = sparsegpt.statistics.factor
    w[:, factor.dead] = 0
    block = 133 if text == "3:7" else block_of(sparsegpt.pattern, k)  # whole groups
    wanted, mask = paper_loop(w.double(), factor.upper.double(), Pattern.parse(text), block)
    result = sparsegpt.prune(w)
    assert torch.equal(result.mask, mask)
    assert ((result.weight - wanted).abs() <= 1e-4 * wanted.abs().max()).all()


def test_levels_from_one_factorisation(monkeypatch):
    w, x = normal(20, 300, seed=1).bfloat16(), correlated(700, 300)
    x[:, 5] = 0
    factored, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: (factored.append(h.shape), cholesky(h))[1])
    before, found = w.clone(), pruner(x).prune_levels(w, [Pattern.parse(text) for text in LEVELS])
    assert len(factored) == 1 and torch.equal(w, before)
    for text, level in zip(LEVELS, found, strict=True):
        fresh = pruner(x, text).prune(w)
        assert same_bits(level.weight, fresh.weight) and torch.equal(level.mask, fresh.mask)
        for name in ("output_error", "output_error_masked", "loss", "damping"):
            assert getattr(level, name) == getattr(fresh, name), name
        assert Pattern.parse(text).check(level.weight) is None
    assert pruner(x).prune_levels(w, []) == []


@pytest.mark.parametrize("n, k", [(12, 32), (13, 45), (3, 300)], ids=["whole blocks", "tails both ways", "several calls"])
def test_blocks_are_removed_whole_and_exactly(n, k):
    w, x = normal(n, k, seed=1), correlated(2 * k, k)
    level = Pattern.parse("block:4x8@40%")
    result = pruner(x, str(level)).prune(w)
    lines, across = -(-n // 4), -(-k // 8)
    of_blocks = [result.mask[4 * i : 4 * i + 4, 8 * j : 8 * j + 8] for i in range(lines) for j in range(across)]
    assert all(block.all() or not block.any() for block in of_blocks)
    assert sum(not block.any() for block in of_blocks) == lines * across * 2 // 5
    assert output_error(w, result.weight, x) < output_error(w, torch.where(result.mask, w, 0), x)


# ---- the report ----


@pytest.mark.parametrize("text", ["2:4", "50%", "4:4"])
def test_what_is_reported(text):
    w, x = normal(24, 200, seed=1), correlated(600, 200)
    x[:, 9] = 0
    result = pruner(x, text).prune(w)
    assert result.output_error == pytest.approx(output_error(w, result.weight, x), rel=1e-3, abs=1e-9)
    masked = output_error(w, torch.where(result.mask, w, 0), x)
    assert result.output_error_masked == pytest.approx(masked, rel=1e-3, abs=1e-9)
    # The loss by the definition: of what the loop changed, under the damped Hessian; H / 2 is the mean of x x'.
    d = torch.where((x == 0).all(0), 0, w).double() - result.weight.double()
    assert result.loss == pytest.approx(float((d @ hessian(x, result.damping) * d).sum() / 2), rel=1e-4, abs=1e-9)
    assert list(result.seconds) == ["factor", "loop", "trailing", "error"] and min(result.seconds.values()) > 0
    if text != "4:4":
        assert 0 < result.output_error < 0.8 * result.output_error_masked


@pytest.mark.parametrize("k", [1, 255, 256, 257, 600], ids=str)
def test_output_error_over_strips(k):
    # Half of the product is reckoned, strip by strip of 256 columns.
    w, pruned, x, gram = normal(7, k), normal(7, k, seed=1), correlated(50, k), Gram(k)
    gram.update(x)
    assert gram.output_error(w, pruned) == pytest.approx(output_error(w, pruned, x), rel=1e-4)


@pytest.mark.parametrize("k", [1, 255, 256, 257, 600, 1025], ids=str)
def test_the_inverse_in_place(k):
    r = normal(k, k).triu(1) / math.sqrt(k) + torch.diag(torch.logspace(-1, 1, k))
    inverse = r.clone()
    _invert_upper_(inverse)
    truth = torch.linalg.inv(r.double())
    assert torch.equal(inverse, inverse.triu()) and ((inverse - truth).norm() <= 1e-5 * truth.norm())


# ---- any Gram matrix ----


def grams(count: int):
    """Sums of x x' as layers make them and as none should: name, matrix, tokens."""
    generator = torch.Generator().manual_seed(0)
    kinds = ["rank 1", "zero", "huge", "tiny", "duplicates", "ill-conditioned", "dead inputs", "sizes apart", "one input", "rank 2"]
    for i in range(count):
        k, tokens = int(torch.randint(1, 40, (), generator=generator)), int(torch.randint(1, 100, (), generator=generator))
        x = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
        if (kind := kinds[i % len(kinds)]) in ("rank 1", "rank 2"):
            x = x[:, : int(kind[-1])] @ torch.randn(x[:, : int(kind[-1])].shape[1], k, generator=generator, dtype=torch.float64)
        elif kind == "zero":
            x *= 0
        elif kind in ("huge", "tiny"):
            x *= 10.0 ** ((1 if kind == "huge" else -1) * (12 + 5 * float(torch.rand((), generator=generator))))
        elif kind == "duplicates":
            x = x[:, torch.randint(0, max(k // 4, 1), (k,), generator=generator)]
        elif kind == "ill-conditioned":
            x = x @ torch.linalg.qr(torch.randn(k, k, generator=generator).double())[0] * torch.logspace(-9, 3, k).double()
            x = x @ torch.linalg.qr(torch.randn(k, k, generator=generator).double())[0]
        elif kind == "dead inputs":
            x[:, torch.rand(k, generator=generator) < 0.5] = 0
        elif kind == "sizes apart":
            x *= torch.logspace(-17, 17, k)[torch.randperm(k, generator=generator)]
        elif kind == "one input":
            x *= torch.arange(k) == k // 2
        yield kind, (x.mT @ x).float(), tokens


def test_a_thousand_grams():
    levels = [Pattern.parse(text) for text in ("2:4", "3:7", "50%")]
    for i, (kind, gram, tokens) in enumerate(grams(1000)):
        k, level = gram.shape[0], levels[i // 10 % 3]
        sparsegpt, w = SparseGPT(k, level), normal(6, k, seed=i)
        sparsegpt.statistics.sum, sparsegpt.statistics.tokens = gram, tokens
        result, where = sparsegpt.prune(w), f"{kind}, {k} inputs, number {i}"
        assert torch.isfinite(result.weight).all() and level.check(result.weight) is None, where
        assert torch.equal(result.mask, sparsegpt.prune(w).mask) and not result.weight[~result.mask].any(), where
        kept = level.n if str(level) != "50%" else None
        if kept is None:
            assert (~result.mask).sum() == 3 * k, where
        else:
            for begin in range(0, k, level.m):
                group = result.mask[:, begin : begin + level.m]
                assert (group.sum(1) == min(kept, group.shape[1])).all(), where
        assert result.damping in Gram.DAMPING_LADDER and math.isfinite(result.loss) and result.loss >= 0, where
        assert math.isfinite(result.output_error) and math.isfinite(result.output_error_masked), where
        assert result.output_error <= result.output_error_masked + 1e-6, where  # a singular H lends the update no licence


@pytest.mark.parametrize(("text", "row"), [("2:4", 1), ("50%", 1), ("4:8 pairs", 1)])
def test_an_update_past_what_fp32_holds_names_its_row(text, row):
    # Finite inputs and weights; what columns alike owe one another is more than fp32 holds. Told at the end, not block by block.
    w, x = normal(6, 300), normal(400, 1) + 1e-3 * normal(400, 300, seed=1)
    w[1:] = torch.tensor([1.0, -1]).repeat(150) * torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match=rf"making up for what goes gives NaN or Inf, the first in row {row}$"):
        pruner(x, text).prune(w)


def test_an_update_to_inf_names_its_row():
    # Nothing is subtracted from what the update takes past the largest number, so that no NaN comes of it.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, generator=generator) + 1e-2 * torch.randn(400, 8, generator=generator)
    w = normal(6, 8)
    w[3] = torch.finfo(torch.float32).max * torch.tensor([0.9, 0.8, 0.7, 0.9, 1, 1, 0.6, 0.6])
    with pytest.raises(ValueError, match=r"making up for what goes gives NaN or Inf, the first in row 3$"):
        pruner(x, "2:4").prune(w)


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-64, 2.0**40, 2.0**66, 2.0**124])
@pytest.mark.parametrize("text", LEVELS)
def test_the_scale_of_the_weight_changes_no_bit(text, scale):
    # The squares of the outermost are 0 or Inf in fp32: all scores were alike, and the loss was 0 or Inf.
    w, x = normal(24, 200), correlated(400, 200)
    plain, scaled = pruner(x, text).prune(w), pruner(x, text).prune(w * scale)
    assert same_bits(scaled.weight, plain.weight * scale) and torch.equal(scaled.mask, plain.mask)
    assert scaled.loss == plain.loss * scale**2 and scaled.output_error == plain.output_error


ROWS_APART = {
    "1e20 and 1e-30, most tiny": [1e-30] * 8 + [1e20] * 4,  # half of all is chosen among the tiny ones
    "1e20 and 1e-30, most huge": [1e20, 1e20, 1e-30, 1e20] * 3,
    "within each unit and between": [1, 1e-12, 1e8, 1e-20, 0, 1e15],
}


@pytest.mark.parametrize("text", ["2:4", "50%", "4:8 pairs", "75%"])
@pytest.mark.parametrize("rows", ROWS_APART.values(), ids=ROWS_APART)
def test_rows_of_sizes_apart(rows, text):
    # Against the loop of the paper in fp64, which holds the squares of all of them; a row is right by its own size.
    k = 300
    w, sparsegpt = normal(len(rows), k, seed=2) * torch.tensor(rows)[:, None], pruner(correlated(3 * k, k), text)
    factor = sparsegpt.statistics.factor
    wanted, mask = paper_loop(w.double(), factor.upper.double(), Pattern.parse(text), block_of(sparsegpt.pattern, k))
    result = sparsegpt.prune(w)
    assert torch.equal(result.mask, mask)
    assert ((result.weight - wanted).abs() <= 1e-4 * wanted.abs().amax(1, keepdim=True)).all()
    lost = w.double() - result.weight.double()
    gram = sparsegpt.statistics.sum.double() / sparsegpt.statistics.tokens
    gram.diagonal().add_(result.damping * gram.diagonal().mean())
    assert result.loss == pytest.approx(float((lost @ gram * lost).sum()), rel=1e-3)


def test_blocks_of_rows_of_sizes_apart():
    # Blocks are chosen by sums of squares, here from 1e-60 to 1e40: the huge rows keep all, the tiny ones lose their least.
    w, x = normal(16, 64), correlated(200, 64)
    alone = pruner(x, "block:4x8@60%").prune(w[:12])
    w[:12] *= 2.0**-100
    w[12:] *= 2.0**66
    result = pruner(x, "block:4x8@45%").prune(w)
    assert result.mask[12:].all() and torch.equal(result.mask[:12], alone.mask)
    assert same_bits(result.weight[:12], alone.weight * 2.0**-100)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-70, 2.0**70, 2.0**100])
def test_output_errors_do_not_hang_on_the_scale_of_the_weight(scale):
    # The squares of such weights are 0 or Inf in fp32, and a ratio of those said that nothing was lost.
    gram, w = Gram(40), normal(6, 40)
    gram.update(correlated(100, 40))
    pruned = torch.where(w.abs() > 0.5, w, 0)
    (wanted,) = gram.output_errors(w, [pruned])
    assert 0.01 < wanted < 1 and gram.output_errors(w * scale, [pruned * scale]) == [wanted]
    assert gram.output_errors(0 * w, [0 * w]) == [0.0]


def test_a_device_is_waited_for_once_a_weight(monkeypatch):
    # The blocks' launches can run ahead of a GPU: none asks the host to look at what it found.
    checked = []
    for name in ("obs_block_", "mask_rows"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, check=True, **more: (checked.append(check), op(*args, **more))[1])
    for text in LEVELS:
        pruner(correlated(300, 400), text).prune(normal(8, 400))
    assert len(checked) > len(LEVELS) and not any(checked)


@pytest.mark.parametrize("k", [7, 300], ids=["one call of the inverse", "several"])
def test_several_factorised_together_have_the_bits_of_each_alone(k):
    # Of every kind: each rung of the ladder, the last in fp64, takes those that are left. One has none and says why.
    alike = Gram(k), Gram(k), Gram(k), Gram(k), Gram(k), Gram(k)
    dense, eye = correlated(2 * k, k), torch.eye(k)
    for gram, x in zip(alike, (dense, dense, torch.zeros(3, k), dense[:, :1].expand(-1, k) * 1e12, dense, dense * 1e-18)):
        gram.update(x)
    for gram, less in ((alike[1], 0.05), (alike[4], 0.5)):
        gram.sum -= less * gram.sum.diagonal().mean() * eye
    indefinite = Gram(k)
    indefinite.sum, indefinite.tokens = torch.full((k, k), -5.0).fill_diagonal_(1), 9
    broken = Gram(k)
    broken.update(torch.full((2, k), torch.nan))
    alone = []
    for gram in (*alike, indefinite, broken):
        alone.append(Gram(k))
        alone[-1].sum, alone[-1].tokens = gram.sum.clone(), gram.tokens
    factorise([*alike, indefinite, broken, alike[0]])
    assert [gram.factor.damping for gram in alike] == [0.01, 0.1, 0.01, 0.01, 1.0, 0.01]
    for gram, one in zip(alike, alone):
        assert "factor" in gram.__dict__
        assert same_bits(gram.factor.unit, one.factor.unit) and torch.equal(gram.factor.dead, one.factor.dead)
        assert (gram.factor.scale, gram.factor.damping) == (one.factor.scale, one.factor.damping)
    for gram, says in ((indefinite, "not positive definite with damping up to 1"), (broken, "its inputs hold NaN or Inf")):
        with pytest.raises(ValueError, match=says):
            _ = gram.factor
    factorise([])


def test_nan_in_a_weight_names_its_place():
    w = normal(6, 300)
    w[4, 290] = w[5, 3] = torch.inf
    with pytest.raises(ValueError, match="its weight holds NaN or Inf, the first in row 4, column 290"):
        pruner(correlated(20, 300)).prune(w)
