"""Layers and sub-layers taken out: how they are measured, which go, and that the model still agrees with itself afterwards."""

import math

import pytest
import shipped
import torch
import torch.nn.functional as F
import transformers
from models import BLOCKS, WIDTH, build, token_batches, unregistered
from torch import nn

from sparsekit import SparsekitError
from sparsekit.structured import architecture_of, block_influence, prune_layers, remove_layers, remove_sublayers, select_layers
from sparsekit.structured.removed import Removed

FAMILIES = ["llama", "llama, tied", "mistral", "qwen2", "gpt2", "opt", "gemma3", "phi", "mixtral", "qwen3_moe"]
FAMILIES += ["phi3", "falcon", "falcon, alibi", "falcon, new", "bloom"]
IDS = token_batches((2, 9))[0]


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return architecture_of(model).blocks(model)


def silence(model: nn.Module, i: int, parts: tuple[str, ...] = ("attention", "mlp")) -> None:
    """Zeroes what the sub-layers of block i end with: they add nothing any more."""
    architecture = architecture_of(model)
    block = architecture.blocks(model)[i]
    ends = []
    if "attention" in parts:
        ends += architecture.projections(block)["o"].parameters()
    if "mlp" in parts:
        found = architecture.expert_parts(block)
        ends += [found[0].down_proj] if found else architecture.neurons(block)["down"].parameters()
    for parameter in ends:
        nn.init.zeros_(parameter)


@torch.no_grad()
def stepped(model: nn.Module, cache=None) -> torch.Tensor:
    """The logits of IDS, a few tokens a call: the model itself tells from the cache where it is."""
    found = []
    for ids in IDS.split([4, 3, 1, 1], dim=1):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


def same_with_cache(model: nn.Module) -> None:
    """With the cache it is as without, further than the windows of the small models, which are 6 wide."""
    torch.testing.assert_close(stepped(model), logits(model), rtol=1e-4, atol=1e-5)
    how = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS, use_cache=True, **how), model.generate(IDS, use_cache=False, **how))


# ---- the measure ----


