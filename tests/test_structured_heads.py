"""Attention heads: importance against brute force, which go, and what a trained model loses by it."""

import itertools
import math

import pytest
import shipped
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import build, token_batches
from torch import nn

from sparsekit import SparsekitError, head_importance, prune_heads, select_heads
from sparsekit.structured import architecture_of, keep_heads, settle_config
from sparsekit.structured.removed import take_out
from sparsekit.structured.surgery import group_widths

# GQA; q, k and v in one Conv1D; another name for the output projection, with biases; heads wider than their share
FAMILIES = ["llama", "gpt2", "opt", "gemma"]


def outputs(model: nn.Module) -> list[nn.Module]:
    architecture = architecture_of(model)
    return [architecture.projections(block)["o"] for block in architecture.blocks(model)]


def groups(model: nn.Module) -> tuple[int, int]:
    """How many there are in a block, and the output projection's inputs of each."""
    architecture = architecture_of(model)
    shape = architecture.shape(architecture.blocks(model)[0])
    return shape.head_units, group_widths(shape)[0]


@torch.no_grad()
def loss(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> float:
    """Of one sample without its padding, which stands on the left, or of what its labels count."""
    logits = model(input_ids=ids, attention_mask=mask).logits.double()[:, :-1]
    counted = slice(0 if mask is None else int((mask == 0).sum()), None)
    return F.cross_entropy(logits[0, counted], (ids if labels is None else labels)[0, 1:][counted]).item()


def with_gate(model: nn.Module, output: nn.Module, group: int, width: int, gate: float, *args) -> float:
    def scale(_, inputs):
        x = inputs[0].clone()
        x[..., group * width : (group + 1) * width] *= gate
        return x, *inputs[1:]

    hook = output.register_forward_pre_hook(scale)
    try:
        return loss(model, *args)
    finally:
        hook.remove()


def by_differences(model: nn.Module, samples: list[tuple], step: float) -> list[list[float]]:
    """Mean over samples of |d loss / d gate|, by central differences."""
    count, width = groups(model)
    return [
        [
            sum(
                abs(with_gate(model, o, g, width, 1 + step, *s) - with_gate(model, o, g, width, 1 - step, *s)) / (2 * step)
                for s in samples
            )
            / len(samples)
            for g in range(count)
        ]
        for o in outputs(model)
    ]


# The norms of Llama and Gemma compute in fp32 whatever comes: a longer step there, and its error.
DIFFERENCES = {"llama": (1e-2, 1e-2), "gemma": (1e-2, 1e-2), "gpt2": (1e-4, 1e-5), "opt": (1e-4, 1e-5)}


@pytest.mark.parametrize("name", FAMILIES)
def test_taylor_is_the_gradient_of_each_samples_loss(name):
    step, tolerance = DIFFERENCES[name]
    model = build(name, torch.float64)
    batch = token_batches((3, 7))[0]
    found = head_importance(model, [batch[:2], batch[2:]])
    expected = by_differences(model, [(row[None],) for row in batch], step)
    assert [scores.tolist() for scores in found] == [pytest.approx(row, rel=tolerance) for row in expected]


def test_taylor_leaves_padding_out_and_takes_labels():
    model = build("opt", torch.float64)  # its positions are counted from the mask
    ids = token_batches((2, 8))[0]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = head_importance(model, [{"input_ids": ids, "attention_mask": mask}])
    expected = by_differences(model, [(ids[:1],), (ids[1:], mask[1:])], 1e-4)
    assert [scores.tolist() for scores in found] == [pytest.approx(row, rel=1e-5) for row in expected]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 5] = -100
    found = head_importance(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    expected = by_differences(model, [(ids[:1], None, labels[:1]), (ids[1:], mask[1:], labels[1:])], 1e-4)
    assert [scores.tolist() for scores in found] == [pytest.approx(row, rel=1e-5) for row in expected]


def test_samples_do_not_cancel():
    # The gradients of samples differ in sign: their sum is another number than the sum of what they are without it.
    model = build("llama", torch.float64)
    batch = token_batches((4, 6))[0]
    whole = torch.cat(head_importance(model, [batch]))
    alone = torch.stack([torch.cat(head_importance(model, [row[None]])) for row in batch])
    torch.testing.assert_close(whole, alone.mean(0))


def test_a_groups_gate_is_one_gate():
    model = build("llama")
    batch = token_batches((1, 9))
    groups = torch.stack(head_importance(model, batch))
    heads = torch.stack(head_importance(model, batch, per="head")).unflatten(1, (2, 2))
    assert heads.shape == (3, 2, 2) and (groups <= heads.sum(2) + 1e-6).all() and (groups < heads.sum(2) - 1e-6).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_norm_is_what_a_head_adds_to_the_hidden_states(name):
    model = build(name)
    batches = token_batches((2, 5), (1, 9))
    found = head_importance(model, batches, "norm")
    count, width = groups(model)
    seen = {o: [] for o in outputs(model)}
    hooks = [o.register_forward_pre_hook(lambda o, args: seen[o].append(args[0].flatten(0, -2).double())) for o in seen]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    for scores, (o, parts) in zip(found, seen.items()):
        weight = (o.weight.T if name == "gpt2" else o.weight).detach().double()
        x = torch.cat(parts)
        own = [slice(g * width, (g + 1) * width) for g in range(count)]
        expected = [(x[:, part] @ weight[:, part].T).square().sum(1).mean().sqrt().item() for part in own]
        assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def test_norm_leaves_padding_out():
    model = build("opt")
    ids = token_batches((1, 6))[0]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    found = head_importance(model, [{"input_ids": padded, "attention_mask": mask}], "norm")
    for one, other in zip(found, head_importance(model, [ids], "norm")):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["taylor", "norm"])
