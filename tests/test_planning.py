"""From a model to a plan, in one call and on the command line: what is measured, what is taken, what is refused before either."""

import json
import math
from pathlib import Path

import pytest
import torch
from models import build, token_batches, weight_of
from safetensors.torch import load_file
from test_cli import CALIB, MODEL, TEST, assert_refused, invoke

from sparsekit import NM, Plan, SparsekitError, bench, checkpoint, data, env, tune
from sparsekit.analysis import (
    Sensitivity,
    allocate,
    allocate_choices,
    allocate_owl,
    error_curves,
    gradient_weights,
    losses_alone,
    make_plan,
    measure_sensitivity,
    outlier_shares,
    planning,
)  # fmt: skip
from sparsekit.analysis.planning import SHARES

BATCHES = token_batches((2, 24), (3, 16))
SMALL = ("--samples", "8", "--seq-len", "32", "--device", "cpu")
LEVELS = (*SHARES, "4:8", "2:4")


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def measured(model) -> Sensitivity:
    tokens = token_batches((1, 64), seed=5)[0].flatten()
    return measure_sensitivity(model, BATCHES, LEVELS, evaluation=tokens, seq_len=16, unit="block")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Invented times of every product of the llama of models.py, for one token, of this machine's CPU in fp32."""
    monkeypatch.setattr(env, "CACHE", tmp_path / "cache")
    tune.forget()
    shapes = {(32, 32): 30.0, (16, 32): 20.0, (44, 32): 80.0, (32, 44): 90.0}
    found = [tune.Row("float32", 1, n, k, tune.DENSE, 0, 0, us) for (n, k), us in shapes.items()]
    found += [tune.Row("float32", 1, n, k, "sparse_cpu", 0, 0, us * 0.6) for (n, k), us in shapes.items()]
    tune.write(bench.key(torch.device("cpu")), found)
    yield shapes
    monkeypatch.undo()
    tune.forget()


def test_each_way_is_its_allocation_of_what_was_measured(model, measured):
    weights, curves = gradient_weights(model, BATCHES), error_curves(model, BATCHES, SHARES)
    plan = make_plan(model, BATCHES, "60%")
    assert plan.patterns == allocate(curves, "60%", weights=weights).patterns and plan.made["weights"] == "gradient"
    assert plan.patterns == make_plan(model, (), "60%", sensitivity=measured).patterns
    by_size = make_plan(model, BATCHES, "60%", weigh="size", low="20%", high="70%")
    assert by_size.patterns == allocate(curves, "60%", low="20%", high="70%").patterns
    choices = make_plan(model, BATCHES, "30%", "choices", unit="block")
    blocks = {name: name[: len("model.layers.0")] for name in weights}
    four = error_curves(model, BATCHES, ("4:8", "2:4"))
    assert choices.patterns == allocate_choices(four, "30%", weights=weights, groups=blocks).patterns
    assert {len({str(choices.patterns[name]) for name in blocks if blocks[name] == block}) for block in blocks.values()} == {1}
    owl = make_plan(model, BATCHES, "60%", "owl")
    assert owl.patterns == allocate_owl(outlier_shares(model, BATCHES), "60%").patterns


@pytest.mark.parametrize("weigh", [None, "size"])
def test_a_folder_is_planned_as_its_model(model, weigh, tmp_path):
    checkpoint.save(model, tmp_path / "model", format="dense")
    plan = make_plan(tmp_path / "model", BATCHES, "60%", weigh=weigh, device="cpu", dtype=torch.float32)
    assert plan.made["weights"] == (weigh or "gradient") and plan == make_plan(model, BATCHES, "60%", weigh=weigh)


def test_losses_weigh_too(model, measured):
    plan = make_plan(model, (), "60%", weigh="loss", sensitivity=measured)
    assert plan.made["weights"] == "loss" and plan.sparsity == pytest.approx(0.6, abs=1e-9)
    with pytest.raises(SparsekitError, match="weights by loss need a sensitivity that holds losses"):
        make_plan(model, BATCHES, "60%", weigh="loss")


def test_latency_by_the_rows_of_this_machine(model, rows, measured):
    dense = sum(3 * us * count for us, count in zip(rows.values(), (2, 2, 2, 1)))
    plan = make_plan(model, (), "1.3x", "latency", sensitivity=measured)
    spent = 0.0
    for name, pattern in plan.patterns.items():
        assert pattern in (None, NM(2, 4))
        spent += rows[plan.shapes[name]] * (1 if pattern is None else 0.6)
    assert plan.made["speedup of the products"] == pytest.approx(dense / spent) and dense / spent >= 1.3
    assert None in plan.patterns.values()
    with pytest.raises(SparsekitError, match=r"must reach a speed-up of 2, and dense and 2:4 reach 1.667 on this machine"):
        make_plan(model, (), 2, "latency", sensitivity=measured)
    assert {str(p) for p in make_plan(model, (), "1x", "latency", sensitivity=measured).patterns.values()} == {"None"}


