"""Surgery on live models: what was zero goes without a trace, whatever way a block is built; the config says what is left."""

import copy
import pickle

import pytest
import torch
import transformers
from models import WIDTH, build, token_batches
from torch import nn

from sparsekit import SparsekitError
from sparsekit.structured import Architecture, architecture_of, keep_experts, keep_heads, keep_neurons, settle_config, shape_model
from sparsekit.structured.entries import entries_of
from sparsekit.structured.surgery import group_parameters, group_widths, neuron_parameters

# GQA; tied; a sliding window; biases of q, k and v; q and k normed and windows a block; heads wider than their share; q, k and v in
# one Conv1D; an MLP of the block's own linears, with biases; attention and MLP side by side; q, k and v of each head in a row; gate
# and up in one linear, and a head count read from the config; one key and value for all heads; ALiBi's slopes by head, in a mask or
# an argument; groups of q, k and v in a row
DENSE = ["llama", "llama, tied", "mistral", "qwen2", "gemma3", "gemma", "gpt2", "opt", "phi", "gpt_neox", "phi3", "falcon"]
DENSE += ["falcon, alibi", "falcon, new", "bloom"]
EXPERTS = ["qwen3_moe", "mixtral"]
# Heads normed one by one; scores and logits capped, and two norms more. No other test builds them.
OTHERS = {"qwen3": transformers.Qwen3Config, "gemma2": transformers.Gemma2Config}
IDS = token_batches((2, 12))[0]
GONE = range(5, 9)  # neurons
TOLERANCE = 1e-5  # logits are of the order of 1 and are summed in another order: some tens of fp32's 6e-8


def built(name: str) -> nn.Module:
    if name not in OTHERS:
        return build(name)
    like = build("llama").config
    sizes = {field: getattr(like, field) for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(OTHERS[name](**sizes, **heads)).eval()


def columns(linear: nn.Module) -> torch.Tensor:
    return linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight


@torch.no_grad()
def silence(model: nn.Module, group: int = 1, neurons=GONE, blocks=range(3)) -> None:
    """Zeros for what the group of heads and the neurons give to the hidden states."""
    architecture = architecture_of(model)
    for block in [architecture.blocks(model)[i] for i in blocks]:
        width, _ = group_widths(architecture.shape(block))
        columns(architecture.projections(block)["o"])[:, group * width : (group + 1) * width] = 0
        if linears := architecture.neurons(block):
            columns(linears["down"])[:, list(neurons)] = 0


def cut(model: nn.Module, group: int = 1, neurons=GONE, blocks=range(3)) -> None:
    architecture = architecture_of(model)
    for block in [architecture.blocks(model)[i] for i in blocks]:
        shape = architecture.shape(block)
        keep_heads(architecture, block, set(range(shape.head_units)) - {group})
        if shape.intermediate_size:
            keep_neurons(architecture, block, set(range(shape.intermediate_size)) - set(neurons))
    settle_config(architecture, model)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def logits(model: nn.Module, mask=None) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=mask).logits


def generated(model: nn.Module, **options) -> torch.Tensor:
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )


@pytest.mark.parametrize("blocks", [range(3), [1]], ids=["all blocks", "one block"])
@pytest.mark.parametrize("name", [*DENSE, *OTHERS, *EXPERTS])
def test_what_adds_nothing_leaves_no_trace(name, blocks):
    model = built(name)
    silence(model, blocks=blocks)
    before, count = logits(model), parameters(model)
    architecture = architecture_of(model)
    predicted = 0
    for block in [architecture.blocks(model)[i] for i in blocks]:
        predicted += group_parameters(architecture, block)
        if architecture.shape(block).intermediate_size:  # experts keep their neurons here
            predicted += len(GONE) * neuron_parameters(architecture, block)
    cut(model, blocks=blocks)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=TOLERANCE)
    assert parameters(model) == count - predicted < count
    padded = torch.ones_like(IDS)
    padded[0, :4] = 0  # the cache and the masks know nothing of head counts that are gone
    assert torch.isfinite(logits(model, padded)).all()
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    if name != "falcon, alibi":  # whose transformers make no biases for what a static cache has room for
        assert torch.equal(generated(model, cache_implementation="static"), generated(model, use_cache=False))


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "opt", "phi3", "falcon", "falcon, alibi", "eager falcon, alibi", "falcon, new", "bloom"]
)
@pytest.mark.parametrize("group", [0, 1])  # the first and the last that Llama has
def test_the_other_heads_keep_their_own_rows(name, group):
    # A head's queries, keys and values come from three places of a fused matrix: another head's would not be noticed by its shape.
    model = build(name.removeprefix("eager "))
    if name.startswith("eager"):  # where ALiBi's biases are an argument, elsewhere a part of the mask
        model.set_attn_implementation("eager")
    silence(model, group=group, neurons=())
    before = logits(model)
    cut(model, group=group, neurons=())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=TOLERANCE)


