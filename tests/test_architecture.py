"""Descriptors of architectures: where the parts lie, sizes measured on modules, and what is said of a model that has none."""

from dataclasses import replace

import pytest
import torch
from models import BLOCKS, EXPERTS, build, unregistered
from torch import nn

import sparsekit
from sparsekit import SparsekitError
from sparsekit.structured import ARCHITECTURES, Architecture, BlockShape, architecture_of, register
from sparsekit.structured.architecture import submodule
from sparsekit.structured.removed import take_out

# heads, key-value heads, width of a head, neurons, experts, neurons of each expert of each block of the small models
SHAPES = {
    "llama": (4, 2, 8, 44, None),
    "mistral": (4, 2, 8, 44, None),
    "qwen2": (4, 2, 8, 44, None),
    "gemma3": (4, 2, 8, 44, None),
    "gemma": (4, 2, 12, 44, None),  # heads wider than their share
    "gpt2": (4, 4, 8, 128, None),  # q, k and v stacked in one Conv1D; n_inner is None
    "opt": (4, 4, 8, 44, None),  # the MLP's linears are the block's own
    "phi": (4, 2, 8, 44, None),
    "gpt_neox": (4, 4, 8, 44, None),  # q, k and v of each head beside each other
    "phi3": (4, 2, 8, 44, None),  # q, k and v stacked in one linear, gate and up in another
    "falcon": (4, 1, 8, 128, None),  # one key and value for all heads
    "falcon, alibi": (4, 4, 8, 128, None),
    "falcon, new": (4, 2, 8, 128, None),  # grouped, beside each other
    "bloom": (4, 4, 8, 128, None),  # no field for the neurons
    "qwen3_moe": (4, 2, 8, None, EXPERTS, 20),
    "mixtral": (4, 2, 8, None, EXPERTS, 44),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_modules(name):
    model = build(name)
    architecture = architecture_of(model)
    assert [architecture.shape(block) for block in architecture.blocks(model)] == [BlockShape(*SHAPES[name])] * BLOCKS


def test_a_model_without_its_head_and_one_without_memory():
    with torch.device("meta"):
        model = build("opt").base_model
    assert architecture_of(model).shape(architecture_of(model).blocks(model)[0]).intermediate_size == 44


def test_dense_blocks_of_a_mixture_of_experts_have_neurons():
    model = build("qwen3_moe", mlp_only_layers=[1])
    shapes = [architecture_of(model).shape(block) for block in architecture_of(model).blocks(model)]
    assert [(s.intermediate_size, s.num_experts) for s in shapes] == [(None, EXPERTS), (44, None), (None, EXPERTS)]


def test_what_has_been_removed_is_none():
    model = build("llama")
    block = architecture_of(model).blocks(model)[1]
    block.self_attn, block.mlp = nn.Identity(), nn.Identity()
    assert architecture_of(model).shape(block) == BlockShape()
    assert architecture_of(model).projections(block) == architecture_of(model).neurons(block) == {}


# The MLP's linears are the block's own; fused q, k and v; experts; o the first in the attention, so that its name is left behind.
@pytest.mark.parametrize("name", ["opt", "gpt2", "mixtral", "phi3"])
def test_what_stands_in_place_of_the_removed_is_none_of_it(name):
    model = build(name)
    architecture = architecture_of(model)
    block = architecture.blocks(model)[1]
    for sublayer in ("attention", "mlp"):
        take_out(architecture, block, sublayer)
    assert architecture_of(model).shape(block) == BlockShape()


def test_an_unknown_architecture_is_told_what_a_descriptor_needs():
    with pytest.raises(SparsekitError, match=r"knows bloom, .*, got stablelm; register .*model_types, .*blocks_at, attention_at"):
        architecture_of(unregistered())
    with pytest.raises(SparsekitError, match="got Linear; register"):
        architecture_of(nn.Linear(2, 2))


def test_a_descriptor_of_ones_own(monkeypatch):
    monkeypatch.setattr("sparsekit.structured.architecture.ARCHITECTURES", dict(ARCHITECTURES))
    mine = register(replace(ARCHITECTURES["llama"], model_types=("stablelm",)))
    model = unregistered()
    assert architecture_of(model) is mine
    assert mine.shape(mine.blocks(model)[0]) == BlockShape(4, 2, 8, 44, None)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"blocks_at": "h"}, "must be a ModuleList at h of its base model, and LlamaModel has none there"),
        ({"q": "query"}, "must have self_attn.query, and has none"),
        ({"up": "fc1"}, "must have mlp.fc1, and has none"),
    ],
)
def test_a_descriptor_that_is_wrong_is_refused_before_anything_is_done(changes, said, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], **changes))
    with pytest.raises(SparsekitError, match=said):
        architecture_of(build("llama"))


def test_bad_descriptors():
    with pytest.raises(SparsekitError, match="model_types must be a tuple of at least one"):
        Architecture("llama")
    with pytest.raises(SparsekitError, match="qkv_order must be stacked or grouped, got 'mixed'"):
        Architecture(("x",), qkv="qkv", qkv_order="mixed")


def test_a_compressed_model_is_refused_in_a_sentence():
    model = build("llama")
    sparsekit.prune(model, (), "magnitude", "2:4")
    sparsekit.compress(model)
    with pytest.raises(SparsekitError, match=r"needs dense linears, got SparseLinear as self_attn\.q_proj; take structures out"):
        architecture_of(model)


def test_a_path():
    block = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Identity()})})
    assert submodule(block, "") is block and submodule(block, "a.b") is block["a"]["b"] and submodule(block, "a.c.d") is None