def test_measuring_changes_nothing(method):
    model = build("llama", torch.bfloat16).train()
    model.lm_head.weight.requires_grad_(False)
    state = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    scores = head_importance(model, token_batches((2, 6)), method)
    assert all(s.dtype == torch.float32 and (s > 0).all() for s in scores)
    assert model.training and all(not module._forward_pre_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name][0]) and parameter.requires_grad == state[name][1] and parameter.grad is None


# ---- which go ----


def scores(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def test_a_share_and_counts_of_each_layer():
    four = scores([4, 1, 3, 2], [1, 2, 3, 4])
    assert select_heads(four, 0.5) == [[1, 3], [0, 1]]
    assert select_heads(four, 3) == [[1, 2, 3], [0, 1, 2]]
    assert select_heads(four, [0, 2]) == [[], [0, 1]]
    assert select_heads(four, 0.74) == [[1, 3], [0, 1]], "a share is not exceeded"
    assert select_heads(scores(list(range(100))), 0.29) == [list(range(29))], "0.29 of 100 is 29"


def test_a_tie_keeps_the_lower_one():
    assert select_heads(scores([1, 1, 1, 1]), 2) == [[2, 3]]
    assert select_heads(scores([1, 1], [1, 1]), 1, scope="global") == [[], [1]]


def test_over_all_layers_none_is_emptied():
    assert select_heads(scores([0, 0.1, 0.2], [5, 6, 7]), 3, scope="global") == [[0, 1], [0]]
    assert select_heads(scores([0, 0], [], [5]), 1, scope="global") == [[1], [], []]  # one block without attention


@given(
    rows=st.lists(st.lists(st.floats(0, 10, width=16), min_size=0, max_size=4), min_size=1, max_size=4).filter(any),
    count=st.integers(1, 12),
)
def test_over_all_layers_exactly_as_many_as_asked_and_the_least_important(rows, count):
    most = sum(len(row) - 1 for row in rows if row)
    if count > most:
        with pytest.raises(SparsekitError, match=rf"at most {most} of {sum(map(len, rows))} can go, got {count} to remove"):
            select_heads(scores(*rows), count, scope="global")
        return
    gone = select_heads(scores(*rows), count, scope="global")
    assert sum(map(len, gone)) == count and all(len(g) < max(len(row), 1) for g, row in zip(gone, rows))
    choices = [[c for n in range(max(len(row), 1)) for c in itertools.combinations(row, n)] for row in rows]
    cheapest = min(sum(map(sum, choice)) for choice in itertools.product(*choices) if sum(map(len, choice)) == count)
    assert sum(row[i] for row, g in zip(rows, gone) for i in g) == pytest.approx(cheapest)


@pytest.mark.parametrize(
    "remove, scope, said",
    [
        (4, "layer", "a block must keep at least one of its 4 heads, got 4 to remove"),
        (0.2, "layer", r"at least one of the heads must go, and 0.2 of 2 or 4 in a block is none; ask for more"),
        (1.0, "layer", r"a share between 0 and 1 or a count of at least 1, got 1\.0"),
        (0, "layer", "a share between 0 and 1 or a count of at least 1, got 0"),
        (True, "layer", "got True"),
        (math.nan, "layer", "got nan"),
        ("25%", "layer", "got '25%'"),
        ([1], "layer", "for each of the 2 blocks, got 1"),
        ([1, -1], "layer", "a number of at least 0, got -1"),
        ([0, 0], "layer", "at least one of the heads must go"),
        (5, "global", "at most 4 of 6 can go, got 5 to remove"),
        ([1, 1], "global", r"one share or count of heads is removed, got \[1, 1\]"),
        (1, "model", "scope must be layer or global, got 'model'"),
    ],
)
def test_what_cannot_be_selected(remove, scope, said):
    with pytest.raises(SparsekitError, match=said):
        select_heads(scores([4, 1, 3, 2], [1, 2]), remove, scope=scope)


def test_importance_that_is_none():
    with pytest.raises(SparsekitError, match="there must be heads to remove, and no block has any"):
        select_heads(scores([], []), 1)
    with pytest.raises(SparsekitError, match="the importance of heads must be finite, got NaN or Inf"):
        select_heads(scores([1, math.nan]), 1)


# ---- a model ----


@pytest.mark.parametrize(
    "ask, said",
    [
        (dict(remove=3), "keep at least one of its 2 heads, got 3 to remove"),
        (dict(remove=1, method="entropy"), "the importance of heads is taylor or norm, got 'entropy'"),
        (dict(remove=1, batches=[]), "measured on calibration batches, got none"),
        (dict(remove=1, batches=token_batches((2, 1))), "must predict a token, and one has fewer than two"),
        (dict(remove=1, batches=[torch.full((1, 4), 96)]), "below the model's vocabulary of 96, got 96"),
    ],
)
def test_bad_input_leaves_the_model_as_it_is(ask, said):
    model = build("llama")
    state = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(SparsekitError, match=said):
        prune_heads(model, **{"batches": token_batches((1, 5)), **ask})
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_units_are_groups_or_heads():
    with pytest.raises(SparsekitError, match="per group or head, got 'token'"):
        head_importance(build("llama"), token_batches((1, 5)), per="token")


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "opt", "gpt_neox", "mixtral", "phi3", "falcon", "falcon, alibi", "bloom"])
def test_heads_go_and_the_result_tells(name, compensate):
    model = build(name)
    take_out(architecture_of(model), architecture_of(model).blocks(model)[1], "attention")
    count, before = groups(model)[0] if name != "mixtral" else 2, sum(p.numel() for p in model.parameters())
    told = []
    result = prune_heads(model, token_batches((2, 20), (1, 20)), 1, compensate=compensate, progress=lambda *news: told.append(news))
    assert result.kept == (count - 1, 0, count - 1) and [len(gone) for gone in result.removed] == [1, 0, 1]
    assert [len(of) for of in result.importance] == [count, 0, count]
    assert result.parameters_before == before > result.parameters_after == result.parameters_predicted
    assert result.parameters_after == sum(p.numel() for p in model.parameters())
    if compensate:
        assert all(made_up < plain for made_up, plain in ((result.errors[i][1], result.errors[i][0]) for i in (0, 2)))
    else:
        assert result.errors == ((None, None),) * 3
    assert told[0][0] == "importance of heads" and told[-1] == ("heads", 3, 3)
    ids = token_batches((1, 4))[0]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


TOKENS = 16 * 128


def without(choice: tuple[int, ...]) -> float:
    """What the shipped model does without this head of each block."""
    model = shipped.load()
    architecture = architecture_of(model)
    for block, gone in zip(architecture.blocks(model), choice):
        keep_heads(architecture, block, {0, 1} - {gone})
    settle_config(architecture, model)
    return shipped.lost(model, TOKENS)


def test_taylor_scores_beat_random_removal_and_compensation_beats_none():
    # One of the two groups of each of four blocks: all sixteen ways are measured, so random removal is their mean.
    every = {choice: without(choice) for choice in itertools.product((0, 1), repeat=4)}
    chosen = select_heads(head_importance(shipped.load(), shipped.calibration()), 1)
    taylor = every[tuple(gone for (gone,) in chosen)]
    assert sum(other < taylor for other in every.values()) <= 4 and taylor < 0.8 * sum(every.values()) / 16
    model = shipped.load()
    result = prune_heads(model, shipped.calibration(), 1)
    assert result.removed == tuple(map(tuple, chosen)) and all(made_up < plain for plain, made_up in result.errors)
    assert shipped.lost(model, TOKENS) < 0.95 * taylor
