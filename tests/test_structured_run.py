"""Structured pruning from end to end: what is asked for, in which order it goes, what is written, and what is refused."""

import json
from pathlib import Path

import pytest
import shipped
import torch
from models import build, token_batches, unregistered
from test_cli import TEST, assert_refused, content, invoke
from torch import nn
from transformers import AutoModelForCausalLM

import sparsekit
from sparsekit import SparsekitError, checkpoint, prune_structured
from sparsekit.cli import _show_structured
from sparsekit.pipeline import parse_amount, prune_structured_folder
from sparsekit.report import StructuredReport
from sparsekit.structured import architecture_of, prune_experts, prune_layers, remove_sublayers

IDS = token_batches((2, 12))
SMALL = ("--calib", shipped.TEXTS / "kjv.calib.txt", "--samples", 4, "--seq-len", 32, "--device", "cpu")
PARTS = "layers, attention, mlp, experts, heads or ffn"


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS[0], use_cache=False).logits


def shapes(model: nn.Module) -> list[tuple]:
    architecture = architecture_of(model)
    return [tuple(vars(architecture.shape(block)).values()) for block in architecture.blocks(model)]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- on a model in memory ----


@pytest.mark.parametrize(
    "amount, found",
    [("4", 4), ("25%", 0.25), ("0.3", 0.3), (4, 4), (0.3, 0.3), (" 7 ", 7), ("12.5%", 0.125), ("1e-1", 0.1)],
)
def test_amounts(amount, found):
    assert parse_amount("layers", amount) == found and type(parse_amount("layers", amount)) is type(found)


@pytest.mark.parametrize("amount", ["0", "1.0", "100%", "-3", "0%", "nan", "inf", "", "%", "four", "²", True, 0, 1.0, -0.5])
def test_amounts_that_are_none(amount):
    with pytest.raises(SparsekitError, match="ffn to remove must be a count of at least 1, such as 4, or a share between 0 and 1"):
        parse_amount("ffn", amount)


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "mistral", "gpt2", "opt", "gemma3", "phi", "phi3", "falcon", "falcon, alibi", "falcon, new", "bloom"],
)
def test_every_part_in_one_run(name):
    model = build(name)
    before, said = count(model), []
    heads = architecture_of(model).shape(architecture_of(model).blocks(model)[0])
    group = heads.heads_a_unit
    report = prune_structured(
        model, IDS, ffn=0.25, heads=group, layers=1, mlp=1, attention="50%", progress=lambda *now: said.append(now)
    )
    assert [step.part for step in report.steps] == ["layers", "attention", "mlp", "heads", "ffn"], "in the order that is promised"
    found = shapes(model)
    assert len(found) == 2 and sum(shape[0] is None for shape in found) == sum(shape[3] is None for shape in found) == 1
    assert [shape[0] for shape in found if shape[0]] == [4 - group]
    width = heads.intermediate_size
    assert [shape[3] for shape in found if shape[3]] == [width - width // 4]
    assert report.parameters == report.parameters_predicted == count(model) < before == report.parameters_before
    assert report.tokens == 24 and report.per_layer_config and torch.isfinite(logits(model)).all()
    assert json.loads(json.dumps(report.to_dict()))["asked"] == {
        "layers": 1,
        "attention": 0.5,
        "mlp": 1,
        "heads": group,
        "ffn": 0.25,
    }
    assert {what.split()[0] for what, _, _ in said} >= {"layers", "attention", "mlp", "heads"}
    assert all(0 <= done <= of for _, done, of in said)
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS[0], use_cache=True, **how), model.generate(IDS[0], use_cache=False, **how))


def test_each_part_is_measured_on_what_is_left_by_then():
    model, by_hand = build("mixtral", num_hidden_layers=4), build("mixtral", num_hidden_layers=4)
    report = prune_structured(model, IDS, experts=2, layers=2)
    layers, experts = prune_layers(by_hand, IDS, 2), prune_experts(by_hand, IDS, 2)
    assert torch.equal(logits(model), logits(by_hand))
    assert report.steps[0].removed == list(layers.removed) and report.steps[0].importance == list(layers.influence)
    assert report.steps[1].removed == [list(experts.removed[i]) for i in range(2)]
    assert report.parameters == report.parameters_predicted == count(model)


