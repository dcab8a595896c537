"""From a model to a plan in one call: what the allocation asks for is measured, or taken from an earlier measurement."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import bench, tune
from ..errors import SparsekitError, listed
from ..patterns import Pattern
from ..pipeline.blocks import Target, find_targets
from ..pipeline.source import Progress
from ..plan import DENSE, Plan
from .allocation import allocate, allocate_choices, allocate_latency, read_target
from .costs import near
from .curves import Curve, error_curves
from .dense import blocks_of, source_of
from .owl import allocate_owl, outlier_shares
from .sensitivity import Sensitivity, check_unit, loss_weights
from .weights import gradient_weights

WAYS = ("curves", "owl", "choices", "latency")
WEIGHTS = ("gradient", "loss", "size")
SHARES = tuple(f"{percent}%" for percent in range(10, 100, 10))  # levels that allocate between
CHOICES = {"choices": (DENSE, "4:8", "2:4"), "latency": (DENSE, "2:4")}


def check_ways(target: str | float, by: str, unit: str, weigh: str | None, low: Any, high: Any, choices: Any) -> None:
    """Raises SparsekitError for names that are not known, a target that is none and options that mean nothing together: all that
    can be refused before anything is measured."""
    check_unit(unit)
    for what, name, known in (("way", by, WAYS), ("weight", weigh, (None, *WEIGHTS))):
        if name not in known:
            raise SparsekitError(f"the {what} to plan by must be {listed([x for x in known if x], 'or')}, got {name!r}")
    if choices is not None and by not in CHOICES:
        raise SparsekitError(f"choices are for plans by choices or latency, got some for a plan by {by}; leave them out")
    if by == "owl" and (weigh or unit != "block"):
        raise SparsekitError("owl gives each block one share and weighs no errors; leave the weights out and plan by block")
    if by == "latency":
        read_speedup(target)
        if low or high is not None:
            raise SparsekitError("bounds of the share are not for plans by latency; leave them out, or leave choices out")
    else:
        read_target(target, low, 1.0 if by == "choices" and high is None else high)


def read_speedup(target: str | float) -> float:
    """The number that "1.2x" or 1.2 is. Raises SparsekitError for anything else, and below 1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*x?\s*", str(target))
    if not match or float(match[1]) < 1:
        raise SparsekitError(f'the target of a plan by latency must be a speed-up of 1 or more, such as "1.2x", got {target!r}')
    return float(match[1])


