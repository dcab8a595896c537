"""Models with parts taken out, as folders: ordinary ones where blocks are alike, ones for sparsekit alone where they differ."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import build, token_batches
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparsekit import SparsekitError, checkpoint, compress, prune
from sparsekit.inspection import inspect
from sparsekit.linear import SparseLinear
from sparsekit.pipeline import prune_folder
from sparsekit.structured import (
    architecture_of,
    keep_heads,
    keep_neurons,
    remove_experts,
    remove_layers,
    remove_sublayers,
    settle_config,
)
from sparsekit.structured.entries import entries_of, set_entries

FAMILIES = ["llama", "llama, tied", "mistral", "qwen2", "gpt2", "opt", "gemma3", "phi", "phi3", "mixtral", "qwen3_moe"]
FAMILIES += ["falcon", "falcon, alibi", "falcon, new", "bloom"]
MOE = ("mixtral", "qwen3_moe")
IDS = token_batches((2, 9))[0]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def uneven(name: str) -> nn.Module:
    """Blocks that differ in all ways: one without attention, one without MLP, and one of other widths."""
    model = build(name)
    remove_sublayers(model, "attention", [0])
    remove_sublayers(model, "mlp", [1])
    architecture = architecture_of(model)
    block = architecture.blocks(model)[2]
    keep_heads(architecture, block, [architecture.shape(block).head_units - 1])
    if name in MOE:
        remove_experts(model, {2: [1]})
    else:
        keep_neurons(architecture, block, range(3, 19))
    settle_config(architecture, model)
    return model


def same(ours: nn.Module, theirs: nn.Module) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    assert {n: b.shape for n, b in ours.named_buffers()} == {n: b.shape for n, b in theirs.named_buffers()}


# ---- blocks that are alike ----


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_layers_are_an_ordinary_folder(name, tmp_path):
    model = build(name)
    whole, one = (sum(p.numel() for p in part.parameters()) for part in (model, architecture_of(model).blocks(model)[0]))
    remove_layers(model, [0])
    checkpoint.save(model, tmp_path / "out", format="dense")
    assert "sparsekit" not in json.loads((tmp_path / "out" / "config.json").read_text())
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert sum(p.numel() for p in theirs.parameters()) == whole - one
    for loaded in (theirs.eval(), checkpoint.load(tmp_path / "out", device="cpu")):
        same(loaded, model)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", MOE)
def test_fewer_experts_are_an_ordinary_folder(name, tmp_path):
    model = build(name)
    remove_experts(model, {0: [0], 1: [3], 2: [1]})
    checkpoint.save(model, tmp_path / "out", format="dense")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(theirs.eval()), logits(model))
    same(checkpoint.load(tmp_path / "out", device="cpu"), model)


# ---- blocks that differ ----


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_differ_are_read_back(name, tmp_path):
    model = uneven(name)
    checkpoint.save(model, tmp_path / "out", format="dense")
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["sparsekit"]["per_layer_config"]
    assert entries[0] == {"attention": False} and entries[1] == {"mlp": False} and len(entries) == model.config.num_hidden_layers
    assert entries[2]["num_attention_heads"] < 4 and ("num_experts" if name in MOE else "intermediate_size") in entries[2]
    loaded = checkpoint.load(tmp_path / "out", device="cpu")
    same(loaded, model)
    assert entries_of(loaded.config) == entries and torch.equal(logits(loaded), logits(model))
    tied = model.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    how = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(loaded.generate(IDS, use_cache=True, **how), loaded.generate(IDS, use_cache=False, **how))
    checkpoint.save(model.half(), tmp_path / "half", format="dense")
    assert checkpoint.load(tmp_path / "half", device="cpu").dtype == torch.float16
    same(checkpoint.load(tmp_path / "half", device="cpu"), model)
    assert checkpoint.load(tmp_path / "half", device="cpu", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("what", ["widths", "attention", "mlp"])
def test_transformers_alone_refuses_blocks_that_differ(name, what, tmp_path):
    # A removed sub-layer's weights are missing, and what is missing it would fill with random numbers.
    model = build(name)
    if what == "widths":
        architecture = architecture_of(model)
        keep_heads(architecture, architecture.blocks(model)[1], [0])
        settle_config(architecture, model)
    else:
        remove_sublayers(model, what, [1])
    checkpoint.save(model, tmp_path / "out", format="dense")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_folder_that_transformers_wrote_of_such_a_model(name, tmp_path):
    # A trainer saves with the model's own method.
    model = uneven(name)
    model.save_pretrained(tmp_path / "out")
    same(checkpoint.load(tmp_path / "out", device="cpu"), model)


# ---- with 2:4 after it ----


# Plain and tied; Conv1D; the MLP's linears the block's own; experts, which stay dense parameters; heads from the config; slopes.
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "opt", "qwen3_moe", "phi3", "bloom"])
@pytest.mark.parametrize("format", checkpoint.FORMATS)
@pytest.mark.parametrize("shape", ["even", "uneven"])
def test_structured_first_and_2_4_after(name, format, shape, tmp_path):
    model = uneven(name) if shape == "uneven" else build(name)
    if shape == "even":
        remove_layers(model, [1])
    checkpoint.save(model, tmp_path / "narrow", format="dense")
    batches = token_batches((2, 9), (2, 9))
    report = prune_folder(tmp_path / "narrow", tmp_path / "out", batches, "wanda", "2:4", format=format, device="cpu")
    prune(model, batches, "wanda", "2:4")
    loaded = checkpoint.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, SparseLinear) for module in loaded.modules()) == (format == "compressed")
    found = inspect(tmp_path / "out")
    assert found["format"] == format
    linears = {row["name"]: row for row in found["linears"]}
    for row in report.linears:
        if "[" not in row.name:  # experts are no linears
            assert (linears[row.name]["pattern"], linears[row.name]["shape"]) == ("2:4", list(row.shape))
    if shape == "uneven":
        assert entries_of(loaded.config) == entries_of(model.config)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_compressed_model_in_memory_is_saved_and_read_back(tmp_path):
    model = uneven("llama")
    prune(model, method="magnitude")
    before = logits(model)
    assert compress(model)
    checkpoint.save(model, tmp_path / "out")
    torch.testing.assert_close(logits(checkpoint.load(tmp_path / "out", device="cpu")), before, rtol=1e-5, atol=1e-5)


# ---- what is wrong with a folder ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("uneven") / "llama"
    checkpoint.save(uneven("llama"), path, format="dense")
    return path


@pytest.mark.parametrize(
    "value, says",
    [
        ({"per_layer_config": [{}]}, "one for each of the 3 blocks"),
        ({"per_layer_config": {"0": {}}}, "must be a list of objects"),
        ([{}, {}, {}, {}], "one for each of the 3 blocks"),
        ({"per_layer_config": [{"heads": 3}, {}, {}]}, "knows num_attention_heads, .*, got 'heads' for block 0"),
        ({"per_layer_config": [{}, {"mlp": 0}, {}]}, "mlp in per_layer_config must be true or false, got 0 for block 1"),
        ({"per_layer_config": [{}, {"intermediate_size": True}, {}]}, "must be a number above 0, got True for block 1"),
        ({"per_layer_config": [{}, {"intermediate_size": -8}, {}]}, "must be a number above 0, got -8 for block 1"),
        ({"per_layer_config": [{}, {"intermediate_size": 4000}, {}]}, "between 1 and 44 neurons in a block, got 4000"),
        ({"per_layer_config": [{}, {}, {"alibi_heads": [0]}]}, r"the numbers that the 0 heads left had among 4, got \[0\]"),
        ({"per_layer_config": [{}, {}, {"alibi_heads": [1, 1]}]}, r"must be a list of rising numbers of heads, got \[1, 1\]"),
        ({"per_layer_config": [{}, {}, {"num_attention_heads": 3}]}, "must keep 2 heads for each key-value head"),
        ({"per_layer_config": [{}, {"num_experts": 2}, {}]}, "experts in a block, got 2"),
    ],
)
def test_entries_that_cannot_be_are_refused_in_a_sentence(folder, value, says, tmp_path):
    path = shutil.copytree(folder, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "sparsekit": value}))
    for read in (lambda: checkpoint.load(path, device="cpu"), lambda: inspect(path)):
        with pytest.raises(SparsekitError, match=says) as error:
            read()
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_weights_that_are_not_those_of_the_entries_are_refused(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    config["sparsekit"]["per_layer_config"][2]["intermediate_size"] = 20
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsekitError, match=r"layers\.2\.mlp\.\w+\.weight must be of shape"):
        checkpoint.load(path, device="cpu")
    with pytest.raises(SparsekitError, match=r"must be those of its config, and .*layers\.2\.mlp"):
        prune_folder(path, tmp_path / "pruned", method="magnitude")
    assert not (tmp_path / "pruned").exists()


def test_entries_without_weights_for_what_they_leave_are_refused(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    config["sparsekit"]["per_layer_config"][0] = {}  # an attention whose weights nobody has
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsekitError, match=r"layers\.0\.self_attn\.\w+\.weight"):
        checkpoint.load(path, device="cpu")


def test_the_sign_of_a_removed_sublayer_is_an_empty_weight(folder):
    held = load_file(folder / "model.safetensors")
    assert [name for name, tensor in held.items() if tensor.numel() == 0] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
    ]


def test_entries_there_and_back():
    config = build("llama").config
    set_entries(config, [{}, {"mlp": False}, {"num_attention_heads": 2}])
    assert entries_of(type(config).from_dict(config.to_dict())) == [{}, {"mlp": False}, {"num_attention_heads": 2}]
    set_entries(config, [{}, {}, {}])
    assert entries_of(config) is None and "sparsekit" not in config.to_dict()
