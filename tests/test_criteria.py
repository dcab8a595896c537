"""Criteria against their formulas in fp64, and every criterion with every pattern, group and dtype."""

import math
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from models import build, token_batches

from sparsekit import NM, PairNM, Pattern, SparsekitError, prune
from sparsekit.criteria import CRITERIA, OBS, Gram, SquaredGradients
from sparsekit.patterns import Block, Unstructured
from sparsekit.pruners import METHODS, method_named, scored
from sparsekit.pruners.sparsegpt import SparseGPT

N, K, TOKENS = 24, 20, 90


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(TOKENS, K, generator=generator) @ torch.randn(K, K, generator=generator)).to(dtype)


def hessian(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.double().T @ x.double() / len(x)


def damped(x: torch.Tensor) -> torch.Tensor:
    h = hessian(x)
    return h + Gram.DAMPING_LADDER[0] * h.diagonal().mean() * torch.eye(len(h))


FORMULAS = {
    "magnitude": lambda w, x: w.abs(),
    "gradient": lambda w, x: sum((g * w) ** 2 for g in gradients(x)),
    "activation": lambda w, x: w.abs() * x.abs().mean(0),
    "wanda": lambda w, x: w.abs() * x.norm(dim=0),
    "obd": lambda w, x: hessian(x).diagonal() * w**2 / 2,
    "obs": lambda w, x: w**2 / (2 * torch.linalg.inv(damped(x)).diagonal()),
}


def gradients(x: torch.Tensor) -> list[torch.Tensor]:
    """Of the three samples that the tokens x are taken for here; the third undoes the first."""
    first, second, _ = x.view(3, TOKENS // 3, K)[:, :N]
    return [first, second, -first]


def gathered(name: str, *batches: torch.Tensor):
    kind = CRITERIA[name].statistics
    statistics = kind and kind((N, K) if kind is SquaredGradients else K)
    for batch in gradients(torch.cat(batches)) if kind is SquaredGradients else batches if kind else ():
        statistics.update(batch)
    return statistics


def test_every_criterion_has_its_formula():
    assert set(CRITERIA) == set(FORMULAS) and set(METHODS) == {*CRITERIA, "sparsegpt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_scores_against_fp64(name, dtype):
    w, x = weight(dtype), inputs(dtype)
    scores = CRITERIA[name].scores(w, gathered(name, *x.view(3, 30, K).split(2)))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), FORMULAS[name](w.double(), x.double()), rtol=2e-5, atol=0)


@pytest.mark.parametrize("scale", [2.0**90, 2.0**-90], ids=["huge", "tiny"])
@pytest.mark.parametrize("name", CRITERIA)
def test_weights_whose_squares_fp32_does_not_hold_are_told_apart(name, scale):
    # They tied at Inf or at 0. All are of such a size, or some rows are; what is zero stays it.
    x = inputs()
    for rows in (slice(None), slice(5)):
        w = weight()
        w[1, 2] = 0
        w[rows] *= scale
        scores, wanted = CRITERIA[name].scores(w, gathered(name, x)), FORMULAS[name](w.double(), x.double())
        torch.testing.assert_close(scores.double(), wanted, rtol=2e-5, atol=0)
        for pattern in (NM(2, 4), PairNM(4, 8), Unstructured(0.5), Block(2, 2, 0.5)):
            assert torch.equal(pattern.mask(scores), pattern.mask(wanted)), pattern


@pytest.mark.parametrize("group", ["block", "model"])
def test_weights_whose_squares_fp32_does_not_hold_are_compared_with_others(group):
    # One matrix, of which the first row is smaller still and the last is larger: half of it goes, and the next one, which its
    # outputs reach as zeros. All other scores are fp32.
    model = build("llama")
    tiny, down = model.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        tiny *= 2.0**-90
        tiny[0] *= 2.0**-20
        tiny[-1] *= 2.0**8
    layers = model.model.layers if group == "model" else model.model.layers[1:2]
    count = sum(matrix.numel() for layer in layers for matrix in layer.parameters() if matrix.dim() > 1)
    if group == "block":
        model.model.layers = layers
    report = prune(model, token_batches((2, 16)), "obd", Unstructured((down.numel() + tiny.numel() // 2) / count), group=group)
    assert report.sparsity * count == pytest.approx(down.numel() + tiny.numel() // 2, abs=1)
    assert not down.any() and not tiny[0].any() and tiny[-1].all()
    assert int((tiny != 0).sum()) == pytest.approx(tiny.numel() // 2, abs=1)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"magnitude"}))
def test_a_huge_weight_of_a_dead_input_is_worth_nothing(name):
    # Its square is Inf in fp32, and Inf * 0 is NaN.
    x, w = inputs(), weight()
    x[:, 3], w[:, 3] = 0, 1e30
    assert (CRITERIA[name].scores(w, gathered(name, x))[:, 3] == 0).all()


def test_obs_is_what_removing_one_weight_costs():
    # Solved for: the least (w - q) H (w - q)' / 2 over all q with q_j = 0.
    w, x = weight().double(), inputs()
    h, scores = damped(x), OBS().scores(weight(), gathered("obs", x))
    for row, j in ((0, 0), (3, 7), (N - 1, K - 1)):
        rest = [i for i in range(K) if i != j]
        step = torch.zeros(K, dtype=torch.float64)
        step[j] = -w[row, j]
        step[rest] = torch.linalg.solve(h[rest][:, rest], h[rest, j] * w[row, j])
        assert scores[row, j].item() == pytest.approx((step @ h @ step / 2).item(), rel=1e-4)


def test_a_dead_input_is_worth_nothing_to_those_who_look_at_inputs():
    x = inputs()
    x[:, 3] = 0
    for name in set(CRITERIA) - {"magnitude"}:
        assert (CRITERIA[name].scores(weight(), gathered(name, x))[:, 3] == 0).all(), name


PATTERNS = [NM(2, 4), NM(1, 8), PairNM(4, 8), Unstructured(0.5), Unstructured(0.3), Block(4, 8, 0.5), Block(5, 3, 0.4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [None, "row", "layer"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_every_pattern_by_every_criterion_in_every_group(name, pattern, group, dtype):
    if group and isinstance(pattern, (NM, PairNM)):
        with pytest.raises(SparsekitError, match=f"{pattern} compares weights within its own groups, got group = '{group}'"):
            method_named(name, [pattern], group)
        return
    kind = method_named(name, [pattern], group)
    rowwise = (name == "wanda") if group is None else group == "row"
    assert kind.rowwise == rowwise
    pruner, w = kind(K, pattern), weight(dtype)
    pruner.observe(inputs(dtype))
    pruner.statistics = gathered(name, inputs(dtype)) if name == "gradient" else pruner.statistics
    result = pruner.prune(w)
    assert torch.equal(result.weight, torch.where(result.mask, w, 0)) and result.weight.dtype == dtype
    assert torch.equal(result.mask, pattern.mask(CRITERIA[name].scores(w, pruner.statistics), rowwise))
    assert pattern.check(result.weight, rowwise) is None
    if isinstance(pattern, Unstructured):
        line = result.mask if rowwise else result.mask.view(1, -1)
        wanted = math.floor(Fraction(str(pattern.share)) * line.shape[1])
        assert ((~line).sum(1) == wanted).all()
    assert (result.output_error is None) == (name != "obs") == (result.damping is None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["2:4", "4:8 pairs", "50%", "block:4x4@50%"])
def test_every_method_prunes_a_model_to_every_pattern(method, text):
    report = prune(build("llama"), token_batches((2, 16)), method, text)  # which verifies each linear
    assert report.method == method and report.group is None
    assert Pattern.parse(text).sparsity * 0.9 <= report.sparsity <= Pattern.parse(text).sparsity * 1.1


def test_a_group_can_be_asked_for():
    for group, rowwise in (("row", True), ("layer", False)):
        model = build("llama")
        assert prune(model, token_batches((2, 16)), "wanda", "50%", group=group).group == group
        zeros = (model.model.layers[0].mlp.up_proj.weight == 0).sum(1)
        assert ((zeros == zeros[0]).all().item()) == rowwise


def test_a_criterion_of_ones_own():
    class Lowest:
        name, statistics, rowwise = "lowest", None, False

        def scores(self, weight, statistics):
            return -weight.float().abs()

    model = build("llama")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    assert prune(model, method=Lowest(), pattern="1:4").method == "lowest"
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight != 0, NM(1, 4).mask(-before.abs()))


def test_a_criterion_without_a_hash():
    @dataclass
    class Power:
        p: float
        name, statistics, rowwise = "power", None, False

        def scores(self, weight, statistics):
            return weight.float().abs() ** self.p

    assert prune(build("llama"), method=Power(2.0), pattern="50%", group="model").sparsity == pytest.approx(0.5, abs=1e-4)


# What torch would broadcast, what it would compare as it is, what is no tensor.
@pytest.mark.parametrize(
    "scores, gave", [(lambda w: w[0].abs(), r"\(\d+,\) of"), (lambda w: w > 0, "bool"), (lambda w: None, "No")]
)
@pytest.mark.parametrize("group", [None, "model"])
def test_scores_that_are_none(scores, gave, group):
    own = SimpleNamespace(name="own", statistics=None, rowwise=False, scores=lambda weight, _: scores(weight))
    with pytest.raises(SparsekitError, match=rf"q_proj cannot be pruned: own must give .* a float, and gave .*{gave}"):
        prune(build("llama"), method=own, pattern="50%", group=group)


@pytest.mark.parametrize("method", [type(CRITERIA["wanda"]), None, 5, SimpleNamespace(name="half", scores=abs)])
def test_what_is_no_criterion(method):
    with pytest.raises(SparsekitError, match="must be an object with name, statistics, rowwise and scores, got"):
        prune(build("llama"), method=method)


def test_refused():
    for name in ("gptq", ""):
        with pytest.raises(SparsekitError, match=f"gradient, magnitude, obd, obs, sparsegpt or wanda, got {name!r}"):
            method_named(name)
    with pytest.raises(SparsekitError, match="the group must be row, layer, block or model, got 'head'"):
        method_named("wanda", [Unstructured(0.5)], "head")
    with pytest.raises(SparsekitError, match="sparsegpt counts a pattern in blocks of columns, got group = 'row'"):
        method_named("sparsegpt", [Unstructured(0.5)], "row")
    assert method_named("sparsegpt") is SparseGPT and method_named("wanda") is scored(CRITERIA["wanda"])