@torch.no_grad()
def steps_by_hand(model: nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each Llama block the hidden states before it, between its two steps, and after it."""
    states, seen = [], {}
    hooks = []
    for i, block in enumerate(model.model.layers):
        hooks.append(block.register_forward_pre_hook(lambda _, args, i=i: seen.update({(i, 0): args[0].clone()})))
        norm = block.post_attention_layernorm  # what it is given is the residual stream between the steps
        hooks.append(norm.register_forward_pre_hook(lambda _, args, i=i: seen.update({(i, 1): args[0].clone()})))
        hooks.append(block.register_forward_hook(lambda _, args, out, i=i: seen.update({(i, 2): out.clone()})))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for i in range(len(model.model.layers)):
        states.append(tuple(seen[i, step].flatten(0, 1).double() for step in range(3)))
    return states


@pytest.mark.parametrize("kind, first, last", [("block", 0, 2), ("attention", 0, 1), ("mlp", 1, 2)])
def test_influence_is_one_minus_the_mean_cosine_of_tokens(kind, first, last):
    model = build("llama")
    batches = token_batches((2, 9), (1, 5))  # two lengths: a token counts alike in both
    states = [steps_by_hand(model, batch) for batch in batches]
    expected = [
        1 - torch.cat([F.cosine_similarity(found[i][first], found[i][last], dim=-1) for found in states]).mean().item()
        for i in range(BLOCKS)
    ]
    assert block_influence(model, batches, kind) == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) == BLOCKS


def test_one_massive_activation_does_not_decide():
    # All tokens as one vector: the massive one, which the block leaves alone, would hide that the block turns the others round.
    from sparsekit.structured.layers import _change

    before = torch.eye(8).repeat(2, 1, 1)
    after = before.roll(1, -1)
    before[0, 0] = after[0, 0] = 1e4
    flattened = 1 - F.cosine_similarity(before.flatten(), after.flatten(), dim=0).item()
    assert flattened < 1e-6
    assert _change(before, after, None) / 16 == pytest.approx(15 / 16)


def test_states_of_zeros_and_half_precision():
    from sparsekit.structured.layers import _change

    nothing, some = torch.zeros(1, 3, 4), torch.ones(1, 3, 4)
    assert _change(nothing, nothing, None) == 0 and _change(nothing, some, None) == 3
    large = torch.full((1, 1, 4), 6e4, dtype=torch.float16)  # its square is not a half
    assert _change(large, large / 2, None) == pytest.approx(0, abs=1e-12)


def test_padding_does_not_count():
    model = build("llama")
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    padded = block_influence(model, [{"input_ids": ids, "attention_mask": mask}])
    alone = block_influence(model, [ids[:1, :6], ids[1:]])
    assert padded == pytest.approx(alone, abs=1e-6)
    assert padded != pytest.approx(block_influence(model, [ids]), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_changes_nothing_has_no_influence_at_all(name):
    model = build(name)
    silence(model, 1)
    for kind in ("block", "attention", "mlp"):
        influence = block_influence(model, [IDS], kind)
        assert influence[1] == 0 and min(influence[0], influence[2]) > 1e-3


def test_measuring_leaves_the_model_as_it_is():
    model = build("opt").train()
    before, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    for kind in ("block", "attention", "mlp"):
        block_influence(model, [IDS, {"input_ids": IDS, "labels": IDS}], kind)
    assert dict(model.named_modules()) == before and all(module.training for module in model.modules())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hidden_states_that_are_not_finite_are_named():
    model = build("llama")
    blocks_of(model)[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(SparsekitError, match="must be finite, got NaN or Inf around block 1"):
        block_influence(model, [IDS])


# ---- which go ----


def test_the_least_go_and_of_equal_ones_the_first():
    assert select_layers([0.3, 0.1, None, 0.1, 0.2], 1) == [1]
    assert select_layers([0.3, 0.1, None, 0.1, 0.2], 3) == [1, 3, 4]


@pytest.mark.parametrize("remove", [0, -1, 3, 4, True, 1.0])
def test_as_many_as_asked_or_an_error(remove):
    with pytest.raises(SparsekitError, match=r"layers to remove must be 1 to 2, for the model has 3, got "):
        select_layers([0.1, None, 0.2, 0.3], remove)
    model = build("llama")
    with pytest.raises(SparsekitError, match=r"layers to remove must be 1 to 2, for the model has 3, got "):
        prune_layers(model, [IDS], remove)
    assert len(blocks_of(model)) == BLOCKS


def test_influence_is_measured_anew_after_each_removal():
    # Block 1 makes every state a hundred times as long, which no cosine sees, and hides what block 2 does; once it is gone block 2
    # turns states round more than block 0 does. By the first measure 1 and 2 would go, and 0 stay.
    model = build("opt")
    for i in range(BLOCKS):
        silence(model, i)
    first, second, third = torch.eye(WIDTH)[:3]
    for block, adds in zip(blocks_of(model), (0.3 * second, 100 * first + 30 * second, third)):
        block.fc2.bias.data = adds.clone()
    model.model.decoder.embed_tokens.weight.data.zero_()
    model.model.decoder.embed_positions.weight.data.copy_(first)
    influence = block_influence(model, [IDS])
    assert select_layers(influence, 2) == [1, 2] and influence[1] < 1e-9 < influence[2] < 1e-3 < influence[0]
    found = prune_layers(model, [IDS], 2)
    assert found.removed == (1, 0)
    assert found.influence == pytest.approx([0, 1 - 1 / math.hypot(1, 0.3)], abs=1e-6)
    assert blocks_of(model)[0].fc2.bias[2] == 1 and len(blocks_of(model)) == 1


# ---- surgery ----


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["block", "attention", "mlp"])
def test_removing_what_adds_nothing_changes_nothing(name, kind):
    model = build(name)
    silence(model, 1, ("attention", "mlp") if kind == "block" else (kind,))
    before = logits(model)
    if kind == "block":
        remove_layers(model, [1])
        assert len(blocks_of(model)) == BLOCKS - 1 == model.config.num_hidden_layers
    else:
        remove_sublayers(model, kind, [1])
        assert getattr(architecture_of(model), kind)(blocks_of(model)[1]) is None
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_agrees_after_the_first_layer_is_gone(name):
    # Masks and positions are counted in the first layer's cache; the windows of mistral, qwen2 and gemma3 differ by layer.
    model = build(name)
    remove_layers(model, [0])
    assert sorted({m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")}) == list(range(BLOCKS - 1))
    same_with_cache(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_agrees_where_sublayers_are_gone(name):
    model = build(name)
    remove_sublayers(model, "attention", [0, 2])
    remove_sublayers(model, "mlp", [1])
    same_with_cache(model)
    remove_layers(model, [0])  # a stand-in is renumbered too
    same_with_cache(model)


def test_a_cache_made_beforehand():
    # Its keys and values have the config's heads already when the stand-in comes to it.
    model = build("llama")
    remove_sublayers(model, "attention", [0])
    cache = transformers.StaticCache(model.config, max_cache_len=16)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(stepped(model, cache), logits(model), rtol=1e-4, atol=1e-5)
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    made = model.generate(IDS, cache_implementation="static", **how)
    assert torch.equal(made, model.generate(IDS, use_cache=False, **how))


def test_lists_of_the_config_are_cut_with_the_layers():
    model = build("gemma3")  # sliding, full, sliding
    remove_layers(model, [0])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    model = build("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[3])
    dense = [i for i, block in enumerate(blocks_of(model)) if architecture_of(model).neurons(block)]
    assert dense == [3]
    remove_layers(model, [1])
    assert model.config.mlp_only_layers == [2]
    model = build("qwen3_moe", num_hidden_layers=5, decoder_sparse_step=2)  # experts in 1 and 3
    remove_layers(model, [0, 3])
    assert (model.config.mlp_only_layers, model.config.decoder_sparse_step) == ([1, 2], 1)
    rebuilt = type(model)(model.config)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_scale_by_the_number_of_the_layer_is_refused():
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    for remove in (lambda: remove_layers(model, [0]), lambda: prune_layers(model, [IDS], 1)):
        with pytest.raises(SparsekitError, match="scale_attn_by_inverse_layer_idx"):
            remove()
    assert len(blocks_of(model)) == BLOCKS


def test_what_is_not_there_is_refused_and_nothing_changed():
    model = build("llama")
    before = logits(model)
    for wrong, said in (([3], "from 0 to 2"), ([-1], "from 0 to 2"), ([], "1 to 2"), ([0, 1, 2], "1 to 2")):
        with pytest.raises(SparsekitError, match=said):
            remove_layers(model, wrong)
    with pytest.raises(SparsekitError, match="must be attention or mlp, got 'block'"):
        remove_sublayers(model, "block", [0])
    with pytest.raises(SparsekitError, match="must be block, attention or mlp, got 'head'"):
        block_influence(model, [IDS], "head")
    with pytest.raises(SparsekitError, match="calibration batches, got none"):
        block_influence(model, [])
    with pytest.raises(SparsekitError, match="the attention_mask of every batch leaves all out"):
        block_influence(model, [{"input_ids": IDS, "attention_mask": IDS * 0}])
    with pytest.raises(SparsekitError, match=r"structured pruning knows .*, got stablelm; register"):
        prune_layers(unregistered(), [IDS], 1)
    assert torch.equal(logits(model), before)
    remove_sublayers(model, "attention", [1])
    with pytest.raises(SparsekitError, match="that of block 1 is gone already"):
        remove_sublayers(model, "attention", [1])
    with pytest.raises(SparsekitError, match="attention sub-layers to remove must be 1 to 1, for the model has 2, got 2"):
        prune_layers(model, [IDS], 2, "attention")
    assert [i is None for i in block_influence(model, [IDS], "attention")] == [False, True, False]


def test_a_stand_in_holds_no_weights_but_the_sign_that_it_is_one():
    model = build("llama")
    whole = sum(p.numel() for p in blocks_of(model)[0].mlp.parameters())
    before = sum(p.numel() for p in model.parameters())
    remove_sublayers(model, "mlp", [0])
    assert sum(p.numel() for p in model.parameters()) == before - whole == before - 3 * 44 * WIDTH
    stand_in = blocks_of(model)[0].mlp
    assert isinstance(stand_in, Removed) and [tuple(p.shape) for p in stand_in.parameters()] == [(0,)]


# ---- on the shipped model ----


def test_of_all_choices_the_least_influence_loses_least():
    # A random one loses the mean of them in expectation.
    def loss(remove) -> float:
        model = shipped.load()
        remove(model)
        return math.log(shipped.lost(model, 16 * 128))

    for kind in ("block", "attention", "mlp"):

        def take(model, i, kind=kind) -> None:
            remove_layers(model, [i]) if kind == "block" else remove_sublayers(model, kind, [i])

        every = [loss(lambda model, i=i, take=take: take(model, i)) for i in range(4)]
        assert loss(lambda model, kind=kind: prune_layers(model, shipped.calibration(8), 1, kind)) == min(every)
        assert min(every) < sum(every) / 4 - 0.1
