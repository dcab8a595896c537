"""Pruning a whole model, block by block, so that later blocks are calibrated on the pruned output of earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..criteria import Criterion
from ..patterns import Pattern
from ..plan import Plan
from ..report import PruneReport
from .blocks import find_blocks
from .folder import prune_folder
from .loop import run
from .narrow import Narrowed, prune_heads, prune_neurons
from .source import Progress, Resident
from .structured import check_amounts, parse_amount, prune_structured, prune_structured_folder
from .world import World


def prune(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]] = (),
    method: str | Criterion = "sparsegpt",
    pattern: str | Pattern | Plan | Mapping[str, Tensor] = "2:4",
    *,
    group: str | None = None,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    stored: torch.dtype | None = None,
    progress: Progress | None = None,
    world: World | None = None,
) -> PruneReport:
    """Prunes every linear of the model's decoder blocks, in place, on the device that the model is on.

    batches: token ids (batch, tokens), or dicts of the model's keyword arguments; not needed by "magnitude". Tokens that an
    attention_mask of such a dict leaves out are not calibrated on.
    method: "sparsegpt", the name of a criterion ("magnitude", "wanda", "activation", "gradient", "obd", "obs"), or one of your own.
    pattern: a Pattern or its text; a Plan, which has one for each linear; or masks by the linears' names, (out_features,
    in_features) bool, True where kept: sparsegpt makes up for what they remove, any criterion applies them as they are ("magnitude"
    without batches), and linears without one are left alone.
    group: what a share of weights or blocks is counted in, a "row" of outputs (of blocks), a "layer", a decoder "block" or the
    whole "model", exactly; by default a row for wanda, else a layer. Over the model the dense model's scores decide, beforehand.
    skip: names, or shell patterns of names, of modules whose linears to leave alone; embeddings and the output layer always are.
    blocks: the decoder blocks in order; by default the largest ModuleList of the model.
    stored: the dtype that the weights will be stored in, where it is narrower than the model's: pruned weights are rounded to it
    before later blocks are calibrated on them.
    world: the processes that prune it together, each with the whole model and all the batches; every one ends up with the same
    weights and the same report. progress is told on rank 0.
    Returns a PruneReport. Raises SparsekitError for what cannot be pruned, among it NaN in weights or activations (named), and
    where a linear does not hold the pattern at the end. The model is then left part pruned: load it again."""
    return run(Resident(model, blocks, stored), batches, method, pattern, skip, progress, world, group)


__all__ = [
    "Narrowed", "Progress", "World", "check_amounts", "find_blocks", "parse_amount", "prune", "prune_folder", "prune_heads",
    "prune_neurons", "prune_structured", "prune_structured_folder",
]  # fmt: skip
