"""Neurons of experts, whether these are one module or modules of their own; and whole experts that are modules of their own."""

import json

import pytest
import torch
import torch.nn.functional as F
from models import BLOCKS, EXPERTS, WIDTH, build, token_batches
from separate import DESCRIPTOR, build_separate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparsekit import SparsekitError, checkpoint, neuron_importance, prune_neurons, select_neurons
from sparsekit.pipeline import prune_structured_folder
from sparsekit.pipeline.structured import prune_structured
from sparsekit.structured import ARCHITECTURES, architecture_of, expert_importance, keep_neurons, prune_experts, settle_config
from sparsekit.structured.entries import entries_of
from sparsekit.structured.neurons import expert_downs

# Router's weights that sum to one; a size of the experts of their own, and weights that do not; modules of their own.
MODELS = {"mixtral": 44, "qwen3_moe": 20, "separate": 44}
IDS = token_batches((2, 12))[0]
TOLERANCE = 1e-5  # as in test_structured_surgery


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "separate_experts", DESCRIPTOR)


def built(name: str, **changes) -> nn.Module:
    return build_separate(**changes) if name == "separate" else build(name, **changes)


@torch.no_grad()
def logits(model: nn.Module, **inputs) -> Tensor:
    return model(**({"input_ids": IDS, "use_cache": False} | inputs)).logits


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def matrices(mlp: nn.Module, e: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of an expert."""
    if isinstance(mlp.experts, nn.ModuleList):
        return mlp.experts[e].w1.weight, mlp.experts[e].w3.weight, mlp.experts[e].w2.weight
    return *mlp.experts.gate_up_proj[e].chunk(2), mlp.experts.down_proj[e]


@torch.no_grad()
def by_hand(model: nn.Module, batches: list, keep: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer: the mean square of what each neuron adds (experts, neurons), and the importance of the experts; in fp64,
    token by token."""
    blocks = model.model.layers
    inputs: list[list[Tensor]] = [[] for _ in blocks]
    hooks = [
        b.mlp.register_forward_pre_hook(lambda _, args, i=i: inputs[i].append(args[0].flatten(0, 1))) for i, b in enumerate(blocks)
    ]
    for batch in batches:
        logits(model, **(batch if isinstance(batch, dict) else {"input_ids": batch}))
    for hook in hooks:
        hook.remove()
    neurons, experts = [], []
    for block, rows in zip(blocks, inputs):
        x = torch.cat(rows).double()
        x = x if keep is None else x[keep]
        adds = torch.zeros(EXPERTS, matrices(block.mlp, 0)[2].shape[1], dtype=torch.float64)
        whole = torch.zeros(EXPERTS, dtype=torch.float64)
        for token in x:
            weights, chosen = F.softmax(block.mlp.gate.weight.double() @ token, dim=0).topk(2)
            if getattr(block.mlp.gate, "norm_topk_prob", True):
                weights = weights / weights.sum()
            for weight, e in zip(weights, chosen.tolist()):
                gate, up, down = (m.double() for m in matrices(block.mlp, e))
                each = down * (F.silu(gate @ token) * (up @ token)) * weight  # (width, neurons)
                adds[e] += each.square().sum(0)
                whole[e] += each.sum(1).norm()
        neurons.append((adds / len(x)).sqrt())
        experts.append(whole)
    return neurons, experts


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_what_a_neuron_adds_to_the_tokens_its_expert_is_given(name):
    model = built(name)
    batches = token_batches((2, 9), (1, 5))
    wanted, _ = by_hand(model, batches)
    for _ in range(2):  # measuring leaves no trace
        for scores, expected in zip(neuron_importance(model, batches), wanted):
            assert scores.shape == (EXPERTS, MODELS[name])
            torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for b in model.model.layers for m in b.mlp.modules())


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_count(name):
    model = built(name)
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    wanted, whole = by_hand(model, [batch], mask.flatten().bool())
    for scores, expected in zip(neuron_importance(model, [batch]), wanted):
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)
    found = expert_importance(model, [batch])
    for i, expected in enumerate(whole):
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-7)


