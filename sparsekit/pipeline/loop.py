"""The one loop over a model's blocks, whether they are all in memory or come from files one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from ..criteria import Criterion
from ..data import hash_batches
from ..errors import SparsekitError
from ..evaluate import eval_mode
from ..linear import SparseLinear
from ..patterns import Pattern
from ..plan import Plan, parse, pattern_of, patterns_in
from ..pruners import Pruner, method_named, method_text
from ..report import BlockReport, LinearReport, PruneReport
from ..timing import Phases, peak_memory
from .blocks import Target, check_finite, find_blocks, find_targets, list_skipped, verify
from .observe import MAGNITUDE, by_magnitude, settle
from .store import Store
from .stream import Stream
from .world import World, check_weights, collect, spread, unite

Progress = Callable[[str, int, int], None]  # what is under way, blocks done, blocks in all


class Source(Protocol):
    """Where the weights of a model's blocks come from and where they go. Outside ``enter(i)`` to ``leave(i)`` a block's parameters
    may be on the meta device."""

    model: nn.Module
    blocks: nn.ModuleList
    device: torch.device
    store: Store | None  # where hidden states wait; None is in memory

    def capturing(self) -> AbstractContextManager:
        """Inside, the model can run up to the end of its first block."""

    def enter(self, i: int) -> tuple[BlockReport, list[LinearReport]] | None:
        """Brings the weights of block i. Returns what was reported of it where it is pruned already, by an earlier run."""

    def rounded(self, target: Target, weight: Tensor) -> Tensor:
        """The pruned weight of the target as it will be read back, in the dtype it has: later blocks are calibrated on that."""

    def leave(self, i: int, told: BlockReport, rows: list[LinearReport]) -> None:
        """Ends the work on block i, of which ``told`` reports, and of its matrices ``rows``."""


class Resident:
    """A model that is in memory as a whole, and is changed there. stored: dtype that its weights are to be rounded to."""

    store = None

    def __init__(self, model: nn.Module, blocks: nn.ModuleList | None = None, stored: torch.dtype | None = None):
        if any(isinstance(module, SparseLinear) for module in model.modules()):
            raise SparsekitError("the model must be dense, got one that is compressed already; prune the model it was made from")
        self.model, self.blocks, self.stored = model, find_blocks(model) if blocks is None else blocks, stored
        self.device = next(model.parameters()).device

    def capturing(self) -> AbstractContextManager:
        return nullcontext()

    def enter(self, i: int) -> None:
        return None

    def rounded(self, target: Target, weight: Tensor) -> Tensor:
        return weight if self.stored is None else weight.to(self.stored).to(weight.dtype)

    def leave(self, i: int, told: BlockReport, rows: list[LinearReport]) -> None:
        pass


@torch.no_grad()
def run(
    source: Source,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    method: str | Criterion,
    pattern: str | Pattern | Plan,
    skip: Iterable[str] = (),
    progress: Progress | None = None,
    world: World | None = None,
    group: str | None = None,
) -> PruneReport:
    """Prunes the blocks of the source in their order; arguments, result and errors are those of ``sparsekit.prune``."""
    pattern, skip = parse(pattern), tuple(skip)
    kind = method_named(method, patterns_in(pattern), group)
    begin = time.perf_counter()
    model, blocks = source.model, source.blocks
    names = {module: name for name, module in model.named_modules()}
    targets = find_targets(blocks, names, skip, pattern)
    skipped = list_skipped(model, blocks, targets, names, skip, pattern)
    report = PruneReport(method_text(method), str(pattern), group=group, skipped=skipped)
    world = World() if world is None else world
    report.processes = world.size
    progress = progress if world.leads else None
    with world.watched(), eval_mode(model):
        late = {target for matrices in targets for target in matrices if target.weight.is_meta}  # read when their turn comes
        check_finite(target for matrices in targets for target in matrices if target not in late)
        if world.size > 1:
            batches = list(batches)
            listed = [target.name for matrices in targets for target in matrices]
            settings = {"method": method_text(method), "group": group, "pattern": str(pattern), "linears": listed}
            world.agree(settings | {"the hash of the calibration batches": hash_batches(batches)})
        stream = None
        if kind.gathers:
            with source.capturing():
                inside = {id(weight) for block in blocks for weight in block.parameters()}
                check_weights(world, "outside the blocks", (p for p in model.named_parameters() if id(p[1]) not in inside))
                stream = Stream(model, blocks, world.part(batches), device=source.device, store=source.store)
            report.tokens = sum(world.gather(stream.tokens))
        for i, (block, matrices) in enumerate(zip(blocks, targets)):
            if progress:
                progress(names[block], i, len(blocks))
            phases = Phases(source.device)
            with phases("read"):
                done = source.enter(i)
            world.agree({f"whether {names[block]} is pruned already": done is not None})
            check_weights(world, f"of {names[block]}", block.named_parameters())
            told, rows = (BlockReport(names[block]), []) if done is None else done
            if done is None:
                check_finite(target for target in matrices if target in late)
                pruners = {t: kind(t.weight.shape[1], pattern_of(pattern, t.name), t.weight.device) for t in matrices}
                origins = dict.fromkeys(matrices, (MAGNITUDE, 0))
                owners = [world.rank] * len(matrices)  # what needs no inputs is cheap, and comes out the same everywhere
                if stream:
                    entering = stream.observe(block, pruners, phases)
                    unite(world, pruners)
                    origins = settle(pruners, {(layer, role) for found in world.gather(sorted(entering)) for layer, role in found})
                    owners = collect(world, pruners)
                for target, owner in zip(matrices, owners):
                    world.look()
                    pruner = pruners.pop(target)
                    rows.append(_prune(target, pruner, *origins[target], source) if owner == world.rank else None)
                    if progress and rows[-1] and rows[-1].output_error is not None:
                        progress(f"{target.name}, error {rows[-1].output_error:.4f}", i, len(blocks))
                if stream:
                    rows = spread(world, owners, [target.weight for target in matrices], rows)
                verify(matrices, pattern, kind)
            if stream and i + 1 < len(blocks):
                with phases("forward"):
                    stream.advance(block)
            if done is None:
                told.seconds, told.peak_memory = phases.seconds(), peak_memory(source.device)
                if stream:
                    told.seconds["forward"] -= told.seconds.get("gram", 0)
            source.leave(i, told, rows)
            report.linears += rows
            report.blocks.append(told)
    if progress:
        progress("", len(blocks), len(blocks))
    report.seconds = time.perf_counter() - begin
    return report


def _prune(target: Target, pruner: Pruner, origin: str, tokens: int, source: Source) -> LinearReport:
    weight = target.weight
    if origin == MAGNITUDE and pruner.gathers:
        pruner = by_magnitude(pruner)
    try:
        result = pruner.prune(weight)
    except ValueError as error:
        raise SparsekitError(f"{target.name} cannot be pruned: {error}") from error
    weight.copy_(source.rounded(target, result.weight)).add_(0.0)  # -0.0 counts as zero, and is stored as 0.0
    zeros = (weight == 0).sum().item() / max(weight.numel(), 1)
    errors = result.output_error, result.output_error_masked, result.loss, result.damping
    return LinearReport(target.name, tuple(weight.shape), str(pruner.pattern), zeros, *errors, result.seconds, origin, tokens)
