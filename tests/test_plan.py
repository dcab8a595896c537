"""Plans: a pattern for each linear, from text to the pruned weights."""

import json
from pathlib import Path

import pytest
import torch
from models import build, token_batches
from test_folder import KJV, dense_folder, weights
from typer.testing import CliRunner

from sparsekit import NM, PruningConfig, SparsekitError, Unstructured, checkpoint, prune, prune_folder
from sparsekit.cli import app
from sparsekit.pipeline import find_blocks
from sparsekit.pipeline.blocks import find_targets
from sparsekit.plan import Plan, parse, pattern_of, patterns_in

PATTERNS = ("2:4", "37.5%", None, "4:8", "block:4x4@50%", "1:4", "62.5%")


def plan_of(model, patterns=PATTERNS, **more) -> Plan:
    """The patterns in turn, over the model's linears."""
    names = {module: name for name, module in model.named_modules()}
    targets = [target for group in find_targets(find_blocks(model), names, ()) for target in group]
    asked = {target.name: patterns[i % len(patterns)] for i, target in enumerate(targets)}
    return Plan(asked, {target.name: tuple(target.weight.shape) for target in targets}, **more)


@pytest.mark.parametrize("name", ("plan.yaml", "config.yaml", "config.json"))
def test_a_full_disk_leaves_the_file_as_it_was(name, tmp_path, monkeypatch):
    path, whole = tmp_path / name, Path.write_text

    def full(self, text, **how):
        whole(self, text[: len(text) // 2], **how)
        raise OSError(28, "No space left on device")

    path.write_text("as it was")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        (Plan({"q": "2:4"}, {"q": (8, 8)}) if "plan" in name else PruningConfig("2:4")).save(path)
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "as it was"


def test_text_and_back(tmp_path):
    plan = plan_of(build("llama"), method="wanda", made={"by": "hand", "target": 0.5})
    plan.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again == plan and again.method == "wanda" and again.made == {"by": "hand", "target": 0.5}
    assert str(again) == str(plan) != str(plan_of(build("llama"), PATTERNS[1:]))
    assert again.patterns["model.layers.0.self_attn.q_proj"] == NM(2, 4)
    assert again.patterns["model.layers.0.self_attn.v_proj"] is None and parse(again) is again
    assert patterns_in(again)[:2] == [NM(2, 4), Unstructured(0.375)] and len(patterns_in(again)) == 6
    assert patterns_in(NM(2, 4)) == [NM(2, 4)] and pattern_of(NM(2, 4), "any") == NM(2, 4)


def test_its_sparsity_is_weighted_by_parameters():
    plan = Plan({"a": "50%", "b": None, "c": "1:4"}, {"a": (2, 8), "b": (4, 4), "c": (16, 4)})
    assert plan.sparsity == (8 + 0 + 48) / (16 + 16 + 64)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_linear_gets_the_pattern_it_is_to_have(method, name):
    """As if it were pruned to that pattern with the whole model, up to the block before; the first block has none before it."""
    model, batches = build(name), token_batches((3, 16))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = plan_of(model)
    report = prune(model, batches, method, plan)
    rows = {row.name: row for row in report.linears}
    assert {name for name, pattern in plan.patterns.items() if pattern is not None} == set(rows)
    assert all(row.pattern == str(plan.patterns[name]) for name, row in rows.items())
    assert report.pattern == str(plan) and report.sparsity > 0
    names = {module: name for name, module in model.named_modules()}
    targets = {target.name: target for group in find_targets(find_blocks(model), names, ()) for target in group}
    for target, pattern in plan.patterns.items():
        if pattern is None:
            held = targets[target].of(before[targets[target].tensor])
            assert torch.equal(targets[target].weight, held)
            assert "dense in the plan" in (report.skipped.get(target), report.skipped.get(target.partition("[")[0]))
        else:
            assert pattern.check(targets[target].weight, rowwise=method == "wanda") is None
    for pattern in patterns_in(plan):
        alone = build(name)
        prune(alone, batches, method, pattern)
        theirs = {t.name: t for t in find_targets(find_blocks(alone), {m: n for n, m in alone.named_modules()}, ())[0]}
        for target in (name for name in theirs if plan.patterns[name] == pattern):
            assert torch.equal(targets[target].weight, theirs[target].weight), target


def test_a_plan_of_one_pattern_is_that_pattern():
    model, uniform, batches = build("qwen2"), build("qwen2"), token_batches((2, 16))
    prune(model, batches, "sparsegpt", plan_of(model, ("2:4",)))
    prune(uniform, batches, "sparsegpt", "2:4")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), uniform.state_dict().values()))


