"""Masks of torch's own pruning tools: taken from a model, and put on one.

torch.nn.utils.prune keeps ``weight_orig`` and ``weight_mask`` beside a module; torch.ao.pruning keeps a mask in a parametrization
of ``weight``. What is given and taken here is (out_features, in_features) bool, True where kept, by the module's name: what
``sparsekit.prune`` takes as its pattern. Only transformers' Conv1D, which holds its weight transposed, has it otherwise itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..errors import SparsekitError
from ..linear import SparseLinear, is_conv1d


def read_masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of each module's weight that has one. Other weights than matrices keep the shape that they have."""
    masks = {}
    for name, module in model.named_modules():
        found = [getattr(module, "weight_mask", None), *(getattr(one, "mask", None) for one in _parametrizations(module))]
        for mask in found:
            if isinstance(mask, Tensor):
                masks[name] = _turned(module, mask.bool())
    return masks


@torch.no_grad()
def take_masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of each module's weight that has one, off the model: its weights are parameters again, as they were without masks.

    Raises SparsekitError, before anything is changed, for a weight that something else than a mask stands before."""
    masks = read_masks(model)
    modules = {name: model.get_submodule(name) for name in masks}
    for name, module in modules.items():
        if any(not isinstance(getattr(one, "mask", None), Tensor) for one in _parametrizations(module)):
            raise SparsekitError(f"masks are taken from weights that nothing else changes, and {name} has another parametrization")
    for module in modules.values():
        if _parametrizations(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        else:
            whole = module.weight_orig.detach().clone()
            prune.remove(module, "weight")
            module.weight.copy_(whole)
    return masks


@torch.no_grad()
def attach_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Puts each mask on the module of its name with torch.nn.utils.prune, whose ``remove`` makes it permanent.

    Raises SparsekitError, before anything is changed, for a name that the model does not have and a mask of another shape."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        module = modules.get(name)
        if not isinstance(getattr(module, "weight", None), Tensor) or isinstance(module, SparseLinear):
            raise SparsekitError(f"a mask must be for a module of the model that has a weight, got {name!r}")
        if (shape := _turned(module, module.weight).shape) != mask.shape:
            raise SparsekitError(f"the mask of {name} must be of its weight's shape {tuple(shape)}, got {tuple(mask.shape)}")
    for name, mask in masks.items():
        prune.custom_from_mask(modules[name], "weight", _turned(modules[name], mask).to(modules[name].weight.device))


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    return list(getattr(getattr(module, "parametrizations", None), "weight", ()))


def _turned(module: nn.Module, held: Tensor) -> Tensor:
    """From the module's own order of dimensions to (out_features, in_features), or back."""
    return held.T.contiguous() if is_conv1d(module) else held