def test_no_latency_without_rows_of_the_very_shape(model, rows, monkeypatch):
    monkeypatch.setattr(planning, "error_curves", None)  # it is refused before anything is measured
    found = [row for row in tune.rows(bench.key(torch.device("cpu"))) if (row.n, row.k) != (32, 44)]
    tune.write(bench.key(torch.device("cpu")), found)
    with pytest.raises(SparsekitError, match="and 32x44 in float32 has none of about 1 token; run sparsekit bench"):
        make_plan(model, BATCHES, "1.2x", "latency")


def test_no_latency_by_rows_of_far_more_or_fewer_tokens(model, rows, measured):
    plan = make_plan(model, (), "1.3x", "latency", sensitivity=measured)
    assert make_plan(model, (), "1.3x", "latency", sensitivity=measured, tokens=4).patterns == plan.patterns
    with pytest.raises(SparsekitError, match=r"in float32 has none of about 5 tokens; run sparsekit bench MODEL_DIR --tokens 5"):
        make_plan(model, (), "1.3x", "latency", sensitivity=measured, tokens=5)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"by": "chance"}, "the way to plan by must be curves, owl, choices or latency, got 'chance'"),
        ({"weigh": "luck"}, "the weight to plan by must be gradient, loss or size, got 'luck'"),
        ({"unit": "head"}, "the unit must be linear or block, got 'head'"),
        ({"choices": ("2:4",)}, "choices are for plans by choices or latency, got some for a plan by curves"),
        ({"by": "owl", "weigh": "size"}, "owl gives each block one share and weighs no errors"),
        ({"by": "latency", "target": "60%"}, "must be a speed-up of 1 or more, such as \"1.2x\", got '60%'"),
        ({"by": "latency", "target": "0.5x"}, "must be a speed-up of 1 or more"),
        ({"by": "latency", "target": "1.1x", "low": "10%"}, "bounds of the share are not for plans by latency"),
        ({"target": "1.2x"}, "the target must be a share of the weights"),
        ({"target": "50%", "high": "40%"}, "the target must lie within the bounds, 0% to 40%, got 50%"),
    ],
)
def test_refused_before_anything_is_measured(monkeypatch, how, says):
    monkeypatch.setattr(planning, "source_of", None)  # would be called first
    with pytest.raises(SparsekitError, match=says):
        make_plan(build("llama"), BATCHES, **{"target": "60%", **how})


def test_sensitivities_of_another_model_are_refused(measured):
    with pytest.raises(SparsekitError, match=r"must be those of this model, and \S*layers\.0\.self_attn\.q_proj is in one"):
        make_plan(build("llama", hidden_size=48), BATCHES, "60%", sensitivity=measured)
    with pytest.raises(SparsekitError, match=r"layers\.2\.self_attn\.q_proj is in one alone"):
        make_plan(build("llama", num_hidden_layers=2), BATCHES, "60%", sensitivity=measured)


