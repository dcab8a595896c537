"""What pruning one part of a model alone costs: the error of its outputs, and the real loss; the model is restored bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import count_tokens, hash_batches
from ..documents import write_json, write_whole
from ..errors import SparsekitError, listed
from ..evaluate import perplexity
from ..patterns import Pattern
from ..pipeline.blocks import Target
from ..pipeline.observe import MAGNITUDE, by_magnitude
from ..pipeline.source import Progress, Resident
from ..pruners import SparseGPT
from .curves import Curve, error_curves, read_levels
from .dense import Seen, blocks_of, dense_blocks, source_of
from .weights import gradient_weights

UNITS = ("linear", "block")


@dataclass(frozen=True)
class Loss:
    """The mean negative log-likelihood of a token, in nats, with one linear or block pruned to a level and nothing else."""

    name: str
    level: str
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """tokens: calibrated on. curves: of every linear. blocks: the block of each, by name. weights: those of ``gradient_weights``,
    empty where they were not taken. losses: at each level of every unit ("linear" or "block"), dense_loss that of the dense model;
    where none were measured, unit and dense_loss are None. spearman: the rank correlation of the rises of the loss with the errors
    of the curves, as ``rank_correlation`` says."""

    tokens: int
    curves: list[Curve]
    blocks: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    unit: str | None = None
    losses: list[Loss] = field(default_factory=list)
    dense_loss: float | None = None
    spearman: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Of JSON's types alone."""
        return {**asdict(self), "curves": [curve.to_dict() for curve in self.curves]}

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, whole or not at all."""
        write_whole(Path(path), lambda part: write_json(part, self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Reads what ``save`` wrote. Raises SparsekitError where that is something else."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SparsekitError(f"the sensitivities {path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise SparsekitError(f"the sensitivities {path} must be JSON, got {error}") from None
        try:
            curves = [Curve.from_dict(curve) for curve in found["curves"]]
            losses = [Loss(str(loss["name"]), str(loss["level"]), float(loss["loss"])) for loss in found["losses"]]
            weights = {str(name): float(weight) for name, weight in found.get("weights", {}).items()}
            return cls(**{**found, "curves": curves, "losses": losses, "weights": weights})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else error
            raise SparsekitError(f"{path} must be what sparsekit sensitivity wrote, got {said}; measure anew") from None


def measure_sensitivity(
    model: nn.Module | str | Path,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    levels: Iterable[str | Pattern],
    *,
    evaluation: Tensor | None = None,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    unit: str | None = None,
    loss_levels: Iterable[str | Pattern] = ("60%",),
    skip: Iterable[str] = (),
    progress: Progress | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
) -> Sensitivity:
    """The error curves of all linears at the levels, their gradient weights, and, where a unit ("linear" or "block") is given, the
    losses with each of them alone pruned to the loss_levels, on the tokens ``evaluation`` in windows of seq_len.

    model: one in memory, or the folder of one that need not fit there: of that all but the losses. The other arguments are those of
    ``error_curves``, the errors those of ``error_curves``, ``gradient_weights`` and ``losses_alone``."""
    batches, skip, loss_levels = list(batches), tuple(skip), read_levels(loss_levels) if unit else []
    if unit is not None:
        check_unit(unit)
        if evaluation is None or not isinstance(model, nn.Module):
            raise SparsekitError(f"losses by {unit} need a model in memory and an evaluation text, got one of them missing")
    held, where = dict(skip=skip, progress=progress), dict(device=device, dtype=dtype)
    curves = error_curves(model, batches, levels, **held, **where)
    names = blocks_of(source_of(model, None, device, dtype), skip)
    found = Sensitivity(count_tokens(batches), curves, names, gradient_weights(model, batches, **held, **where))
    if unit is None:
        return found
    how = dict(unit=unit, max_tokens=max_tokens, **held)
    dense, losses = losses_alone(model, batches, evaluation, seq_len, loss_levels, **how)
    rho = rank_correlation(curves, losses, dense, names if unit == "block" else None)
    return replace(found, unit=unit, losses=losses, dense_loss=dense, spearman=rho)


def check_unit(unit: str) -> None:
    """Raises SparsekitError, listing the known ones, for a unit that losses are not measured of."""
    if unit not in UNITS:
        raise SparsekitError(f"the unit must be {listed(UNITS, 'or')}, got {unit!r}")


@torch.no_grad()
def losses_alone(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    tokens: Tensor,
    seq_len: int,
    levels: Iterable[str | Pattern] = ("60%",),
    *,
    unit: str = "linear",
    max_tokens: int | None = None,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    progress: Progress | None = None,
) -> tuple[float, list[Loss]]:
    """The loss of the dense model, and with each linear or block alone pruned by SparseGPT to each level, on the tokens (count,),
    max_tokens of them, cut into windows of seq_len.

    unit: what is pruned at a time, "linear" or "block", calibrated on what the dense model feeds it. The model must be in memory.
    It is restored after each, which is checked by a hash of every bit; where anything fails it is restored too.
    batches, skip, blocks: as for ``prune``. Raises SparsekitError as ``prune`` and ``perplexity`` do."""
    check_unit(unit)
    source, patterns, found = Resident(model, blocks), read_levels(levels), []

    def loss() -> float:
        return math.log(perplexity(model, tokens, seq_len, max_tokens)["perplexity"])

    before, dense = _hash(model), loss()
    for i, seen in enumerate(dense_blocks(source, batches, SparseGPT, patterns[-1], skip)):
        units = {seen.name: list(seen.pruners)} if unit == "block" else {target.name: [target] for target in seen.pruners}
        for name, targets in units.items():
            for pattern in patterns:
                if progress:
                    progress(f"{name} {pattern}", i, len(source.blocks))
                with _restored(source.blocks[i], [target.weight for target in targets]):
                    for target in targets:
                        target.weight.copy_(_pruned(target, seen, pattern))
                    found.append(Loss(name, str(pattern), loss()))
    if _hash(model) != before:
        raise RuntimeError("the model is not what it was before its losses were measured")
    if progress:
        progress("", len(source.blocks), len(source.blocks))
    return dense, found


def _pruned(target: Target, seen: Seen, pattern: Pattern) -> Tensor:
    pruner = seen.pruners[target]
    try:
        if seen.origins[target][0] == MAGNITUDE:
            pruner.pattern = pattern
            return by_magnitude(pruner).prune(target.weight).weight
        return pruner.prune_levels(target.weight, [pattern])[0].weight
    except ValueError as error:
        raise SparsekitError(f"{target.name} cannot be pruned: {error}") from error


@contextmanager
def _restored(block: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards the weights, and all else in the block, are what they were. Raises RuntimeError where they are not."""
    before, kept = _hash(block), [weight.clone() for weight in weights]
    try:
        yield
    finally:
        for weight, old in zip(weights, kept):
            weight.copy_(old)
    if _hash(block) != before:
        raise RuntimeError("a block is not what it was before one of its parts was pruned")


