"""prune_compress24: a dense weight to its 2:4 form in one pass, by magnitude. Rival: a sort of every four in torch, then its
conversion to the CUTLASS layout.

    python -m benchmarks.prune_compress24 [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, sorted_mask, weight
from sparsekit import ops
from sparsekit.format import nbytes24


def problem(w: torch.Tensor) -> Problem:
    rivals = {}
    if w.dtype in (torch.float16, torch.bfloat16) and w.is_contiguous():
        rivals["torch_sort_from_dense"] = lambda: sparse_semi_structured_from_dense_cutlass(w * sorted_mask(w.abs(), 2, 4))
    nbytes = w.nbytes + nbytes24(*w.shape, w.dtype)
    return Problem(nbytes, partial(ops.prune_compress24, w), lambda: kernel_of("prune_compress24")(w), rivals)


def test_prune_compress24(benchmark):
    benchmark(ops.prune_compress24, weight(*PYTEST_SHAPE, torch.bfloat16, "cpu"))


if __name__ == "__main__":
    main(__doc__, problem)
