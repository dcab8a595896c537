"""What the pruners of each block are to know: what their matrices receive, carried from block to block, or their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..pruners import Pruner, by_gradient
from ..timing import Phases
from .blocks import Target
from .gradients import square_gradients
from .observe import MAGNITUDE, OWN, clocked, settle
from .source import Source
from .stream import Stream
from .world import World, check_weights, collect, unite


class Known:
    """What pruners of that kind are to know of the source's model, from this rank's share of the batches.

    What is known of inputs changes as blocks are pruned: ``advance`` goes on with what became of a block. Gradients are those of
    the whole model as it was. tokens: those calibrated on, by all ranks."""

    def __init__(
        self,
        source: Source,
        kind: type[Pruner],
        targets: Sequence[Sequence[Target]],
        batches: Iterable[Tensor | Mapping[str, Tensor]],
        world: World,
    ):
        self._world, self._stream, self._gradients, self.tokens = world, None, None, 0
        if by_gradient(kind):
            with source.whole():
                check_weights(world, "of the model", source.model.named_parameters())
                matrices = [target for block in targets for target in block]
                self._gradients, tokens = square_gradients(source.model, matrices, world.part(batches), source.device, world.look)
        elif kind.gathers:
            with source.capturing():
                inside = {id(weight) for block in source.blocks for weight in block.parameters()}
                outside = ((name, p) for name, p in source.model.named_parameters() if id(p) not in inside)
                check_weights(world, "outside the blocks", outside)
                self._stream = Stream(source.model, source.blocks, world.part(batches), device=source.device, store=source.store)
            tokens = self._stream.tokens
        if kind.gathers:
            self.tokens = sum(world.gather(tokens))

    def show(
        self, block: nn.Module, pruners: dict[Target, Pruner], phases: Phases
    ) -> tuple[dict[Target, tuple[str, int]], list[int]]:
        """Shows each pruner of a block's matrices what it is to know. Returns where that comes from, as ``settle`` says, and which
        rank knows it: this one, where there is nothing to know."""
        world = self._world
        if self._stream:
            entering = self._stream.observe(block, pruners, phases)
            unite(world, pruners)
            origins = settle(pruners, {(layer, role) for found in world.gather(sorted(entering)) for layer, role in found})
        elif self._gradients is not None:
            for target, pruner in pruners.items():
                pruner.statistics = self._gradients.pop(target)
            unite(world, pruners)
            seen = {target: pruner.statistics.tokens for target, pruner in pruners.items()}
            origins = {target: (MAGNITUDE if target.expert and not count else OWN, count) for target, count in seen.items()}
        else:  # cheap, and comes out the same everywhere
            return dict.fromkeys(pruners, (MAGNITUDE, 0)), [world.rank] * len(pruners)
        return origins, collect(world, pruners)

    def advance(self, block: nn.Module, targets: Iterable[Target], phases: Phases) -> None:
        """Goes on from the block as it is now to the next. The time goes to the phases "forward" and, as parts of
        that, ("forward", name) of the matrix of each linear."""
        if self._stream:
            with phases("forward"), clocked(targets, phases):
                self._stream.advance(block)
