"""How long a call takes, on the host's clock and on a GPU without what the host adds; and the phases of longer work."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor as /proc/cpuinfo names it, or as Python does where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class Phases:
    """The time of work that goes through the same few phases again and again: ``with phases("loop"): ...``.

    A GPU runs behind the host: there the times are its own, and ``seconds`` waits for it."""

    def __init__(self, device: torch.device):
        self._device, self._spans = device, []

    @contextmanager
    def __call__(self, name: Hashable) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def seconds(self) -> dict[Hashable, float]:
        """Of each phase so far, in the order in which they first came."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = {}
        for name, begin, end in self._spans:
            span = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            found[name] = found.get(name, 0.0) + span
        return found

    def _now(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def peak_memory(device: torch.device) -> int:
    """The most bytes that the process has held since it began: of the device's memory, or of its own for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, IndexError, ValueError):  # getrusage on Linux counts what stood here before exec, a parent's memory
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_us(
    calls: dict[str, Callable[[], object]], seconds: float = 0.3, synchronize: Callable[[], object] | None = None
) -> dict[str, float]:
    """Median microseconds of each call as its caller waits for it, the rivals taking turns so that a busy moment hits them alike.
    At least five turns each; a call of more than 0.2 s takes no more than that.

    synchronize: what waits for a device that runs behind the host."""
    wait = synchronize or (lambda: None)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, samples.values())) < 5:
        for name, call in calls.items():
            slow = samples[name] and samples[name][0] > 0.2e6
            if slow and len(samples[name]) >= 5:
                continue
            if not slow:
                call()  # the turn before was a rival's: its threads and its data are not ours
            wait()
            begin = time.perf_counter()
            call()
            wait()
            samples[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


def variants(nbytes: int) -> int:
    """How many inputs of so many bytes the L2 of the current CUDA device cannot all hold: four times its size in all, at least 2
    and at most 32."""
    cached = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(32, 4 * cached // max(nbytes, 1) + 1))


def graph_us(calls: dict[str, Sequence[Callable[[], object]]], seconds: float = 0.5, most: int = 50) -> dict[str, float]:
    """Median microseconds of one call on the current CUDA device, from CUDA graphs replayed in turns: for so many seconds, but at
    least ten turns and at most ``most``.

    A name's calls do the same to different inputs: where those together exceed L2, each call finds its own in memory. The graph
    leaves out what the host takes to launch. Not yet run on hardware."""
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
    for turn in range(most + 3):
        if turn == 3:  # the first ones bring the clocks up
            end_of_all, samples = time.perf_counter() + seconds, {name: [] for name in calls}
        if turn >= 13 and time.perf_counter() > end_of_all:
            break
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e3 / len(calls[name]))
    return {name: statistics.median(times) for name, times in samples.items()}