# ---- the command line ----


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The sensitivities of the shipped model, as the command writes them."""
    path = tmp_path_factory.mktemp("sensitivity") / "sensitivity.json"
    losses = ("--eval", TEST, "--unit", "block", "--max-tokens", "256", "--loss-levels", "60%,80%")
    done = invoke(*ERRORS, *SMALL, *losses, "--out", path, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"out": str(path), **json.loads(path.read_text())}
    return path


def test_sensitivity_writes_what_was_measured(file):
    found = Sensitivity.load(file)
    assert len(found.curves) == 28 and found.curves[0].levels == (*LEVELS[:5], "4:8", "2:4", *LEVELS[5:9])
    assert [(one.name, one.level) for one in found.losses[:3]] == [
        ("model.layers.0", "60%"), ("model.layers.0", "80%"), ("model.layers.1", "60%")
    ]  # fmt: skip
    assert found.tokens == 8 * 32 and len(found.weights) == 28 and found.spearman is not None
    model = checkpoint.load(MODEL, device="cpu", dtype=torch.float32)
    tokenizer = checkpoint.load_tokenizer(MODEL)
    batches = data.calibration_batches(data.read_tokens(CALIB, tokenizer), 8, 32)
    dense, losses = losses_alone(model, batches, data.read_tokens(TEST, tokenizer), 32, ("80%",), unit="block", max_tokens=256)
    assert found.dense_loss == dense and [one for one in found.losses if one.level == "80%"] == losses


def test_streamed_it_has_the_same_curves_and_weights_and_no_losses(file, tmp_path):
    done = invoke(*ERRORS, *SMALL, "--stream", "--levels", "50%, 2:4", "--out", tmp_path / "s.json")
    assert done.exit_code == 0 and "model.layers.3.mlp.down_proj" in done.stdout, done.stderr
    found, whole = Sensitivity.load(tmp_path / "s.json"), Sensitivity.load(file)
    assert [one.errors for one in found.curves] == [(one.errors[4], one.errors[6]) for one in whole.curves]
    assert found.weights == whole.weights and found.losses == [] and [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_a_plan_is_written_and_followed(file, tmp_path):
    plan = tmp_path / "plan.yaml"
    done = invoke(*PLAN, "--sensitivity", file, "--out", plan, "--json")
    assert done.exit_code == 0, done.stderr
    said, made = json.loads(done.stdout), Plan.load(plan)
    assert said["sparsity"] == pytest.approx(0.6, abs=1e-12) and said["linears"] == made.to_dict()["linears"]
    done = invoke("prune", MODEL, "--calib", CALIB, *SMALL, "--plan", plan, "--out", tmp_path / "out", "--format", "dense")
    assert done.exit_code == 0, done.stderr
    pruned, zeros, total = load_file_of(tmp_path / "out"), 0, 0
    for name, shape in made.shapes.items():
        zeros += int((pruned[f"{name}.weight"] == 0).sum())
        total += math.prod(shape)
    assert zeros == total * 3 // 5 and Plan.load(tmp_path / "out" / "plan.yaml").patterns == made.patterns


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("more", [("--by", "choices"), ("--weigh", "loss", "--max", "70%"), ("--unit", "block", "--min", "10%")])
def test_plans_from_the_same_file(file, tmp_path, more):
    plan = tmp_path / "plan.yaml"
    done = invoke("plan", MODEL, "--target", "45%", "--sensitivity", file, "--out", plan, *more)
    assert done.exit_code == 0 and "model.layers.3.mlp.down_proj" in done.stdout, done.stderr
    assert Plan.load(plan).sparsity >= 0.45 - 1e-9


@pytest.mark.parametrize("more, weights", [(("--stream",), "gradient"), (("--by", "owl"), None)])
def test_plans_that_measure(tmp_path, more, weights):
    plan = tmp_path / "plan.yaml"
    done = invoke(*PLAN, "--calib", CALIB, *SMALL, "--out", plan, *more)
    assert done.exit_code == 0, done.stderr
    found = Plan.load(plan)
    assert found.made.get("weights") == weights and found.sparsity == pytest.approx(0.6, abs=1e-9)


PLAN, ERRORS = ("plan", MODEL, "--target", "60%"), ("sensitivity", MODEL, "--calib", CALIB)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((*PLAN,), "--calib must name a text to calibrate on"),
        (("plan", MODEL, "--target", "half", "--calib", CALIB), "the target must be a share of the weights, .* got 'half'"),
        ((*PLAN, "--min", "70%", "--calib", CALIB), "the target must lie within the bounds, 70% to 80%"),
        ((*PLAN, "--by", "luck", "--calib", CALIB), "must be curves, owl, choices or latency, got 'luck'"),
        ((*PLAN, "--sensitivity", "none.json"), "the sensitivities none.json cannot be read"),
        (("plan", "nowhere", "--target", "60%", "--calib", CALIB), "nowhere"),
        ((*PLAN, "--calib", CALIB, "--out", "no/such/plan.yaml"), "must be a file in a folder that is there"),
        ((*ERRORS, "--unit", "block"), "losses need an --eval text and a --unit, .* got --eval None"),
        ((*ERRORS, "--eval", TEST, "--unit", "none"), "losses need an --eval text and a --unit"),
        ((*ERRORS, "--eval", TEST, "--unit", "head"), "the unit must be linear or block, got 'head'"),
        ((*ERRORS, "--eval", TEST, "--stream"), "losses need the whole model in memory"),
        ((*ERRORS, "--levels", "50%,half"), "a pattern must be .* got 'half'"),
        ((*ERRORS, "--levels", ","), "there must be a level to prune to"),
        ((*ERRORS, "--eval", TEST, *SMALL, "--max-tokens", "8"), "at least one sequence of 32 tokens"),
        ((*ERRORS, "--max-tokens", "8"), "--max-tokens is how much of --eval is read, got 8 without it"),
        ((*PLAN, "--calib", CALIB, "--batch", "8"), "--batch is for plans by latency, got 8 for a plan by curves"),
        ((*PLAN, "--calib", CALIB, "--weigh", "loss"), "weights by loss need a sensitivity that holds losses"),
        (("sensitivity", MODEL), "--calib must name a text to calibrate on"),
    ],
)  # fmt: skip
def test_refused_on_the_command_line(arguments, says, tmp_path, monkeypatch):
    before = tmp_path / "plan.yaml"
    before.write_text("kept")
    out = () if "--out" in arguments else ("--out", before)
    assert_refused(invoke(*arguments, *out), says)
    assert before.read_text() == "kept" and [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_plan_that_cannot_be_written_leaves_the_old_one(file, tmp_path, monkeypatch):
    (tmp_path / "plan.yaml").write_text("kept")

    def full(self, text, **how):
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = invoke(*PLAN, "--sensitivity", file, "--out", tmp_path / "plan.yaml")
    assert_refused(done, "No space left on device; nothing was written")
    assert (tmp_path / "plan.yaml").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_weights_were_not_changed_by_any_of_it(model):
    assert all(torch.equal(weight_of(model, name), weight_of(build("llama"), name)) for name in gradient_weights(model, BATCHES))
