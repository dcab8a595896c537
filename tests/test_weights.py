"""What an error of each matrix costs, against gradients taken one batch and one parameter at a time by torch.autograd.grad."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import build, token_batches, weight_of

from sparsekit import SparsekitError, checkpoint
from sparsekit.analysis.weights import gradient_weights
from sparsekit.checkpoint.lazy import LazyModel


def truth(model, batches, name):
    """mean(w^2) / 2 times the squared gradients of each batch's summed loss, a token."""
    path, _, index = name.partition("[")
    parameter = model.get_parameter(path if index else f"{path}.weight")
    total, tokens = 0.0, 0
    for ids in batches:
        logits = model(input_ids=ids).logits.double()
        loss = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum()
        (gradient,) = torch.autograd.grad(loss, parameter, allow_unused=True)
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        total += (gradient[int(index[:-1])] if index else gradient).double().square().sum().item()
        tokens += ids[:, 1:].numel()
    return total / tokens * weight_of(model, name).double().square().mean().item() / 2


# llama: the plain case; gpt2: weights transposed, tied; qwen3_moe: many matrices in one parameter, of which some see no token.
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_by_autograd(name):
    model, batches = build(name), token_batches((2, 9), (1, 5))
    before = copy.deepcopy(model.state_dict())
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    found = gradient_weights(model, batches)
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.requires_grad_(True)
    for matrix in [*found][:: 1 if name != "qwen3_moe" else 5]:
        assert found[matrix] == pytest.approx(truth(model, batches, matrix), rel=1e-4), matrix


def test_gradients_that_were_there_stay():
    model = build("llama")
    parameter = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    parameter.grad = torch.ones_like(parameter)
    gradient_weights(model, token_batches((2, 9)))
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_what_no_output_depends_on_weighs_nothing():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    found = gradient_weights(model, token_batches((2, 9)))
    assert all(found[f"model.layers.1.self_attn.{name}_proj"] == 0 for name in "qkvo")  # o_proj: an error of nothing is nothing
    assert all(found[f"model.layers.0.self_attn.{name}_proj"] > 0 for name in "qkvo")


def test_padding_is_not_predicted():
    model, (ids,) = build("llama"), token_batches((1, 9))
    padded = {"input_ids": F.pad(ids, (0, 3)), "attention_mask": F.pad(torch.ones_like(ids), (0, 3))}
    alone, with_padding = gradient_weights(model, [ids]), gradient_weights(model, [padded])
    assert all(with_padding[name] == pytest.approx(alone[name], rel=1e-4) for name in alone)


# As above; opt: blocks that return a tuple where transformers is older, and a head with positions of its own kind; mixtral: routed.
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "opt", "qwen3_moe", "mixtral"])
def test_a_folder_weighs_as_its_model_with_a_block_in_memory_at_a_time(name, tmp_path, monkeypatch):
    model, (ids,) = build(name), token_batches((2, 9))
    padded = {"input_ids": F.pad(ids, (0, 3)), "attention_mask": F.pad(torch.ones_like(ids), (0, 3))}
    batches, there = [ids, padded, *token_batches((1, 5))], []
    wanted = gradient_weights(model, batches)
    checkpoint.save(model, tmp_path / "model", format="dense")
    fill = LazyModel.fill

    def counted(self, parts):
        fill(self, parts)
        there.append([i for i, block in enumerate(self.blocks) if not any(p.is_meta for p in block.parameters())])

    monkeypatch.setattr(LazyModel, "fill", counted)
    found = gradient_weights(tmp_path / "model", batches, device="cpu", dtype=torch.float32)
    assert list(found) == list(wanted) and found == pytest.approx(wanted, rel=1e-5)
    assert there == [[0], [0], [1], [2], [], [2], [1], [0]]  # to capture; forward; behind the blocks; back


@pytest.mark.parametrize("beside", [(), (None,), (torch.ones(3),)], ids=str)
def test_blocks_that_return_a_tuple(beside, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    model, batches = build("llama"), token_batches((2, 9))
    wanted = gradient_weights(model, batches)
    checkpoint.save(model, tmp_path / "model", format="dense")
    forward, original = LlamaDecoderLayer.forward, LlamaModel.forward

    class Unpacked(torch.nn.Module):  # what the model of an older transformers does with it
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs)[0]

    def unpacking(self, *args, **kwargs):
        kept = self.layers
        self.__dict__["layers"] = [Unpacked(block) for block in kept]
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.__dict__["layers"]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: (forward(self, *args, **kwargs), *beside))
    monkeypatch.setattr(LlamaModel, "forward", unpacking)
    found = gradient_weights(tmp_path / "model", batches, device="cpu", dtype=torch.float32)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "batches, says", [([], "needs calibration batches, got none"), (token_batches((3, 1)), "at least two tokens for gradients")]
)
def test_refused(batches, says):
    with pytest.raises(SparsekitError, match=says):
        gradient_weights(build("llama"), batches)
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(SparsekitError, match="loss of each calibration sequence must be finite"):
        gradient_weights(model, token_batches((2, 9)))