def test_what_adds_something_is_missed():
    model = build("llama")
    before = logits(model)
    cut(model)
    assert (logits(model) - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name, changes",
    [("mixtral", {"num_local_experts": 5}), ("qwen3_moe", {"num_experts": 5, "norm_topk_prob": True})],  # shares of the two alone
)
def test_an_expert_that_no_token_is_given_to_leaves_no_trace(name, changes):
    model = build(name, **changes)
    architecture = architecture_of(model)
    for block in architecture.blocks(model):
        router = architecture.expert_parts(block)[1]
        with torch.no_grad():  # along one direction, with the third in the middle: never among the top two
            router.weight.copy_(torch.tensor([[2.0], [1], [0], [-1], [-2]]) * router.weight[0])
    before = logits(model)
    for block in architecture.blocks(model):
        keep_experts(architecture, block, [0, 1, 3, 4])
    settle_config(architecture, model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=TOLERANCE)
    assert model.config.num_experts == 4 and entries_of(model.config) is None


def test_experts_that_are_modules_of_their_own():
    # As transformers 4 has them, behind a linear as router.
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    block.mlp.gate, block.mlp.top_k = nn.Linear(4, 4), 2
    held, rows = list(block.mlp.experts), block.mlp.gate.weight.detach().clone()
    architecture = Architecture(("x",), experts="experts", router="gate")
    keep_experts(architecture, block, [3, 1])
    assert list(block.mlp.experts) == [held[1], held[3]] and architecture.shape(block).num_experts == 2
    assert (
        torch.equal(block.mlp.gate.weight, rows[[1, 3]]) and block.mlp.gate.bias.shape == (2,) and block.mlp.gate.out_features == 2
    )
    with pytest.raises(SparsekitError, match="must keep the 2 experts that each token is given to, got 1 to keep"):
        keep_experts(architecture, block, [0])


def test_dense_blocks_of_a_mixture_of_experts_lose_neurons():
    model = build("qwen3_moe", mlp_only_layers=[1])
    architecture = architecture_of(model)
    block = architecture.blocks(model)[1]
    with torch.no_grad():
        columns(architecture.neurons(block)["down"])[:, list(GONE)] = 0
    before = logits(model)
    keep_neurons(architecture, block, set(range(44)) - set(GONE))
    settle_config(architecture, model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=TOLERANCE)
    assert model.config.intermediate_size == 40 and entries_of(model.config) is None


def test_what_is_left_trains():
    model = build("qwen2")
    cut(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


# ---- the config ----


@pytest.mark.parametrize("name", ["llama", "llama, tied", "mistral", "qwen2", "gemma3", "gemma", "phi", "phi3", *OTHERS, *EXPERTS])
def test_a_uniform_result_is_an_ordinary_folder(name, tmp_path):
    model = built(name)
    cut(model)
    assert entries_of(model.config) is None and model.config.num_attention_heads == 2 and model.config.num_key_value_heads == 1
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert parameters(loaded) == parameters(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "name, blocks",
    [("llama", [0, 2]), ("gpt2", [0]), ("opt", range(3)), ("gpt2", range(3)), ("gpt_neox", range(3)), ("qwen3_moe", [1])],
)
def test_what_the_config_cannot_say_is_said_of_each_block(name, blocks, tmp_path):
    model = build(name)
    cut(model, blocks=blocks)
    entries = entries_of(model.config)
    assert [bool(entry) for entry in entries] == [i in blocks for i in range(3)]
    assert model.config.num_attention_heads == 4, "the config's own values are what a loader builds before it shapes"
    fresh = type(model)(copy.deepcopy(model.config)).eval()
    shape_model(fresh, entries)
    assert entries_of(fresh.config) == entries
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"mismatch|size"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["bloom", "falcon, alibi"])
def test_a_second_cut_keeps_the_slopes_that_the_first_left(name):
    model = build(name)
    silence(model, group=0, neurons=())
    silence(model, group=2, neurons=())
    before = logits(model)
    cut(model, group=0, neurons=())
    cut(model, group=1, neurons=())  # the third, which is the second by now
    torch.testing.assert_close(logits(model), before, rtol=0, atol=TOLERANCE)
    assert [entry["alibi_heads"] for entry in entries_of(model.config)] == [[1, 3]] * 3


# All that take a head's width beside their number of heads, whatever that divides; Llama's and Gemma's later ones do not.
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma", "phi", "phi3", *EXPERTS])
def test_a_head_count_that_does_not_divide_the_hidden_size_is_an_ordinary_folder(name, tmp_path):
    model = build(name, num_key_value_heads=4)
    cut(model, group=0, neurons=())
    assert model.config.num_attention_heads == 3 and WIDTH % 3
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model)) and parameters(loaded) == parameters(model)


