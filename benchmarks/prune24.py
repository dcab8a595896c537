"""prune24: a dense weight to the same with two of every four columns kept, by magnitude. Rival: a sort of every four in torch.

python -m benchmarks.prune24 [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, sorted_mask, weight
from sparsekit import ops


def problem(w: torch.Tensor) -> Problem:
    rivals = {}
    if w.dtype in (torch.float32, torch.float16, torch.bfloat16):
        rivals["torch_sort"] = lambda: w * sorted_mask(w.abs(), 2, 4)
    return Problem(2 * w.nbytes, partial(ops.prune24, w), lambda: kernel_of("prune24")(w), rivals)


def test_prune24(benchmark):
    benchmark(ops.prune24, weight(*PYTEST_SHAPE, torch.bfloat16, "cpu"))


if __name__ == "__main__":
    main(__doc__, problem)