def test_experts_of_their_own_are_worth_what_they_are_worth_in_one_module():
    apart, fused = (expert_importance(built(name), token_batches((2, 9), (1, 5))) for name in ("separate", "mixtral"))
    for i in range(BLOCKS):
        torch.testing.assert_close(apart[i], fused[i], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("blocks", [range(BLOCKS), [1]], ids=["all blocks", "one block"])
@pytest.mark.parametrize("name", MODELS)
def test_neurons_that_add_nothing_leave_no_trace(name, blocks, tmp_path):
    # Others in each expert: were one expert's numbers taken for all, it would show.
    model, width = built(name), MODELS[name]
    architecture = architecture_of(model)
    generator = torch.Generator().manual_seed(3)
    for i in blocks:
        block = architecture.blocks(model)[i]
        gone = [torch.randperm(width, generator=generator)[:4].tolist() for _ in range(EXPERTS)]
        for e, own in enumerate(gone):
            with torch.no_grad():
                matrices(block.mlp, e)[2][:, own] = 0
    before, whole = logits(model), count(model)
    for i in blocks:
        block = architecture.blocks(model)[i]
        downs = expert_downs(architecture, block)
        keep_neurons(architecture, block, [e * width + j for e in range(EXPERTS) for j in range(width) if downs[e, :, j].any()])
    settle_config(architecture, model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=TOLERANCE)
    assert count(model) == whole - len(blocks) * EXPERTS * 4 * 3 * WIDTH
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS, use_cache=True, **how), model.generate(IDS, use_cache=False, **how))
    checkpoint.save(model, tmp_path / "out", format="dense")
    loaded = checkpoint.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded), logits(model)) and count(loaded) == count(model)
    if len(blocks) == 1:
        assert entries_of(model.config) == [{}, {"moe_intermediate_size": width - 4}, {}]
        return
    assert getattr(model.config, "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size") == width - 4
    assert "sparsekit" not in json.loads((tmp_path / "out" / "config.json").read_text())
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(theirs.eval()), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_neurons_go_and_the_rest_of_each_expert_makes_up_for_them(name):
    model, whole = built(name), built(name)
    batches = token_batches((6, 40), (4, 40))
    width, left = MODELS[name], MODELS[name] - 12
    result = prune_neurons(model, batches, 12)
    assert result.kept == (EXPERTS * left,) * BLOCKS and all(made_up < plain for plain, made_up in result.errors)
    assert result.parameters_after == result.parameters_predicted == count(model) < result.parameters_before == count(whole)
    for i, scores in enumerate(neuron_importance(whole, batches)):  # the least of each expert
        least = {e * width + j for e in range(EXPERTS) for j in scores[e].argsort()[: width - left].tolist()}
        assert set(result.removed[i]) == least
    # The first block's experts, on the tokens that they are given, against least squares of its own making.
    plain = built(name)
    prune_neurons(plain, batches, 12, compensate=False)
    block, dense = model.model.layers[0], whole.model.layers[0]
    inputs = []
    hook = dense.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for batch in batches:
        logits(whole, input_ids=batch)
    hook.remove()
    x = torch.cat(inputs).double()
    weights, chosen = F.softmax(x @ dense.mlp.gate.weight.double().T, dim=-1).topk(2)
    if getattr(dense.mlp.gate, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    for e in range(EXPERTS):
        rows, choice = torch.where(chosen == e)
        gate, up, down = (m.detach().double() for m in matrices(dense.mlp, e))
        made = F.silu(x[rows] @ gate.T) * (x[rows] @ up.T) * weights[rows, choice, None]
        kept = [j for j in range(width) if e * width + j not in result.removed[0]]
        best = torch.linalg.lstsq(made[:, kept], made @ down.T).solution.T
        wanted, given = made @ down.T, matrices(block.mlp, e)[2].detach().double()
        reached, least = ((made[:, kept] @ w.T - wanted).norm() for w in (given, best))
        assert reached < 1.01 * least
        assert torch.equal(matrices(plain.model.layers[0].mlp, e)[2], matrices(dense.mlp, e)[2][:, kept])


def test_an_expert_that_no_token_comes_to_loses_neurons_like_the_others():
    model = build("mixtral")
    for block in model.model.layers:
        block.mlp.gate.register_forward_pre_hook(
            lambda gate, args: (torch.cat([args[0][..., :-1], args[0][..., -1:] * 0 + 1], -1),)
        )
        block.mlp.gate.weight.data[1, -1] = -1e4
    before = logits(model)
    scores = neuron_importance(model, [IDS])
    assert all(not s[1].any() and s[[0, 2, 3]].all() for s in scores)
    result = prune_neurons(model, [IDS], 4)
    assert all(set(range(44 + 40, 44 + 44)) <= set(gone) and len(gone) == 16 for gone in result.removed)
    assert torch.isfinite(logits(model)).all() and not torch.equal(logits(model), before)


def test_the_least_of_each_expert_go_and_blocks_are_compared_by_their_mean():
    scores = [torch.tensor([[3.0, 1, 2, 0], [0, 0, 0, 0]]), torch.tensor([9.0, 8, 7, 6])]
    assert select_neurons(scores, 2) == [[1, 3, 6, 7], [2, 3]]
    assert select_neurons(scores, 3, scope="global") == [[1, 2, 3, 5, 6, 7], []]
    assert select_neurons([torch.rand(2, 40)], 0.3, round_to=16)[0].__len__() == 2 * 8
    with pytest.raises(SparsekitError, match="must keep at least one of its 4 neurons, got 4"):
        select_neurons(scores[:1], 4)


def test_dense_blocks_and_blocks_of_experts_lose_their_own():
    model = build("qwen3_moe", mlp_only_layers=[1])
    result = prune_neurons(model, token_batches((2, 40)), 0.2)
    assert [len(gone) for gone in result.removed] == [EXPERTS * 4, 8, EXPERTS * 4]
    assert result.parameters_after == result.parameters_predicted == count(model)
    assert (model.config.moe_intermediate_size, model.config.intermediate_size) == (16, 36) and entries_of(model.config) is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("asked", [{"ffn": 0.5, "round_to": 8}, {"experts": 1, "ffn": 12, "heads": 2}])
def test_from_folder_to_folder(name, asked, tmp_path):
    checkpoint.save(built(name), tmp_path / "in", format="dense")
    report = prune_structured_folder(tmp_path / "in", tmp_path / "out", token_batches((4, 20)), device="cpu", **asked)
    assert report.per_layer_config is None and report.parameters == report.parameters_predicted
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and count(theirs) == report.parameters
    assert torch.equal(logits(theirs.eval()), logits(checkpoint.load(tmp_path / "out", device="cpu")))


def test_whole_experts_that_are_modules_of_their_own():
    apart, fused = built("separate"), built("mixtral")
    batches = token_batches((2, 9))
    one, other = (prune_experts(model, batches, 2) for model in (apart, fused))
    assert one.removed == other.removed and apart.config.num_local_experts == fused.config.num_local_experts == 2
    torch.testing.assert_close(logits(apart), logits(fused), rtol=0, atol=TOLERANCE)
    assert all(len(b.mlp.experts) == b.mlp.num_experts == b.mlp.gate.out_features == 2 for b in apart.model.layers)


def test_experts_that_differ_between_blocks_are_read_back(tmp_path):
    model = built("separate")
    report = prune_structured(model, token_batches((2, 20)), experts=1, mlp=1, ffn=0.5)
    checkpoint.save(model, tmp_path / "out", format="dense")
    loaded = checkpoint.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded), logits(model)) and count(loaded) == report.parameters_predicted


