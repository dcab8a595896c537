"""The pruners against their definitions, worked out in fp64 without the factor, the blocks and the batching of the package."""

import math
from fractions import Fraction

import pytest
import torch

from sparsekit import NM, PairNM, Pattern, SparsekitError, Unstructured
from sparsekit.criteria import Gram, SquaredGradients, SquaredNorm
from sparsekit.pruners import METHODS, Magnitude, Pruner, SparseGPT, Wanda, by_gradient, method_named

NM24 = NM(2, 4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, k: int, seed: int = 0) -> torch.Tensor:
    """Inputs as a network makes them: neighbours alike, and of very different size."""
    return (
        normal(tokens, k, seed=seed)
        @ (torch.eye(k) + 0.7 * normal(k, k, seed=seed + 1) / math.sqrt(k) + 0.5)
        * torch.logspace(-0.7, 0.7, k).roll(k // 3)
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def sparsegpt(weight: torch.Tensor, x: torch.Tensor, pattern: Pattern):
    pruner = SparseGPT(weight.shape[1], pattern)
    pruner.observe(x)
    return pruner.prune(weight)


def shown(kind: type[Pruner], pattern: Pattern, x: torch.Tensor, rows: int) -> Pruner:
    """A pruner of a weight (rows, k) that knows what it needs: the inputs x (tokens, k), or some gradients."""
    pruner = kind(x.shape[1], pattern)
    pruner.observe(x)
    if by_gradient(kind):
        pruner.statistics = SquaredGradients((rows, x.shape[1]))
        pruner.statistics.update(normal(rows, x.shape[1], seed=9))
    return pruner


# ---- the truth ----


def hessian(x: torch.Tensor, damping: float) -> torch.Tensor:
    """2 X'X / tokens in fp64; an input that never fired counts as much as the mean of the others; then the damping."""
    h = 2 * x.double().T @ x.double() / len(x)
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h[dead, dead] = mean
    return h + damping * mean * torch.eye(len(h))


def obs(w: torch.Tensor, h: torch.Tensor, pattern: Pattern, block: int):
    """SparseGPT as its paper tells it: at each column the inverse Hessian of the columns from there on, inverted anew; a weight
    costs w_j^2 / [H^-1]_jj; removing it moves the columns from there on by -w_j / [H^-1]_jj [H^-1]_j.

    Returns weights, mask, and the smallest relative gap between a kept score and a lower one that went."""
    w, (n, k), gap = w.double().clone(), w.shape, math.inf
    kept = torch.ones(n, k, dtype=torch.bool)
    inverse = [torch.linalg.inv(h[j:, j:]) for j in range(k)]

    def choose(places: list[tuple[int, int]], remove: int, width: int = 1) -> None:
        """Removes the cheapest of the places, or of the runs of `width` places that are kept or removed whole."""
        nonlocal gap
        runs = [tuple(places[i : i + width]) for i in range(0, len(places), width)]
        cost = {run: sum(float(w[r, c] ** 2 / inverse[c][0, 0]) for r, c in run) for run in runs}
        order = sorted(runs, key=lambda p: (-cost[p], p))
        for run in order[len(order) - remove :]:
            for place in run:
                kept[place] = False
        if 0 < remove < len(order):
            low, high = cost[order[len(order) - remove]], cost[order[len(order) - remove - 1]]
            gap = min(gap, (high - low) / high)

    for j in range(k):
        if isinstance(pattern, (NM, PairNM)):
            columns, width = range(j, min(j + pattern.m, k)) if j % pattern.m == 0 else range(0), 1 + isinstance(pattern, PairNM)
            for r in range(n if columns else 0):
                choose([(r, c) for c in columns], max(-(-len(columns) // width) - pattern.n // width, 0), width)
        elif j % block == 0:
            columns = range(j, min(j + block, k))
            share = Fraction(str(pattern).rstrip("%")) / 100
            choose([(r, c) for r in range(n) for c in columns], int(share * n * columns.stop // 1 - share * n * j // 1))
        gone = ~kept[:, j]
        w[:, j:] -= (w[:, j] * gone / inverse[j][0, 0])[:, None] * inverse[j][0]
        w[gone, j] = 0
    return w, kept, gap


def block_of(pattern: Pattern, k: int) -> int:
    """Columns until the mask of a share of k columns is chosen anew: 16 times at least, but 8 columns or more, 128 at most."""
    return min(128, max(k // 16, 8)) if isinstance(pattern, Unstructured) else 128


def assert_like_obs(w: torch.Tensor, x: torch.Tensor, pattern: Pattern, block: int | None = None):
    result, block = sparsegpt(w, x, pattern), block or block_of(pattern, w.shape[1])
    h = hessian(x, result.damping)
    wanted, mask, gap = obs(torch.where((x == 0).all(0), 0, w), h, pattern, block)
    assert gap > 1e-4, "two scores of the test's own problem are too close to tell apart in fp32"
    assert torch.equal(result.mask, mask)
    assert ((result.weight - wanted).abs() <= 1e-4 * wanted.abs().max()).all()
    assert result.damping == Gram.DAMPING_LADDER[0]


PATTERNS = [Pattern.parse(text) for text in ("2:4", "4:8", "1:4", "2:3", "3:7", "4:8 pairs", "50%", "33.3%")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("k", [1, 4, 8, 10, 13, 16])
@pytest.mark.parametrize("seed", [0, 10])
def test_sparsegpt_is_exact_obs(k, seed, pattern):
    assert_like_obs(normal(6, k, seed=seed + 5), correlated(64, k, seed), pattern)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if str(p) in ("2:4", "4:8", "3:7", "4:8 pairs", "50%")], ids=str)
def test_sparsegpt_is_exact_obs_over_many_blocks(pattern, monkeypatch):
    monkeypatch.setattr(SparseGPT, "BLOCK", 4)  # 4:8 and 3:7 make it one group
    assert_like_obs(normal(6, 16, seed=5), correlated(64, 16), pattern, block=4)


@pytest.mark.parametrize("pattern", [NM24, NM(3, 7), Unstructured(0.5)], ids=str)
def test_sparsegpt_is_exact_obs_past_a_block_of_128(pattern):
    assert_like_obs(normal(2, 150, seed=3), correlated(600, 150), pattern)


@pytest.mark.parametrize("k", [16, 150, 2047, 2048, 4100])
def test_a_share_is_chosen_from_sixteen_times_or_as_the_paper_does(k):
    # Each block of columns loses half: the narrowest, one between, the last before the paper's 128, that, and a ragged end.
    mask, width = sparsegpt(normal(3, k, seed=1), normal(20, k), Unstructured(0.5)).mask, block_of(Unstructured(0.5), k)
    ends = [*range(width, k, width), k]
    assert [int((~mask[:, :end]).sum()) for end in ends] == [3 * end // 2 for end in ends]
    assert width == {16: 8, 150: 9, 2047: 127}.get(k, 128)


@pytest.mark.parametrize("pattern", [NM24, Unstructured(0.5)], ids=str)
def test_sparsegpt_is_exact_obs_with_dead_inputs(pattern):
    x = correlated(64, 16)
    x[:, [2, 3, 9]] = 0
    assert_like_obs(normal(6, 16, seed=5), x, pattern)


def test_one_removal_is_made_up_for_in_the_best_way():
    # 3:4 of four columns removes one weight a row. No other values of the columns after it make a smaller error.
    w, x = normal(40, 4, seed=1), correlated(64, 4)
    result = sparsegpt(w, x, NM(3, 4))
    h = hessian(x, result.damping)
    for before, after, mask in zip(w.double(), result.weight.double(), result.mask):
        gone = int((~mask).nonzero())
        assert torch.equal(after[:gone], before[:gone])
        # minimise d' H d over d, with d = -w at the removed column and free after it
        best = -torch.linalg.solve(h[gone + 1 :, gone + 1 :], h[gone + 1 :, gone]) * -before[gone]
        assert torch.allclose(after[gone + 1 :], before[gone + 1 :] + best, rtol=1e-4, atol=1e-5)
    assert len({int((~mask).nonzero()) for mask in result.mask}) >= 3  # the case is not always the same


@pytest.mark.parametrize("pattern", [NM24, NM(4, 8), NM(1, 4), NM(3, 7), PairNM(4, 8)], ids=str)
def test_the_block_size_does_not_change_nm(pattern, monkeypatch):
    w, x = normal(16, 200, seed=2), correlated(800, 200)
    whole = sparsegpt(w, x, pattern)
    monkeypatch.setattr(SparseGPT, "BLOCK", 16)
    pieces = sparsegpt(w, x, pattern)
    assert torch.equal(pieces.mask, whole.mask) and torch.allclose(pieces.weight, whole.weight, rtol=1e-3, atol=1e-4)


# ---- what it is for ----


def output_error(w: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    x, w = x.double(), w.double()
    return float((x @ (w - pruned.double()).T).square().sum() / (x @ w.T).square().sum())


@pytest.mark.parametrize("pattern", [NM24, NM(4, 8), PairNM(4, 8), Unstructured(0.5)], ids=str)
def test_the_update_is_alive(pattern):
    w, x = normal(64, 192, seed=1), correlated(2000, 192)
    result = sparsegpt(w, x, pattern)
    assert output_error(w, result.weight, x) < 0.75 * output_error(w, torch.where(result.mask, w, 0), x)
    assert result.output_error == pytest.approx(output_error(w, result.weight, x), rel=1e-3)


def test_sparsegpt_beats_wanda_beats_magnitude_where_inputs_differ_in_size():
    w, x, errors = normal(64, 192, seed=1), correlated(2000, 192), []
    for kind in (SparseGPT, Wanda, Magnitude):
        pruner = kind(192, NM24)
        pruner.observe(x)
        errors.append(output_error(w, pruner.prune(w).weight, x))
    assert errors[0] < 0.75 * errors[1] and errors[1] < 0.9 * errors[2]


def test_a_duplicate_takes_over():
    # Columns 2i and 2i + 1 see the same input: what leaves the first is added to the second, and nothing is lost.
    x = normal(500, 32).repeat_interleave(2, dim=1)
    w = normal(24, 64, seed=1)
    result = sparsegpt(w, x, NM(1, 2))
    assert result.mask[:, 1::2].float().mean() > 0.9
    assert 0 <= result.output_error < 0.02 < output_error(w, torch.where(result.mask, w, 0), x)


# ---- exact counts ----


@pytest.mark.parametrize(
    "text", ["2:4", "4:8", "1:4", "2:3", "3:7", "16:32", "100:200", "0:4", "4:4", "50%", "33.3%", "0%", "100%", "99%"]
)
@pytest.mark.parametrize("k", [10, 130, 131, 300])
@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_exact_counts(kind, k, text):
    pattern, w = Pattern.parse(text), normal(9, k, seed=1)
    result = shown(kind, pattern, correlated(2 * k, k), 9).prune(w)
    assert result.mask.dtype == torch.bool and result.weight.shape == result.mask.shape == w.shape
    assert torch.equal(result.weight != 0, result.mask)  # no weight of the test is zero by itself
    assert not torch.signbit(result.weight[~result.mask]).any()
    if isinstance(pattern, NM):
        for begin in range(0, k, pattern.m):
            width = min(pattern.m, k - begin)
            assert (result.mask[:, begin : begin + width].sum(1) == min(pattern.n, width)).all()
    else:
        line = result.mask if kind.rowwise else result.mask.view(1, -1)
        assert ((~line).sum(1) == math.floor(Fraction(text.rstrip("%")) / 100 * line.shape[1])).all()
    assert pattern.check(result.weight, rowwise=kind.rowwise) is None
    if text in ("4:4", "0%"):
        assert same_bits(result.weight, w)


@pytest.mark.parametrize("text", ["50%", "33.3%", "1%"])
def test_unstructured_sparsegpt_keeps_its_share_after_every_block(text):
    mask = sparsegpt(normal(7, 300, seed=1), correlated(600, 300), Pattern.parse(text)).mask
    for end in (*range(18, 300, 18), 300):  # 300 // 16
        assert (~mask[:, :end]).sum() == math.floor(Fraction(text.rstrip("%")) / 100 * 7 * end)


# ---- inputs that are hard ----


def hard_inputs():
    x = correlated(200, 40)
    dead = x.clone()
    dead[:, [0, 5, 39]] = 0
    yield "dead inputs", dead
    yield "no input fires", torch.zeros(200, 40)
    yield "one direction", normal(200, 1) @ normal(1, 40, seed=1)
    yield "fewer tokens than columns", x[:3]
    yield "one token", x[:1]
    yield "every column alike", normal(200, 1).expand(200, 40)
    yield "columns in pairs", x[:, :20].repeat_interleave(2, dim=1)
    yield "huge", x * 1e8
    yield "tiny", x * 1e-12
    yield "huge and tiny", x * torch.logspace(-12, 8, 40)
    yield "one column alone", x * (torch.arange(40) == 17)
    yield "large mean", x + 1e4


HARD = pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in hard_inputs()])


@HARD
@pytest.mark.parametrize("pattern", [NM24, NM(3, 7), Unstructured(0.5)], ids=str)
def test_hard_inputs(x, pattern):
    w = normal(12, 40, seed=1)
    result = sparsegpt(w, x, pattern)
    assert torch.isfinite(result.weight).all() and result.damping in Gram.DAMPING_LADDER
    assert pattern.check(result.weight) is None
    assert pattern is not NM24 or (result.mask.view(12, 10, 4).sum(-1) == 2).all()
    assert (result.weight[:, (x == 0).all(0)] == 0).all() and (result.weight[~result.mask] == 0).all()
    assert 0 <= result.output_error <= 1  # removing everything gives 1
    # A weight that stays where nothing is removed to its left stays as it was.
    first = result.mask[:, 0] & (x[:, 0] != 0).any()
    assert torch.equal(result.weight[first, 0], w[first, 0])


@pytest.mark.parametrize("scale", [2.0**26, 2.0**-40], ids=["6.7e7", "9e-13"])
@pytest.mark.parametrize("pattern", [NM24, Unstructured(0.5)], ids=str)
def test_the_scale_of_the_inputs_changes_no_bit(pattern, scale):
    w, x = normal(12, 200, seed=1), correlated(400, 200)
    plain, scaled = sparsegpt(w, x, pattern), sparsegpt(w, x * scale, pattern)
    assert same_bits(plain.weight, scaled.weight) and torch.equal(plain.mask, scaled.mask) and plain.damping == scaled.damping


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("kind", [SparseGPT, Wanda], ids=["sparsegpt", "wanda"])
def test_inputs_that_are_not_finite(kind, bad):
    x, pruner = normal(20, 8), kind(8, NM24)
    x[3, 5] = bad
    pruner.observe(x)
    with pytest.raises(ValueError, match="its inputs hold NaN or Inf"):
        pruner.prune(normal(4, 8))


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_weights_with_nan(kind):
    pruner, w = shown(kind, NM24, normal(20, 8), 4), normal(4, 8)
    w[2, 6] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        pruner.prune(w)


@pytest.mark.parametrize("kind", [SparseGPT, Wanda], ids=["sparsegpt", "wanda"])
def test_no_inputs(kind):
    pruner = kind(8, NM24)
    with pytest.raises(ValueError, match="needs the linear's inputs, and observed none"):
        pruner.prune(normal(4, 8))
    pruner.observe(torch.zeros(0, 8))
    with pytest.raises(ValueError, match="observed none"):
        pruner.prune(normal(4, 8))


# ---- what comes back ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [NM24, Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_arithmetic_is_fp32_and_the_dtype_comes_back(kind, pattern, dtype):
    w = normal(8, 150, seed=1).to(dtype)
    pruner = shown(kind, pattern, correlated(300, 150), 8)
    result = pruner.prune(w)
    assert same_bits(result.weight, pruner.prune(w.float()).weight.to(dtype))
    assert result.weight.is_contiguous() and result.mask.is_contiguous()


@pytest.mark.parametrize("shape, transposed", [((8, 12), False), ((8, 12), True), ((1, 12), False), ((8, 1), False)], ids=str)
@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_the_argument_is_left_alone(kind, shape, transposed):
    # Transposed is how GPT-2 holds a weight: a transpose of that, in fp32, is the very memory of the model.
    w = normal(*shape, seed=1)
    w = w.T.contiguous().T if transposed else w
    before, x = w.clone(memory_format=torch.contiguous_format), correlated(50, shape[1])
    x[:, 0] = 0
    pruner = shown(kind, NM(1, 4), x, shape[0])
    result = pruner.prune(w)
    assert torch.equal(w, before)
    assert same_bits(result.weight, pruner.prune(before).weight)
    if kind is SparseGPT and shape[1] > 1:
        assert result.output_error == pytest.approx(output_error(before, result.weight, x), rel=1e-3) and result.output_error > 0.01


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_two_runs_agree_bit_for_bit(kind):
    results = []
    for _ in range(2):
        first, *others = correlated(600, 200).split(150)
        pruner = shown(kind, NM24, first, 64)
        for batch in others:
            pruner.observe(batch)
        results.append(pruner.prune(normal(64, 200, seed=1)))
    assert same_bits(results[0].weight, results[1].weight) and torch.equal(results[0].mask, results[1].mask)
    assert results[0].output_error == results[1].output_error


@pytest.mark.parametrize("kind", [SparseGPT, Wanda], ids=["sparsegpt", "wanda"])
def test_statistics_can_be_shared(kind):
    one, other, w = kind(40, NM24), kind(40, NM24), normal(8, 40, seed=1)
    one.observe(correlated(90, 40))
    other.statistics = one.statistics
    assert same_bits(one.prune(w).weight, other.prune(w).weight)


def test_methods_by_name():
    assert [method_named(name) for name in ("magnitude", "wanda", "sparsegpt")] == [Magnitude, Wanda, SparseGPT]
    for name in ("Wanda", "", "random"):
        with pytest.raises(
            SparsekitError, match=f"must be activation, gradient, magnitude, obd, obs, sparsegpt or wanda, got {name!r}"
        ):
            method_named(name)


# ---- statistics ----


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_streaming_is_exact(kind, dtype):
    # Integers up to 200, whose squares no fp16 holds: each sum is exact in fp32, so pieces and whole agree bit for bit.
    x = torch.randint(-200, 201, (60, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 256  # 65536 is past the largest fp16
    gram = x.double().T @ x.double()
    pieces = [(x,), x.split(7), (x.view(4, 15, 12),), (*x.view(2, 2, 15, 12),), tuple(x), (x.T.contiguous().T, x[:0])]
    for batches in pieces:
        statistics = kind(12)
        for batch in batches:
            statistics.update(batch)
        assert statistics.tokens == 60 and statistics.sum.dtype == torch.float32
        assert torch.equal(statistics.sum.double(), gram if kind is Gram else gram.diagonal())


@HARD
def test_the_factor(x):
    gram = Gram(40)
    gram.update(x)
    factor = gram.factor
    assert torch.equal(factor.upper, factor.upper.triu()) and (factor.upper.diagonal() > 0).all()
    assert torch.equal(factor.dead, (x.float().square().sum(0) == 0))
    # Of the matrix that was summed in fp32: U H U' = I, the form in which inputs of every size weigh the same.
    h = gram.sum.double() * 2 / len(x)
    mean = h.diagonal()[~factor.dead].mean() if not factor.dead.all() else torch.ones((), dtype=torch.double)
    h[factor.dead, factor.dead] = mean
    h += factor.damping * mean * torch.eye(40)
    upper = factor.upper.double()
    assert torch.allclose(upper @ h @ upper.T, torch.eye(40, dtype=torch.double), atol=1e-3)
    assert torch.allclose(upper.T @ upper @ h, torch.eye(40, dtype=torch.double), atol=1e-3)


def test_the_factor_to_full_precision():
    x, gram = correlated(500, 64), Gram(64)
    gram.update(x)
    upper = gram.factor.upper.double()
    inverse = torch.linalg.inv(hessian(x, 0.01))
    assert gram.factor.damping == 0.01
    assert ((upper.T @ upper - inverse).abs() <= 1e-4 * inverse.abs().max()).all()
    assert torch.allclose(upper, torch.linalg.cholesky(inverse, upper=True), rtol=1e-3, atol=1e-4 * float(upper.abs().max()))


def test_the_factor_follows_new_tokens():
    gram = Gram(8)
    gram.update(normal(20, 8))
    before = gram.factor
    assert gram.factor is before
    gram.update(normal(20, 8, seed=1))
    whole = Gram(8)
    whole.update(torch.cat((normal(20, 8), normal(20, 8, seed=1))))
    assert torch.allclose(gram.factor.upper, whole.factor.upper, rtol=1e-4) and gram.factor is not before


@pytest.mark.parametrize("off, damping", [(0.5, 0.01), (1.005, 0.01), (1.05, 0.1), (1.5, 1.0), (1.99, 1.0)])
def test_the_ladder_of_damping(off, damping):
    # [[1, off], [off, 1]] has the eigenvalue 1 - off: the first rung above off - 1 is the one to use.
    gram = Gram(2)
    gram.sum, gram.tokens = 3.0 * torch.tensor([[1, off], [off, 1]]), 7
    factor = gram.factor
    assert factor.damping == damping
    h = gram.sum.double() * 2 / 7
    h += damping * h.diagonal().mean() * torch.eye(2)
    assert torch.allclose(factor.upper.double().T @ factor.upper.double() @ h, torch.eye(2, dtype=torch.double), atol=1e-3)


def test_above_the_ladder():
    gram = Gram(2)
    gram.sum, gram.tokens = torch.tensor([[1, 2.5], [2.5, 1]]), 4
    with pytest.raises(ValueError, match="not positive definite with damping up to 1 of the mean diagonal"):
        _ = gram.factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_error(dtype):
    w, x, gram = normal(8, 20, seed=1).to(dtype), correlated(60, 20), Gram(20)
    gram.update(x)
    for pruned in (w * (normal(8, 20, seed=2) > 0), w * 0, w * 2):
        assert gram.output_error(w, pruned) == pytest.approx(output_error(w, pruned, x), rel=1e-4)
    assert gram.output_error(w, w) == 0 and gram.output_error(w * 0, w * 0) == 0


def test_output_error_is_never_negative():
    # Inputs of one direction, and a change of the weight that they do not see: the exact answer is next to nothing.
    for seed in range(20):
        gram, w, d = Gram(32), normal(4, 32, seed=seed), normal(1, 32, seed=seed + 100)
        gram.update(normal(500, 1, seed=seed + 200) @ d)
        unseen = normal(4, 32, seed=seed + 300)
        unseen -= unseen @ d.T / d.square().sum() * d
        assert 0 <= gram.output_error(w, w - unseen) < 1e-5


# ---- magnitude and Wanda by hand ----


def test_magnitude_by_hand():
    w = torch.tensor([[1.0, -4, 3, 2], [-0.5, 0, 0.25, 6]])
    result = Magnitude(4, NM24).prune(w)
    assert result.weight.tolist() == [[0, -4, 3, 0], [-0.5, 0, 0, 6]]
    assert result.mask.tolist() == [[False, True, True, False], [True, False, False, True]]
    assert result.output_error is None and result.damping is None
    whole = Magnitude(4, Unstructured(0.5)).prune(w)  # compared over the whole weight
    assert whole.weight.tolist() == [[0, -4, 3, 2], [0, 0, 0, 6]]


def test_magnitude_of_equal_weights_keeps_the_lower_columns():
    w = torch.tensor([[2.0, -2, 2, -2, 1, 2, -2, 2]])
    assert Magnitude(8, NM24).prune(w).mask.tolist() == [[True, True, False, False, False, True, True, False]]
    assert Magnitude(8, Unstructured(0.5)).prune(w).mask.tolist() == [[True, True, True, True, False, False, False, False]]


def test_wanda_by_hand():
    # Norms of the inputs: 5, 1, 2, 0.
    x = torch.tensor([[3.0, 0, 2, 0], [-4, 1, 0, 0]])
    w = torch.tensor([[1.0, -6, 2.75, 9], [0.1, 0.2, -0.4, 7], [-100, 200, 300, 1]])
    # |w| * norm: 5, 6, 5.5, 0 | 0.5, 0.2, 0.8, 0 | 500, 200, 600, 0
    want = [[0, -6, 2.75, 0], [0.1, 0, -0.4, 0], [-100, 0, 300, 0]]
    for pattern in (NM24, Unstructured(0.5)):  # half of every row, however small the row
        pruner = Wanda(4, pattern)
        for token in x:
            pruner.observe(token)
        result = pruner.prune(w)
        assert torch.equal(result.weight, torch.tensor(want)) and torch.equal(result.mask, result.weight != 0)
        assert result.output_error is None and result.damping is None


def test_wanda_of_equal_scores_keeps_the_lower_columns():
    pruner = Wanda(8, Unstructured(0.5))
    pruner.observe(torch.tensor([[1.0, 2, 4, 8, 0, 0, 1, 1]]))
    w = torch.tensor([[8.0, 4, -2, 1, 5, 5, 8, -8], [1, 1, 1, 1, 1, 1, 1, 1]])
    # 8 8 8 8 0 0 8 8 | 1 2 4 8 0 0 1 1
    assert pruner.prune(w).mask.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
