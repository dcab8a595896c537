"""validate24: is a packed weight what the format says? Reads the metadata alone where no column is padded. No rival is known.

python -m benchmarks.validate24 [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, weight
from sparsekit import ops


def problem(w: torch.Tensor) -> Problem:
    s = ops.prune_compress24(w)
    kernel = lambda: kernel_of("validate24")(s.values, s.meta, s.shape[1])  # noqa: E731
    return Problem(s.meta.nbytes, partial(ops.validate24, s), kernel, writes=False)


def test_validate24(benchmark):
    benchmark(ops.validate24, ops.prune_compress24(weight(*PYTEST_SHAPE, torch.bfloat16, "cpu")))


if __name__ == "__main__":
    main(__doc__, problem)
