"""Everything that only a GPU can show, in one folder: tests, sanitizer, benchmarks, and what they ran on.

    make gpu-evidence [QUICK=1]        or, with the package installed, python -m benchmarks.gpu_evidence [--quick] [--out FOLDER]

Each step writes its own files and one line of summary.json; a step that fails is recorded and the next one runs. The exit code is 1
where any failed. Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.measure import machine

ROOT = Path(__file__).resolve().parents[1]
MEMORY_BOUND = (
    "prune_compress24", "compress24", "expand24", "expand_fragments", "prune24", "mask_nm", "mask_rows", "validate24",
)  # fmt: skip
SANITIZED = ("memcheck", "racecheck")
QUICK_LAYERS = ("Llama-3-8B o", "Llama-2-7B down")


def steps(out: Path, quick: bool) -> dict[str, list[str]]:
    """Name -> command of every step, in order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")]
    found = {"tests": [*pytest, "-m", "gpu", f"--junitxml={out / 'tests.xml'}"]}
    for op in MEMORY_BOUND:
        layers = ["--layers", *QUICK_LAYERS] if quick else []
        found[op] = [python, "-m", f"benchmarks.{op}", "--device", "cuda", "--out", str(out / f"{op}.csv"), *layers]
    found["linear24"] = [python, "-m", "benchmarks.linear24", "--device", "cuda", "--out", str(out / "linear24.csv")]
    found["linear24"] += ["--quick"] if quick else []
    sparsegpt = [python, "-m", "benchmarks.sparsegpt", "--device", "cuda"]
    found["sparsegpt"] = [*sparsegpt, "--out", str(out / "sparsegpt.csv"), *(["--layers", "Llama-2-7B q"] if quick else [])]
    if not quick:
        model = ["--model", "llama-2-7b", "--pattern", "2:4", "--out", str(out / "sparsegpt-llama-2-7b.csv")]
        found["sparsegpt of a model"] = [*sparsegpt, *model]
    if find_spec("matplotlib"):
        found["roofline"] = [python, "-m", "benchmarks.roofline", str(out / "linear24.csv"), "--out", str(out / "roofline.png")]
    if not quick and (sanitizer := shutil.which("compute-sanitizer")):
        for tool in SANITIZED:
            chosen = [*pytest, "-m", "gpu and sanitize"]
            found[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *chosen]
    return found


def what_ran() -> dict[str, str | int | None]:
    """The machine, its driver and tools, and the commit."""

    def said(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    nvcc = said("nvcc", "--version")
    return {
        **machine("cuda"),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": nvcc and nvcc.splitlines()[-1],
        "commit": said("git", "rev-parse", "HEAD"),
        "dirty": said("git", "status", "--porcelain") != "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and no sanitizer")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/ and the name of the GPU")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_evidence: a CUDA device must be there for torch to use, found none")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia ")).strip("-")
    out = (args.out or ROOT / "benchmarks/results" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = {"machine": what_ran(), "quick": args.quick, "steps": {}}
    for step, command in steps(out, args.quick).items():
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        lines = (done.stdout + done.stderr).strip().splitlines()
        (out / f"{step}.log").write_text(done.stdout + done.stderr)
        last = lines[-1] if lines else ""
        summary["steps"][step] = {"exit": done.returncode, "seconds": round(time.perf_counter() - begin, 1), "last": last}
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{step}: exit {done.returncode}, {summary['steps'][step]['seconds']} s: {last}", flush=True)
    sys.exit(any(step["exit"] for step in summary["steps"].values()))


if __name__ == "__main__":
    main()
