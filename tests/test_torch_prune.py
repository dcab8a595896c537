"""Masks to and from torch's own pruning tools."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsekit import NM, SparsekitError, SparseLinear
from sparsekit.integrations.torch_prune import attach_masks, read_masks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.LayerNorm(4))


def test_masks_of_nn_utils_prune():
    dense = model()
    prune.l1_unstructured(dense[0], "weight", amount=0.5)
    prune.random_structured(dense[2], "weight", amount=0.25, dim=0)
    masks = read_masks(dense)
    assert list(masks) == ["0", "2"] and all(mask.dtype == torch.bool for mask in masks.values())
    for name, mask in masks.items():
        assert torch.equal(mask, dense.get_submodule(name).weight_mask.bool())
        assert torch.equal(dense.get_submodule(name).weight != 0, mask)


def test_masks_of_ao_pruning():
    pruning = pytest.importorskip("torch.ao.pruning")
    dense = model()
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(dense, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    masks = read_masks(dense)
    assert list(masks) == ["0", "2"]
    for name, mask in masks.items():
        assert torch.equal(dense.get_submodule(name).weight != 0, mask) and NM(2, 4).check(mask.int()) is None


def test_masks_attached_come_back_and_can_be_made_permanent():
    dense = model()
    masks = {name: NM(2, 4).mask(dense.get_submodule(name).weight.detach().abs()) for name in ("0", "2")}
    before = dense[0].weight.detach().clone()
    attach_masks(dense, masks)
    assert all(torch.equal(mask, masks[name]) for name, mask in read_masks(dense).items())
    prune.remove(dense[0], "weight")
    assert torch.equal(dense[0].weight, before * masks["0"]) and list(read_masks(dense)) == ["2"]


@pytest.mark.parametrize(
    "masks, says",
    [
        ({"0": torch.ones(16, 8), "9": torch.ones(1)}, "for a module of the model that has a weight, got '9'"),
        ({"0": torch.ones(16, 8), "1": torch.ones(1)}, "got '1'"),
        ({"0": torch.ones(16, 8), "2": torch.ones(16, 4)}, r"the mask of 2 must be of its weight's shape \(4, 16\), got \(16, 4\)"),
    ],
)
def test_refused_before_anything_changes(masks, says):
    dense = model()
    with pytest.raises(SparsekitError, match=says):
        attach_masks(dense, masks)
    assert not read_masks(dense)


def test_a_weight_that_is_stored_24_takes_no_mask():
    """It can be read as a weight, and not written to."""
    stored = nn.Sequential(SparseLinear.from_linear(nn.Linear(8, 4).requires_grad_(False).apply(zeros)))
    with pytest.raises(SparsekitError, match="for a module of the model that has a weight, got '0'"):
        attach_masks(stored, {"0": torch.ones(4, 8)})


def zeros(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
