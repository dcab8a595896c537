"""Every criterion with every pattern, group and dtype, on whole models and on large weights: exact counts, and the lowest go.

The truth is each criterion's formula in fp64, from inputs and gradients that are gathered here by hand."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from models import build, token_batches
from test_criteria import FORMULAS

from sparsekit import Pattern, SparsekitError, magnitude_prune, prune, wanda_prune
from sparsekit.criteria import CRITERIA
from sparsekit.patterns import GROUPS, Block, Unstructured, keep_top_of_all
from sparsekit.pipeline.blocks import find_blocks, find_targets

BATCHES = token_batches((2, 40), (1, 17))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def targets_of(model):
    names = {module: name for name, module in model.named_modules()}
    return find_targets(find_blocks(model), names, ())


def units(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(lines, units in a line) in fp64, blocks added up one by one."""
    if isinstance(pattern, Unstructured):
        return scores.double()
    rows, columns = range(0, scores.shape[0], pattern.rows), range(0, scores.shape[1], pattern.cols)
    return torch.stack(
        [torch.stack([scores[i : i + pattern.rows, j : j + pattern.cols].double().sum() for j in columns]) for i in rows]
    )


def groups(per_linear: list[list[torch.Tensor]], group: str) -> list[torch.Tensor]:
    """What is compared with one another, of units (lines, units in a line) by block and linear."""
    if group == "row":
        return [line for block in per_linear for linear in block for line in linear]
    if group == "layer":
        return [linear.flatten() for block in per_linear for linear in block]
    blocks = [torch.cat([linear.flatten() for linear in block]) for block in per_linear]
    return blocks if group == "block" else [torch.cat(blocks)]


