"""Model folders, written, read back, damaged and interrupted."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from models import ARCHITECTURES, BLOCKS, build, matrix, token_batches
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparsekit import NM, SparsekitError, checkpoint, compress
from sparsekit.checkpoint import writing
from sparsekit.inspection import inspect
from sparsekit.linear import SparseLinear
from sparsekit.pipeline import prune
from sparsekit.report import PruneReport

KJV = Path(__file__).parent / "data" / "kjv1m"
MODELS = ["llama", "llama, tied", "gpt2", "opt", "qwen2", "gemma3"]


def pruned(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A dense model whose linears hold 2:4, but for one, which is left dense."""
    model = build(name, dtype)
    prune(model, method="magnitude", skip=[ARCHITECTURES[name].targets()[-1]])
    return model


@cache
def dense_and_sparse(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    dense, sparse = pruned(name, dtype), pruned(name, dtype)
    assert compress(sparse)
    return dense, sparse


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_batches((3, 16))[0], use_cache=False).logits


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """The same tensors bit for bit, buffers that are not saved among them."""
    for kind in ("named_parameters", "named_buffers"):
        left, right = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, theirs))
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype, name
            assert torch.equal(left[name], right[name]), name


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- there and back ----


@pytest.mark.parametrize("name", MODELS)
def test_compressed_round_trip(name, tmp_path):
    dense, sparse = dense_and_sparse(name)
    checkpoint.save(sparse, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", device="cpu")
    assert_same(loaded, sparse)
    linears = {path: module for path, module in loaded.named_modules() if isinstance(module, SparseLinear)}
    assert len(linears) == sum(isinstance(module, SparseLinear) for module in sparse.modules()) > BLOCKS
    for path, linear in linears.items():
        assert torch.equal(matrix(linear.to_linear()), matrix(dense.get_submodule(path)))
        assert type(linear.to_linear()) is type(dense.get_submodule(path))
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-5, atol=1e-5)
    assert not any(module.training for module in loaded.modules())
    tied = dense.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_dense_format_is_an_ordinary_folder(name, form, tmp_path):
    """From a model with zeros, or with SparseLinears, transformers alone reads the same weights."""
    dense, sparse = dense_and_sparse(name)
    checkpoint.save(dense if form == "dense" else sparse, tmp_path, format="dense")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(theirs, dense)
    assert_same(checkpoint.load(tmp_path, device="cpu"), dense)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_refuses_a_compressed_folder(name, tmp_path, monkeypatch):
    """It must not end up with random weights, as it does where a weight is only absent."""
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 20_000)
    checkpoint.save(dense_and_sparse(name)[1], tmp_path)
    for loader in (AutoModelForCausalLM, type(dense_and_sparse(name)[0])):
        with pytest.raises((RuntimeError, ValueError)):
            loader.from_pretrained(tmp_path)


def test_a_process_without_sparsekit_refuses_a_compressed_folder(tmp_path):
    checkpoint.save(dense_and_sparse("llama")[1], tmp_path / "model")
    script = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode
    assert "Traceback" in done.stderr
    assert "sparsekit" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_storage_and_of_computation(dtype, tmp_path):
    dense, sparse = dense_and_sparse("llama, tied", dtype)
    checkpoint.save(sparse, tmp_path)
    dense.save_pretrained(tmp_path / "dense")
    for name, tensor in checkpoint.load(tmp_path, device="cpu").state_dict().items():
        assert tensor.dtype == sparse.state_dict()[name].dtype
        assert torch.equal(tensor, sparse.state_dict()[name]), name
    assert checkpoint.stored_dtype(tmp_path) == dtype
    wide = checkpoint.load(tmp_path, device="cpu", dtype=torch.float32)
    assert wide.dtype == torch.float32
    for name, parameter in wide.named_parameters():
        assert parameter.dtype == (dtype if name.endswith(".values") else torch.float32), name
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(wide), logits(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", checkpoint.FORMATS)
def test_the_config_tells_the_dtype_of_the_weights_beside_it(format, tmp_path):
    """The pruning command computes in fp32 and writes fp16: what is read back is fp16."""
    model = checkpoint.load(KJV, device="cpu", dtype=torch.float32)
    prune(model, method="magnitude")
    model.to(torch.float16)
    compress(model)
    checkpoint.save(model, tmp_path, format=format)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float16", ["LlamaForCausalLM"])
    assert checkpoint.load(tmp_path, device="cpu").dtype == torch.float16


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16], ids=str)
def test_buffers_that_are_not_saved_are_those_of_transformers(name, dtype, tmp_path):
    """Rotary frequencies, and Gemma's scale of the embedding, are made anew at load."""
    dense, sparse = dense_and_sparse(name, torch.bfloat16)
    checkpoint.save(sparse, tmp_path / "sparse")
    dense.save_pretrained(tmp_path / "dense")
    ours = dict(checkpoint.load(tmp_path / "sparse", device="cpu", dtype=dtype).named_buffers())
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).named_buffers())
    assert theirs
    for buffer in theirs:
        assert ours[buffer].dtype == theirs[buffer].dtype
        assert torch.equal(ours[buffer], theirs[buffer]), buffer


