"""What pruning one part alone costs: the losses against models built by hand, and the model, which comes back bit for bit."""

import json
import math

import pytest
import torch
from models import ARCHITECTURES, build, token_batches, weight_of

from sparsekit import SparsekitError
from sparsekit.analysis import (
    Curve,
    Loss,
    Sensitivity,
    error_curves,
    loss_weights,
    losses_alone,
    measure_sensitivity,
    rank_correlation,
    spearman,
)  # fmt: skip
from sparsekit.analysis import sensitivity as module
from sparsekit.evaluate import perplexity
from sparsekit.pipeline import prune

BATCHES = token_batches((2, 24), (3, 16))
TOKENS = token_batches((1, 64), seed=5)[0].flatten()
LENGTH = 16


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loss_of(model) -> float:
    return math.log(perplexity(model, TOKENS, LENGTH)["perplexity"])


# Gated, with heads that share keys; weights transposed, q, k and v in one; experts in one parameter, of which some see few tokens.
@pytest.mark.parametrize("name, unit", [("llama", "linear"), ("gpt2", "block"), ("mixtral", "linear"), ("mixtral", "block")])
def test_a_loss_is_that_of_a_model_with_this_part_pruned_alone(name, unit):
    model = build(name)
    before, told = state(model), []
    dense, losses = losses_alone(model, BATCHES, TOKENS, LENGTH, ("50%", "80%"), unit=unit, progress=lambda *now: told.append(now))
    assert same(before, state(model)) and dense == loss_of(model)
    names = ARCHITECTURES[name].targets()
    blocks = [f"{ARCHITECTURES[name].blocks}.{i}" for i in range(3)]
    parts = blocks if unit == "block" else names
    assert [(one.name, one.level) for one in losses] == [(part, level) for part in parts for level in ("50%", "80%")]
    assert len(told) == len(losses) + 1 and told[-1][1:] == (3, 3)
    found = {(one.name, one.level): one.loss for one in losses}
    # In the first block prune sees the inputs of the dense model too: what it makes of the part alone is the truth.
    for part in parts[:: 7 if unit == "linear" else 1]:
        if not part.startswith(blocks[0]):
            continue
        pruned = build(name)
        prune(pruned, BATCHES, "sparsegpt", "80%", skip=[n for n in names if n != part and not n.startswith(f"{part}.")])
        assert found[part, "80%"] == loss_of(pruned) != dense


def test_in_later_blocks_a_part_is_calibrated_on_the_dense_model():
    # A plan that prunes only the third block's o_proj leaves everything before it dense.
    model, name = build("llama"), "model.layers.2.self_attn.o_proj"
    others = [other for other in ARCHITECTURES["llama"].targets() if other != name]
    _, losses = losses_alone(model, BATCHES, TOKENS, LENGTH, ("2:4",))
    prune(model, BATCHES, "sparsegpt", "2:4", skip=others)
    assert {one.name: one.loss for one in losses}[name] == loss_of(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SparsekitError, MemoryError])
def test_the_model_is_restored_where_the_evaluation_fails(monkeypatch, error):
    model, calls = build("llama").train(), []
    before = state(model)

    def fails(*args):
        calls.append(args)
        if len(calls) == 4:
            assert not same(before, state(model))
            raise error("enough")
        return perplexity(*args)

    monkeypatch.setattr(module, "perplexity", fails)
    with pytest.raises(error):
        losses_alone(model, BATCHES, TOKENS, LENGTH)
    assert same(before, state(model)) and model.training


def test_a_model_that_is_not_restored_is_noticed(monkeypatch):
    model = build("llama")

    def spoils(*args):
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[3] += 1e-6  # another parameter than the one that is put back
        return perplexity(*args)

    monkeypatch.setattr(module, "perplexity", spoils)
    with pytest.raises(RuntimeError, match="a block is not what it was before one of its parts was pruned"):
        losses_alone(model, BATCHES, TOKENS, LENGTH)


