"""Masks of matrices that are counted together: over a decoder block, or over the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import SparsekitError
from ..patterns import Given, Share
from ..plan import Asked, patterns_in
from ..pruners import Pruner
from .blocks import Target, check_together
from .dense import dense_blocks
from .observe import MAGNITUDE
from .source import Progress, Source
from .world import World

Origins = dict[Target, tuple[str, int]]


class OfBlock:
    """Each block for itself, by what its pruners know when its turn comes."""

    def __init__(self, pattern: Share, world: World):
        self._pattern, self._world = pattern, world

    def choose(self, pruners: dict[Target, Pruner], origins: Origins, owners: Sequence[int]) -> Origins:
        """Gives each pruner of a block the mask of its matrix in place of its pattern. Returns where what it is by comes from."""
        units = _units(self._pattern, "block", pruners, origins, owners, self._world)
        masks = self._pattern.masks(units, [target.weight.shape for target in pruners])
        for pruner, mask in zip(pruners.values(), masks):
            pruner.pattern = Given(mask, str(self._pattern))
        return origins

    def passed(self, targets: Sequence[Target]) -> None:
        """Goes on past a block that was pruned by an earlier run."""

    def check(self, targets: Sequence[Target]) -> None:
        """Raises SparsekitError where fewer units of the block are gone than must be."""
        check_together(self._pattern, targets, "block")

    def finish(self) -> None:
        pass


class OfModel:
    """The whole model at once, by the scores of its weights as they are before any is pruned.

    It goes through the dense model once; the scores, 4 bytes a weight (8 a block of weights, and where fp32 holds too little), wait
    where the source keeps them.
    origins, tokens: of that pass. Raises SparsekitError as ``sparsekit.prune`` does."""

    def __init__(
        self,
        source: Source,
        kind: type[Pruner],
        asked: Asked,
        batches: Iterable[Tensor | Mapping[str, Tensor]],
        skip: Sequence[str],
        progress: Progress | None,
        world: World,
    ):
        (self._pattern,) = patterns_in(asked)
        self._targets: list[Target] = []
        self.origins: Origins = {}
        self.tokens = self._gone = 0
        self._scores, wide = source.keep(), False
        told = progress and (lambda what, done, total: progress(f"scores of {what}" if what else "", done, total))
        for seen in dense_blocks(source.dense(), batches, kind, asked, skip, told, world):
            for unit in _units(self._pattern, "model", seen.pruners, seen.origins, seen.owners, world):
                self._scores.append(unit)
                wide |= unit.dtype == torch.float64
            self._targets += seen.pruners
            self.origins |= seen.origins
            self.tokens = seen.tokens
        self._masks = self._pattern.masks(self._scores, [target.weight.shape for target in self._targets], wide)

    def choose(self, pruners: dict[Target, Pruner], origins: Origins, owners: Sequence[int]) -> Origins:
        """Gives each pruner of the next block the mask of its matrix in place of its pattern. Returns ``origins`` of the pass."""
        for pruner in pruners.values():
            pruner.pattern = Given(next(self._masks), str(self._pattern))
        return self.origins

    def passed(self, targets: Sequence[Target]) -> None:
        """Goes on past a block that was pruned by an earlier run, to the same masks."""
        for _ in targets:
            next(self._masks)

    def check(self, targets: Sequence[Target]) -> None:
        """Counts what is gone of a block."""
        self._gone += sum(self._pattern.gone(target.weight) for target in targets)

    def finish(self) -> None:
        """Raises SparsekitError where fewer units of the model are gone than must be."""
        check_together(self._pattern, self._targets, "model", self._gone)


def _units(
    pattern: Share, group: str, pruners: dict[Target, Pruner], origins: Origins, owners: Sequence[int], world: World
) -> list[Tensor]:
    """What is compared of each matrix, fp32 or fp64, from the rank whose pruner knows it on all."""
    units: list[Tensor | None] = []
    for (target, pruner), owner in zip(pruners.items(), owners):
        origin, tokens = origins[target]
        if origin == MAGNITUDE and pruner.gathers:
            raise SparsekitError(
                f"a linear must see enough tokens to be compared over the {group}, and {target.name} saw {tokens}; "
                f"give more samples, skip it, or count by the layer"
            )
        if owner != world.rank:
            units.append(None)
            continue
        try:
            unit = pattern.units(pruner.scores(target.weight))
            units.append(unit if unit.dtype == torch.float64 else unit.float())
            if unit.isnan().any():
                raise ValueError("its scores hold NaN")
        except ValueError as error:
            raise SparsekitError(f"{target.name} cannot be pruned: {error}") from error
    wide = world.gather([unit is not None and unit.dtype == torch.float64 for unit in units])
    for i, (target, owner) in enumerate(zip(pruners, owners)):
        if units[i] is None:
            dtype = torch.float64 if wide[owner][i] else torch.float32
            units[i] = torch.empty(pattern.grid(target.weight.shape), dtype=dtype, device=target.weight.device)
        if pruners[target].gathers:  # else all ranks know it
            world.broadcast_(units[i], owner)
    return units
