"""What every benchmark here shares: time, the machine's own floor, and rows out."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def time_us(calls: dict[str, Callable[[], object]], seconds: float = 0.3) -> dict[str, float]:
    """Median microseconds of each call on the CPU, the rivals taking turns so that a busy moment hits them alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, samples.values())) < 5:
        for name, call in calls.items():
            call()  # the turn before was a rival's: its threads and its data are not ours
            begin = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


def copy_gbps(nbytes: int = 1 << 28) -> float:
    """Bytes read and written a second by torch's copy of a tensor that no cache holds, on torch's threads."""
    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    return 2 * nbytes / time_us({"copy": lambda: target.copy_(source)}, 1.0)["copy"] / 1e3


def machine() -> dict[str, str | int]:
    """Where and when: processor, threads, torch, date."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write(rows: list[dict], as_json: bool, path: Path | None) -> None:
    """The rows as CSV, or as one JSON object with the machine; to stdout, and to the path where one is given."""
    if as_json or (path and path.suffix == ".json"):
        text = json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n"
        if path:
            path.write_text(text)
        sys.stdout.write(text)
        return
    for out in filter(None, (sys.stdout, path and path.open("w", newline=""))):
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