@pytest.mark.parametrize("format", checkpoint.FORMATS)
def test_shards(format, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 5000)
    dense, sparse = dense_and_sparse("llama")
    checkpoint.save(sparse, tmp_path / "model", format=format)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    held = {file: load_file(tmp_path / "model" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 5000 or len(held[file]) == 1 for size, file in zip(sizes, files))
    assert_same(checkpoint.load(tmp_path / "model", device="cpu"), sparse if format == "compressed" else dense)
    monkeypatch.undo()
    checkpoint.save(sparse, tmp_path / "whole", format=format)
    rows, whole = (inspect(tmp_path / name) for name in ("model", "whole"))
    assert rows["linears"] == whole["linears"]  # values and meta may lie in two shards
    assert rows["bytes"] == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))


def test_everything_beside_the_weights(tmp_path):
    model, tokenizer = checkpoint.load(KJV, device="cpu"), checkpoint.load_tokenizer(KJV)
    model.generation_config.update(max_new_tokens=7, repetition_penalty=1.5)
    report = prune(model, method="magnitude")
    compress(model)
    checkpoint.save(model, tmp_path, tokenizer=tokenizer, report=report)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    loaded = checkpoint.load(tmp_path, device="cpu")
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.repetition_penalty) == (7, 1.5)
    text = "And it came to pass"
    assert checkpoint.load_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1, "some files are for other eyes than others"


def test_a_compressed_linear_takes_nine_sixteenths(tmp_path):
    model = checkpoint.load(KJV, device="cpu")
    prune(model, method="magnitude")
    names = compress(model)
    checkpoint.save(model, tmp_path)
    stored, dense = load_file(tmp_path / "model.safetensors"), load_file(KJV / "model.safetensors")
    assert len(names) == 28
    for name in names:
        ours = stored[f"{name}.values"].nbytes + stored[f"{name}.meta"].nbytes
        assert 16 * ours == 9 * dense[f"{name}.weight"].nbytes
    saved = sum(dense[f"{name}.weight"].nbytes for name in names) * 7 / 16
    difference = (KJV / "model.safetensors").stat().st_size - (tmp_path / "model.safetensors").stat().st_size
    assert difference == pytest.approx(saved, abs=8192)  # all but the header