@pytest.mark.parametrize(
    "name, asked, says",
    [
        ("llama", {}, f"something must be asked for, of {PARTS}, got nothing"),
        ("llama", {"layers": 3}, "layers to remove must be at least one and leave one, got 3 of 3"),
        ("llama", {"layers": 9}, "got 9 of 3"),
        ("llama", {"layers": 0.1}, "got 0.1 of 3"),
        ("llama", {"layers": 1, "attention": 2}, "attention to remove must be at least one and leave one, got 2 of 2"),
        ("llama", {"layers": 1, "heads": 4}, "2 of 4 at a time and not all, got 4 to remove"),
        ("llama", {"layers": 1, "heads": 3}, "2 of 4 at a time .*got 3 to remove"),
        ("llama", {"heads": 0.25}, "2 of 4 at a time .*got 0.25 to remove"),
        # Rounded to whole key-value heads it would be fewer than asked for.
        ("llama", {"heads": 3, "scope": "global"}, "2 at a time, .* at most 6 of 12 can go, got 3 to remove"),
        ("llama", {"heads": 1, "scope": "global"}, "2 at a time, .*got 1 to remove"),
        # Enough while all blocks are there, too many when their turn comes.
        ("llama", {"layers": 2, "heads": 4, "scope": "global"}, "at most 2 of 4 can go, got 4 to remove"),
        ("llama", {"attention": 2, "heads": 4, "scope": "global"}, "at most 2 of 4 can go, got 4 to remove"),
        ("llama", {"layers": 2, "ffn": 44, "scope": "global"}, "at most 43 of 44 can go, got 44 to remove"),
        ("llama", {"layers": 1, "mlp": 1, "ffn": 44, "scope": "global"}, "at most 43 of 44 can go, got 44 to remove"),
        ("llama", {"layers": 1, "scope": "global"}, "scope=global is for heads and ffn, and neither is to go; leave it out"),
        ("llama", {"mlp": 1, "compensate": False}, "compensate=False is for heads and ffn, and neither is to go; leave it out"),
        ("llama", {"layers": 1, "ffn": 44}, "must keep at least one of its 44 neurons, got 44"),
        ("llama", {"ffn": 0.01}, "at least one of the neurons must go"),
        ("llama", {"ffn": 1.0}, "ffn to remove must be a count of at least 1"),
        ("llama", {"layers": 1, "ffn": 0.3, "round_to": 64}, "at least one of the neurons must go"),
        ("llama", {"layers": 1, "round_to": 8}, "round_to=8 is for the neurons"),
        ("llama", {"layers": 1, "ffn": 0.5, "scope": "model"}, "scope must be layer or global, got 'model'"),
        ("llama", {"layers": 1, "experts": 1}, "must have experts to remove some, got LlamaForCausalLM without one"),
        ("mixtral", {"layers": 1, "experts": 3}, "must be 1 to 2, for block 0 has 4 and each token is given to 2"),
        ("mixtral", {"layers": 1, "ffn": 0.5}, "must keep a multiple of 8 neurons each, .* got 22; give round_to=8"),
        (None, {"layers": 1}, r"structured pruning knows .*, got stablelm; register a sparsekit\.structured\.Architecture"),
        ("falcon", {"heads": 4}, "1 of 4 at a time and not all, got 4 to remove"),  # which share one key-value head
    ],
)
def test_what_cannot_be_is_refused_before_anything_has_changed(name, asked, says):
    model = build(name) if name else unregistered()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(SparsekitError, match=says):
        prune_structured(model, IDS, **asked)
    assert state.keys() == model.state_dict().keys() and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_parts_that_may_all_have_gone_by_their_turn_are_refused_before():
    one = build("llama")
    remove_sublayers(one, "mlp", [0, 1])
    with pytest.raises(SparsekitError, match="all 1 that have any may go with the 1 layers and mlp asked for"):
        prune_structured(one, IDS, layers=1, ffn=0.5)
    model = build("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[0])  # two blocks of three have experts
    count_before = count(model)
    with pytest.raises(SparsekitError, match="all 2 that have any may go with the 2 layers and mlp asked for"):
        prune_structured(model, IDS, mlp=2, experts=1)
    assert count(model) == count_before


def test_no_batches():
    with pytest.raises(SparsekitError, match="calibration batches, got none"):
        prune_structured(build("llama"), [], layers=1)


def test_a_count_over_all_blocks_together():
    model = build("llama")
    report = prune_structured(model, IDS, ffn=60, heads=4, scope="global", compensate=False)
    found = shapes(model)
    assert sum(44 - shape[3] for shape in found) == 60 and sum(4 - shape[0] for shape in found) == 4
    assert report.parameters == report.parameters_predicted
    assert [step.damping for step in report.steps] == [[None] * 3] * 2


def test_a_fault_of_a_descriptor_is_not_passed_over(monkeypatch):
    from sparsekit.pipeline import structured

    sizes = structured._sizes
    monkeypatch.setattr(structured, "_sizes", lambda *args: {**sizes(*args), "layers": 1})
    with pytest.raises(SparsekitError, match=r"without its layers the model must hold \d+ parameters, got \d+; correct"):
        prune_structured(build("llama"), IDS, layers=1)


# ---- from folder to folder ----


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("asked", [{"layers": 1}, {"mlp": 1}, {"heads": 0.5, "layers": 1}])
def test_a_folder_is_what_the_model_in_memory_becomes(name, asked, tmp_path):
    checkpoint.save(build(name), tmp_path / "in", format="dense")
    report = prune_structured_folder(tmp_path / "in", tmp_path / "out", IDS, device="cpu", **asked)
    model = build(name)
    prune_structured(model, IDS, **asked)
    loaded = checkpoint.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded), logits(model)) and count(loaded) == report.parameters_predicted
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    if report.per_layer_config is None:
        theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()) and count(theirs) == report.parameters_predicted


