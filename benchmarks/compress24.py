"""compress24: a weight that holds 2:4 to values and metadata. Rivals: torch's conversion to its CUTLASS layout, which
to_sparse_semi_structured calls, and on a GPU that call itself.

    python -m benchmarks.compress24 [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

from functools import partial

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, pruned, weight
from sparsekit import ops
from sparsekit.format import nbytes24


def problem(w: torch.Tensor) -> Problem:
    held = pruned(w)
    rivals = {}
    if w.dtype in (torch.float16, torch.bfloat16, torch.int8) and held.is_contiguous():
        rivals["torch_from_dense"] = lambda: sparse_semi_structured_from_dense_cutlass(held)
        if w.is_cuda:
            rivals["torch_semi_structured"] = lambda: torch.sparse.to_sparse_semi_structured(held)
    nbytes = w.nbytes + nbytes24(*w.shape, w.dtype)
    return Problem(nbytes, partial(ops.compress24, held), lambda: kernel_of("compress24")(held), rivals)


def test_compress24(benchmark):
    benchmark(ops.compress24, pruned(weight(*PYTEST_SHAPE, torch.bfloat16, "cpu")))


if __name__ == "__main__":
    main(__doc__, problem)
