"""What every benchmark here shares: time, the machine's own floor, and rows out."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def time_us(
    calls: dict[str, Callable[[], object]], seconds: float = 0.3, synchronize: Callable[[], object] | None = None
) -> dict[str, float]:
    """Median microseconds of each call as its caller waits for it, the rivals taking turns so that a busy moment hits them alike.

    synchronize: what waits for a device that runs behind the host."""
    wait = synchronize or (lambda: None)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, samples.values())) < 5:
        for name, call in calls.items():
            call()  # the turn before was a rival's: its threads and its data are not ours
            wait()
            begin = time.perf_counter()
            call()
            wait()
            samples[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


def graph_us(calls: dict[str, Sequence[Callable[[], object]]], rounds: int = 50) -> dict[str, float]:
    """Median microseconds of one call on the current CUDA device, from CUDA graphs replayed in turns.

    A name's calls do the same to different inputs: where those together exceed L2, each call finds its own in memory. The graph
    leaves out what the host takes to launch."""
    graphs = {}
    for name, variants in calls.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in variants:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in variants:
                call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:  # the first ones bring the clocks up
                samples[name].append(begin.elapsed_time(end) * 1e3 / len(calls[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def copy_gbps(nbytes: int = 1 << 28) -> float:
    """Bytes read and written a second by torch's copy of a tensor that no cache holds, on torch's threads."""
    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    return 2 * nbytes / time_us({"copy": lambda: target.copy_(source)}, 1.0)["copy"] / 1e3


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Where and when: processor, threads, torch, date; and the GPU with its driver where that is what ran."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return found


def write(rows: list[dict], as_json: bool, path: Path | None, device: str = "cpu") -> None:
    """The rows as CSV, or as one JSON object with the machine; to stdout, and to the path where one is given."""
    if as_json or (path and path.suffix == ".json"):
        text = json.dumps({"machine": machine(device), "rows": rows}, indent=2) + "\n"
        if path:
            path.write_text(text)
        sys.stdout.write(text)
        return
    for out in filter(None, (sys.stdout, path and path.open("w", newline=""))):
        writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
