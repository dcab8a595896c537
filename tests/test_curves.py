"""Error curves: the errors against a brute force of their definition, and the model, which they must leave as it was."""

import json

import pytest
import torch
from models import ARCHITECTURES, build, token_batches

from sparsekit import SparsekitError, checkpoint
from sparsekit.analysis import Curve, error_curves
from sparsekit.patterns import Pattern
from sparsekit.pipeline import prune
from sparsekit.pruners import SparseGPT

LEVELS = ("20%", "4:8", "2:4", "80%")
BATCHES = token_batches((2, 24), (3, 16))  # 96 tokens of two shapes: more than any linear has columns


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def inputs_of(model, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """What each linear receives in the whole model, (tokens, k) a batch."""
    seen: dict[str, list] = {name: [] for name in names}

    def keep(name: str):
        return model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )

    hooks = [keep(name) for name in names]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])  # gated; transposed and fused; biases and linears outside the blocks
def test_errors_are_those_of_the_dense_models_inputs(name):
    model = build(name)
    before = state(model)
    curves = error_curves(model, BATCHES, LEVELS)
    assert same(before, state(model)) and not model.training
    assert [curve.name for curve in curves] == ARCHITECTURES[name].targets()
    inputs = inputs_of(model, [curve.name for curve in curves])
    for curve in curves:
        linear = model.get_submodule(curve.name)
        weight = (linear.weight.T if name == "gpt2" else linear.weight).detach()
        assert curve.levels == LEVELS and curve.shape == tuple(weight.shape)
        x = torch.cat(inputs[curve.name]).double()
        for level, error in zip(LEVELS, curve.errors):
            pruner = SparseGPT(weight.shape[1], Pattern.parse(level))
            for batch in inputs[curve.name]:
                pruner.observe(batch)
            lost = x @ (pruner.prune(weight).weight - weight).double().T
            true = (lost.square().sum() / (x @ weight.double().T).square().sum()).item()
            assert error == pytest.approx(true, rel=1e-4), (curve.name, level)  # fp32 sums of a hundred products
        assert list(curve.errors[:2]) == sorted(curve.errors[:2]) and 0 < curve.errors[0] < curve.errors[-1] < 1


def test_a_level_is_bit_for_bit_what_prune_loses_in_the_first_block():
    # Only there are the inputs of prune those of the dense model; later blocks must differ, or the states were not dense.
    curves = error_curves(build("llama"), BATCHES, ("2:4",))
    report = prune(build("llama"), BATCHES, "sparsegpt", "2:4")
    found = {row.name: row.output_error for row in report.linears}
    first = [curve for curve in curves if ".layers.0." in curve.name]
    assert first and all(curve.errors == (found[curve.name],) for curve in first)
    assert any(curve.errors != (found[curve.name],) for curve in curves if ".layers.1." in curve.name)


def test_a_curve_does_not_depend_on_its_other_levels():
    many = error_curves(build("llama"), BATCHES, LEVELS)
    one = error_curves(build("llama"), BATCHES, ("2:4",))
    assert [curve.errors[2] for curve in many] == [curve.errors[0] for curve in one]


def test_levels_come_in_rising_sparsity():
    curves = error_curves(build("llama"), BATCHES, ("80%", "2:4", "4:8", "20%"), skip=("*.mlp.*", "*.1.*", "*.2.*"))
    assert {curve.levels for curve in curves} == {("20%", "2:4", "4:8", "80%")}  # of two alike, the one asked for first
    assert curves[0].sparsities == (0.2, 0.5, 0.5, 0.8)
    assert [curve.name for curve in curves] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_saw_few_tokens_have_a_curve(name):
    # Six tokens for four experts: some see fewer than a quarter of a token a column, and some none.
    model = build(name)
    before = state(model)
    curves = error_curves(model, token_batches((1, 6)), LEVELS)
    assert same(before, state(model))
    assert [curve.name for curve in curves] == ARCHITECTURES[name].targets()
    assert all(0 <= error <= 1.5 for curve in curves for error in curve.errors)
    assert all(curve.errors[-1] > 0 for curve in curves)


def test_an_expert_that_saw_no_token_loses_the_squares_of_its_smallest_weights():
    # One token goes to two of four experts; the way out of the other two has nothing to share.
    model = build("mixtral")
    curves = {curve.name: curve for curve in error_curves(model, token_batches((1, 1)), ("50%",))}
    for i, layer in enumerate(model.model.layers):
        alike = 0
        for e, weight in enumerate(layer.mlp.experts.down_proj.detach().double()):
            squares = weight.flatten().square().sort().values
            true = (squares[: len(squares) // 2].sum() / squares.sum()).item()
            alike += curves[f"model.layers.{i}.mlp.experts.down_proj[{e}]"].errors[0] == pytest.approx(true, rel=1e-5)
        assert alike == 2


def test_a_folder_is_measured_as_the_model_in_it(tmp_path):
    model = build("llama")
    checkpoint.save(model, tmp_path / "model", format="dense")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    told = []
    found = error_curves(
        tmp_path / "model", BATCHES, LEVELS, device="cpu", dtype=torch.float32, progress=lambda *now: told.append(now)
    )
    assert found == error_curves(model, BATCHES, LEVELS)
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert told == [*((f"model.layers.{i}", i, 3) for i in range(3)), ("", 3, 3)]


def test_through_json_and_back():
    curve = Curve("a.b", (3, 4), ("10%", "2:4"), (0.1, 1 / 3))
    assert Curve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


@pytest.mark.parametrize("errors", [(0.1,), (0.1, float("nan")), (0.1, -0.1), (0.1, float("inf"))])
def test_what_is_no_curve_is_refused(errors):
    with pytest.raises(ValueError, match="a curve must have an error of 0 or more for each level"):
        Curve.from_dict({"name": "a", "shape": [3, 4], "levels": ["10%", "2:4"], "errors": errors})


def test_one_linear_at_a_time_is_held(monkeypatch):
    # All levels' weights together would be as large as a block: no call may ask for more than one.
    asked = []
    levels = SparseGPT.prune_levels
    monkeypatch.setattr(SparseGPT, "prune_levels", lambda self, w, of: asked.append(len(of)) or levels(self, w, of))
    error_curves(build("llama"), BATCHES, LEVELS)
    assert set(asked) == {1} and len(asked) == len(LEVELS) * 21


def test_one_factorisation_serves_all_levels_and_all_who_share_an_input(monkeypatch):
    made = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: made.append(h.shape) or cholesky(h))
    error_curves(build("llama"), BATCHES, LEVELS)
    assert len(made) == 3 * 4  # q, k and v; o; gate and up; down


@pytest.mark.parametrize(
    "levels, says",
    [
        ((), "there must be a level to prune to, .* got none"),
        (("50%", "50.0%"), "each level must be given once, got 50% 2 times"),
        (("2:4", "half"), "a pattern must be .* got 'half'"),
    ],
)
def test_levels_that_cannot_be_used(levels, says):
    with pytest.raises(SparsekitError, match=says):
        error_curves(build("llama"), BATCHES, levels)


def test_broken_input_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(SparsekitError, match=r"got NaN or Inf in model\.layers\.1\.self_attn\.v_proj"):
        error_curves(model, BATCHES, LEVELS)
    with pytest.raises(SparsekitError, match="needs calibration batches, got none"):
        error_curves(build("llama"), (), LEVELS)