def test_a_spoilt_norm_outside_the_blocks_is_noticed_too(monkeypatch):
    model = build("llama")

    def spoils(*args):
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-6
        return perplexity(*args)

    monkeypatch.setattr(module, "perplexity", spoils)
    with pytest.raises(RuntimeError, match="the model is not what it was before its losses were measured"):
        losses_alone(model, BATCHES, TOKENS, LENGTH, skip=("*.1.*", "*.2.*", "*.mlp.*"))


# ---- ranks and slopes ----


@pytest.mark.parametrize(
    "xs, ys, rho",
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [9, 4, 1], -1),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # a tie, each of it the mean rank: Pearson's of the ranks by hand
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [2], None),
    ],
)
def test_spearman(xs, ys, rho):
    assert spearman(xs, ys) == (None if rho is None else pytest.approx(rho, abs=1e-12))


def curve(name: str, errors, shape=(2, 2), levels=("50%", "80%")) -> Curve:
    return Curve(name, shape, levels, tuple(errors))


CURVES = [curve("a.q", (0.1, 0.3)), curve("a.o", (0.2, 0.5), (2, 6)), curve("b.q", (0.3, 0.9)), curve("b.o", (0.1, 0.4), (2, 6))]
BLOCKS = {one.name: one.name[0] for one in CURVES}


def test_ranks_are_taken_level_by_level_over_units():
    # Over both levels at once the correlation would be high whatever the order within each: errors and losses rise with the level.
    losses = [Loss(one.name, "50%", 1 + error) for one, error in zip(CURVES, (0.4, 0.3, 0.2, 0.4))]
    losses += [Loss(one.name, "80%", 2 - one.errors[1]) for one in CURVES]
    found = rank_correlation(CURVES, losses, 1.0)
    at_50 = spearman([0.1, 0.2, 0.3, 0.1], [0.4, 0.3, 0.2, 0.4])
    assert found == pytest.approx((at_50 - 1) / 2) and at_50 == pytest.approx(-1)
    assert rank_correlation(CURVES, losses[:1], 1.0) is None
    assert rank_correlation(CURVES, [Loss("a.q", "70%", 2.0), Loss("b.q", "70%", 3.0)], 1.0) is None  # no curve has the level


def test_a_blocks_error_is_the_mean_of_its_linears_by_size():
    # By size a 0.175, b 0.15; by plain means a 0.15, b 0.2.
    losses = [Loss("a", "50%", 1.2), Loss("b", "50%", 1.1)]
    assert rank_correlation(CURVES, losses, 1.0, BLOCKS) == pytest.approx(1)


def test_slopes_of_measured_losses():
    losses = [Loss(one.name, "80%", 1 + rise) for one, rise in zip(CURVES, (0.3, 0.05, -0.2, 0.8))]
    slopes = [1.0, 0.1, 0.0, 2.0]  # the third fell: noise
    found = loss_weights(CURVES, losses, 1.0)
    least = sum(slopes) / 4 / 2
    assert found == pytest.approx({one.name: max(slope, least) for one, slope in zip(CURVES, slopes)})
    both = [*losses, *(Loss(one.name, "50%", 1 + rise) for one, rise in zip(CURVES, (0.2, 0.3, 0.3, 0.3)))]
    assert loss_weights(CURVES, both, 1.0)["a.q"] == pytest.approx((0.3 * 0.3 + 0.1 * 0.2) / (0.3**2 + 0.1**2))
    by_block = loss_weights(CURVES, [Loss("a", "80%", 1.8), Loss("b", "80%", 2.3)], 1.0, BLOCKS)
    assert by_block == pytest.approx({"a.q": 1.0, "a.o": 1.0, "b.q": 1.0, "b.o": 1.0})
    with pytest.raises(SparsekitError, match=r"every linear must have a loss that was measured, and b\.o has none"):
        loss_weights(CURVES, losses[:3], 1.0)