def test_weights_keep_the_dtype_that_they_were_stored_in(tmp_path):
    checkpoint.save(build("llama", torch.bfloat16), tmp_path / "in", format="dense")
    prune_structured_folder(tmp_path / "in", tmp_path / "out", IDS, device="cpu", dtype=torch.float32, ffn=0.5)
    assert checkpoint.stored_dtype(tmp_path / "out") == torch.bfloat16


def test_a_config_that_does_not_say_what_is_left_is_not_written(tmp_path, monkeypatch):
    checkpoint.save(build("llama"), tmp_path / "in", format="dense")
    monkeypatch.setattr("sparsekit.structured.layers.settle_config", lambda *_: None)
    with pytest.raises(SparsekitError, match=r"the config must say what is left of the model, and .*layers\.\d\.self_attn"):
        prune_structured_folder(tmp_path / "in", tmp_path / "out", IDS, device="cpu", attention=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_compressed_folder_is_refused(tmp_path):
    model = build("llama")
    sparsekit.prune(model, method="magnitude")
    sparsekit.compress(model)
    checkpoint.save(model, tmp_path / "in")
    with pytest.raises(SparsekitError, match=r"must be dense, and .* is compressed; take parts out first"):
        prune_structured_folder(tmp_path / "in", tmp_path / "out", IDS, device="cpu", layers=1)
    assert not (tmp_path / "out").exists()


# ---- the command line ----


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> tuple[Path, dict]:
    """The shipped model with blocks that differ, as the command writes it, and what it said."""
    out = tmp_path_factory.mktemp("narrow") / "out"
    parts = ("--structured", "heads=2", "--structured", "ffn=0.3", "--round-to", 64, "--structured", "mlp=1", "--no-compensate")
    done = invoke("prune", shipped.MODEL, "--out", out, *SMALL, *parts, "--json")
    assert done.exit_code == 0, done.stderr
    return out, json.loads(done.stdout)


def test_the_command_says_what_went_and_keeps_it(narrow):
    out, said = narrow
    assert said.pop("out") == str(out) and said == json.loads((out / "report.json").read_text())
    assert [step["part"] for step in said["steps"]] == ["mlp", "heads", "ffn"]
    assert said["asked"] == {"mlp": 1, "heads": 2, "ffn": 0.3} and said["structured"] is True
    model = checkpoint.load(out, device="cpu")
    assert [shape[0] for shape in shapes(model)] == [2] * 4
    assert sorted(shape[3] or 0 for shape in shapes(model)) == [0, 320, 320, 320]  # 384 - 115, up to a multiple of 64
    assert count(model) == said["parameters_predicted"] == said["parameters"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("format", checkpoint.FORMATS)
def test_its_result_is_pruned_to_2_4_and_looked_at_like_any_other(narrow, format, tmp_path):
    folder, _ = narrow
    done = invoke("prune", folder, "--out", tmp_path / "out", *SMALL, "--format", format)
    assert done.exit_code == 0, done.stderr
    found = json.loads(invoke("inspect", tmp_path / "out", "--json").stdout)
    assert found["format"] == format
    assert {row["pattern"] for row in found["linears"] if "layers" in row["name"]} == {"2:4"}
    said = [
        json.loads(invoke("eval", path, "--text", TEST, "--seq-len", 128, "--max-tokens", 1024, "--device", "cpu", "--json").stdout)
        for path in (folder, tmp_path / "out")
    ]
    assert 1 < said[0]["perplexity"] < said[1]["perplexity"]
    done = invoke("generate", tmp_path / "out", "--prompt", "And the", "--max-new-tokens", 4, "--device", "cpu", "--json")
    assert json.loads(done.stdout)["tokens"] == 4


def test_the_table(tmp_path):
    done = invoke("prune", shipped.MODEL, "--out", tmp_path / "out", *SMALL, "--structured", "layers=25%")
    assert done.exit_code == 0 and done.stderr == ""
    assert "layers" in done.stdout and "721,792 of 918,656 parameters are left (721,792 predicted)" in done.stdout
    assert "its blocks differ" not in done.stdout
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and count(theirs) == 721_792


@pytest.mark.parametrize(
    "entries, says",
    [([{"num_attention_heads": 3}] * 2, "transformers' config cannot say what"), ([{}, {"mlp": False}], "its blocks differ:")],
)
def test_a_result_for_sparsekit_alone_is_told_with_its_reason(entries, says, capsys):
    _show_structured(Path("out"), StructuredReport({"heads": 1}, per_layer_config=entries), False)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--structured", "kv=3"), rf"--structured must be {PARTS} = an amount, such as heads=25%, got 'kv=3'"),
        (("--structured", "layers"), "= an amount, such as heads=25%, got 'layers'"),
        (("--structured", "layers=1", "--structured", "layers=2"), "must name each part once, got layers twice"),
        (("--structured", "layers=4"), "layers to remove must be at least one and leave one, got 4 of 4"),
        (("--structured", "heads=8"), "2 of 4 at a time and not all, got 8"),
        (("--structured", "ffn=1.0"), r"ffn to remove must be a count of at least 1, .*, got 1\.0"),
        (("--structured", "experts=1"), "must have experts to remove some"),
        (("--structured", "layers=1", "--pattern", "2:4"), "takes parts out whole, got --pattern too; leave it out"),
        (("--structured", "layers=1", "--method", "wanda"), "takes parts out whole, got --method too; leave it out"),
        (("--structured", "layers=1", "--format", "dense"), "takes parts out whole, got --format too; leave it out"),
        (("--structured", "layers=1", "--resume"), "takes parts out whole, got --resume too; leave it out"),
        (("--scope", "global"), "--scope belongs to --structured, and is given without it"),
        (("--round-to", "64"), "--round-to belongs to --structured, and is given without it"),
        (("--structured", "layers=1", "--round-to", "64"), "round_to=64 is for the neurons"),
        (("--structured", "layers=1", "--no-compensate"), "compensate=False is for heads and ffn"),
        (("--structured", "heads=4", "--structured", "layers=3", "--scope", "global"), "at most 2 of 4 can go, got 4"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(arguments, says, tmp_path):
    assert_refused(invoke("prune", shipped.MODEL, "--out", tmp_path / "deep" / "out", *SMALL, *arguments), says)
    assert not any(tmp_path.iterdir())


def test_calibration_is_needed_and_an_architecture_that_is_known(tmp_path):
    done = invoke("prune", shipped.MODEL, "--out", tmp_path / "out", "--structured", "layers=1")
    assert_refused(done, "--calib must name a text for --structured")
    checkpoint.save(unregistered(), tmp_path / "in", format="dense")
    done = invoke("prune", tmp_path / "in", "--out", tmp_path / "out", *SMALL, "--structured", "layers=1")
    assert_refused(done, r"structured pruning knows .*, got stablelm; register a sparsekit\.structured\.Architecture")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_full_disk_leaves_what_was_there(narrow, tmp_path, monkeypatch):
    out, _ = narrow
    before = content(out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsekit.checkpoint.writing.save_file", full)
    done = invoke("prune", shipped.MODEL, "--out", out, *SMALL, "--structured", "layers=1", "--overwrite")
    assert_refused(done, "No space left on device; nothing was written")
    assert content(out) == before and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_report_is_of_its_own_kind():
    assert StructuredReport({"layers": 1}).to_dict()["structured"] is True
