"""expand24: values and metadata back to a dense weight. Rival: torch's conversion from its CUTLASS layout.

python -m benchmarks.expand24 [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, weight
from sparsekit import ops
from sparsekit.format import to_torch_cutlass


def problem(w: torch.Tensor) -> Problem:
    s = ops.prune_compress24(w)
    rivals = {}
    if w.dtype in (torch.float16, torch.bfloat16, torch.int8):
        theirs = to_torch_cutlass(s)
        rivals["torch_to_dense"] = lambda: sparse_semi_structured_to_dense_cutlass(*theirs)
    kernel = lambda: kernel_of("expand24")(s.values, s.meta, s.shape[1])  # noqa: E731
    return Problem(s.nbytes + w.nbytes, partial(ops.expand24, s), kernel, rivals)


def test_expand24(benchmark):
    benchmark(ops.expand24, ops.prune_compress24(weight(*PYTEST_SHAPE, torch.bfloat16, "cpu")))


if __name__ == "__main__":
    main(__doc__, problem)
