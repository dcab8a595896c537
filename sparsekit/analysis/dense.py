"""What is measured of a dense model, in memory and from a folder alike, a block at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import check_model_folder, resolve_device
from ..checkpoint.lazy import LazyModel
from ..pipeline.blocks import find_blocks, find_targets
from ..pipeline.dense import Seen, dense_blocks
from ..pipeline.folder import Reading
from ..pipeline.source import Resident, Source

__all__ = ["Seen", "blocks_of", "dense_blocks", "source_of"]


def source_of(
    model: nn.Module | str | Path,
    blocks: nn.ModuleList | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
) -> Source:
    """Where the blocks come from: a model in memory, or the folder of one that need not fit there. device, dtype: of a folder, as
    for ``load``. Raises SparsekitError for what is compressed already, and for no model's folder."""
    if isinstance(model, nn.Module):
        return Resident(model, blocks)
    return Reading(LazyModel(check_model_folder(model), find_blocks, dtype, resolve_device(device)))


def blocks_of(source: Source, skip: Iterable[str] = ()) -> dict[str, str]:
    """The name of the block of every matrix that ``prune`` would prune, by the matrix's name."""
    names = {module: name for name, module in source.model.named_modules()}
    targets = find_targets(source.blocks, names, tuple(skip))
    return {target.name: names[block] for block, matrices in zip(source.blocks, targets) for target in matrices}