def test_a_model_without_a_compressed_linear_is_stored_as_an_ordinary_one(tmp_path):
    model = build("llama")
    checkpoint.save(model, tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(SparsekitError, match="compressed or dense, got 'gguf'"):
        checkpoint.save(build("llama"), tmp_path / "model", format="gguf")
    with pytest.raises(SparsekitError, match="only a transformers model"):
        checkpoint.save(nn.Linear(4, 4), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---- inspection ----


def test_inspect(tmp_path):
    model = build("gpt2")
    prune(model, method="magnitude", pattern="2:4", skip=["transformer.h.1", "transformer.h.2"])
    for i, pattern in ((1, "4:8"), (2, "60%")):
        prune(model, method="magnitude", pattern=pattern, blocks=model.transformer.h[i : i + 1], skip=["*.mlp.c_proj"])
    model.transformer.h[0].attn.c_proj.weight.data.T[:, 1::2] = 0
    model.transformer.h[0].attn.c_proj.weight.data.T[:, 2::4] = 0
    compress(model)
    for format in checkpoint.FORMATS:
        checkpoint.save(model, tmp_path / format, format=format)
        found = inspect(tmp_path / format)
        assert found["format"] == format
        assert found["bytes"] == (tmp_path / format / "model.safetensors").stat().st_size
        rows = {row["name"].removeprefix("transformer.h."): row for row in found["linears"]}
        patterns = {name: row["pattern"] for name, row in rows.items()}
        linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        wanted = dict(zip((f"0.{name}" for name in linears), ("2:4", "1:4", "2:4", "2:4")))
        wanted |= dict(zip((f"1.{name}" for name in linears), ("4:8", "4:8", "4:8", "dense")))
        wanted |= dict(zip((f"2.{name}" for name in linears), ("60.0%", "60.0%", "60.0%", "dense")))
        assert patterns == wanted
        assert rows["0.mlp.c_fc"]["shape"] == [128, 32]
        for name, row in rows.items():
            compressed = format == "compressed" and name.startswith("0.")
            assert row["compressed"] == compressed
            assert row["dense_bytes"] == 4 * row["shape"][0] * row["shape"][1]
            assert row["bytes"] == row["dense_bytes"] * (17 / 32 if compressed else 1)


def test_a_skeleton_holds_no_weights(folders):
    model = checkpoint.skeleton(folders / "compressed")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_inspect_a_checkpoint_of_the_bare_model(tmp_path):
    """As GPT-2's on the hub: no "transformer." before the names."""
    model = build("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert len(inspect(tmp_path)["linears"]) == 4 * BLOCKS


# ---- folders that cannot be read ----


def rewrite(folder: Path, change) -> None:
    """The one weight file again, after ``change(tensors, metadata)``."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def tensors(change):
    return lambda folder: rewrite(folder, lambda tensors, _: change(tensors))


def header(change):
    def damage(folder):
        def rewritten(_, metadata):
            value = json.loads(metadata["sparsekit"])
            metadata["sparsekit"] = json.dumps(change(value) or value)

        rewrite(folder, rewritten)

    return damage


def text(file: str, value: str):
    return lambda folder: (folder / file).write_text(value)


def index(value: str):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(value)

    return damage


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("a file")


LAYER = "model.layers.0"
Q, NORM, MLP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.input_layernorm", f"{LAYER}.mlp.down_proj"
WEIGHTS = r"model\.safetensors"
# name: how it is damaged, what the error says, whether it takes a compressed folder to have it
DAMAGES = {
    "no folder": (shutil.rmtree, "must be a folder, and .* does not exist", False),
    "a file": (a_file, "must be a folder, and .* is a file", False),
    "no config": (lambda folder: (folder / "config.json").unlink(), "must hold a config.json", False),
    "config cut": (text("config.json", '{"model_type": "lla'), r"config\.json is not JSON", False),
    "config in another encoding": (
        lambda folder: (folder / "config.json").write_bytes(b'{"\xff": 1}'),
        r"config\.json is not JSON",
        False,
    ),
    "config a list": (text("config.json", "[]"), "must be a JSON object, got a list", False),
    "config empty": (text("config.json", "{}"), "must name a causal language model", False),
    "config of no known model": (text("config.json", '{"model_type": "nope"}'), "model type `nope`", False),
    "config with a wrong type": (
        text("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        "must name a causal language model",
        False,
    ),
    "config of no language model": (text("config.json", '{"model_type": "clip"}'), "CLIPConfig", False),
    "weights cut": (truncate, f"{WEIGHTS} is not a whole safetensors file", False),
    "weights empty": (text("model.safetensors", ""), f"{WEIGHTS} is not a whole safetensors file", False),
    "weights something else": (text("model.safetensors", "PK" * 99), f"{WEIGHTS} is not a whole safetensors file", False),
    "pickle alone": (pickle_only, f"must be safetensors files, and .*{WEIGHTS} is missing", False),
    "index not JSON": (index("{"), "must be the index", False),
    "index a list": (index("[]"), "must be the index", False),
    "index without a map": (index("{}"), "must be the index", False),
    "index of numbers": (index('{"weight_map": {"a": 5}}'), "must be the index", False),
    "index of absent files": (index('{"weight_map": {"a": "b.safetensors"}}'), r"b\.safetensors is missing", False),
    "index of nothing": (index('{"weight_map": {}}'), "holds no tensor", False),
    "tensor missing": (tensors(lambda held: held.pop(f"{NORM}.weight")), f"{NORM}.weight is missing", False),
    "tensor of another shape": (
        tensors(lambda held: held.update({f"{NORM}.weight": torch.ones(7)})),
        rf"(cannot be loaded|{NORM}.weight must be of shape \(32,\), got \(7,\))",
        False,
    ),
    "newer version": (header(lambda value: value.update(version=2)), "format version 2, this sparsekit reads up to 1; up", True),
    "newer version of another form": (header(lambda _: {"version": 3, "linears": [["who", "knows"]]}), "version 3", True),
    "header not JSON": (lambda folder: rewrite(folder, lambda _, meta: meta.update(sparsekit="{")), "metadata cannot", True),
    "header a list": (header(lambda _: [1]), "its metadata cannot be read", True),
    "header without linears": (header(lambda value: value.pop("linears") and None), "its metadata cannot be read", True),
    "header of broken shapes": (header(lambda value: value["linears"].update({Q: [32]})), "metadata cannot be read", True),
    "header gone": (lambda folder: rewrite(folder, lambda _, meta: meta.pop("sparsekit")), "says sparsekit", True),
    "linear the config lacks": (header(lambda value: value["linears"].update({"a.b": [4, 4]})), "compressed a.b, which", True),
    "linear that is a norm": (header(lambda value: value["linears"].update({NORM: [32, 32]})), NORM, True),
    "linear of another shape": (header(lambda value: value["linears"].update({Q: [32, 64]})), Q, True),
    "damaged nibble": (tensors(lambda held: held[f"{Q}.meta"][3].fill_(0x4F)), f"{Q} .* damaged: .* got F in row 3", True),
    "value past the last column": (tensors(lambda held: held[f"{MLP}.values"][:, -1].fill_(1)), f"{MLP} .* damaged", True),
    "meta of floats": (
        tensors(lambda held: held.update({f"{Q}.meta": held[f"{Q}.meta"].float()})),
        f"{Q} .* damaged: .*uint8, got torch.float32",
        True,
    ),
    "values of integers": (
        tensors(lambda held: held.update({f"{Q}.values": held[f"{Q}.values"].long()})),
        f"{Q} .* damaged: .*got torch.int64",
        True,
    ),
    "values missing": (tensors(lambda held: held.pop(f"{Q}.values")), f"{Q}.values is missing", True),
    "meta missing": (tensors(lambda held: held.pop(f"{Q}.meta")), f"{Q}.meta is missing", True),
    "meta of another shape": (
        tensors(lambda held: held.update({f"{Q}.meta": held[f"{Q}.meta"][:, :-1].contiguous()})),
        f"{Q}",
        True,
    ),
    "tensor too many": (tensors(lambda held: held.update({"model.more": torch.ones(1)})), "holds model.more, which", True),
    "tensor named as an attribute": (
        tensors(lambda held: held.update({"model.training": torch.ones(1)})),
        "holds model.training, which",
        True,
    ),
    "bias too many": (tensors(lambda held: held.update({f"{Q}.bias": torch.ones(32)})), f"holds {Q}.bias, which", True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same pruned model, compressed and dense, never to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    for format in checkpoint.FORMATS:
        checkpoint.save(dense_and_sparse("llama")[1], folder / format, format=format)
    return folder


@pytest.mark.parametrize(
    ("format", "damage"),
    [(f, name) for name, row in DAMAGES.items() for f in checkpoint.FORMATS if f == "compressed" or not row[2]],
)
def test_a_damaged_folder_is_refused_with_one_sentence(damage, format, folders, tmp_path, capfd):
    spoil, says, _ = DAMAGES[damage]
    folder = tmp_path / "model"
    shutil.copytree(folders / format, folder)
    spoil(folder)
    with pytest.raises(SparsekitError, match=says) as error:
        checkpoint.load(folder, device="cpu")
    assert "\n" not in str(error.value)
    assert not str(error.value).endswith(".")
    assert capfd.readouterr() == ("", "")


# Damages that are in what inspect reads: all but those of tensors that are no linear's weight.
@pytest.mark.parametrize(
    "damage", [name for name in DAMAGES if not name.startswith(("tensor", "bias", "header gone", "index of nothing"))]
)
def test_inspect_refuses_what_load_refuses(damage, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders / "compressed", folder)
    DAMAGES[damage][0](folder)
    with pytest.raises(SparsekitError, match=DAMAGES[damage][1]):
        inspect(folder)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.load_tokenizer, inspect], ids=lambda read: read.__name__)
def test_code_that_a_config_names_is_never_run(read, folders, tmp_path, monkeypatch):
    """Nor is anybody asked whether to run it."""
    folder = tmp_path / "model"
    shutil.copytree(folders / "compressed", folder)
    config = json.loads((folder / "config.json").read_text())
    own = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(SparsekitError):
        read(folder)
    assert not (tmp_path / "ran").exists()


def test_one_weight_file_goes_before_an_index(folders, tmp_path):
    """As in transformers, so that what is checked is what is loaded."""
    folder = tmp_path / "model"
    shutil.copytree(folders / "dense", folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    assert_same(checkpoint.load(folder, device="cpu"), dense_and_sparse("llama")[0])


@pytest.mark.parametrize("device", ["nonsense", "", "meta", "cuda:99", "hpu", "cpu,gpu"])
def test_a_device_that_torch_cannot_use_is_refused(device):
    with pytest.raises(SparsekitError, match="device must be") as error:
        checkpoint.load(KJV, device=device)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer(folders):
    with pytest.raises(SparsekitError, match="must hold a tokenizer"):
        checkpoint.load_tokenizer(folders / "dense")


# ---- the output folder ----


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(SparsekitError, match="not empty; give another, or --overwrite"):
        checkpoint.save(build("llama"), tmp_path / "model")
    with pytest.raises(SparsekitError, match="holds other things and no config"):
        checkpoint.save(build("llama"), tmp_path / "model", overwrite=True)
    assert content(tmp_path) == {"model/notes.txt": b"mine"}
    (tmp_path / "model" / "config.json").write_text("{}")
    checkpoint.save(build("llama"), tmp_path / "model", overwrite=True)
    assert not (tmp_path / "model" / "notes.txt").exists()
    assert os.listdir(tmp_path) == ["model"]
    checkpoint.load(tmp_path / "model", device="cpu")


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    checkpoint.save(build("llama"), tmp_path / "link")
    checkpoint.save(build("llama"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "place" / "model.safetensors").is_file()
    assert sorted(os.listdir(tmp_path)) == ["link", "place"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder, says in ((tmp_path / "file", "got the file"), (tmp_path / "file" / "a" / "b", "that can be written")):
        with pytest.raises(SparsekitError, match=says):
            checkpoint.check_new_folder(folder, overwrite=True)
        with pytest.raises(SparsekitError, match=says):
            checkpoint.save(build("llama"), folder, overwrite=True)
    assert content(tmp_path) == {"file": b"mine"}


FAILURES = {
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt),
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), OSError),
}


@pytest.mark.parametrize("before", ["nothing", "a model", "no parent"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_while_writing_leaves_what_was_there(failure, before, tmp_path, monkeypatch):
    folder = tmp_path / "not" / "yet" / "model" if before == "no parent" else tmp_path / "model"
    if before == "a model":
        checkpoint.save(build("llama", seed=1), folder)
    was = content(tmp_path)
    raised, comes_out = FAILURES[failure]
    written = []

    def fail_at_the_third(tensors, path, metadata):
        save_file(tensors, path, metadata)
        written.append(path)
        if len(written) == 3:
            raise raised

    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 5000)
    monkeypatch.setattr(writing, "save_file", fail_at_the_third)
    with pytest.raises(comes_out):
        checkpoint.save(build("llama"), folder, overwrite=True)
    assert len(written) == 3
    assert content(tmp_path) == was
    assert os.listdir(tmp_path) == (["model"] if before == "a model" else [])


@pytest.mark.parametrize("step", [1, 2])
def test_an_interruption_between_the_renames_puts_the_old_folder_back(step, tmp_path, monkeypatch):
    checkpoint.save(build("llama", seed=1), tmp_path / "model")
    was, rename, steps = content(tmp_path), Path.rename, []

    def interrupted(self, target):
        if self.parent == tmp_path:
            steps.append(self)
            if len(steps) == step:
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(build("llama"), tmp_path / "model", overwrite=True)
    assert content(tmp_path) == was


def test_a_report_can_be_saved_before_it_is_filled(tmp_path):
    checkpoint.save(build("llama"), tmp_path, report=PruneReport("magnitude", str(NM(2, 4))))
    assert json.loads((tmp_path / "report.json").read_text())["sparsity"] == 0


def test_transformers_is_left_as_it_was(folders):
    """Its progress bars and its verbosity belong to the user."""
    from transformers.utils import logging

    was = logging.get_verbosity(), logging.is_progress_bar_enabled()
    register = nn.Module.register_parameter
    checkpoint.load(folders / "compressed", device="cpu")
    checkpoint.load(folders / "dense", device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == was
    assert nn.Module.register_parameter is register
    assert transformers.LlamaForCausalLM(build("llama").config).lm_head.weight.device.type == "cpu"