def make_plan(
    model: nn.Module | str | Path,
    batches: Sequence[Tensor | Mapping[str, Tensor]],
    target: str | float,
    by: str = "curves",
    *,
    low: str | float = 0.0,
    high: str | float | None = None,
    unit: str = "linear",
    choices: Iterable[str | Pattern | None] | None = None,
    weigh: str | None = None,
    sensitivity: Sensitivity | None = None,
    tokens: int = 1,
    progress: Progress | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
) -> Plan:
    """The plan that prunes all linears to the target together, or by "latency" makes their products that much faster.

    model: one in memory, or the folder of one that need not fit there (device, dtype: as for ``load``). batches: as for ``prune``;
    not needed for what ``sensitivity``, an earlier measurement, holds.
    by: "curves" (``allocate``), "owl" (``allocate_owl``), "choices" (``allocate_choices``) or "latency" (``allocate_latency``): for
    this the target is a speed-up such as "1.2x", and times are what ``sparsekit bench --tune`` measured on this machine, in the
    model's dtype, at the number of tokens nearest to ``tokens``, four times as many or a quarter at most.
    low, high, choices: of the allocation. unit: what gets a share or a choice of its own, a "linear" or a "block"; by owl always a
    block.
    weigh: what the errors are weighed with: "gradient" (``gradient_weights``; the default), "loss" (those of the sensitivity, by
    ``loss_weights``) or "size".
    Raises SparsekitError as these functions do, for a sensitivity of another model, and where no row was measured."""
    unit = "block" if by == "owl" else unit
    check_ways(target, by, unit, weigh, low, high, choices)
    source, where = source_of(model, None, device, dtype), dict(device=device, dtype=dtype)
    names = {module: name for name, module in source.model.named_modules()}
    matrices = [matrix for group in find_targets(source.blocks, names, ()) for matrix in group]
    if by == "owl":
        return allocate_owl(outlier_shares(model, batches, progress=progress, **where), target, low=low, high=high)
    weigh = weigh or "gradient"
    if weigh == "loss" and not (sensitivity and sensitivity.losses):
        raise SparsekitError("weights by loss need a sensitivity that holds losses; measure them, or weigh by gradient")
    times = measured_times(matrices, source.device, tokens) if by == "latency" else {}
    wanted = list(CHOICES[by] if choices is None else choices) if by in CHOICES else SHARES
    if sensitivity is None:
        curves = error_curves(model, batches, [p for p in wanted if p not in (None, DENSE)], progress=progress, **where)
    else:
        curves = sensitivity.curves
        check_curves(curves, matrices)
    how: dict[str, Any] = {
        "weights": _weights(model, batches, curves, weigh, sensitivity, progress, where),
        "groups": blocks_of(source) if unit == "block" else None,
    }
    if by == "curves":
        plan = allocate(curves, target, low=low, high=high, **how)
    elif by == "choices":
        plan = allocate_choices(curves, target, wanted, low=low, high=1.0 if high is None else high, **how)
    else:
        plan = allocate_latency(curves, read_speedup(target), times, wanted, **how)
    return Plan(plan.patterns, plan.shapes, plan.method, {**plan.made, "weights": weigh, "unit": unit})


def check_curves(curves: Sequence[Curve], matrices: Iterable[Target]) -> None:
    """Raises SparsekitError where the curves are not those of the model's matrices, naming the first that differs."""
    found, there = {curve.name: curve.shape for curve in curves}, {one.name: tuple(one.weight.shape) for one in matrices}
    for name in (*there, *found):
        if found.get(name) != there.get(name):
            raise SparsekitError(f"the sensitivities must be those of this model, and {name} is in one alone, or of another shape")


def measured_times(matrices: Iterable[Target], device: torch.device, tokens: int) -> dict[tuple[int, int], tuple[float, float]]:
    """Of each shape the microseconds of the dense product and of the fastest kernel for a 2:4 weight, in the matrices' dtype, that
    were measured on the device, of four times the tokens or a quarter at most. Raises SparsekitError for a shape that was not,
    whatever was measured near it."""
    if tokens < 1:
        raise SparsekitError(f"a product must be of 1 token or more, got {tokens}")
    found = {}
    for matrix in matrices:
        (n, k), dtype = matrix.weight.shape, str(matrix.weight.dtype).removeprefix("torch.")
        times = tune.times(bench.key(device), dtype, tokens, n, k)
        if times is None or (times.n, times.k) != (n, k) or not near(times, tokens, n, k):
            raise SparsekitError(
                f"a plan by latency needs this machine's times of every product, and {n}x{k} in {dtype} has none of about "
                f"{tokens} token{'s' * (tokens > 1)}; run sparsekit bench MODEL_DIR --tokens {tokens} --tune, or plan by choices"
            )
        found[n, k] = times.dense, times.sparse
    return found


def _weights(
    model: nn.Module | str | Path,
    batches: Sequence[Tensor | Mapping[str, Tensor]],
    curves: Sequence[Curve],
    weigh: str,
    sensitivity: Sensitivity | None,
    progress: Progress | None,
    where: Mapping[str, Any],
) -> dict[str, float] | None:
    if weigh == "size":
        return None
    if weigh == "loss":
        groups = sensitivity.blocks if sensitivity.unit == "block" else None
        return loss_weights(curves, sensitivity.losses, sensitivity.dense_loss, groups)
    if sensitivity and sensitivity.weights:
        return sensitivity.weights
    return gradient_weights(model, batches, progress=progress, **where)
