"""What the benchmarks of the memory-bound ops share: shapes, rows and the command. Not itself a benchmark.

An op reads and writes a known number of bytes and computes next to nothing, so its floor is the time in which a copy moves as many.
A row holds that count and the time, the time of a copy of as many bytes that took turns with it, the share of the copy's bandwidth
that the op reached, and each rival's time.

On a CPU the two sides of a share do the same with memory. The goal, half of a copy's bandwidth, is of_copy: copy and op write to
memory that is there (``out=``), and neither finds its data in a cache, for each call takes the next of so many inputs and outputs
that no cache holds them. of_fresh_copy is the other pair: both return a new tensor, whose memory the system first gives and clears,
which costs as much again as the work; new_us is the op's time, fresh_copy_us the copy's. Where the input is transposed the row has
turned_copy_us besides: torch's copy of as many bytes that does no more than turn such a matrix over.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import cycle
from pathlib import Path

import torch

from benchmarks.gpu import that_run
from benchmarks.measure import attempted, write
from sparsekit import ops
from sparsekit.timing import graph_us, time_us, variants

SHAPES = {  # (n, k): the linears of the models that they are named for
    "Llama-3-8B o": (4096, 4096),
    "Llama-3-8B kv": (1024, 4096),
    "Llama-3-8B up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-2-7B down": (4096, 11008),
    "Qwen2.5-7B up": (18944, 3584),
    "Qwen2.5-7B down": (3584, 18944),
    "Qwen2.5-14B o": (5120, 5120),
    "Qwen2.5-14B down": (5120, 13824),
}
REFERENCE_SHAPE = "Llama-2-7B down"  # the one measured in every dtype and layout
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
PYTEST_SHAPE = (1024, 4096)


@dataclass
class Problem:
    """One call to measure: the bytes it must move, the op (``op(out=...)`` where it can write to memory that is there), its Triton
    kernel alone (the op also waits for the kernel's verdict on the input, which no CUDA graph can hold), and what else does the
    same."""

    nbytes: int
    op: Callable[..., object]
    kernel: Callable[[], object]
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)
    writes: bool = True


def weight(n: int, k: int, dtype: torch.dtype, device: str, transposed: bool = False, seed: int = 0) -> torch.Tensor:
    """A random dense weight (n, k); transposed: laid out as the transpose of a row-major (k, n)."""
    shape = (k, n) if transposed else (n, k)
    generator = torch.Generator(device).manual_seed(seed)
    if dtype == torch.int8:
        w = torch.randint(-128, 128, shape, generator=generator, dtype=dtype, device=device)
    else:
        w = torch.randn(shape, generator=generator, device=device).to(dtype)
    return w.t() if transposed else w


def kernel_of(name: str) -> Callable:
    """The Triton launcher of that name. Imported late: only a GPU's rows need Triton."""
    return getattr(import_module(f"sparsekit.kernels.{name}"), name)


def sorted_mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The N:M mask as pruning tools commonly take it: by sorting every m neighbours. m must divide the columns."""
    places = scores.reshape(-1, m).argsort(dim=1, descending=True)[:, :n]
    mask = torch.zeros(places.shape[0], m, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, places, True).view(scores.shape)


def pruned(w: torch.Tensor) -> torch.Tensor:
    """A weight that holds 2:4, laid out as w is."""
    held = ops.prune24(w)
    return held if w.is_contiguous() else held.t().contiguous().t()


Maker = Callable[[torch.Tensor], Problem | None]  # of a dense weight; None where its dtype has no such op


def rows(make: Maker, device: str, layers: list[str]) -> Iterator[dict]:
    """A row for every layer in bf16, and for the reference shape in every dtype that the op has and transposed."""
    cases = [(name, "bf16", False) for name in layers]
    if REFERENCE_SHAPE in layers:
        cases += [(REFERENCE_SHAPE, label, False) for label in DTYPES if label != "bf16"] + [(REFERENCE_SHAPE, "bf16", True)]
    return attempted(partial(row, make, device), cases)


def row(make: Maker, device: str, name: str, label: str, transposed: bool) -> dict | None:
    (n, k), dtype = SHAPES[name], DTYPES[label]
    w = weight(n, k, dtype, device, transposed)
    problem = make(w)
    if problem is None:
        return None
    found = {"layer": name, "n": n, "k": k, "dtype": label, "layout": "transposed" if transposed else "row-major"}
    found["bytes"] = problem.nbytes
    if device == "cpu":
        if transposed:
            problem.rivals["turned_copy"] = turned_copy_of(problem.nbytes, w)
        times = cpu_times(problem, [make(w.clone()) for _ in range(uncached(problem.nbytes) - 1)])
        us, copy = times["op"], times["copy"]
    else:
        problem.rivals = that_run(problem.rivals, f"{label} {n} x {k}, {found['layout']}")
        # Inputs that no L2 holds all of, so that each call finds its own in memory.
        seeds = range(variants(problem.nbytes))
        kernels = [make(weight(n, k, dtype, device, transposed, seed)).kernel for seed in seeds]
        replayed = graph_us({"kernel": kernels, "copy": [copy_of(problem.nbytes, device) for _ in seeds]})
        us, copy = replayed["kernel"], replayed["copy"]
        times = time_us({"op": problem.op, **problem.rivals}, seconds=0.2, synchronize=torch.cuda.synchronize)
        found["op_eager_us"] = round(times["op"], 1)
    found |= {"us": round(us, 1), "gbps": round(problem.nbytes / us / 1e3, 2)}
    found |= {"copy_us": round(copy, 1), "copy_gbps": round(problem.nbytes / copy / 1e3, 2), "of_copy": round(copy / us, 3)}
    if "new" in times:
        found |= {"new_us": round(times["new"], 1), "fresh_copy_us": round(times["fresh"], 1)}
        found |= {"of_fresh_copy": round(times["fresh"] / times["new"], 3)}
    return found | {f"{rival}_us": round(times[rival], 1) for rival in problem.rivals}


def cpu_times(problem: Problem, others: list[Problem]) -> dict[str, float]:
    """Median microseconds of the op and of a copy, each on one problem after the other; of both with new tensors; of the rivals."""
    problems = [problem, *others]
    calls = {"op": in_turn([partial(p.op, out=p.op()) if p.writes else p.op for p in problems])}
    calls["copy"] = in_turn([copy_of(problem.nbytes, "cpu") for _ in problems])
    if problem.writes:
        calls |= {"new": in_turn([p.op for p in problems]), "fresh": in_turn([fresh_copy_of(problem.nbytes) for _ in problems])}
    return time_us(calls | problem.rivals, seconds=0.5)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Each call is the next one's turn."""
    turns = cycle(calls)
    return lambda: next(turns)()


def uncached(nbytes: int) -> int:
    """How many problems of so many bytes the largest cache of this CPU cannot hold half of."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    kib = int(size.read_text().strip().removesuffix("K")) if size.exists() else 32 << 10
    return 1 + (2 * kib << 10) // max(nbytes, 1)


def copy_of(nbytes: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes nbytes in all."""
    source = torch.ones(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def turned_copy_of(nbytes: int, w: torch.Tensor) -> Callable[[], object]:
    """A copy that reads and writes nbytes in all: of a matrix with the rows of w, laid out as w is, into a row-major one."""
    rows, cols = w.shape[0], nbytes // (2 * w.shape[0] * w.itemsize)
    source = torch.ones(cols, rows, dtype=w.dtype).t()
    target = torch.empty(rows, cols, dtype=w.dtype)
    return lambda: target.copy_(source)


def fresh_copy_of(nbytes: int) -> Callable[[], object]:
    """The same into memory that each call asks the system for."""
    source = torch.ones(nbytes // 2, dtype=torch.uint8)
    return source.clone


def main(
    doc: str,
    make: Callable[..., Problem | None],
    parent: argparse.ArgumentParser | None = None,
    settings: Callable[[argparse.Namespace], dict] = lambda args: {},
) -> None:
    """The command of a benchmark: prints its rows as CSV or JSON.

    parent: the arguments that this benchmark has of its own; settings: what of them goes to make."""
    parents = [parent] if parent else []
    parser = argparse.ArgumentParser(description=doc, parents=parents, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="LAYER", help=", ".join(SHAPES))
    parser.add_argument("--json", action="store_true", help="one JSON object with the machine, in place of CSV")
    parser.add_argument("--out", type=Path, help="also write to this file; .json or .csv")
    args = parser.parse_args()
    write(rows(partial(make, **settings(args)), args.device, args.layers), args.json, args.out, args.device)
