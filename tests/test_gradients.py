"""The gradient criterion on whole models: squared gradients by the sequence, in memory and from a folder."""

import itertools
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, build, token_batches
from test_folder import assert_same, weights

from sparsekit import SparsekitError, checkpoint, prune, prune_folder
from sparsekit.pipeline import memory
from sparsekit.pipeline.blocks import find_blocks, find_targets
from sparsekit.pipeline.gradients import square_gradients

BATCHES = token_batches((3, 16), (1, 11))  # a batch of several sequences, and one of other length


def targets_of(model):
    names = {module: name for name, module in model.named_modules()}
    return [target for block in find_targets(find_blocks(model), names, ()) for target in block]


def by_hand(model, sequences) -> tuple[dict[str, torch.Tensor], Counter]:
    """Sums of squared gradients in fp64, from autograd's gradients of each sequence (1, t), and how many were not all zeros."""
    model, sums, reached = model.double(), {}, Counter()
    for ids in sequences:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        for target in targets_of(model):
            gradient = target.of(getattr(target.module, target.parameter).grad)
            sums[target.name] = sums.get(target.name, 0) + gradient**2
            reached[target.name] += bool(gradient.any())
    model.zero_grad()
    return sums, reached


# One of each way to hold a matrix: a linear, a transposed one, many experts in one parameter; and an embedding that is tied.
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "qwen3_moe"])
def test_against_autograd_in_fp64_sequence_by_sequence(name):
    model = build(name)
    found, tokens = square_gradients(model, targets_of(model), BATCHES)
    assert tokens == 3 * 16 + 11
    again = build(name)
    again.set_experts_implementation("eager")  # the one that takes fp64
    expected, reached = by_hand(again, [ids[i : i + 1] for ids in BATCHES for i in range(len(ids))])
    assert ("moe" in name) == any(reached[target.name] < 4 for target in found)
    for target, squares in found.items():
        assert squares.tokens == reached[target.name]
        torch.testing.assert_close(squares.sum.double(), expected[target.name], rtol=2e-3, atol=1e-4 * expected[target.name].max())


def test_sequences_do_not_cancel_within_a_batch():
    """A batch whose summed gradient is nothing: logits next to zero, those of its second sequence negated."""
    model, batch = build("llama"), token_batches((1, 12))[0].expand(2, -1).clone()
    forward, sign = model.forward, itertools.cycle([1e-3, -1e-3])

    def mirrored(input_ids, use_cache=False):
        return SimpleNamespace(logits=next(sign) * forward(input_ids=input_ids, use_cache=use_cache).logits)

    model.forward = mirrored
    found, _ = square_gradients(model, targets_of(model), [batch])
    target = next(t for t in found if t.name.endswith("layers.0.mlp.up_proj"))
    summed = sum(F.cross_entropy(mirrored(row[None]).logits[0, :-1], row[1:]) for row in batch)
    gradient = torch.autograd.grad(summed, target.module.weight)[0]
    assert found[target].tokens == 2
    assert gradient.square().sum() < 1e-4 * found[target].sum.sum()


