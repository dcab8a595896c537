"""The one loop over a model's blocks, whether they are all in memory or come from files one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..criteria import Criterion
from ..data import hash_batches
from ..errors import SparsekitError
from ..evaluate import eval_mode
from ..patterns import Pattern
from ..plan import Plan, parse, pattern_of, patterns_in
from ..pruners import METHODS, Pruner, SparseGPT, identity, method_named, method_text
from ..report import BlockReport, LinearReport, PruneReport
from ..timing import Phases, peak_memory
from .blocks import Target, check_finite, find_targets, list_skipped, verify
from .groups import OfBlock, OfModel
from .known import Known
from .observe import MAGNITUDE, by_magnitude
from .source import Progress, Source
from .world import World, check_weights, spread

TOGETHER = 1024  # inputs of a Gram matrix: what libraries factorise several at a time with is made for small ones


@torch.inference_mode(False)
@torch.no_grad()
def run(
    source: Source,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    method: str | Criterion,
    pattern: str | Pattern | Plan | Mapping[str, Tensor],
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
            asked = {"method": method_text(method), **identity(method), "group": group, "pattern": str(pattern)}
            world.agree(asked | {"linears": listed, "the hash of the calibration batches": hash_batches(batches)})
        together = None
        if group == "block":
            (one,) = patterns_in(pattern)
            together = OfBlock(one, world)
        elif group == "model":
            together = OfModel(source, kind, pattern, batches, skip, progress, world)
            kind = METHODS["magnitude"]  # needs to know nothing more: the masks are decided
        known = Known(source, kind, targets, batches, world)
        report.tokens = known.tokens if group != "model" else together.tokens
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
                origins, owners = known.show(block, pruners, phases)
                if together:
                    origins = together.choose(pruners, origins, owners)
                patterns = {target: pruner.pattern for target, pruner in pruners.items()}
                here = [target for target, owner in zip(matrices, owners) if owner == world.rank]
                _factorise_together([pruners[target] for target in here if origins[target][0] != MAGNITUDE])
                for target, owner in zip(matrices, owners):
                    world.look()
                    pruner = pruners.pop(target)
                    rows.append(_prune(target, pruner, *origins[target], source) if owner == world.rank else None)
                    if progress and rows[-1] and rows[-1].output_error is not None:
                        progress(f"{target.name}, error {rows[-1].output_error:.4f}", i, len(blocks))
                if kind.gathers:
                    rows = spread(world, owners, [target.weight for target in matrices], rows)
                verify(patterns, kind.rowwise)
            elif together:
                together.passed(matrices)
            if together:
                together.check(matrices)
            if i + 1 < len(blocks):
                known.advance(block, matrices, phases)
            if done is None:
                told.seconds, told.peak_memory = phases.seconds(), peak_memory(source.device)
                for row in rows:  # a Gram matrix is the work of the one that gathers it for all that share it
                    own = {phase: told.seconds.pop((phase, row.name), 0.0) for phase in ("forward", "gram")}
                    row.seconds = {phase: spent for phase, spent in own.items() if spent} | row.seconds
                    if any(own.values()):
                        told.seconds["forward"] -= sum(own.values())
            source.leave(i, told, rows)
            report.linears += rows
            report.blocks.append(told)
        if together:
            together.finish()
    if progress:
        progress("", len(blocks), len(blocks))
    report.seconds = time.perf_counter() - begin
    return report


def _factorise_together(pruners: Sequence[Pruner]) -> None:
    """Has one of a few SparseGPT pruners whose Gram matrices are of one size factorise those of the others with its own: as many as
    take no more memory than the largest of the block, and of no more than TOGETHER inputs."""
    by_size: dict[int, dict[int, SparseGPT]] = {}
    for pruner in pruners:
        if isinstance(pruner, SparseGPT):
            by_size.setdefault(len(pruner.statistics.sum), {}).setdefault(id(pruner.statistics), pruner)
    for size, held in by_size.items():
        few, alike = max(by_size) ** 2 // max(size, 1) ** 2 if size <= TOGETHER else 1, list(held.values())
        for i in range(0, len(alike), few):
            alike[i].beside = [pruner.statistics for pruner in alike[i + 1 : i + few]]


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
    found = target.name, tuple(weight.shape), str(pruner.pattern), zeros, *errors, result.seconds, origin, tokens
    return LinearReport(*found, peak_memory(source.device))
