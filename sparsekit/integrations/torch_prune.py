"""Masks of torch's own pruning tools: taken from a model, and put on one.

torch.nn.utils.prune keeps ``weight_orig`` and ``weight_mask`` beside a module; torch.ao.pruning keeps a mask in a parametrization
of ``weight``. Either way the mask is the shape of the module's weight, and that is what is given and taken here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..errors import SparsekitError


def read_masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of each module's weight, by the module's name, bool in the shape of the weight, True where kept.

    Modules without one are left out."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(mask := getattr(module, "weight_mask", None), Tensor):
            masks[name] = mask.bool()
        for parametrization in getattr(getattr(module, "parametrizations", None), "weight", ()):
            if isinstance(mask := getattr(parametrization, "mask", None), Tensor):
                masks[name] = mask.bool()
    return masks


@torch.no_grad()
def attach_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Puts each mask on the module of its name with torch.nn.utils.prune, whose ``remove`` makes it permanent.

    Raises SparsekitError, before anything is changed, for a name that the model does not have and a mask of another shape."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise SparsekitError(f"a mask must be for a module of the model that has a weight, got {name!r}")
        if weight.shape != mask.shape:
            raise SparsekitError(f"the mask of {name} must be of its weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    for name, mask in masks.items():
        prune.custom_from_mask(modules[name], "weight", mask.to(modules[name].weight.device))