def test_a_head_count_that_llamas_config_refuses():
    # Three heads of a width of 32 are refused by the config's class; the neurons, cut alike, still go to its own field.
    model = build("llama", num_key_value_heads=4)
    cut(model)
    assert entries_of(model.config) == [{"num_attention_heads": 3, "num_key_value_heads": 3}] * 3
    assert model.config.intermediate_size == 40 and model.config.num_attention_heads == 4


@pytest.mark.parametrize("name", ["phi3", "falcon", "falcon, alibi", "bloom"])
def test_what_an_attention_reads_from_elsewhere_goes_with_copies_of_the_model(name):
    # Its head count from the config, or its heads' slopes from the model by a hook: a copy has its own, one that is pickled too.
    model = build(name)
    cut(model, blocks=[1])
    cut(model, group=0, neurons=(), blocks=[1])
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = logits(model)
    for other in copies:
        assert torch.equal(logits(other), before)
    if name == "phi3":
        copies[0].set_attn_implementation("eager")
        attentions = [other.model.layers[1].self_attn for other in (copies[0], model)]
        assert [a.config._attn_implementation for a in attentions] == ["eager", "sdpa"], "all else is the model's"
        torch.testing.assert_close(logits(copies[0]), before, rtol=0, atol=TOLERANCE)


def test_a_group_that_is_left_loses_query_heads():
    # Of two groups of two one goes, then one of the other's two: a config of 2 and 2 cannot say it of a block, an entry can.
    model = build("llama")
    cut(model, neurons=(), blocks=[1])
    block = architecture_of(model).blocks(model)[1]
    with torch.no_grad():
        block.self_attn.o_proj.weight[:, :8] = 0
    before = logits(model)
    cut(model, group=0, neurons=(), blocks=[1])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=TOLERANCE)
    entries = entries_of(model.config)
    assert entries == [{}, {"num_attention_heads": 1, "num_key_value_heads": 1}, {}]
    fresh = build("llama")
    shape_model(fresh, entries)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_a_model_is_shaped_without_memory():
    model = build("gpt2")
    cut(model, blocks=[1])
    entries = entries_of(model.config)
    entries[0]["attention"] = entries[2]["mlp"] = False
    with torch.device("meta"):
        fresh = build("gpt2")
    shape_model(fresh, entries)
    assert all(p.is_meta for p in fresh.parameters())
    shapes = [architecture_of(fresh).shape(block) for block in architecture_of(fresh).blocks(fresh)]
    assert [s.num_attention_heads for s in shapes] == [None, 3, 4] and [s.intermediate_size for s in shapes] == [128, 124, None]


def test_settling_twice_and_after_a_second_cut():
    model = build("llama", num_key_value_heads=4)
    cut(model, blocks=[0])
    entries = entries_of(model.config)
    settle_config(architecture_of(model), model)
    assert entries_of(model.config) == entries
    cut(model, group=0, neurons=(), blocks=[0])
    cut(model, group=0, neurons=(), blocks=[1, 2])
    cut(model, group=0, neurons=GONE, blocks=[1, 2])
    assert entries_of(model.config) is None and model.config.num_attention_heads == 2 and model.config.intermediate_size == 40


# ---- what is refused ----


@pytest.mark.parametrize(
    "entries, said",
    [
        ([{}], r"each of the model's 3 blocks, got 1 entries"),
        ([{"num_attention_heads": 6, "num_key_value_heads": 3}, {}, {}], "between 1 and 4 heads in a block, got 6"),
        ([{"num_attention_heads": 4, "num_key_value_heads": 1}, {}, {}], "2 heads for each key-value head, got 4 for 1"),
        ([{"num_attention_heads": 0}, {}, {}], "between 1 and 4 heads in a block, got 0"),
        ([{"intermediate_size": 45}, {}, {}], "between 1 and 44 neurons in a block, got 45"),
        ([{"num_experts": 2}, {}, {}], "between 1 and 0 experts in a block, got 2"),
    ],
)
def test_entries_that_do_not_fit(entries, said):
    with pytest.raises(SparsekitError, match=said):
        shape_model(build("llama"), entries)


def test_nothing_is_changed_by_what_is_refused():
    model = build("mixtral")
    architecture = architecture_of(model)
    block, state = architecture.blocks(model)[0], {name: p.clone() for name, p in model.named_parameters()}
    for act in (
        lambda: keep_heads(architecture, block, []),
        lambda: keep_heads(architecture, block, [0, 2]),
        lambda: keep_heads(architecture, block, [-1]),
        lambda: keep_neurons(architecture, block, [0]),  # its MLP holds experts
        lambda: keep_experts(architecture, block, [3]),  # a token is given to two
    ):
        with pytest.raises(SparsekitError):
            act()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_parameters_stay_as_trainable_as_they_were():
    model = build("qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name)
    cut(model)
    assert all(p.requires_grad == ("k_proj" in name) for name, p in model.named_parameters())