@pytest.mark.parametrize(
    "asked, left", [({"ffn": 6}, 38), ({"ffn": 0.25}, 33), ({"ffn": 24, "scope": "global"}, None), ({"ffn": 8, "round_to": 6}, 36)]
)
def test_widths_that_the_grouped_product_does_not_take_are_refused_before(asked, left):
    # torch's wants rows of whole 16 bytes: another width would save, and fail when the result is run in 16 bits.
    model = build("mixtral")
    before = logits(model)
    said = f"must keep a multiple of 8 neurons .* got {left or 'round_to None over all blocks'}; give round_to=8"
    with pytest.raises(SparsekitError, match=said):
        prune_structured(model, [IDS], **asked)
    with pytest.raises(SparsekitError, match="must keep a multiple of 8 neurons"):
        prune_neurons(model, [IDS], asked["ffn"], round_to=asked.get("round_to"), scope=asked.get("scope", "layer"))
    assert torch.equal(logits(model), before)


def test_what_cannot_be_is_refused_and_changes_nothing():
    model = build("mixtral")
    architecture, state = architecture_of(model), {name: p.clone() for name, p in model.named_parameters()}
    block = architecture.blocks(model)[0]
    with pytest.raises(SparsekitError, match="as many neurons must be kept of each of the 4 experts, got 1 and 2"):
        keep_neurons(architecture, block, [0, 44, 45, 88, 132])
    with pytest.raises(SparsekitError, match="must be some of the block's 176, got"):
        keep_neurons(architecture, block, [176])
    with pytest.raises(
        SparsekitError, match="importance of experts' neurons is contribution, got taylor, and block 0 holds experts"
    ):
        prune_neurons(model, [IDS], 0.5, method="taylor")
    block.mlp.experts.is_concatenated = False
    with pytest.raises(
        SparsekitError, match=r"must lie in gate_up_proj \(experts, 2 \* neurons, width\), .* take whole experts out"
    ):
        prune_structured(model, [IDS], ffn=0.5)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
