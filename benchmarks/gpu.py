"""What the rows of a GPU need beside time: its name, its copy bandwidth, its clocks under load, and the rivals. Not yet run on
hardware."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import torch

from sparsekit import ops
from sparsekit.format import Sparse24, to_torch_cutlass
from sparsekit.timing import graph_us


def gpu_copy_gbps(nbytes: int = 1 << 30) -> float:
    """Bytes read and written a second by torch's copy of a tensor that L2 does not hold."""
    source = torch.ones(nbytes // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / graph_us({"copy": [lambda: target.copy_(source)]})["copy"] / 1e3


def clocks(calls: Sequence[Callable[[], object]], seconds: float = 0.3) -> tuple[int | None, float | None]:
    """MHz of the multiprocessors and watts while the calls run, by NVML or nvidia-smi; None where there is neither."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    rounds = max(1, int(seconds * 1e3 / max(begin.elapsed_time(end), 1e-3)))
    for _ in range(min(rounds, 2000)):  # queued ahead, so that the card is still at it when it is asked
        for call in calls:
            call()
    try:
        return _by_nvml() if find_spec("pynvml") else _by_nvidia_smi()
    finally:
        torch.cuda.synchronize()


def _by_nvml() -> tuple[int | None, float | None]:
    import pynvml

    try:
        return torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3
    except (RuntimeError, pynvml.NVMLError) as error:
        print(f"NVML gives no clocks: {error}", file=sys.stderr)
        return None, None


def _by_nvidia_smi() -> tuple[int | None, float | None]:
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        mhz, watts = said.splitlines()[torch.cuda.current_device()].split(",")
        return int(mhz), float(watts)
    except (OSError, subprocess.SubprocessError, ValueError):  # the latter where it says [N/A]
        return None, None


def that_run(rivals: Mapping[str, Callable[[], object]], what: str) -> dict[str, Callable[[], object]]:
    """The calls that do not raise, each made once; of the others is told what they do not take."""
    found = {}
    for name, call in rivals.items():
        try:
            call()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, AttributeError) as error:
            print(f"{name} does not take {what}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            continue
        found[name] = call
    return found


def rivals_of(x: torch.Tensor, held: Sequence[Sparse24]) -> dict[str, list[Callable[[], object]]]:
    """The products of other libraries that take these sizes and that a CUDA graph holds: x (m, k) with each 2:4 weight (n, k)."""
    ways, made, what = {"cusparselt": _cusparselt, "torch_cutlass": _torch_cutlass}, {}, f"m, n, k = {(x.shape[0], *held[0].shape)}"
    that_run({name: lambda name=name, way=way: made.update({name: way(x, held)}) for name, way in ways.items()}, what)
    run = {name: lambda name=name, calls=calls: graph_us({name: calls[:1]}, most=1) for name, calls in made.items()}
    return {name: made[name] for name in that_run(run, what)}


def _cusparselt(x: torch.Tensor, held: Sequence[Sparse24]) -> list[Callable[[], object]]:
    compressed, b = [torch._cslt_compress(ops.expand24(s)) for s in held], x.t()
    best = torch._cslt_sparse_mm_search(compressed[0], b)
    return [lambda a=a: torch._cslt_sparse_mm(a, b, alg_id=best) for a in compressed]


def _torch_cutlass(x: torch.Tensor, held: Sequence[Sparse24]) -> list[Callable[[], object]]:
    packed, b = [to_torch_cutlass(s) for s in held], x.t()
    return [lambda values=values, meta=meta: torch._sparse_semi_structured_mm(values, meta, b) for values, meta in packed]