def _hash(module: nn.Module) -> str:
    return hash_batches([module.state_dict()])


def _by_unit(curves: Sequence[Curve], level: str, groups: Mapping[str, str]) -> dict[str, list[tuple[float, int]]]:
    """Of each unit the errors at the level, and the numbers of weights, of its linears that were measured there."""
    found: dict[str, list[tuple[float, int]]] = {}
    for curve in curves:
        if level in curve.levels:
            row = curve.errors[curve.levels.index(level)], math.prod(curve.shape)
            found.setdefault(groups.get(curve.name, curve.name), []).append(row)
    return found


def rank_correlation(
    curves: Sequence[Curve], losses: Sequence[Loss], dense_loss: float, groups: Mapping[str, str] | None = None
) -> float | None:
    """Spearman's rank correlation, over the units of the losses, of the rise of the loss and the error of the outputs: that of the
    linear, or of a block's linears the mean by their number of weights. The mean over levels that the curves hold.

    groups: the block of each linear by name, where blocks are the units. None where there is nothing to rank."""
    found = []
    for level in dict.fromkeys(loss.level for loss in losses):
        errors = {
            name: sum(error * (size / max(sum(size for _, size in rows), 1)) for error, size in rows)
            for name, rows in _by_unit(curves, level, groups or {}).items()
        }
        pairs = [(errors[one.name], one.loss - dense_loss) for one in losses if one.level == level and one.name in errors]
        if pairs and (correlation := spearman(*zip(*pairs))) is not None:
            found.append(correlation)
    return sum(found) / len(found) if found else None


def loss_weights(
    curves: Sequence[Curve], losses: Sequence[Loss], dense_loss: float, groups: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Of each linear the nats a token that an error of 1 costs by the losses measured: the slope, through zero, of the rise of the
    loss over the error of its outputs, of a block's linears over their sum. What allocations weigh the errors with.

    A small rise drowns in the noise of the evaluation, and a slope of zero would give a linear away. So none is less than half the
    mean. groups: as for ``rank_correlation``. Raises SparsekitError for a linear without a loss."""
    products, squares = dict.fromkeys((loss.name for loss in losses), 0.0), dict.fromkeys((loss.name for loss in losses), 0.0)
    for level in dict.fromkeys(loss.level for loss in losses):
        errors = {name: sum(error for error, _ in rows) for name, rows in _by_unit(curves, level, groups or {}).items()}
        for loss in losses:
            if loss.level == level and loss.name in errors:
                products[loss.name] += errors[loss.name] * (loss.loss - dense_loss)
                squares[loss.name] += errors[loss.name] ** 2
    units = {curve.name: (groups or {}).get(curve.name, curve.name) for curve in curves}
    if missing := next((name for name, unit in units.items() if unit not in products), None):
        raise SparsekitError(f"every linear must have a loss that was measured, and {missing} has none; measure them anew")
    slopes = {name: max(products[unit], 0.0) / squares[unit] if squares[unit] else 0.0 for name, unit in units.items()}
    least = sum(slopes.values()) / max(len(slopes), 1) / 2
    return {name: max(slope, least) for name, slope in slopes.items()}


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The correlation of the ranks, those of equal values their mean; None where either has no two different values."""
    x, y = (torch.tensor(_ranks(values), dtype=torch.float64) for values in (xs, ys))
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x @ y).item() / scale if scale > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in dict.fromkeys(values)}
    count = {value: ordered.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]
