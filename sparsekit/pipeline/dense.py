"""The blocks of a dense model, one at a time, with what is known of each of their matrices; the model stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluate import eval_mode
from ..plan import Asked, pattern_of
from ..pruners import Pruner
from ..report import BlockReport
from ..timing import Phases
from .blocks import Target, check_finite, find_targets
from .known import Known
from .source import Progress, Source
from .world import World, check_weights


@dataclass
class Seen:
    """A block while its weights are in memory. pruners: of each matrix, which know its inputs on ``tokens`` tokens, or gradients.

    origins: where what they know comes from, and the tokens that each saw, as ``settle`` says. owners: the rank whose pruner knows
    it, as ``Known.show`` says."""

    name: str
    pruners: dict[Target, Pruner]
    origins: dict[Target, tuple[str, int]]
    owners: list[int]
    tokens: int


@torch.no_grad()
def dense_blocks(
    source: Source,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    kind: type[Pruner],
    asked: Asked,
    skip: Iterable[str] = (),
    progress: Progress | None = None,
    world: World | None = None,
) -> Iterator[Seen]:
    """Every block in its order, with a pruner of that kind for each matrix that ``prune`` would prune to what is asked.

    Inputs are those of the dense model: whoever changes weights while a block is at hand must restore them. One block's statistics
    are held at a time. Raises SparsekitError as ``sparsekit.prune`` does."""
    world = World() if world is None else world
    names = {module: name for name, module in source.model.named_modules()}
    targets = find_targets(source.blocks, names, tuple(skip), asked)
    with eval_mode(source.model):
        late = {target for matrices in targets for target in matrices if target.weight.is_meta}  # read when their turn comes
        check_finite(target for matrices in targets for target in matrices if target not in late)
        known = Known(source, kind, targets, batches, world)
        for i, (block, matrices) in enumerate(zip(source.blocks, targets)):
            if progress:
                progress(names[block], i, len(targets))
            source.enter(i)
            check_weights(world, f"of {names[block]}", block.named_parameters())
            check_finite(target for target in matrices if target in late)
            pruners = {t: kind(t.weight.shape[1], pattern_of(asked, t.name), t.weight.device) for t in matrices}
            phases = Phases(source.device)
            yield Seen(names[block], pruners, *known.show(block, pruners, phases), known.tokens)
            del pruners
            if i + 1 < len(targets):
                known.advance(block, matrices, phases)
            source.leave(i, BlockReport(names[block]), [])
    if progress:
        progress("", len(targets), len(targets))