def test_a_folder_follows_it_and_keeps_it(tmp_path):
    folder, batches = dense_folder(tmp_path / "model", "llama"), token_batches((3, 16), (1, 11))
    model = build("llama")
    plan = plan_of(model)
    prune(model, batches, "sparsegpt", plan)
    out = tmp_path / "out"
    report = prune_folder(folder, out, batches, "sparsegpt", plan, format="dense", device="cpu", dtype=torch.float32)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights(out).items())
    assert Plan.load(out / "plan.yaml") == plan
    assert report.fingerprint["pattern"] == str(plan)
    # The same call finds it finished; another plan is another run.
    assert prune_folder(folder, out, batches, "sparsegpt", plan, format="dense", device="cpu", dtype=torch.float32, resume=True)
    with pytest.raises(SparsekitError):
        other = plan_of(model, PATTERNS[1:])
        prune_folder(folder, out, batches, "sparsegpt", other, format="dense", device="cpu", dtype=torch.float32, resume=True)


def test_skipped_names_stay_dense_whatever_the_plan_says():
    model = build("llama")
    report = prune(model, (), "magnitude", plan_of(model, ("2:4",)), skip=["*.down_proj"])
    assert not any("down_proj" in row.name for row in report.linears)
    assert report.skipped["model.layers.1.mlp.down_proj"] == "asked for"


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop(UP), f"{UP} is of shape (384, 128) in the model, absent in the plan"),
        (lambda rows: rows.update(more={"pattern": "2:4", "shape": [4, 4]}), "more is absent in the model, of shape (4, 4)"),
        (lambda rows: rows[UP].update(shape=[384, 127]), "of shape (384, 128) in the model, of shape (384, 127)"),
    ],
    ids=["a linear missing", "one too many", "another shape"],
)
def test_a_plan_for_another_model(change, says, tmp_path):
    found = plan_of(checkpoint.load(KJV)).to_dict()
    change(found["linears"])
    Plan.from_dict(found).save(tmp_path / "plan.yaml")
    done = follow(tmp_path, "--method", "magnitude")
    assert done.exit_code == 2 and "the plan must be for this model" in done.stderr and says in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def follow(folder: Path, *more: str):
    """The command on the shipped model, with the plan in the folder."""
    args = ["prune", str(KJV), "--out", str(folder / "out"), "--plan", str(folder / "plan.yaml"), "--json", *more]
    return CliRunner().invoke(app, args)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 2:4", 'a plan must hold "linears"'),
        ("linears: {}", "a plan must be of version 1, got None"),
        ("version: 2\nlinears: {}", "a plan must be of version 1, got 2"),
        ("version: 1\nlinears: {}", "at least one linear"),
        ("version: 1\nlinears: {a: 2:4}", "must say pattern and shape of a"),
        ("version: 1\nlinears: {a: {pattern: 0.5, shape: [4, 4]}}", "must say pattern and shape of a"),
        ("version: 1\nlinears: {a: {pattern: half, shape: [4, 4]}}", "a pattern must be"),
        ("version: 1\nlinears: {a: {pattern: 50%, shape: [4]}}", "a plan's shape must be"),
        ("version: 1\nsparsity: 0.5\nlinears: {a: {pattern: 50%, shape: [4, 4]}}", "got 'sparsity'"),
        ("version: 1\nmethod: [a]\nlinears: {a: {pattern: 50%, shape: [4, 4]}}", "a plan's method must be text"),
        ("version: [", "must be YAML"),
        ("version: 2026-99-99", "must be YAML"),
    ],
)
def test_files_that_are_no_plan(text, says, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(SparsekitError) as caught:
        Plan.load(tmp_path / "plan.yaml")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_bad_calls(tmp_path):
    with pytest.raises(SparsekitError, match="must be a text file that can be read"):
        Plan.load(tmp_path / "none.yaml")
    with pytest.raises(SparsekitError, match="got one of them for b"):
        Plan({"a": "2:4"}, {"a": (4, 4), "b": (4, 4)})
    plan = plan_of(build("llama"))
    with pytest.raises(SparsekitError, match="compares weights within its own groups"):
        prune(build("llama"), (), "magnitude", plan, group="row")  # its 2:4 have no rows to count in
    with pytest.raises(SparsekitError, match="every one is skipped"):
        prune(build("llama"), (), "magnitude", plan_of(build("llama"), (None,)))
    plan.save(tmp_path / "plan.yaml")
    done = CliRunner().invoke(app, ["prune", "x", "--out", "y", "--plan", str(tmp_path / "plan.yaml"), "--pattern", "2:4"])
    assert done.exit_code == 2 and "leave one of them out" in done.stderr


def test_the_command_takes_the_method_of_the_plan(tmp_path):
    plan_of(checkpoint.load(KJV), ("50%",), method="magnitude").save(tmp_path / "plan.yaml")
    done = follow(tmp_path)
    assert done.exit_code == 0 and json.loads(done.stdout)["method"] == "magnitude"
    assert Plan.load(tmp_path / "out" / "plan.yaml") == Plan.load(tmp_path / "plan.yaml")
    done = follow(tmp_path, "--method", "wanda", "--overwrite")
    assert done.exit_code == 2 and "--calib must name a text for wanda" in done.stderr
