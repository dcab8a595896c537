"""The blocks of a dense model, one at a time, with what each of their linears receives; the model stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import check_model_folder, resolve_device
from ..checkpoint.lazy import LazyModel
from ..evaluate import eval_mode
from ..patterns import Pattern
from ..pipeline.blocks import Target, check_finite, find_blocks, find_targets
from ..pipeline.folder import Reading
from ..pipeline.observe import settle
from ..pipeline.source import Progress, Resident, Source
from ..pipeline.stream import Stream
from ..pruners import Pruner
from ..report import BlockReport
from ..timing import Phases


@dataclass
class Seen:
    """A block while its weights are in memory. pruners: of each matrix, which have observed its inputs on ``tokens`` tokens.

    origins: where the statistics of each come from, and the tokens that it saw, as ``settle`` says."""

    name: str
    pruners: dict[Target, Pruner]
    origins: dict[Target, tuple[str, int]]
    tokens: int


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


@torch.no_grad()
def dense_blocks(
    source: Source,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    kind: type[Pruner],
    pattern: Pattern,
    skip: Iterable[str] = (),
    progress: Progress | None = None,
) -> Iterator[Seen]:
    """Every block in its order, with a pruner of that kind and pattern for each matrix that ``prune`` would prune.

    Inputs are those of the dense model: whoever changes weights while a block is at hand must restore them. One block's statistics
    are held at a time. Raises SparsekitError as ``sparsekit.prune`` does."""
    names = {module: name for name, module in source.model.named_modules()}
    targets = find_targets(source.blocks, names, tuple(skip))
    with eval_mode(source.model):
        late = {target for matrices in targets for target in matrices if target.weight.is_meta}  # read when their turn comes
        check_finite(target for matrices in targets for target in matrices if target not in late)
        with source.capturing():
            stream = Stream(source.model, source.blocks, batches, device=source.device, store=source.store)
        for i, (block, matrices) in enumerate(zip(source.blocks, targets)):
            if progress:
                progress(names[block], i, len(targets))
            source.enter(i)
            check_finite(target for target in matrices if target in late)
            pruners = {target: kind(target.weight.shape[1], pattern, target.weight.device) for target in matrices}
            entering = stream.observe(block, pruners, Phases(source.device))
            yield Seen(names[block], pruners, settle(pruners, entering), stream.tokens)
            del pruners
            if i + 1 < len(targets):
                stream.advance(block)
            source.leave(i, BlockReport(names[block]), [])
    if progress:
        progress("", len(targets), len(targets))
