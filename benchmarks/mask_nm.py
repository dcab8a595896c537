"""mask_nm: the mask of an N:M pattern. Rival: a sort of every M in torch, where M divides the columns.

python -m benchmarks.mask_nm [--pattern 2:4] [--pairs] [--device cpu|cuda] [--layers LAYER ...] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.memory_bound import PYTEST_SHAPE, Problem, kernel_of, main, sorted_mask, weight
from sparsekit import NM, Pattern, SparsekitError, ops


def pattern(text: str) -> NM:
    """An N:M that the op takes, from the command line."""
    try:
        found = Pattern.parse(text)
    except SparsekitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(found, NM) or found.m > ops.LARGEST_M:
        raise argparse.ArgumentTypeError(f"a pattern must be N:M with M at most {ops.LARGEST_M}, got {text!r}")
    return found


def problem(scores: torch.Tensor, n: int = 2, m: int = 4, pairs: bool = False) -> Problem:
    rivals = {}
    if scores.dtype in (torch.float32, torch.float16, torch.bfloat16) and not pairs and scores.shape[1] % m == 0:
        rivals["torch_sort"] = lambda: sorted_mask(scores, n, m)
    kernel = lambda: kernel_of("mask_nm")(scores, n, m, pairs)  # noqa: E731
    return Problem(scores.nbytes + scores.numel(), partial(ops.mask_nm, scores, n, m, pairs), kernel, rivals)


def pytest_generate_tests(metafunc):
    metafunc.parametrize("n, m", [(2, 4), (4, 8), (16, 32)], ids=["2:4", "4:8", "16:32"])


def test_mask_nm(benchmark, n, m):
    benchmark(ops.mask_nm, weight(*PYTEST_SHAPE, torch.bfloat16, "cpu"), n, m)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pattern", type=pattern, default=NM(2, 4), metavar="N:M", help="kept:of, of at most 32")
    parser.add_argument("--pairs", action="store_true", help="groups of M pairs of columns")
    main(__doc__, problem, parser, lambda args: {"n": args.pattern.n, "m": args.pattern.m, "pairs": args.pairs})
