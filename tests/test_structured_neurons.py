"""Neurons: importance against brute force, which go, the least squares that make up for them, and what a trained model loses."""

import math

import pytest
import shipped
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build, token_batches
from torch import nn

from sparsekit import SparsekitError, neuron_importance, prune_neurons, select_neurons
from sparsekit.criteria import Gram
from sparsekit.structured import architecture_of, keep_neurons
from sparsekit.structured.compensation import DAMPING_LADDER, compensated

# gate and up; Conv1D without a gate; the block's own linears, which see tokens without their batch
FAMILIES = ["llama", "gpt2", "opt"]


def parts(model: nn.Module) -> list[dict[str, nn.Module]]:
    architecture = architecture_of(model)
    return [architecture.neurons(block) for block in architecture.blocks(model)]


def activations(model: nn.Module, batches: list) -> list[torch.Tensor]:
    """What each down receives, (tokens, neurons) in fp64."""
    seen = {linears["down"]: [] for linears in parts(model)}
    hooks = [down.register_forward_pre_hook(lambda d, args: seen[d].append(args[0].flatten(0, -2).double())) for down in seen]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in seen.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_contribution_is_what_a_neuron_adds_to_the_hidden_states(name):
    model = build(name)
    batches = token_batches((2, 5), (1, 9))
    for scores, x, linears in zip(neuron_importance(model, batches), activations(model, batches), parts(model)):
        weight = linears["down"].weight.detach().double()
        weight = weight.T if name == "gpt2" else weight
        added = x[:, None, :] * weight  # (tokens, out, neurons)
        expected = added.square().sum(1).mean(0).sqrt()
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["contribution", "taylor"])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_every_part_of_a_neuron_counts(part, method):
    # The other two of its vectors are as large as any.
    model = build("llama")
    for linears in parts(model):
        with torch.no_grad():
            (linears[part].weight.T if part == "down" else linears[part].weight)[7] = 0
    for scores in neuron_importance(model, token_batches((2, 9)), method):
        assert scores[7] == 0 and (scores > 0).sum() == len(scores) - 1


def test_taylor_is_each_samples_gradient():
    model = build("gpt2", torch.float64)
    batch = token_batches((3, 6))[0]
    found = neuron_importance(model, [batch], "taylor")
    whole = [torch.zeros(len(scores), dtype=torch.float64) for scores in found]
    inputs = []
    for linears in parts(model):
        linears["down"].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for row in batch:  # d loss / d gate of a neuron is the sum of activation times its gradient
        inputs.clear()
        loss = model(row[None], labels=row[None]).loss
        for total, x, gradient in zip(whole, inputs, torch.autograd.grad(loss, inputs)):
            total += (x * gradient).sum((0, 1)).abs() / len(batch)
    for scores, expected in zip(found, whole):
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-9)


