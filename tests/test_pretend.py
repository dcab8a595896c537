"""A GPU's branches run as Python without a GPU, on a device that is none (pretend.py): the tests that need no more of one, and the
benchmarks' rows. What they say of kernels and of time is nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
TESTS = Path(__file__).resolve().parent
# Autograd's engine and torch.compile ask for a real device.
ROWS = """import json, pretend, sys, torch
from benchmarks import decode, gpu, linear24, memory_bound, sparsegpt
for wrong in (lambda: torch.ones(2, device="cuda") + torch.ones(2), lambda: torch.ones(2).cuda().numpy(),
              lambda: torch.randn(2, generator=torch.Generator().manual_seed(0), device="cuda"),
              lambda: torch.ones(2, generator=torch.Generator("cuda"))):
    try:
        wrong()
        sys.exit("devices may be mixed")
    except (RuntimeError, TypeError):
        pass
reference = memory_bound.REFERENCE_SHAPE
memory_bound.SHAPES = {"tiny": (64, 128), reference: (32, 64)}
found = {}
for op in ("compress24", "expand24", "expand_fragments", "mask_nm", "mask_rows", "prune24", "prune_compress24", "validate24"):
    problem = __import__(f"benchmarks.{op}", fromlist=["problem"]).problem
    found[op] = [memory_bound.row(problem, "cuda", *case) for case in (("tiny", "bf16", False), (reference, "bf16", True))]
found["linear24"] = [linear24.gpu_row("tiny", m, 64, 128, torch.bfloat16, 1.0) for m in (1, 100)]
found["sparsegpt"] = [sparsegpt.row("tiny", 24, 64, "2:4", tokens=100, device="cuda", repeats=1)]
tiny = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
found["model"] = sparsegpt.model_row("llama-2-7b", "2:4", "cuda", blocks=2, samples=3, seq_len=20, **tiny)
found["decode"] = list(decode.rows("llama-2-7b", "cuda", 2, [1, 3], 6, **tiny))
print(json.dumps(found))"""


def pretending(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", ""), str(TESTS.parent)])}
    return subprocess.run([sys.executable, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True)


def test_rows_of_a_gpu():
    done = pretending("-c", ROWS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(
        row["us"] >= 0 and row["op_eager_us"] > 0
        for op, rows in found.items()
        if "24" in op[-2:] and op != "linear24"
        for row in rows
    )
    assert [row["kernel"] for row in found["linear24"]] == ["linear24_decode_sm80 0/0", "linear24_sm90a 0/0"]
    assert all(0 < row["rel_err"] < 1e-2 and row["dense_us"] >= 0 for row in found["linear24"])
    assert found["model"]["blocks"] == 2 and 0 < found["model"]["output_error"] < 1
    assert [row["batch"] for row in found["decode"]] == [1, 3] and {row["dense_dtype"] for row in found["decode"]} == {"bfloat16"}
    assert all(0 < row["rel_err"] < 2 * row["bf16_rel_err"] < 0.06 for row in found["decode"])
    assert found["sparsegpt"][0]["rel_err"] < 1e-5 and found["sparsegpt"][0]["rows_apart"] == 0


def test_tests_of_a_gpu():
    """Of the ops, their dispatch, every kernel of the product at a small shape, and a model pruned there."""
    chosen = "test_gram or test_variants or 3-7-17-torch.float16-linear24_sm80 or 3-7-17-torch.float16-expand or llama-wanda-2"
    chosen += " or (test_within and silu and float16) or another_place or canonical_files"  # dtypes that differ; modules

    names = ("gram", "linear", "linear24_dispatch", "linear24_gpu", "ops", "pipeline_gpu")
    files = [str(TESTS / f"test_{name}.py") for name in names]
    done = pretending("-m", "pytest", "-p", "pretend", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-3000:]
