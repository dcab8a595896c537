"""Everything that only a GPU can show, in one folder: tests, sanitizer, benchmarks, and what they ran on.

    make gpu-evidence [QUICK=1] [MINUTES=9.5] [OUT=FOLDER]
    python -m benchmarks.gpu_evidence [--build] [--quick] [--minutes M] [--only NAME ...] [--out FOLDER]

It ends within its minutes whatever hangs. Steps run in the order of their worth, each within a limit, and what one has learned is
on disk at once: a log each in logs/, a line a test in tests/, a row of a benchmark in its CSV; summary.json and summary.md hold
what came of each, and which tests failed by which line. The exit code is 1 where a step failed, hung, ran out of time or was not
run. Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from benchmarks import cases
from benchmarks.steps import NOT_RUN, PASSED, RUNNING, Record, Step, Steps

ROOT = Path(__file__).resolve().parents[1]
MINUTES = {False: 9.5, True: 2.8}
MEMORY_BOUND = (
    "prune_compress24", "compress24", "expand24", "expand_fragments", "prune24", "mask_nm", "mask_rows", "validate24",
)  # fmt: skip
SANITIZED = ("memcheck", "racecheck")
QUICK_LAYERS = ("Llama-3-8B o", "Llama-2-7B down")
QUICK_DECODE = ("--blocks", "4", "--batch", "1")
SPARSEGPT_LAYERS = ("square 1024", "Llama-2-7B q", "Llama-2-7B up")
TUNED = {"8192x8192": ("--tokens", "8192"), "4096x4096": (), "14336x4096": (), "4096x14336": ()}  # the first: a goal's size
OURS = ("linear24", "24_kernel", "mask_", "obs_block", "gram_kernel", "count_digits", "keep_above", "expand_fragments")  # kernels
STUCK = {"test": 75, "row": 45}  # seconds after which one hangs, what Triton compiles for it included: of a test up to 40 kernels
TOOLKIT = "/usr/local/cuda/bin"
MOST_AT_ONCE = 15  # processes of tests, each with a CUDA context of 0.5 GiB

# Name, torch, compute capability: before the package is built, in a process of its own, which alone has a CUDA context then.
PROBE = """import json, torch
print(json.dumps([torch.cuda.get_device_name(), torch.cuda.get_device_capability()] if torch.cuda.is_available() else None))"""


# Without nvcc the package is built for CPUs, and every test of a kernel would be skipped.
BUILT = """import sys, benchmarks
from sparsekit import _C
found = _C.cuda_archs()
sys.exit(f"the package must be built for {sys.argv[1]}, and is for {found or 'CPUs alone'}" if sys.argv[1] not in found else 0)"""


def build(capability: Sequence[int]) -> list[Step]:
    """Of the card's own architecture alone; a letter is for what runs on no later one. Then whether that is what was built."""
    arch = "90a" if tuple(capability) == (9, 0) else "".join(map(str, capability))
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "."]
    env = {"SPARSEKIT_CUDA_ARCHS": arch, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return [Step("build", command, 60, 150, env=env), Step("built", [sys.executable, "-c", BUILT, arch], 1, 20)]


def steps(out: Path, quick: bool, cores: int = 16, gpu: str = "") -> list[list[Step]]:
    """What is run after the build, in order; the steps of a group run beside each other. Estimates are of a Hopper card and 16
    cores, reckoned and not measured but for what Triton takes to compile a kernel, 0.5 s and 1.5 s for the OBS step: 600 and 300 of
    them in the tests. 5 s for a process to import torch."""
    marked = "gpu and sanitize" if quick else "gpu"
    found = [tests("tests", out, marked, min(cores, MOST_AT_ONCE), 25 if quick else 95, 45 if quick else 150)]
    tuned = {} if quick else {"SPARSEKIT_CACHE": str(out / "tune")}
    for shape, tokens in ({} if quick else TUNED).items():  # 8 numbers of tokens, 5 to 40 kernels of 10 ms to 0.5 s of replays
        command = [sys.executable, "-m", "sparsekit", "bench", "--tune", "--json", "--device", "cuda", "--shape", shape, *tokens]
        found.append([Step(f"tune-{shape}", command, 12, 30, env=tuned, cwd=out)])
    # 22 rows, or 117, of 0.7 s: 0.5 s of replays, 0.1 s of eager calls; 4 s for the largest squares.
    options = ["--quick"] if quick else []
    found.append([benchmark("linear24", out, 25 if quick else 80, 45 if quick else 150, *options, env=tuned)])
    few = ["--layers", *QUICK_LAYERS]
    for op in MEMORY_BOUND[:2] if quick else MEMORY_BOUND:
        # 7 rows, or of the first three 14, of 0.5 s and some 4 compilations.
        short = quick or op not in MEMORY_BOUND[:3]
        found.append([benchmark(op, out, 10 if short else 15, 30 if short else 45, *(few if short else []))])
    # 8 s of imports, 3 s for a model of 32 blocks and its sparse twin, 2 s of compilations; of a row 1 s of capture, 1 s of
    # replays, 1.5 s for the truth.
    model = ["--model", "llama-2-7b"]
    found.append([benchmark("decode", out, *((13, 40) if quick else (20, 75)), *model, *(QUICK_DECODE if quick else []))])
    # Of a row 0.5 to 3 s of eager loop, and thrice as much again as our own prune: the widest layer's are left out.
    layers = SPARSEGPT_LAYERS[1:2] if quick else SPARSEGPT_LAYERS
    found.append([benchmark("sparsegpt", out, 10 if quick else 26, 30 if quick else 75, "--layers", *layers)])
    if quick:
        return found + roofline(out, gpu)
    found.append([benchmark("sparsegpt", out, 70, 120, *model, "--pattern", "2:4", name="sparsegpt-llama-2-7b", still=None)])
    if sanitizer := of_toolkit("compute-sanitizer"):
        each = max(1, min(cores, MOST_AT_ONCE) // len(SANITIZED))
        found.append([step for tool in SANITIZED for step in sanitized(tool, out, sanitizer, each)])
    else:  # told as a failure, and not left out
        code = f"raise SystemExit('compute-sanitizer must be on the path or in {TOOLKIT}, found in neither')"
        found.append([Step("sanitizer", [sys.executable, "-c", code], 1, 10)])
    return found + roofline(out, gpu)


def tests(name: str, out: Path, marked: str, parts: int, estimate: float, limit: float, before: Sequence[str] = ()) -> list[Step]:
    """The marked tests in so many processes: what hangs, or loses its CUDA context, takes nothing else with it."""
    found = []
    for part in range(parts):
        lines = out / "tests" / f"{name}-{part}.jsonl"
        command = [*before, sys.executable, "-m", "benchmarks.cases", str(lines), "--part", f"{part}/{parts}", "--"]
        command += ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-m", marked, *gpu_files()]
        # The CPU's side of a comparison is as many threads as there are processes.
        found.append(Step(f"{name}-{part}", command, estimate, limit, STUCK["test"], lines, True, {"OMP_NUM_THREADS": "1"}))
    return found


def of_toolkit(name: str) -> str | None:
    """Where a program of CUDA's toolkit is, whose folder is not on every path."""
    return shutil.which(name) or shutil.which(name, path=TOOLKIT)


def gpu_files() -> list[str]:
    """The files of tests that have any for a GPU: no other is imported. They are marked, or take the fixture ``device``, or run
    Triton's kernels on whatever there is."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text()
        fixture = re.search(r"def test_\w+\([^)]*\bdevice\b", text) and 'parametrize("device"' not in text
        if fixture or "mark.gpu" in text or "interpreted import" in text:
            found.append(str(path))
    return found


def sanitized(tool: str, out: Path, sanitizer: str, parts: int) -> list[Step]:
    """The small set of tests under one tool of compute-sanitizer, which looks at this package's kernels alone."""
    ours = [word for name in OURS for word in ("--kernel-name", f"kns={name}")]
    found = []
    for part, step in enumerate(tests(tool, out, "gpu and sanitize", parts, 60, 90)):
        port = 49152 + 64 * (SANITIZED.index(tool) * parts + part)  # or they would find each other's processes
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--port", str(port), *ours, *step.command]
        found.append(Step(step.name, command, step.estimate, step.limit, STUCK["test"], step.grows, True, step.env))
    return found


def benchmark(
    op: str,
    out: Path,
    estimate: float,
    limit: float,
    *arguments: str,
    name: str = "",
    still: float | None = STUCK["row"],
    env: Mapping[str, str] | None = None,
) -> Step:
    rows = out / f"{name or op}.csv"
    command = [sys.executable, "-m", f"benchmarks.{op}", "--device", "cuda", "--out", str(rows), *arguments]
    return Step(name or op, command, estimate, limit, still, rows, env=env or {})


def roofline(out: Path, gpu: str) -> list[list[Step]]:
    if not find_spec("matplotlib"):
        return []
    command = [sys.executable, "-m", "benchmarks.roofline", str(out / "linear24.csv"), "--card", gpu]
    command += ["--out", str(out / "roofline.png")]
    return [[Step("roofline", command, 5, 20)]]


def what_ran(left: Callable[[], float]) -> dict[str, str | int | bool | None]:
    """The machine, its driver and tools, and the commit, asked while seconds are left. A GPU's own part comes from a process that
    ends."""

    def said(*command: str) -> str | None:
        try:
            limit = max(1, min(60, left()))
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=limit).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    nvcc, changed = said(of_toolkit("nvcc") or "nvcc", "--version"), said("git", "status", "--porcelain", "--untracked-files=no")
    here = said(sys.executable, "-c", "import json; from benchmarks.measure import machine; print(json.dumps(machine('cuda')))")
    return {
        **(json.loads(here) if here else {}),
        "cores": os.cpu_count(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": nvcc and nvcc.splitlines()[-1],
        "commit": said("git", "rev-parse", "HEAD"),
        "dirty": None if changed is None else changed != "",
    }


class Summary:
    """summary.json and summary.md, whole at every moment."""

    def __init__(self, out: Path, quick: bool, minutes: float, records: dict[str, Record]):
        self._out, self._quick, self._minutes, self._records = out, quick, minutes, records
        self._begun, self._said, self.machine = time.monotonic(), set(), {}

    def families(self) -> dict[str, list[Path]]:
        """The files of outcomes of each group of tests."""
        found: dict[str, list[Path]] = {}
        for path in sorted((self._out / "tests").glob("*.jsonl")):
            found.setdefault(path.stem.rpartition("-")[0], []).append(path)
        return found

    def write(self) -> None:
        counts = {name: cases.count(paths) for name, paths in self.families().items()}
        found = {"machine": self.machine, "quick": self._quick, "minutes": self._minutes}
        found |= {"seconds": round(time.monotonic() - self._begun, 1), "tests": counts}
        found["steps"] = {name: asdict(record) for name, record in self._records.items()}
        _write(self._out / "summary.json", json.dumps(found, indent=2) + "\n")
        _write(self._out / "summary.md", self.text(counts))

    def tell(self) -> None:
        """Writes it, and prints a line of each step that has ended since."""
        self.write()
        for name, record in self._records.items():
            if record.result not in (RUNNING, NOT_RUN) and name not in self._said:
                self._said.add(name)
                print(f"{name}: {record.result}, exit {record.exit}, {record.seconds} s: {record.last[:200]}", flush=True)

    def text(self, counts: dict[str, dict[str, int]]) -> str:
        """A page: what came of each step, the counts of the tests, and the first line of each that failed."""
        lines = [
            f"# {self.machine.get('gpu', 'GPU')}, {self.machine.get('date', '')}",
            "",
            "| step | result | s | of | |",
            "|---|---|--:|--:|---|",
        ]
        for name, record in self._records.items():
            if not (record.result == PASSED and name.rpartition("-")[0] in counts):  # of a group of tests those that did not pass
                said = record.last.replace("|", "\\|")[:160]
                lines.append(f"| {name} | {record.result} | {record.seconds:.0f} | {record.estimate:.0f} | {said} |")
        for name, count in counts.items():
            lines += ["", f"**{name}**: {', '.join(f'{number} {outcome}' for outcome, number in count.items())}", ""]
            for path in self.families()[name]:
                for case, (outcome, why) in cases.outcomes(path).items():
                    if outcome in ("failed", cases.KILLED):
                        lines.append(f"- {outcome}: `{case.removeprefix('tests/')}` {why}")
        return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def chosen(groups: Iterable[list[Step]], only: Sequence[str] | None) -> list[list[Step]]:
    """The steps whose name is one of these, or begins so, in their groups."""
    if only is None:
        return list(groups)
    found = ([step for step in group if any(f"{step.name}-".startswith(f"{name}-") for name in only)] for group in groups)
    return [group for group in found if group]


def probe() -> tuple[str, tuple[int, int]]:
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=90)
        found = json.loads(done.stdout or "null")
    except subprocess.TimeoutExpired:
        sys.exit("gpu_evidence: torch must answer within 90 s whether there is a CUDA device, and did not")
    if not found:
        sys.exit("gpu_evidence: a CUDA device must be there for torch to use, found none")
    return found[0], tuple(found[1])


def folder_name(gpu: str) -> str:
    """Of a GPU's results: NVIDIA H100 80GB HBM3 gives h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small set of tests, fewer sizes and no sanitizer")
    parser.add_argument("--build", action="store_true", help="install the package first, for this card alone")
    parser.add_argument("--minutes", type=float, help="in which all ends (9.5; with --quick 2.8)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="steps or groups of them: tests, linear24, memcheck, tune, ...")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/ and the name of the GPU")
    args = parser.parse_args()
    minutes = args.minutes or MINUTES[args.quick]
    deadline = time.monotonic() + 60 * minutes - 3  # to kill what runs, and to write
    gpu, capability = probe()
    out = (args.out or ROOT / "benchmarks/results" / folder_name(gpu)).resolve()
    groups = chosen(steps(out, args.quick, os.cpu_count() or 1, gpu), args.only)
    if not groups:
        sys.exit(f"gpu_evidence: --only must name a step, got {' '.join(args.only)}")
    sys.exit(run(groups, build(capability) if args.build else [], out, args.quick, minutes, deadline))


def run(groups: list[list[Step]], first: list[Step], out: Path, quick: bool, minutes: float, deadline: float) -> int:
    """The exit code. first: what all others need."""
    for name in ("tests", "logs"):  # of a former run, whose tests would count as begun
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    runner = Steps(out / "logs", ROOT, deadline)
    summary = Summary(out, quick, minutes, runner.records)
    runner.told = summary.tell
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        missing = any(record.result != PASSED for record in runner.run(first))
        if missing:
            runner.skip([step for group in groups for step in group], "the build failed")
        else:
            summary.machine = what_ran(runner.left)
            for group in groups:
                runner.run(group, beside=len(group))
    finally:
        for group in groups:
            runner.skip([step for step in group if step.name not in runner.records])
        summary.write()
        print(f"\n{(out / 'summary.md').read_text()}", flush=True)
    return int(any(record.result != PASSED for record in runner.records.values()))


if __name__ == "__main__":
    main()
