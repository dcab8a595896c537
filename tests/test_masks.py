"""Masks that somebody else decided: applied as they are, made up for by SparseGPT, held, and refused where they fit nothing."""

import json

import pytest
import torch
from models import build, token_batches, weight_of
from test_folder import assert_same, weights
from torch.nn.utils import prune as torch_prune

from sparsekit import NM, GradualPruner, Plan, PruningConfig, SparsekitError, checkpoint, prune, prune_folder
from sparsekit.integrations.torch_prune import take_masks
from sparsekit.patterns import Given
from sparsekit.pruners import SparseGPT

BATCHES = token_batches((3, 16), (1, 11))
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"


def masks_for(model, *names: str) -> dict[str, torch.Tensor]:
    """Masks that no criterion would choose: half of each weight at random."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(weight_of(model, name).shape, generator=generator) < 0.5 for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_masks_are_applied_as_they_are_and_nothing_else_changes(method, dtype):
    model, dense = build("llama", dtype), build("llama", dtype)
    masks = masks_for(model, UP, DOWN)
    report = prune(model, BATCHES if method == "wanda" else (), method, masks)
    for name, parameter in dense.named_parameters():
        mask = masks.get(name.removesuffix(".weight"))
        expected = parameter if mask is None else torch.where(mask, parameter, 0)
        assert torch.equal(model.get_parameter(name), expected), name
    assert [row.name for row in report.linears] == [UP, DOWN] and {row.pattern for row in report.linears} == {"given mask"}
    assert report.pattern.startswith("masks ") and report.pattern.endswith(" (2 linears)")
    assert report.skipped["model.layers.0.mlp.gate_proj"] == "has no mask"
    assert report.sparsity == pytest.approx(0.5, abs=0.05)


def test_sparsegpt_makes_up_for_what_a_mask_removes():
    """Against its definition in fp64: what goes is made up for, at the least cost, by the columns to its right."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 150, generator=generator)  # wider than the 128 columns that are pruned in one go
    x = torch.randn(900, 150, generator=generator) @ torch.randn(150, 150, generator=generator)
    mask = torch.rand(8, 150, generator=generator) < 0.6
    pruner = SparseGPT(150, Given(mask))
    pruner.observe(x)
    result = pruner.prune(weight)
    h = x.double().T @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(150)
    expected = weight.double()
    for j in range(150):
        inverse = torch.linalg.inv(h[j:, j:])
        lost = torch.where(mask[:, j], 0, expected[:, j])
        expected[:, j:] -= lost[:, None] * inverse[0] / inverse[0, 0]
    assert torch.equal(result.mask, mask) and torch.equal(result.weight != 0, mask)
    torch.testing.assert_close(result.weight.double(), torch.where(mask, expected, 0), rtol=1e-3, atol=1e-4)
    assert result.output_error < 0.9 * result.output_error_masked


def test_a_models_masks_are_made_up_for_and_held():
    model, dense = build("llama"), build("llama")
    masks = masks_for(model, UP, DOWN)
    report = prune(model, BATCHES, pattern=masks)
    for name, row in zip((UP, DOWN), report.linears):
        weight = weight_of(model, name)
        assert not weight[~masks[name]].any() and (weight != weight_of(dense, name))[masks[name]].any()
        assert row.output_error < row.output_error_masked


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_masks_of_transposed_and_fused_weights_are_out_by_in(name):
    model = build(name)
    linear = "transformer.h.1.attn.c_attn" if name == "gpt2" else "model.layers.1.mlp.experts.gate_up_proj[2]"
    masks = masks_for(model, linear)
    prune(model, method="magnitude", pattern=masks)
    assert torch.equal(weight_of(model, linear) != 0, masks[linear])


def test_masks_of_a_gradual_pruning_fit():
    model = build("llama")
    pruner = GradualPruner(model, PruningConfig("50%", group="block"))
    pruner.step()
    fresh = build("llama")
    prune(fresh, method="magnitude", pattern=pruner.masks)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), fresh.parameters()))


