"""mask_rows: half of each row kept, exactly. Rival: torch.topk of each row.

python -m benchmarks.mask_rows [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, weight
from sparsekit import ops


def problem(scores: torch.Tensor) -> Problem:
    kept = scores.shape[1] // 2
    rivals = {}
    if scores.dtype in (torch.float32, torch.float16, torch.bfloat16):
        blank = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        rivals["torch_topk"] = lambda: blank.scatter(1, scores.topk(kept, dim=1, sorted=False).indices, True)
    kernel = lambda: kernel_of("mask_rows")(scores, kept)  # noqa: E731
    return Problem(scores.nbytes + scores.numel(), partial(ops.mask_rows, scores, kept), kernel, rivals)


def test_mask_rows(benchmark):
    scores = weight(*PYTEST_SHAPE, torch.bfloat16, "cpu")
    benchmark(ops.mask_rows, scores, scores.shape[1] // 2)


if __name__ == "__main__":
    main(__doc__, problem)
