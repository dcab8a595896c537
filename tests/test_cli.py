"""The command line: what comes out, what is refused and how, and what is left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparsekit import Pattern, checkpoint
from sparsekit.cli import app

MODEL = Path(__file__).parent / "data" / "kjv1m"
TEXTS = Path(__file__).parent.parent / "examples" / "data"
CALIB, TEST = TEXTS / "kjv.calib.txt", TEXTS / "kjv.test.txt"
SMALL = ("--samples", "8", "--seq-len", "32", "--device", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments, **options):
    command = [sys.executable, "-m", "sparsekit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(done, says: str) -> None:
    """Exit code 2, one sentence on stderr, nothing on stdout. ``done`` of a CliRunner or of a process."""
    code = done.returncode if isinstance(done, subprocess.CompletedProcess) else done.exit_code
    assert code == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert re.fullmatch(r"sparsekit: [^\n]+\n", done.stderr), done.stderr
    assert re.search(says, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """kjv1m, pruned once and written both ways, with what the command said."""
    folder = tmp_path_factory.mktemp("outputs")
    said = {
        format: invoke(
            "prune",
            MODEL,
            "--calib",
            CALIB,
            "--out",
            folder / format,
            "--format",
            format,
            *SMALL,
            *("--json",)[: format == "dense"],
        )
        for format in checkpoint.FORMATS
    }
    return folder, said


# ---- what comes out ----


def test_prune_writes_both_formats_of_the_same_weights(outputs):
    folder, said = outputs
    assert all(done.exit_code == 0 for done in said.values()), said
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    assert dense.dtype == torch.float16
    compressed = checkpoint.load(folder / "compressed", device="cpu")
    for name, module in compressed.named_modules():
        if hasattr(module, "to_linear"):
            assert torch.equal(module.to_linear().weight, dense.get_submodule(name).weight)
    sizes = {format: (folder / format / "model-00001-of-00005.safetensors").stat().st_size for format in checkpoint.FORMATS}
    assert sizes["compressed"] < 0.6 * sizes["dense"]


def test_prune_says_what_it_did(outputs):
    folder, said = outputs
    report = json.loads(said["dense"].stdout)
    assert (report["method"], report["pattern"], report["tokens"]) == ("sparsegpt", "2:4", 8 * 32)
    assert report["out"] == str(folder / "dense")
    assert report["sparsity"] == 0.5
    assert len(report["linears"]) == 28
    assert report["skipped"] == {"model.embed_tokens": "embedding", "lm_head": "output layer"}
    table = said["compressed"].stdout
    assert all(f"{linear['name']} " in table for linear in report["linears"]), "a name was cut"
    assert "not pruned: lm_head (output layer)" in table
    assert [done.stderr for done in said.values()] == ["", ""]
    kept = json.loads((folder / "dense" / "report.json").read_text())
    assert kept == {key: value for key, value in report.items() if key != "out"}


def test_eval_of_both_formats_agrees(outputs):
    folder, _ = outputs
    said = {
        path: invoke("eval", path, "--text", TEST, "--seq-len", 128, "--max-tokens", 2048, "--device", "cpu", "--json")
        for path in (folder / "compressed", folder / "dense", MODEL)
    }
    results = [json.loads(done.stdout) for done in said.values()]
    assert all(result["tokens"] == 16 * 127 for result in results)
    compressed, dense, unpruned = (result["perplexity"] for result in results)
    assert compressed == pytest.approx(dense, rel=1e-4)
    assert unpruned < dense < 3 * unpruned
    assert all(done.stderr == "" for done in said.values())
    text = invoke("eval", folder / "dense", "--text", TEST, "--seq-len", 128, "--max-tokens", 2048, "--device", "cpu").stdout
    assert text.startswith(f"perplexity {dense:.4f} over 2032 tokens in ")


def test_inspect_of_both_formats(outputs):
    folder, _ = outputs
    for format in checkpoint.FORMATS:
        found = json.loads(invoke("inspect", folder / format, "--json").stdout)
        assert found["format"] == format
        assert [row["pattern"] for row in found["linears"]] == ["2:4"] * 28
        ratio = {row["bytes"] / row["dense_bytes"] for row in found["linears"]}
        assert ratio == {9 / 16 if format == "compressed" else 1}
        table = invoke("inspect", folder / format).stdout
        assert all(f"{row['name']} " in table for row in found["linears"]), "a name was cut"
        assert f"{found['bytes']:,} bytes" in table
    found = json.loads(invoke("inspect", MODEL, "--json").stdout)
    assert {row["pattern"] for row in found["linears"]} == {"dense"}


def test_generate(outputs):
    arguments = ("--prompt", "And the LORD said unto", "--max-new-tokens", 12, "--device", "cpu")
    result = json.loads(invoke("generate", outputs[0] / "compressed", *arguments, "--json").stdout)
    assert result["tokens"] == 12 and result["tokens_per_second"] > 0
    assert len(result["text"]) > 5
    said = invoke("generate", outputs[0] / "compressed", *arguments, "--dtype", "float32")
    assert said.stdout.startswith(result["text"])


def test_a_pattern_that_is_not_2_4_is_stored_dense_and_says_so(tmp_path):
    done = invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude", "--pattern", "60%", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["pattern"] == "60%"
    assert done.stderr == "sparsekit: no linear holds 2:4 after pruning to 60%; the weights are stored dense\n"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_skip_leaves_linears_alone(tmp_path):
    skips = ("--skip", "*.down_proj", "--skip", "model.layers.3")
    done = invoke("prune", MODEL, "--out", tmp_path / "out", "--method", "magnitude", *skips, "--json")
    assert len(json.loads(done.stdout)["linears"]) == 18
    patterns = {row["name"]: row["pattern"] for row in json.loads(invoke("inspect", tmp_path / "out", "--json").stdout)["linears"]}
    assert patterns["model.layers.0.mlp.up_proj"] == "2:4"
    assert patterns["model.layers.0.mlp.down_proj"] == patterns["model.layers.3.mlp.up_proj"] == "dense"


def weight_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def test_the_seed_decides_the_result(tmp_path):
    weights = []
    for seed in (5, 5, 6):
        options = ("--method", "wanda", "--seed", seed, "--overwrite", "--format", "dense", "--samples", 2, "--seq-len", 16)
        assert invoke("prune", MODEL, "--calib", CALIB, "--out", tmp_path / "out", *options).exit_code == 0
        weights.append(weight_bytes(tmp_path / "out"))
    assert weights[0] == weights[1] != weights[2]
    assert os.listdir(tmp_path) == ["out"]


def test_a_criterion_counted_in_rows(tmp_path):
    options = ("--criterion", "obs", "--group", "row", "--pattern", "50%", "--samples", 2, "--seq-len", 16, "--json")
    result = invoke("prune", MODEL, "--calib", CALIB, "--out", tmp_path / "out", *options)
    report = json.loads(result.stdout)
    assert (report["method"], report["group"], report["pattern"]) == ("obs", "row", "50%")
    model = checkpoint.load(tmp_path / "out", device="cpu")
    for row in report["linears"]:
        zeros = (model.get_submodule(row["name"]).weight == 0).sum(1)
        assert (zeros == row["shape"][1] // 2).all() and row["damping"] == 0.01 and row["output_error"] > 0


@pytest.mark.parametrize(
    "criterion, group, pattern, share",
    [("gradient", "layer", "2:4", 0.5), ("wanda", "model", "30%", 0.3), ("obd", "block", "block:4x4@25%", 0.25)],
)
def test_criteria_and_groups(criterion, group, pattern, share, tmp_path):
    options = ("--criterion", criterion, "--pattern", pattern, "--json", *(("--group", group) if "%" in pattern else ()))
    done = invoke("prune", MODEL, "--calib", CALIB, "--out", tmp_path / "out", *options, *SMALL)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["method"] == criterion and report["sparsity"] == pytest.approx(share, abs=1e-3) and report["tokens"] > 0
    alike = len({round(row["sparsity"], 4) for row in report["linears"]}) == 1
    assert alike == (group == "layer")


# Each of the other criteria, and the patterns that those above lack.
@pytest.mark.parametrize(
    "criterion, pattern", [("activation", "4:8 pairs"), ("magnitude", "block:32x32@50%"), ("sparsegpt", "block:32x32@50%")]
)
def test_criteria_and_patterns(criterion, pattern, tmp_path):
    options = ("--criterion", criterion, "--pattern", pattern, "--format", "dense", *SMALL)
    done = invoke("prune", MODEL, "--calib", CALIB, "--out", tmp_path / "out", *options)
    assert done.exit_code == 0, done.stderr
    report, model = json.loads((tmp_path / "out" / "report.json").read_text()), checkpoint.load(tmp_path / "out", device="cpu")
    assert report["method"] == criterion and report["pattern"] == pattern and report["sparsity"] == pytest.approx(0.5, abs=0.02)
    for row in report["linears"]:
        assert Pattern.parse(pattern).check(model.get_submodule(row["name"]).weight) is None


def test_calibration_sources_of_the_same_tokens_give_the_same_weights(tmp_path):
    text = CALIB.read_text(encoding="utf-8")[:40_000]
    ids = checkpoint.load_tokenizer(MODEL)(text, add_special_tokens=False, verbose=False)["input_ids"]
    (tmp_path / "folder").mkdir()
    for name, content in (
        ("a.txt", text),
        ("folder/a.md", text),
        ("a.jsonl", json.dumps({"verse": text})),
        ("a.ids", " ".join(map(str, ids))),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
    save_file({"ids": torch.tensor(ids)}, tmp_path / "a.safetensors")
    weights = {}
    for source in ("a.txt", "folder", "a.jsonl", "a.ids", "a.safetensors"):
        options = ("--method", "wanda", "--samples", 2, "--seq-len", 64, "--format", "dense", "--overwrite")
        field = ("--calib-field", "verse") if source == "a.jsonl" else ()
        done = invoke("prune", MODEL, "--calib", tmp_path / source, "--out", tmp_path / "out", *options, *field)
        assert done.exit_code == 0, done.stderr
        weights[source] = weight_bytes(tmp_path / "out")
    assert len(set(weights.values())) == 1


def test_calibration_on_what_the_model_writes(tmp_path):
    options = ("--calib", "self", "--method", "wanda", "--format", "dense", "--samples", 5, "--seq-len", 16, "--overwrite")
    weights = []
    for run, seed in ((process, 5), (invoke, 5), (invoke, 6)):
        done = run("prune", MODEL, "--out", tmp_path / "out", *options, "--json", "--seed", seed)
        assert done.stderr == ""
        assert json.loads(done.stdout)["tokens"] == 5 * 16
        weights.append(weight_bytes(tmp_path / "out"))
    assert weights[0] == weights[1] != weights[2]


def test_the_module_runs_as_a_process(tmp_path):
    """stdout is one JSON object and stderr is silent, whatever else torch and transformers have to say."""
    done = process("prune", MODEL, "--calib", CALIB, "--out", tmp_path / "out", "--method", "wanda", *SMALL, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["method"] == "wanda"
    assert done.stdout.count("\n") == 1
    done = process("inspect", tmp_path / "out", env={**os.environ, "COLUMNS": "40"})
    assert "model.layers.3.self_attn.q_proj " in done.stdout


def test_without_arguments_it_shows_help():
    done = process()
    said = done.stdout + done.stderr
    assert "Usage" in said
    assert all(command in said for command in ("prune", "eval", "inspect", "generate"))
    assert invoke("--help").exit_code == 0


# ---- what is refused ----


def model_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def with_weight(name: str, value: float):
    def make(tmp_path):
        folder = model_copy(tmp_path)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[3] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return {"model": folder}

    return make


def with_file(name: str, value: str | bytes | None):
    def make(tmp_path):
        folder = model_copy(tmp_path)
        (folder / name).unlink()
        if value is not None:
            (folder / name).write_bytes(value if isinstance(value, bytes) else value.encode())
        return {"model": folder}

    return make


def with_text(value: bytes):
    def make(tmp_path):
        (tmp_path / "text").write_bytes(value)
        return {"text": tmp_path / "text"}

    return make


def empty_folder(tmp_path):
    (tmp_path / "text").mkdir()
    return {"text": tmp_path / "text"}


def newer(tmp_path):
    folder = model_copy(tmp_path)
    metadata = {"format": "pt", "sparsekit": json.dumps({"version": 2, "linears": {}})}
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata)
    return {"model": folder}


def without_blocks(tmp_path):
    checkpoint.save(build("llama", num_hidden_layers=0), tmp_path / "model", tokenizer=checkpoint.load_tokenizer(MODEL))
    return {"model": tmp_path / "model"}


def small_vocabulary(tmp_path):
    checkpoint.save(build("llama"), tmp_path / "model", tokenizer=checkpoint.load_tokenizer(MODEL))
    return {"model": tmp_path / "model"}


def full(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    return {}


def file_for_out(tmp_path):
    (tmp_path / "out").write_text("mine")
    return {}


def file_for_model(tmp_path):
    (tmp_path / "model").write_text("a file")
    return {"model": tmp_path / "model"}


def inputs_in_out(tmp_path):
    (tmp_path / "out").mkdir()
    return {"model": shutil.copytree(MODEL, tmp_path / "out" / "model")}


def half(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


def as_it_is(_):
    return {}


NORM, UP = "model.layers.1.post_attention_layernorm.weight", "model.layers.2.mlp.up_proj.weight"
# Refused by prune and by eval alike: what is made beforehand, options, what is said.
BOTH = {
    "model missing": (lambda _: {"model": "/no/such/model"}, (), "/no/such/model does not exist"),
    "model a file": (file_for_model, (), "must be a folder, and .*model is a file"),
    "no config": (with_file("config.json", None), (), r"must hold a config\.json"),
    "config broken": (with_file("config.json", "{"), (), r"config\.json is not JSON"),
    "config with a wrong type": (with_file("config.json", '{"model_type": "llama", "hidden_size": "x"}'), (), "the config in"),
    "weights cut": (with_file("model.safetensors", half(MODEL / "model.safetensors")), (), "not a whole safetensors file"),
    "weights something else": (with_file("model.safetensors", "PK" * 99), (), "not a whole safetensors file"),
    "weights missing": (with_file("model.safetensors", None), (), r"model\.safetensors is missing"),
    "newer format": (newer, (), "format version 2, this sparsekit reads up to 1; upgrade sparsekit"),
    "tokenizer broken": (with_file("tokenizer.json", "{"), (), "must hold a tokenizer"),
    "tokenizer missing": (with_file("tokenizer.json", None), (), "must hold a tokenizer"),
    "tokenizer of another model": (small_vocabulary, ("--seq-len", 32), "vocabulary of 96, got"),
    "text missing": (lambda _: {"text": "/no/such/text"}, (), "/no/such/text cannot be read: No such file"),
    "text an empty folder": (empty_folder, (), "cannot be read: Is a directory|must hold .txt or .md files, and has none"),
    "text empty": (with_text(b""), (), "is empty"),
    "text blank": (with_text(b" \n"), (), "is empty"),
    "text too short": (with_text(b"And the LORD said"), (), "at least one sequence of 1024 tokens, got"),
    "text not UTF-8": (with_text(b"And \xff"), (), "must be UTF-8, and byte 4 is not"),
    "seq-len above the context": (
        as_it_is,
        ("--seq-len", 1025),
        "--seq-len must be 1 to the model's context of 1024 tokens, got 1025",
    ),
    "seq-len 0": (as_it_is, ("--seq-len", 0), "--seq-len must be 1 to"),
    "seq-len negative": (as_it_is, ("--seq-len", -5), "--seq-len must be 1 to"),
    "device unknown": (as_it_is, ("--device", "gpu"), "the device must be one torch can use here, got 'gpu'"),
    "device absent": (as_it_is, ("--device", "cuda:99"), "the device must be one torch can use here, got 'cuda:99'"),
    "device without arithmetic": (as_it_is, ("--device", "meta"), "the device must be one that computes"),
}
PRUNE = {
    "group of 2:4": (
        as_it_is,
        ("--method", "wanda", "--group", "row"),
        "2:4 compares weights within its own groups, got group = 'row'",
    ),
    "group unknown": (as_it_is, ("--method", "wanda", "--pattern", "50%", "--group", "head"), "must be row, layer, block or model"),
    "method unknown": (
        as_it_is,
        ("--method", "gptq"),
        "must be activation, gradient, magnitude, obd, obs, sparsegpt or wanda, got 'gptq'",
    ),
    "pattern unknown": (as_it_is, ("--pattern", "half"), '"2:4", "4:8" or "1:4", .* "4:8 pairs", .* "50%", .*got \'half\''),
    "pattern above all": (as_it_is, ("--pattern", "120%"), "sparsity must lie in 0% to 100%, got 120%"),
    "pattern below nothing": (as_it_is, ("--pattern", "-5%"), "sparsity must lie in 0% to 100%, got -5%"),
    "pattern keeps too many": (as_it_is, ("--pattern", "5:4"), "got 5:4"),
    "format unknown": (as_it_is, ("--format", "gguf"), "must be compressed or dense, got 'gguf'"),
    "samples 0": (as_it_is, ("--samples", 0), "samples must be at least 1, got 0"),
    "skip unknown": (as_it_is, ("--skip", "layer.7", *SMALL), "must be a module of the model, got 'layer.7'"),
    "everything skipped": (as_it_is, ("--skip", "*", *SMALL), "every one is skipped"),
    "no linear": (without_blocks, ("--samples", 4, "--seq-len", 16), "decoder blocks with a linear to prune"),
    "weight NaN": (with_weight(UP, float("nan")), SMALL, r"NaN or Inf in model\.layers\.2\.mlp\.up_proj"),
    "weight Inf": (with_weight(UP, float("inf")), SMALL, r"NaN or Inf in model\.layers\.2\.mlp\.up_proj"),
    "activation NaN": (with_weight(NORM, float("nan")), SMALL, r"model\.layers\.1\.mlp\.gate_proj .*NaN or Inf"),
    "out not empty": (full, (), "exists and is not empty; give another, or --overwrite"),
    "out a file": (file_for_out, (), "the output must be a folder, got the file"),
    "out a file, overwriting": (file_for_out, ("--overwrite",), "the output must be a folder, got the file"),
    "out holds other things": (full, ("--overwrite",), "only a model folder is overwritten"),
    "out holds the model": (inputs_in_out, ("--overwrite",), "must not be or hold the input"),
}


@pytest.mark.parametrize("case", [*BOTH, *PRUNE])
def test_prune_refuses(case, tmp_path):
    make, options, says = {**BOTH, **PRUNE}[case]
    given = {"model": MODEL, "text": CALIB, **make(tmp_path)}
    was = content(tmp_path)
    arguments = ("prune", given["model"], "--calib", given["text"], "--out", tmp_path / "out", *options)
    assert_refused(invoke(*arguments), says)
    assert content(tmp_path) == was


@pytest.mark.parametrize("case", BOTH)
def test_eval_refuses(case, tmp_path):
    make, options, says = BOTH[case]
    given = {"model": MODEL, "text": TEST, **make(tmp_path)}
    assert_refused(invoke("eval", given["model"], "--text", given["text"], *options, "--json"), says)


@pytest.mark.parametrize("case", [case for case in BOTH if case.startswith(("model", "no config", "config", "weights", "newer"))])
def test_inspect_and_generate_refuse(case, tmp_path):
    make, _, says = BOTH[case]
    folder = make(tmp_path)["model"]
    assert_refused(invoke("inspect", folder), says)
    assert_refused(invoke("generate", folder, "--prompt", "And"), says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("eval", MODEL, "--text", TEST, "--max-tokens", 0), "max_tokens must be at least 1, got 0"),
        (("eval", MODEL, "--text", TEST, "--seq-len", 64, "--max-tokens", 63), "at least one sequence of 64 tokens, got 63"),
        (("eval", MODEL, "--text", TEST, "--dtype", "int8"), "must be auto, float32, bfloat16 or float16, got 'int8'"),
        (("generate", MODEL, "--prompt", ""), "at least one token"),
        (("generate", MODEL, "--prompt", "And", "--max-new-tokens", 1024), "must fit the model's context of 1024"),
        (("prune", MODEL, "--out", "/tmp/never", "--method", "wanda"), "--calib must name a text for wanda"),
        (("prune", MODEL, "--out", "/tmp/never", "--calib", "self", "--calib-field", "a"), r"belongs to a \.jsonl file, got 'a'"),
        (("prune", MODEL, "--out", "/tmp/never", "--calib", CALIB, "--calib-field", "a"), r"belongs to a \.jsonl file, got 'a'"),
        (("prune", MODEL, "--out", "/tmp/never", "--calib", "self", "--samples", 0), "samples must be at least 1, got 0"),
        (("prune", MODEL, "--out", "/tmp/never", "--calib", MODEL), r"must hold \.txt or \.md files"),
        (("prune", MODEL, "--out", "/tmp/never", "--calib", MODEL / "model.safetensors"), "one tensor or one called input_ids"),
    ],
    ids=lambda value: " ".join(map(str, value[2:])) if isinstance(value, tuple) else "",
)
def test_refused_by_one_command(arguments, says):
    assert_refused(invoke(*arguments), says)


def test_a_compressed_model_is_not_pruned_again(outputs, tmp_path):
    assert_refused(
        invoke("prune", outputs[0] / "compressed", "--out", tmp_path / "out", "--method", "magnitude"), "compressed already"
    )


def test_an_error_is_one_line_however_long_and_as_it_is(tmp_path):
    """Not wrapped, not coloured, and nothing in a path taken for markup or an emoji."""
    folder = tmp_path / ("[red]" + "long " * 40 + ":smile:")
    done = process("inspect", folder, env={**os.environ, "COLUMNS": "40"})
    assert_refused(done, re.escape(str(folder)))


def test_a_mistake_leaves_a_process_with_one_sentence(tmp_path):
    given = with_weight(NORM, float("nan"))(tmp_path)
    done = process("prune", given["model"], "--calib", CALIB, "--out", tmp_path / "out", *SMALL, "--json")
    assert_refused(done, r"model\.layers\.1\.mlp\.gate_proj .*NaN or Inf")
    assert os.listdir(tmp_path) == ["model"]