def test_of_linears_that_cost_nothing_all_weigh_nothing():
    none = [curve("a", (0.0, 0.0)), curve("b", (0.0, 0.0))]
    assert loss_weights(none, [Loss("a", "50%", 1.0), Loss("b", "50%", 1.0)], 1.0) == {"a": 0.0, "b": 0.0}


# ---- one call, and its file ----


def test_all_in_one_call_and_through_its_file(tmp_path):
    model = build("llama")
    before = state(model)
    found = measure_sensitivity(
        model, BATCHES, ("50%", "80%"), evaluation=TOKENS, seq_len=LENGTH, unit="block", loss_levels=("80%",)
    )
    assert same(before, state(model))
    assert found.tokens == 96 and found.curves == error_curves(model, BATCHES, ("50%", "80%"))
    assert (found.dense_loss, found.losses) == losses_alone(model, BATCHES, TOKENS, LENGTH, ("80%",), unit="block")
    assert found.blocks == {name: name[: len("model.layers.0")] for name in ARCHITECTURES["llama"].targets()}
    assert found.spearman == rank_correlation(found.curves, found.losses, found.dense_loss, found.blocks)
    assert set(found.weights) == set(found.blocks) and all(weight > 0 for weight in found.weights.values())
    found.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == found
    held = json.loads((tmp_path / "sensitivity.json").read_text())
    assert {"tokens", "curves", "losses", "dense_loss", "spearman"} <= held.keys()
    assert held["losses"][0].keys() == {"name", "level", "loss"} and held["curves"][0].keys() == {
        "name",
        "shape",
        "levels",
        "errors",
    }


def test_without_losses():
    found = measure_sensitivity(build("llama"), BATCHES, ("50%",))
    assert (found.unit, found.losses, found.dense_loss, found.spearman) == (None, [], None, None)
    assert len(found.curves) == len(found.weights) == 21


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "must be JSON, got"),
        ("[]", "must be what sparsekit sensitivity wrote, got"),
        ('{"curves": []}', "must be what sparsekit sensitivity wrote, got no 'losses'"),
        (
            '{"curves": [{"name": "a", "shape": [1], "levels": [], "errors": []}], "losses": []}',
            "must be what sparsekit sensitivity",
        ),
        ('{"curves": [], "losses": [], "tokens": 1, "speed": 2}', "got .*'speed'"),
        ('{"curves": [], "losses": [{"name": "a"}], "tokens": 1}', "must be what sparsekit sensitivity wrote"),
        ('{"curves": [], "losses": [], "tokens": 1, "weights": {"a": "heavy"}}', "could not convert .*'heavy'"),
        ('{"curves": [], "losses": [], "tokens": 1, "weights": [1]}', "must be what sparsekit sensitivity wrote"),
    ],
)
def test_another_file_is_refused(tmp_path, text, says):
    path = tmp_path / "sensitivity.json"
    path.write_text(text)
    with pytest.raises(SparsekitError, match=says):
        Sensitivity.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SparsekitError, match="cannot be read: No such file"):
        Sensitivity.load(tmp_path / "sensitivity.json")


@pytest.mark.parametrize(
    "more, says",
    [
        ({"unit": "head"}, "the unit must be linear or block, got 'head'"),
        ({"levels": ()}, "there must be a level to prune to"),
        ({"levels": ("half",)}, "a pattern must be"),
        ({"skip": ("model.layers.9",)}, "every skipped name must be a module of the model"),
        ({"tokens": TOKENS[:4]}, "must hold at least one sequence of 16 tokens, got 4"),
    ],
)
def test_refused(more, says):
    with pytest.raises(SparsekitError, match=says):
        losses_alone(**{"model": build("llama"), "batches": BATCHES, "tokens": TOKENS, "seq_len": LENGTH, **more})


def test_weights_that_are_not_finite_are_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    with pytest.raises(SparsekitError):
        losses_alone(model, BATCHES, TOKENS, LENGTH)
    assert weight_of(model, "model.layers.1.mlp.up_proj")[0, 0] == math.inf