def test_what_fp16_would_lose_is_not_lost():
    """A long sequence and small logits: of its mean loss the gradients are below what fp16 holds, as in large models."""

    def squares(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = build("llama", torch.float16).to(dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0**-8)
        found, _ = square_gradients(model, targets_of(model), token_batches((1, 512)))
        return {target.name: of_one.sum for target, of_one in found.items()}

    expected = squares(torch.float32)
    for name, found in squares(torch.float16).items():
        assert (found - expected[name]).abs().sum() < 0.02 * expected[name].sum(), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_predicted(side):
    ids, pad = token_batches((2, 12))[0], 5
    mask = torch.ones_like(ids)
    mask[0, slice(0, pad) if side == "left" else slice(12 - pad, 12)] = 0
    model = build("llama")
    padded, tokens = square_gradients(model, targets_of(model), [{"input_ids": ids, "attention_mask": mask}])
    short = ids[:1, pad:] if side == "left" else ids[:1, : 12 - pad]
    alone, _ = square_gradients(model, targets_of(model), [short, ids[1:]])
    assert tokens == 24 - pad
    for target, squares in padded.items():
        other = alone[next(t for t in alone if t.name == target.name)].sum
        torch.testing.assert_close(squares.sum, other, rtol=1e-3, atol=1e-5 * other.max().item())


def test_what_the_model_asked_for_and_held_is_as_before():
    model = build("llama")
    frozen, held = model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    held.grad = torch.ones_like(held)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    square_gradients(model, targets_of(model), BATCHES)
    assert not frozen.requires_grad and held.requires_grad and torch.equal(held.grad, torch.ones_like(held))
    assert all(p.grad is None for p in model.parameters() if p is not held)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_loses_what_its_gradients_say_matters_least(name):
    model = build(name)
    squares, _ = square_gradients(model, targets_of(model), BATCHES)
    scores = {target.name: known.sum * target.weight**2 for target, known in squares.items()}
    report = prune(model, BATCHES, "gradient", "50%")
    assert report.method == "gradient" and report.tokens == 3 * 16 + 11 and report.sparsity == pytest.approx(0.5, abs=2e-3)
    for target, row in zip(targets_of(model), report.linears):
        gone = target.weight == 0
        assert row.name == target.name and gone.sum() == gone.numel() // 2
        if row.statistics == "own":
            assert scores[target.name][gone].max() <= scores[target.name][~gone].min()
        else:
            assert target.expert and not squares[next(t for t in squares if t.name == target.name)].tokens


# Tied embeddings, a transposed weight and fused experts each are read in their own way; bf16 is squared in fp32.
@pytest.mark.parametrize("name, dtype", [("llama, tied", torch.bfloat16), ("gpt2", torch.float32), ("qwen3_moe", torch.float32)])
def test_a_folder_is_pruned_as_the_whole_model_is(name, dtype, tmp_path):
    build(name, dtype).save_pretrained(tmp_path / "model")
    model = checkpoint.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    prune(model, BATCHES, "gradient", "2:4", stored=dtype)
    checkpoint.save(model.to(dtype), tmp_path / "whole", format="dense")
    report = prune_folder(
        tmp_path / "model", tmp_path / "out", BATCHES, "gradient", "2:4", format="dense", device="cpu", dtype=torch.float32
    )
    assert report.tokens == 3 * 16 + 11
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_folder_needs_room_for_the_whole_model_and_says_so(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(memory, "taken", lambda: 0)
    with pytest.raises(SparsekitError, match=r"for the weights of the whole model, .* for its squared gradients") as error:
        prune_folder(tmp_path / "model", tmp_path / "out", BATCHES, "gradient", device="cpu", max_memory=1)
    need = re.search(r"at least (\S+),", str(error.value))[1]
    count = sum(p.numel() for p in build("llama").parameters())
    assert memory.parse_size(need) > 8 * count
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    prune_folder(tmp_path / "model", tmp_path / "out", BATCHES, "gradient", device="cpu", max_memory=need)


@pytest.mark.parametrize(
    "batches, says",
    [
        ((), "this method needs calibration batches, got none"),
        (token_batches((2, 1)), "at least two tokens for gradients"),
        ([{"inputs_embeds": torch.zeros(1, 4, 32)}], "a batch without input_ids or labels"),
        ([torch.full((1, 4), 96)], "below the model's vocabulary of 96, got 96"),
    ],
)
def test_batches_of_no_use(batches, says):
    with pytest.raises(SparsekitError, match=says):
        prune(build("llama"), batches, "gradient", "50%")


def test_a_loss_that_is_not_finite():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(SparsekitError, match="the loss of each calibration sequence must be finite, got nan"):
        prune(model, BATCHES, "gradient", "50%")
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
