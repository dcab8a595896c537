"""expand_fragments: a weight in fragment order back to a dense one. Rival: expand24, from the canonical format.

python -m benchmarks.expand_fragments [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

import torch

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, weight
from sparsekit import ops
from sparsekit.format import to_fragments


def problem(w: torch.Tensor) -> Problem | None:
    if w.dtype == torch.float32:  # has no fragment order
        return None
    s = ops.prune_compress24(w)
    f = to_fragments(s)
    arguments = f.values, f.meta, *f.shape
    kernel = lambda: kernel_of("expand_fragments")(*arguments)  # noqa: E731
    op = lambda: torch.ops.sparsekit.expand_fragments.default(*arguments)  # noqa: E731
    return Problem(f.nbytes + w.nbytes, op, kernel, {"expand24": lambda: ops.expand24(s)}, writes=False)


def test_expand_fragments(benchmark):
    benchmark(problem(weight(*PYTEST_SHAPE, torch.bfloat16, "cpu")).op)


if __name__ == "__main__":
    main(__doc__, problem)