def test_padding_does_not_count():
    model = build("opt")
    ids = token_batches((2, 6))[0]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    found = neuron_importance(model, [{"input_ids": padded, "attention_mask": mask}])
    for one, other in zip(found, neuron_importance(model, [ids])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- which go ----


def test_rounding_keeps_multiples_and_removes_no_more_than_asked():
    scores = [torch.arange(384.0)]
    assert [len(gone) for gone in select_neurons(scores, 0.3)] == [115]
    assert select_neurons(scores, 0.3, round_to=64) == [list(range(64))]  # 269 to keep: 320
    assert select_neurons(scores, 0.34, round_to=128) == [list(range(128))]  # 254 to keep: 256
    assert select_neurons(scores, 128, round_to=128) == [list(range(128))]
    assert select_neurons([torch.arange(100.0)], 0.2, round_to=16) == [list(range(20))]  # 80 of a width that is none itself
    assert select_neurons([torch.arange(100.0)], 0.1, round_to=32) == [list(range(4))]  # 96


def test_rounding_never_comes_to_nothing_or_everything():
    with pytest.raises(SparsekitError, match=r"at least one of the neurons must go, and 0.3 of 384 in a block is none, keep"):
        select_neurons([torch.arange(384.0)], 0.3, round_to=128)  # 269 to keep: 384
    with pytest.raises(SparsekitError, match="is none, keeping multiples of 64"):
        select_neurons([torch.arange(40.0)], 0.5, round_to=64)
    with pytest.raises(SparsekitError, match=r"a share between 0 and 1 or a count of at least 1, got 1\.0"):
        select_neurons([torch.arange(384.0)], 1.0)
    with pytest.raises(SparsekitError, match="keep at least one of its 384 neurons, got 384"):
        select_neurons([torch.arange(384.0)], 384)
    for bad in (0, -64, 1.5, True):
        with pytest.raises(SparsekitError, match="round_to must be a number of neurons of at least 1"):
            select_neurons([torch.arange(384.0)], 0.5, round_to=bad)


def test_over_all_layers_whole_steps_go_where_they_matter_least():
    # Of 40 and 24 neurons 30 % is 19: two steps of eight, both from the second block, whose last eight stay.
    scores = [torch.full((40,), 2.0), torch.arange(24.0) / 24]
    assert select_neurons(scores, 0.3, scope="global", round_to=8) == [[], list(range(16))]
    # A block that is no multiple of eight comes to one first.
    assert select_neurons([torch.zeros(20), torch.ones(16)], 10, scope="global", round_to=8) == [list(range(16, 20)), []]


@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4), share=st.floats(0.05, 0.95), step=st.sampled_from([1, 4, 8]),
    scope=st.sampled_from(["layer", "global"]),
)  # fmt: skip
def test_what_is_kept(widths, share, step, scope):
    generator = torch.Generator().manual_seed(sum(widths))
    scores = [torch.rand(width, generator=generator) for width in widths]
    try:
        gone = select_neurons(scores, share, scope=scope, round_to=step)
    except SparsekitError:
        gone = None
    asked = [int(width * share + 1e-6) for width in widths]
    if gone is None:
        assert scope == "global" or not any(width - -(-(width - n) // step) * step > 0 for width, n in zip(widths, asked) if n)
        return
    assert any(gone) and sum(map(len, gone)) <= (sum(asked) if scope == "layer" else int(sum(widths) * share + 1e-6))
    for out, width, row in zip(gone, widths, scores):
        assert out == sorted(set(out)) and len(out) < width
        assert not out or (width - len(out)) % step == 0
        kept = [i for i in range(width) if i not in out]
        assert not out or max(row[i] for i in out) <= min(row[i] for i in kept)


# ---- least squares ----


def gram_of(x: torch.Tensor) -> Gram:
    gram = Gram(x.shape[1])
    gram.update(x)
    return gram


def problem(tokens: int = 200, k: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs (tokens, k) and a weight (5, k)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return x, torch.randn(5, k, generator=generator)


def test_compensation_is_the_least_squares_solution():
    x, weight = problem()
    kept = [0, 3, 4, 7, 8, 11]
    found, damping = compensated(weight, gram_of(x), kept)
    expected = torch.linalg.lstsq(x[:, kept].double(), x.double() @ weight.double().T).solution.T
    assert damping == DAMPING_LADDER[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    errors = gram_of(x).output_errors(weight, [spread(weight[:, kept], kept), spread(found, kept)])
    assert errors[1] < 0.5 * errors[0]


def spread(weight: torch.Tensor, kept: list[int], k: int = 12) -> torch.Tensor:
    wide = torch.zeros(len(weight), k)
    wide[:, kept] = weight
    return wide


def test_nothing_is_lost_where_the_removed_are_combinations_of_the_kept():
    x, weight = problem()
    kept, gone = [0, 2, 3, 5, 6, 8, 9, 11], [1, 4, 7, 10]
    x[:, gone] = x[:, kept] @ torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    found, _ = compensated(weight, gram_of(x), kept)
    error = (x[:, kept] @ found.T - x @ weight.T).norm() / (x @ weight.T).norm()
    assert error < 1e-4 < (x[:, kept] @ weight[:, kept].T - x @ weight.T).norm() / (x @ weight.T).norm()


def test_twins_and_dead_inputs():
    x, weight = problem()
    x[:, 5] = x[:, 4]  # of two kept twins neither is told apart
    x[:, [0, 1]] = 0  # one goes, one stays
    kept = [0, 2, 3, 4, 5, 8, 9]
    found, damping = compensated(weight, gram_of(x), kept)
    assert torch.isfinite(found).all() and damping in DAMPING_LADDER
    assert torch.equal(found[:, 0], weight[:, 0]), "an input that never fired takes nothing over"
    best = torch.linalg.lstsq(x[:, kept].double(), x.double() @ weight.double().T, driver="gelsd").solution.T
    for one, other in [(found.double(), best)]:
        reached, least = ((x[:, kept].double() @ w.T - x.double() @ weight.double().T).norm() for w in (one, other))
        assert reached < 1.001 * least


def test_all_inputs_dead_and_fewer_tokens_than_inputs():
    weight = problem()[1]
    found, _ = compensated(weight, Gram(12), [1, 2])
    assert torch.equal(found, weight[:, [1, 2]])
    x, _ = problem(tokens=3)
    found, _ = compensated(weight, gram_of(x), [0, 3, 4, 7, 8, 11])
    assert (x[:, [0, 3, 4, 7, 8, 11]] @ found.T - x @ weight.T).norm() < 1e-2 * (x @ weight.T).norm()


def test_inputs_that_are_not_finite():
    gram = gram_of(problem()[0])
    gram.sum[0, 0] = math.nan
    with pytest.raises(ValueError, match="its inputs hold NaN or Inf"):
        compensated(problem()[1], gram, [0, 1])


# ---- a model ----


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "opt", "phi", "phi3", "falcon, new"])
def test_neurons_go_and_the_result_tells(name):
    model = build(name)
    width, before = len(neuron_importance(model, token_batches((1, 5)))[0]), sum(p.numel() for p in model.parameters())
    told = []
    result = prune_neurons(model, token_batches((2, 40), (1, 40)), 0.25, round_to=3, progress=lambda *news: told.append(news))
    kept = -(-(width - width // 4) // 3) * 3
    assert result.kept == (kept,) * 3 and all(len(gone) == width - kept for gone in result.removed)
    assert result.parameters_before == before > result.parameters_after == result.parameters_predicted
    assert result.parameters_after == sum(p.numel() for p in model.parameters())
    assert all(made_up < plain for plain, made_up in result.errors)
    assert getattr(model.config, architecture_of(model).intermediate_field) == kept
    assert told[0][0] == "importance of neurons" and told[-1] == ("neurons", 3, 3)


def test_the_compensation_is_fitted_to_what_the_narrowed_model_feeds_it():
    # The last block's down is told of is what it would be with the first blocks as they have become, not as they were.
    batches = token_batches((4, 30))
    model, dense = build("llama"), build("llama")
    result = prune_neurons(model, batches, 0.5)
    last = [i for i in range(44) if i not in result.removed[2]]
    x = activations(model, batches)[2]
    whole = parts(dense)[2]["down"].weight.detach().double()
    # The removed neurons' activations in the narrowed model: its own hidden states through the dense block's gate and up.
    seen = []
    hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
        hook.remove()
        mlp = dense.model.layers[2].mlp
        full = (mlp.act_fn(mlp.gate_proj(torch.cat(seen))) * mlp.up_proj(torch.cat(seen))).double()
    torch.testing.assert_close(full[:, last], x, rtol=1e-4, atol=1e-5)
    best = torch.linalg.lstsq(x, full @ whole.T).solution.T
    torch.testing.assert_close(parts(model)[2]["down"].weight.detach().double(), best, rtol=1e-2, atol=1e-2)


def test_a_method_that_is_none():
    with pytest.raises(SparsekitError, match="the importance of neurons is contribution or taylor, got 'magnitude'"):
        neuron_importance(build("llama"), token_batches((1, 5)), "magnitude")


def test_nan_is_found_before_anything_goes():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    state = {name: p.clone() for name, p in model.named_parameters()}
    for method in ("contribution", "taylor"):
        with pytest.raises(SparsekitError, match="must be finite, got NaN or Inf"):
            prune_neurons(model, token_batches((1, 5)), 0.5, method=method)
    assert all(p.shape == state[name].shape for name, p in model.named_parameters())


def test_16_bit_models_stay_so():
    model = build("llama", torch.bfloat16)
    prune_neurons(model, token_batches((2, 20)), 0.5)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


TOKENS = 32 * 128


def narrowed(remove, **options) -> float:
    model = shipped.load()
    prune_neurons(model, shipped.calibration(), remove, **options)
    return shipped.lost(model, TOKENS)


def at_random(seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    model = shipped.load()
    architecture = architecture_of(model)
    for block in architecture.blocks(model):
        keep_neurons(architecture, block, torch.randperm(384, generator=generator)[: 384 - 115].tolist())
    return shipped.lost(model, TOKENS)


def test_scores_beat_random_removal_and_compensation_beats_none():
    dense = shipped.lost(shipped.load(), TOKENS)
    random = [at_random(seed) - dense for seed in range(3)]
    plain = {method: narrowed(0.3, method=method, compensate=False) - dense for method in ("contribution", "taylor")}
    assert all(lost < 0.6 * min(random) for lost in plain.values())
    made_up = narrowed(0.3) - dense
    assert 0 < made_up < 0.7 * plain["contribution"]
    assert narrowed(0.3, method="taylor", scope="global") - dense < made_up
