"""What is known of a pruned folder, from its report, its weights and the files of other commands beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import bench, tune
from ..checkpoint import check_model_folder, resolve_device
from ..errors import SparsekitError
from ..inspection import inspect
from ..plan import DENSE, FILE, Plan
from ..report import PruneReport
from .patient import Check, read_checks
from .sensitivity import Sensitivity

# What stands beside report.json where the commands were told to put it there: the default of each option.
SENSITIVITY, FORECAST, DOCTOR = "sensitivity.json", "forecast.json", "doctor.json"
EVALUATION, DENSE_EVALUATION = "eval.json", "eval-dense.json"


@dataclass
class Known:
    """raw: report.json as it is; report: its PruneReport, where matrices were pruned. held: of ``inspect``. plan: the pattern
    asked for, and its sparsity, by name. sensitivity, forecast: as their commands write them. evaluation, dense_evaluation: of
    ``sparsekit eval``, of this folder and of the dense model. speeds: as ``measured_speeds``; machine: whose; measured: where."""

    name: str
    raw: dict[str, Any]
    report: PruneReport | None
    held: dict[str, Any]
    plan: dict[str, tuple[str, float]] | None = None
    sensitivity: Sensitivity | None = None
    forecast: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    dense_evaluation: dict[str, Any] | None = None
    checks: list[Check] | None = None
    speeds: dict[tuple[str, int, int], dict[int, float]] = field(default_factory=dict)
    machine: str = ""
    measured: str = "on this machine"

    @property
    def dense_perplexity(self) -> float | None:
        if self.dense_evaluation:
            return self.dense_evaluation["perplexity"]
        return (self.forecast or {}).get("dense_perplexity")

    @property
    def blocks(self) -> list[str]:
        return [block.name for block in self.report.blocks] if self.report else []


def split_name(name: str, blocks: Iterable[str]) -> tuple[str, str]:
    """The block that a matrix belongs to, by its number, and its role there, the same for all experts of a layer."""
    block = next((block for block in blocks if name.startswith(f"{block}.")), None)
    if block is None:
        found = re.match(r"(.*?\.\d+)\.(.+)", name)
        block, role = (found[1], found[2]) if found else ("", name)
    else:
        role = name[len(block) + 1 :]
    role = re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"\[\d+\]", "[*]", role))
    return block.rpartition(".")[2], role


def read(
    folder: str | Path,
    sensitivity: str | Path | None = None,
    forecast: str | Path | None = None,
    evaluation: str | Path | None = None,
    dense_evaluation: str | Path | None = None,
    doctor: str | Path | None = None,
) -> Known:
    """All that is known of a pruned folder; arguments and errors are those of ``make_page``."""
    folder = check_model_folder(folder)
    path = folder / "report.json"
    if not path.is_file():
        raise SparsekitError(f"the folder {folder} must hold the report.json of its pruning, and has none; prune it with sparsekit")
    raw = read_json(path)
    report = read_report(raw, path)
    if report is None and "structured" not in raw:
        raise SparsekitError(f"{path} must be the report of a pruning, and names neither linears nor what was taken out")
    beside = {
        name: _beside(folder, given, name)
        for given, name in (
            (forecast, FORECAST),
            (evaluation, EVALUATION),
            (dense_evaluation, DENSE_EVALUATION),
            (doctor, DOCTOR),
        )
    }
    for given, name in ((evaluation, EVALUATION), (dense_evaluation, DENSE_EVALUATION)):
        found = beside[name]
        if found is not None and not isinstance(found.get("perplexity"), int | float):
            raise SparsekitError(f"{given or folder / name} must be what sparsekit eval --json prints, and has no perplexity")
    if beside[FORECAST] is not None and not beside[FORECAST].get("rows"):
        raise SparsekitError(f"{forecast or folder / FORECAST} must be what sparsekit forecast writes, and has no rows")
    path = Path(sensitivity or folder / SENSITIVITY)
    losses = Sensitivity.load(path) if sensitivity or path.is_file() else None
    checks = beside.pop(DOCTOR)
    checks = None if checks is None else read_checks(checks, Path(doctor or folder / DOCTOR))
    held = inspect(folder)
    machine, speeds = measured_speeds(resolve_device("auto"))
    of = checks, speeds, machine, tune.measured_on(machine)
    return Known(folder.resolve().name, raw, report, held, _plan(folder), losses, *beside.values(), *of)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises SparsekitError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparsekitError(f"{path} must be a JSON file that can be read, got {error}") from None
    if not isinstance(found, dict):
        raise SparsekitError(f"{path} must be a JSON object, got a {type(found).__name__}")
    return found


def read_report(raw: dict[str, Any], path: Path) -> PruneReport | None:
    """The report of a pruning within matrices; None where the file tells of none."""
    if "linears" not in raw:
        return None
    try:
        return PruneReport.from_dict(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SparsekitError(f"{path} must be the report of a pruning by this version of sparsekit, got {error!r}") from None


def _beside(folder: Path, given: str | Path | None, name: str) -> dict[str, Any] | None:
    """The file given, or the one of that name in the folder, if there is one."""
    if given is not None:
        return read_json(Path(given))
    return read_json(folder / name) if (folder / name).is_file() else None


def _plan(folder: Path) -> dict[str, tuple[str, float]] | None:
    if not (folder / FILE).is_file():
        return None
    patterns = Plan.load(folder / FILE).patterns
    return {name: (DENSE, 0.0) if pattern is None else (pattern.brief, pattern.sparsity) for name, pattern in patterns.items()}


def measured_speeds(device: torch.device) -> tuple[str, dict[tuple[str, int, int], dict[int, float]]]:
    """The device's key, and how many times as fast as the dense product its fastest kernel ran: by dtype and weight (n, k), of each
    measured number of tokens."""
    key = bench.key(device)
    found: dict[tuple[str, int, int], dict[int, float]] = {}
    for dtype in dict.fromkeys(row.dtype for row in tune.rows(key)):
        for (n, k), of_m in tune.timed(key, dtype).items():
            if speeds := {m: times.dense / times.sparse for m, times in of_m.items() if times}:
                found[dtype, n, k] = speeds
    return key, found
