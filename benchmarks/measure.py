"""What every benchmark here shares: the machine, its own floor, and rows out. Time itself is sparsekit/timing.py."""

from __future__ import annotations

import csv
import datetime
import io
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from sparsekit import _C
from sparsekit.documents import to_json, write_whole
from sparsekit.timing import cpu_name, time_us


def copy_gbps(nbytes: int = 1 << 28) -> float:
    """Bytes read and written a second by torch's copy of a tensor that no cache holds, on torch's threads."""
    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    return 2 * nbytes / time_us({"copy": lambda: target.copy_(source)}, 1.0)["copy"] / 1e3


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the difference over that of the truth, to three digits."""
    return float(f"{((found.double() - truth).norm() / truth.double().norm()).item():.2e}")


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Where and when: processor and what vectors of it the CPU kernels use, threads, torch, date; and the GPU with its driver."""
    found = {
        "cpu": cpu_name(),
        "vectors": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return found


def attempted(row: Callable[..., dict | None], cases: Iterable[tuple]) -> Iterator[dict]:
    """The row of each case, but of those that have none. One that raises is told to stderr and the next one made; at the end that
    is a SystemExit."""
    failed = []
    for case in cases:
        try:
            found = row(*case)
        except (RuntimeError, ValueError) as error:
            failed.append(case)
            traceback.print_exc()
            print(f"no row of {case}: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
            continue
        if found is not None:
            yield found
    if failed:
        sys.exit(f"{len(failed)} rows could not be made, the first of {failed[0]}")


def write(rows: Iterable[dict], as_json: bool, path: Path | None, device: str = "cpu") -> None:
    """The rows as CSV, or as one JSON object with the machine; to stdout, and to the path where one is given, which holds every row
    as soon as it is made."""
    as_json, made = as_json or bool(path and path.suffix == ".json"), []
    here = machine(device) if as_json else None
    try:
        for row in rows:
            made.append(row)
            _write(_text(made, here), path)
    finally:
        sys.stdout.write(_text(made, here))


def _text(rows: list[dict], here: dict | None) -> str:
    if here is not None:
        return _json({"machine": here, "rows": rows})
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_object(found: dict, path: Path | None) -> None:
    """The object as JSON, a figure that is no number as null; to stdout, and to the path where one is given."""
    _write(_json(found), path)
    sys.stdout.write(_json(found))


def _json(found: dict) -> str:
    return to_json(_numbers(found), indent=2) + "\n"


def _numbers(value):
    """The same with None for NaN and Inf: a kernel that is wrong on some size still leaves the other rows."""
    if isinstance(value, dict):
        return {name: _numbers(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(text: str, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: part.write_text(text))