def removed(pattern: Pattern, count: int) -> int:
    return math.floor(Fraction(str(pattern.share)) * count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", CRITERIA)
def test_counts_are_exact_in_every_group(name, group, dtype):
    # Blocks of 3 x 5 divide no weight here; 37.5% of a row's 44 columns is no whole number.
    for pattern in (Unstructured(0.375), Block(3, 5, 0.4)):
        model = build("llama", dtype, num_hidden_layers=2)
        report = prune(model, BATCHES, name, pattern, group=group)
        assert report.group == group
        gone = [[units((target.weight == 0).int(), pattern) for target in block] for block in targets_of(model)]
        if isinstance(pattern, Block):  # a block is gone where all of it is
            sizes = [[units(torch.ones_like(target.weight), pattern) for target in block] for block in targets_of(model)]
            gone = [[have == size for have, size in zip(*both)] for both in zip(gone, sizes)]
        for line in groups([[linear.double() for linear in block] for block in gone], group):
            assert line.sum() == removed(pattern, len(line))
        assert all(row.pattern == str(pattern) for row in report.linears)
        for row, target in zip(report.linears, (target for block in targets_of(model) for target in block)):
            assert row.sparsity == pytest.approx((target.weight == 0).double().mean().item())


@torch.no_grad()
def inputs(model, targets) -> dict[str, torch.Tensor]:
    """What each linear receives, (tokens, k) fp64."""
    seen = {target.name: [] for target in targets}
    hooks = []
    for target in targets:
        look = lambda _, x, name=target.name: seen[name].append(x[0].flatten(0, -2).double())  # noqa: E731
        hooks.append(target.module.register_forward_pre_hook(look))
    for ids in BATCHES:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def by_gradients(model) -> list[list[torch.Tensor]]:
    """The sum over sequences of (g w)^2, in fp64 from autograd's gradients."""
    matrices = targets_of(model)
    weights = [target.module.weight for block in matrices for target in block]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for ids in (row[None] for batch in BATCHES for row in batch):
        loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        for total, weight, gradient in zip(sums, weights, torch.autograd.grad(loss, weights)):
            total += (gradient.double() * weight.detach().double()) ** 2
    found = iter(sums)
    return [[next(found) for _ in block] for block in matrices]


def truth(name: str, group: str, pruned) -> list[list[torch.Tensor]]:
    """The scores of every linear, by block: of the model as it was where that decides, else of each block behind pruned ones."""
    model, scores = build("llama", num_hidden_layers=2), []
    if name == "gradient":
        return by_gradients(model)
    for block, after in zip(targets_of(model), targets_of(pruned)):
        seen = inputs(model, block)
        scores.append([FORMULAS[name](target.weight.double(), seen[target.name]) for target in block])
        if group != "model":
            for target, other in zip(block, after):
                target.weight.copy_(other.weight)
    return scores


@pytest.mark.parametrize("pattern", [Unstructured(0.4), Block(4, 8, 0.5)], ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", CRITERIA)
def test_the_lowest_of_each_group_go(name, group, pattern):
    model = build("llama", num_hidden_layers=2)
    prune(model, BATCHES, name, pattern, group=group)
    scores = [[units(linear, pattern) for linear in block] for block in truth(name, group, model)]
    kept = [[units((target.weight != 0).double(), pattern) > 0 for target in block] for block in targets_of(model)]
    for line, mask in zip(groups(scores, group), groups(kept, group)):
        assert (~mask).sum() == removed(pattern, len(line))
        assert line[~mask].max() <= line[mask].min() * (1 + 1e-3)  # fp32 sums on the one side


# Blocks of 4 x 4 divide every weight here: none scores less for being cut off.
@pytest.mark.parametrize("pattern", [Unstructured(0.3), Block(4, 4, 0.3)], ids=str)
@pytest.mark.parametrize("group", ["block", "model"])
def test_of_equals_the_first_are_kept(group, pattern):
    model = build("llama", num_hidden_layers=2)
    for block in targets_of(model):
        for target in block:
            target.weight.fill_(-1.5)
    prune(model, method="magnitude", pattern=pattern, group=group)
    kept = [[units((target.weight != 0).double(), pattern) > 0 for target in block] for block in targets_of(model)]
    for line in groups(kept, group):
        expected = torch.arange(len(line)) < len(line) - removed(pattern, len(line))
        assert torch.equal(line, expected)


# Above the 2^24 elements at which torch.quantile and fp16 counts end; 4100 columns are no multiple of a vector's width.
LARGE = (4096, 4100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_weight_of_more_than_16_million(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(LARGE, generator=generator).to(dtype)
    weight[weight == 0] = 1e-3
    x = torch.randn(64, LARGE[1], generator=generator).to(dtype)
    share = Unstructured(0.5001)
    pruned = wanda_prune(weight, x, share)
    assert ((pruned == 0).sum(1) == removed(share, LARGE[1])).all()
    row = weight[0].double().abs() * x.double().norm(dim=0)
    assert row[pruned[0] == 0].max() <= row[pruned[0] != 0].min() * (1 + 1e-5)
    pruned = magnitude_prune(weight, share)
    assert (pruned == 0).sum() == removed(share, weight.numel())
    assert weight[pruned == 0].abs().max() <= weight[pruned != 0].abs().min()


def test_several_weights_of_more_than_16_million_together():
    generator = torch.Generator().manual_seed(0)
    lines = [torch.randn(2100, 4100, generator=generator) for _ in range(2)]
    kept = int(0.3 * 2 * lines[0].numel()) + 1
    masks = list(keep_top_of_all(lines, kept))
    assert sum(int(mask.sum()) for mask in masks) == kept
    lowest = min(line[mask].min() for line, mask in zip(lines, masks))
    assert lowest >= max(line[~mask].max() for line, mask in zip(lines, masks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_highest_of_several_lines_against_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        sizes = torch.randint(0, 6, (3,), generator=generator).tolist()
        lines = [torch.randint(-3, 4, (size, 2), generator=generator).to(dtype) * 1e-3 for size in sizes]  # mostly ties
        if trial % 3 == 0:
            lines = [torch.randn(size, 2, generator=generator).to(dtype) for size in sizes]
        if trial % 4 == 0 and sizes[0]:
            lines[0][0] = torch.tensor([-0.0, -math.inf])  # equals 0.0; below everything
        flat = torch.cat([line.flatten() for line in lines]).double()
        for kept in {0, len(flat) // 3, len(flat) // 2, len(flat)}:
            expected = torch.zeros(len(flat), dtype=torch.bool)
            expected[torch.sort(flat, descending=True, stable=True).indices[:kept]] = True
            assert torch.equal(torch.cat([mask.flatten() for mask in keep_top_of_all(lines, kept)]), expected)
    with pytest.raises(ValueError, match="NaN"):
        list(keep_top_of_all([torch.tensor([1.0, math.nan], dtype=dtype)], 1))
    beyond = torch.tensor([1e199, 1e201, 1e200, 0.0, 1e-200], dtype=torch.float64)  # what fp32 does not hold is fp64
    assert [mask.int().tolist() for mask in keep_top_of_all([torch.ones(2, dtype=dtype), beyond], 2)] == [[0, 0], [0, 1, 1, 0, 0]]
    assert [mask.int().tolist() for mask in keep_top_of_all([torch.ones(2, dtype=dtype), beyond], 6)] == [[1, 1], [1, 1, 1, 0, 1]]
    with pytest.raises(ValueError, match="must be 3 scores to keep, got 2"):
        list(keep_top_of_all([torch.ones(2, dtype=dtype)], 3))


@pytest.mark.parametrize("group", ["row", "block", "model"])
def test_what_a_group_cannot_be_asked_of(group):
    model = build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for method, pattern, says in (
        ("wanda", "2:4", f"2:4 compares weights within its own groups, got group = '{group}'"),
        ("sparsegpt", "50%", f"sparsegpt counts a pattern in blocks of columns, got group = '{group}'"),
    ):
        with pytest.raises(SparsekitError, match=says):
            prune(model, BATCHES, method, pattern, group=group)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("group", ["block", "model"])
def test_an_expert_that_saw_too_little_cannot_be_compared(group):
    model = build("mixtral")
    with pytest.raises(SparsekitError, match=rf"must see enough tokens to be compared over the {group}, and .*experts.* saw \d+;"):
        prune(model, token_batches((1, 4)), "wanda", "50%", group=group)
