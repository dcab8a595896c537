"""Experts taken out whole: what each adds, by brute force; which go; and that routing agrees with what is left."""

import pytest
import torch
import torch.nn.functional as F
from models import BLOCKS, EXPERTS, build, token_batches
from torch import Tensor, nn

from sparsekit import SparsekitError
from sparsekit.structured import architecture_of, expert_importance, prune_experts, remove_experts, select_experts

MODELS = ("mixtral", "qwen3_moe")
IDS = token_batches((2, 9))[0]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def layers(model: nn.Module) -> list[nn.Module]:
    return [block.mlp for block in architecture_of(model).blocks(model)]


@torch.no_grad()
def by_hand(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Of each layer and expert: the sum over tokens of the router's weight times the norm of the expert's output, in fp64."""
    inputs: list[list[Tensor]] = [[] for _ in range(BLOCKS)]
    hooks = [
        mlp.register_forward_pre_hook(lambda _, args, i=i: inputs[i].append(args[0].flatten(0, 1)))
        for i, mlp in enumerate(layers(model))
    ]
    for batch in batches:
        logits(model, batch)
    for hook in hooks:
        hook.remove()
    found = []
    for mlp, rows in zip(layers(model), inputs):
        total = torch.zeros(EXPERTS, dtype=torch.float64)
        for x in torch.cat(rows).double():
            probabilities = F.softmax(mlp.gate.weight.double() @ x, dim=0)
            weights, chosen = probabilities.topk(2)
            if getattr(mlp.gate, "norm_topk_prob", True):
                weights = weights / weights.sum()
            for weight, e in zip(weights, chosen.tolist()):
                gate, up = (mlp.experts.gate_up_proj[e].double() @ x).chunk(2)
                total[e] += weight * (mlp.experts.down_proj[e].double() @ (F.silu(gate) * up)).norm()
        found.append(total)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_the_router_weighted_norm_of_what_comes_out(name):
    model = build(name)
    batches = token_batches((2, 9), (1, 5))
    found = expert_importance(model, batches)
    assert list(found) == list(range(BLOCKS))
    for i, expected in enumerate(by_hand(model, batches)):
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-7)
    again = expert_importance(model, batches)  # measuring leaves no trace
    assert all(torch.equal(again[i], found[i]) for i in found)


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_count(name):
    model = build(name)
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    padded = expert_importance(model, [{"input_ids": IDS, "attention_mask": mask}])
    alone = expert_importance(model, [IDS[:1, :6], IDS[1:]])
    for i in padded:
        torch.testing.assert_close(padded[i], alone[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_an_expert_that_no_token_is_given_to_is_worth_nothing_and_its_removal_changes_nothing(name):
    # Its row of the router always loses. Rows of the router, the fused matrices and the counts have to agree afterwards.
    model = build(name)
    for mlp in layers(model):
        mlp.gate.register_forward_pre_hook(lambda gate, args: (torch.cat([args[0][..., :-1], args[0][..., -1:] * 0 + 1], -1),))
        mlp.gate.weight.data[1, -1] = -1e4
    before = logits(model)
    importance = expert_importance(model, [IDS])
    assert all(importance[i][1] == 0 and (importance[i] > 0).sum() == EXPERTS - 1 for i in importance)
    found = prune_experts(model, [IDS], 1)
    assert found.removed == dict.fromkeys(range(BLOCKS), (1,))
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    for mlp in layers(model):
        assert mlp.gate.weight.shape[0] == mlp.experts.num_experts == len(mlp.experts.down_proj) == EXPERTS - 1
    assert model.config.num_experts == EXPERTS - 1


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_is_what_was_there(name):
    whole, model = build(name), build(name)
    remove_experts(model, {0: [0, 2], 1: [3, 1], 2: [2, 3]})
    for old, new, kept in zip(layers(whole), layers(model), ([1, 3], [0, 2], [0, 1])):
        assert torch.equal(new.gate.weight, old.gate.weight[kept])
        for parameter in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(new.experts, parameter), getattr(old.experts, parameter)[kept])
    assert torch.isfinite(logits(model)).all()
    assert model.config.num_experts == 2 and not hasattr(model.config, "sparsekit")
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS, use_cache=True, **how), model.generate(IDS, use_cache=False, **how))


def test_the_least_go_and_of_equal_ones_the_first():
    scores = {0: torch.tensor([0.2, 0.1, 0.1, 0.3]), 3: torch.tensor([0.0, 0.0, 0.0, 0.0])}
    assert select_experts(scores, 1) == {0: [1], 3: [0]}
    assert select_experts(scores, 2, keep=2) == {0: [1, 2], 3: [0, 1]}
    for broken in (float("nan"), float("inf")):
        with pytest.raises(SparsekitError, match="importance of experts must be finite, got NaN or Inf for block 2"):
            select_experts({0: torch.ones(4), 2: torch.tensor([1.0, broken, 2.0, 3.0])}, 1)


def test_a_token_keeps_as_many_experts_as_it_is_given_to():
    model = build("mixtral")
    before = logits(model)
    for remove in (0, 3, 4, True):
        with pytest.raises(SparsekitError, match="must be 1 to 2, for block 0 has 4 and each token is given to 2"):
            prune_experts(model, [IDS], remove)
    with pytest.raises(SparsekitError, match="a token is given to 2 experts, and block 2 would be left with 1"):
        remove_experts(model, {0: [1], 2: [0, 1, 2]})
    with pytest.raises(SparsekitError, match=r"must be some of those that block 1 has, 4, got \[4\]"):
        remove_experts(model, {0: [1], 1: [4]})
    with pytest.raises(SparsekitError, match="block 3 has, 0, got"):
        remove_experts(model, {3: [0]})
    with pytest.raises(SparsekitError, match="calibration batches, got none"):
        prune_experts(model, [], 1)
    assert torch.equal(logits(model), before)


def test_a_model_without_experts_is_refused():
    with pytest.raises(SparsekitError, match="must have experts to remove some, got LlamaForCausalLM without one"):
        prune_experts(build("llama"), [IDS], 1)


def test_blocks_without_experts_are_left_alone():
    model = build("qwen3_moe", mlp_only_layers=[1])
    found = prune_experts(model, [IDS], 2)
    assert sorted(found.removed) == [0, 2] and model.config.num_experts == 2
    assert architecture_of(model).shape(architecture_of(model).blocks(model)[1]).intermediate_size == 44