# Conv1D is square here, so that a mask that is not turned fits as well.
@pytest.mark.parametrize("name, linear", [("llama", UP), ("gpt2", "transformer.h.0.attn.c_proj")])
def test_masks_of_torchs_own_pruning(name, linear):
    model, dense = build(name), build(name)
    torch_prune.l1_unstructured(model.get_submodule(linear), "weight", amount=0.5)
    with pytest.raises(SparsekitError, match=rf"the weight of {linear} must be a parameter.*take_masks"):
        prune(model, BATCHES)
    pruned = model.get_submodule(linear).weight.detach()
    masks = take_masks(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in dense.named_parameters())
    prune(model, method="magnitude", pattern=masks)
    assert list(masks) == [linear] and torch.equal(model.get_submodule(linear).weight, pruned)


def test_masks_of_ao_pruning_are_made_up_for():
    pruning = pytest.importorskip("torch.ao.pruning")
    model, dense = build("llama"), build("llama")
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": f"{UP}.weight"}])
    sparsifier.step()
    masks = take_masks(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in dense.named_parameters())
    prune(model, BATCHES, pattern=masks)
    up = weight_of(model, UP)
    assert NM(2, 4).check(up) is None and not up[~masks[UP]].any() and (up != weight_of(dense, UP))[masks[UP]].any()


def test_a_folder_is_pruned_as_the_whole_model_is_and_resumed_with_the_same_masks_alone(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    model = checkpoint.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    masks = masks_for(model, UP, DOWN)
    prune(model, BATCHES, pattern=masks)
    checkpoint.save(model, tmp_path / "whole", format="dense")
    how = dict(pattern=masks, format="dense", device="cpu", dtype=torch.float32)
    prune_folder(tmp_path / "model", tmp_path / "out", BATCHES, **how)
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]["model.layers.1.mlp.up_proj"] == "has no mask"

    def stop(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_folder(tmp_path / "model", tmp_path / "other", BATCHES, **how, progress=stop)
    turned = {**masks, UP: ~masks[UP]}
    with pytest.raises(SparsekitError, match="pattern"):
        prune_folder(tmp_path / "model", tmp_path / "other", BATCHES, **{**how, "pattern": turned}, resume=True)
    prune_folder(tmp_path / "model", tmp_path / "other", BATCHES, **how, resume=True)
    assert_same(weights(tmp_path / "other"), weights(tmp_path / "out"))


def test_a_mask_that_is_not_held_is_found_by_the_verification(monkeypatch):
    monkeypatch.setattr(SparseGPT, "prune", lambda self, weight: type("Kept", (), {"weight": weight, **NOTHING})())
    with pytest.raises(SparsekitError, match=rf"given mask, got {UP}, where row \d+, column \d+ is .* where its mask has none"):
        prune(build("llama"), BATCHES, pattern=masks_for(build("llama"), UP))


NOTHING = dict(output_error=None, output_error_masked=None, loss=None, damping=None, seconds={})


@pytest.mark.parametrize(
    "masks, says",
    [
        ({}, "a mask for at least one linear, got none"),
        (
            {"model.layers.0.mlp": torch.ones(44, 32).bool()},
            r"such as model\.layers\.0\.self_attn\.q_proj, got 'model",
        ),
        ({"lm_head": torch.ones(96, 32).bool()}, "for a linear of the blocks, .*, got 'lm_head'"),
        ({UP: torch.ones(32, 44).bool()}, rf"the mask of {UP} must be \(44, 32\), got \(32, 44\)"),
        ({UP: torch.ones(44, 32)}, rf"of torch.bool, got \(44, 32\) of torch.float32 for {UP}"),
        ({UP: torch.ones(44).bool()}, rf"\(out_features, in_features\) of torch.bool, got \(44,\) of torch.bool for {UP}"),
        ({UP: [[True]]}, f"got list for {UP}"),
    ],
)
def test_masks_of_no_use_are_refused_before_anything_changes(masks, says):
    model, dense = build("llama"), build("llama")
    with pytest.raises(SparsekitError, match=says):
        prune(model, method="magnitude", pattern=masks)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), dense.parameters()))


def test_a_mask_is_not_counted_in_anything_and_is_no_plan():
    masks = masks_for(build("llama"), UP)
    for group in ("row", "model"):
        with pytest.raises(SparsekitError, match=f"a given mask is not counted in anything, got group = '{group}'; leave it out"):
            prune(build("llama"), method="magnitude", pattern=masks, group=group)
    with pytest.raises(SparsekitError, match=f"such as text can say, got a mask for {UP}; give masks alone"):
        Plan({UP: Given(masks[UP])}, {UP: (44, 32)})
