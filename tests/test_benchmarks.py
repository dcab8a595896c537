"""The benchmarks of the memory-bound ops: that a row says what was measured, and that a rival does the same work."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekit

ROOT = Path(__file__).resolve().parents[1]
OPS = ["compress24", "expand24", "mask_nm", "mask_rows", "prune24", "prune_compress24", "validate24"]


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def module(op: str):
    return __import__(f"benchmarks.{op}", fromlist=["problem"])


@pytest.mark.parametrize("op", OPS)
def test_rows(op, monkeypatch):
    from benchmarks import memory_bound

    monkeypatch.setattr(memory_bound, "SHAPES", {"tiny": (64, 128), memory_bound.REFERENCE_SHAPE: (32, 64)})
    monkeypatch.setattr(memory_bound, "time_us", lambda calls, **_: {name: (call(), 2.0)[1] for name, call in calls.items()})
    rows = memory_bound.rows(module(op).problem, "cpu", ["tiny", memory_bound.REFERENCE_SHAPE])
    assert [(r["layer"], r["dtype"], r["layout"]) for r in rows] == [
        ("tiny", "bf16", "row-major"),
        *((memory_bound.REFERENCE_SHAPE, dtype, "row-major") for dtype in ("bf16", "fp16", "fp32", "fp8", "int8")),
        (memory_bound.REFERENCE_SHAPE, "bf16", "transposed"),
    ]
    for row in rows:
        assert row["us"] == row["copy_us"] == 2 and row["of_copy"] == 1
        assert row["gbps"] == row["copy_gbps"] == round(row["bytes"] / 2e3, 2)


@pytest.mark.parametrize("op, share", [("compress24", 1 + 9 / 16), ("expand24", 1 + 9 / 16), ("prune_compress24", 1 + 9 / 16),
                                       ("prune24", 2), ("mask_nm", 1.5), ("mask_rows", 1.5), ("validate24", 1 / 16)])  # fmt: skip
def test_bytes(op, share):
    from benchmarks.memory_bound import weight

    w = weight(64, 128, torch.bfloat16, "cpu")
    assert module(op).problem(w).nbytes == share * w.nbytes


@pytest.mark.parametrize("op", ["compress24", "expand24", "mask_nm", "mask_rows", "prune24", "prune_compress24"])
def test_a_rival_gives_the_same(op):
    # The rivals' sorts are not stable: no ties, in a row or in a group of four.
    distinct = torch.randperm(64 * 128, generator=torch.Generator().manual_seed(0)).view(64, 128).float()
    w = (distinct.unflatten(1, (-1, 4)).argsort(-1) + 1).flatten(1).half() if "compress" in op or "expand" in op else distinct
    problem = module(op).problem(w)
    ((name, rival),) = problem.rivals.items()
    ours, theirs = problem.op(), rival()
    if isinstance(ours, sparsekit.Sparse24):
        held = sparsekit.ops.expand24(ours)
        assert torch.equal(torch.sparse._semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(*theirs), held)
    else:
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_the_command(suffix, tmp_path):
    out = tmp_path / f"rows{suffix}"
    command = [sys.executable, "-m", "benchmarks.validate24", "--device", "cpu", "--layers", "Llama-3-8B kv", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert done.stdout == text
    rows = json.loads(text)["rows"] if suffix == ".json" else list(csv.DictReader(text.splitlines()))
    (row,) = rows
    assert row["layer"] == "Llama-3-8B kv" and float(row["us"]) > 0 and 0 < float(row["of_copy"])
    if suffix == ".json":
        assert json.loads(text)["machine"]["threads"] == torch.get_num_threads()
