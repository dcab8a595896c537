"""The three questions about a pruned model (why did quality drop, why is it no faster, why does 2:4 hurt), answered by what can be
checked: what was looked at, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import catalog
from ..checkpoint import resolve_device, stored_dtype
from ..errors import SparsekitError, listed
from ..format import nbytes24
from ..inspection import Weights, share_of_zeros
from ..linear import NM24
from ..patterns import Pattern
from ..pipeline.loop import Progress
from ..pruners import METHODS, SparseGPT, method_named
from ..report import LinearReport, PruneReport
from .checks import CHECKS
from .dense import dense_blocks, source_of
from .known import SENSITIVITY, read_json, read_report, split_name
from .patient import FINDING, LEVELS, NOT_MADE, OK, SEVERITIES, Check, Matrix, Patient
from .sensitivity import Sensitivity


def diagnose(
    folder: str | Path,
    *,
    dense: str | Path | None = None,
    batches: Iterable[Tensor | Mapping[str, Tensor]] = (),
    perplexities: tuple[float, float] | None = None,
    batch: int = 1,
    gpu: str | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[Check]:
    """Every check of the three trees on a pruned folder, in their order. What cannot be made says why.

    dense: the folder that it was pruned from. batches: token ids, as for ``prune``, of text that the model is for; the errors of
    each matrix are measured on it against ``dense``; not where parts were taken out whole. perplexities: of the dense model and of
    this one, on one text. batch: tokens a product, and gpu: a name or capability as the catalog reads it, by default this
    machine's: what speed is asked about. dtype: of activations, by default fp32 on a CPU and the stored one elsewhere.
    Raises SparsekitError where the folder cannot be loaded or did not come from ``dense``, and for what is out of range."""
    if batch < 1:
        raise SparsekitError(f"the batch must be at least one token, got {batch}")
    if gpu is not None:
        catalog.capability_of(gpu)  # refuses a name that is not known
    batches = list(batches)
    if batches and dense is None:
        raise SparsekitError("errors on a text are measured against the dense model, and none is given; give --dense")
    weights, place = Weights(folder), resolve_device(device)
    path = weights.folder / "report.json"
    raw = read_json(path) if path.is_file() else {}
    report = read_report(raw, path)
    beside = weights.folder / SENSITIVITY
    stored, structured = stored_dtype(weights.folder), bool(raw.get("structured"))
    if structured and batches:
        raise SparsekitError(
            f"errors are measured matrix by matrix, and parts were taken whole out of those of {weights.folder}; leave --calib out"
        )
    before = None if dense is None else Weights(dense)
    patient = Patient(
        weights.folder,
        report,
        _matrices(weights, report, None if structured else before),
        weights.format,
        stored,
        dtype or (torch.float32 if place.type == "cpu" else stored),
        place,
        gpu,
        batch,
        structured,
        Sensitivity.load(beside) if beside.is_file() else None,
        perplexities,
    )
    if batches:
        patient.errors = _errors(weights, report, dense, batches, place, progress)
    return [check(patient) for check in CHECKS]


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """Of JSON's types alone: the checks, and how many of each result."""
    counts = {result: sum(check.result == result for check in checks) for result in (OK, FINDING, NOT_MADE)}
    return {"checks": [asdict(check) for check in checks], "counts": counts}


def _matrices(weights: Weights, report: PruneReport | None, dense: Weights | None) -> list[Matrix]:
    asked = {row.name: row for row in report.linears} if report else {}
    names = [*weights.linears, *weights.experts]
    if missing := [name for name in asked if name not in names]:
        raise SparsekitError(f"the report in {weights.folder} must be of its weights, and {missing[0]} is not among them")
    original = set() if dense is None else {*dense.linears, *dense.experts}
    if dense is not None and (odd := sorted(name for name in original ^ {*names} if split_name(name, ())[0])):  # of a block
        raise SparsekitError(
            f"--dense must be the model that {weights.folder} was pruned from, and {odd[0]} is in one of them alone"
        )
    found = []
    for name in names:
        held = weights.read(name)
        weight, row = held.weight, asked.get(name)
        changed = None
        if dense is not None and name in original:
            before = dense.read(name).weight
            if before.shape != weight.shape:
                raise SparsekitError(
                    f"--dense must be the model that {weights.folder} was pruned from, and its {name} is {tuple(before.shape)}, "
                    f"here {tuple(weight.shape)}"
                )
            kept = weight != 0
            changed = ((weight != before.to(weight.dtype)) & kept).sum().item() / max(kept.sum().item(), 1)
        saves = nbytes24(*weight.shape, weight.dtype) < weight.nbytes
        found.append(
            Matrix(
                name,
                tuple(weight.shape),
                share_of_zeros(weight),
                bool(torch.isfinite(weight).all()),
                None if row is None else _broken(weight, row, report),
                bool(weight.numel()) and NM24.check(weight) is None,
                held.compressed,
                saves and name not in weights.experts,
                changed,
            )
        )
    return found


def _broken(weight: Tensor, row: LinearReport, report: PruneReport) -> str | None:
    """Where the weight does not hold what the report says of it."""
    pattern = Pattern.parse(row.pattern)
    rowwise = report.group == "row"
    if report.group is None and report.method in METHODS:
        rowwise = method_named(report.method).rowwise
    return pattern.check(weight, rowwise=rowwise)


def _errors(
    weights: Weights,
    report: PruneReport | None,
    dense: str | Path,
    batches: list,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, tuple[float, tuple[float, ...]]]:
    """Of each pruned matrix by name: its output error on the batches, and SparseGPT's at each of LEVELS, calibrated on them."""
    names = {row.name for row in report.linears} if report else {*weights.linears, *weights.experts}
    levels, found = [Pattern.parse(level) for level in LEVELS], {}
    for seen in dense_blocks(source_of(dense, device=device), batches, SparseGPT, NM24, (), progress):
        for target in list(seen.pruners):
            pruner, weight = seen.pruners.pop(target), target.weight
            if target.name not in names or not pruner.statistics.tokens:
                continue
            own = pruner.statistics.output_error(weight, weights.read(target.name).weight.to(weight.device))
            best = tuple(pruner.prune_levels(weight, [level])[0].output_error for level in levels)
            found[target.name] = own, best
    return found


def summarise(checks: list[Check]) -> str:
    """How many findings of each severity, in how many checks."""
    findings = [check for check in checks if check.result == FINDING]
    made = sum(check.result != NOT_MADE for check in checks)
    if not findings:
        return f"no finding in {made} checks, {len(checks) - made} could not be made"
    counts = [(severity, sum(check.severity == severity for check in findings)) for severity in SEVERITIES]
    said = listed([f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts if count])
    return f"{said} in {made} checks, {len(checks) - made} could not be made"
