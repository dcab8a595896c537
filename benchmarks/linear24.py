"""linear24 against torch's dense product, on the CPU: a row a shape, with the error beside the time and the floor beside both.

    python -m benchmarks.linear24 --device cpu [--json] [--out FILE]

dense_us is the fastest of torch's dense fp32, bf16 and fp16 products of the same numbers, dense_dtype says which. The floor of
few tokens is reading the packed weight once: copy_gbps is what a copy moves on this machine, gbps what the kernel reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks.measure import copy_gbps, write
from sparsekit import NM, Sparse24, ops
from sparsekit.timing import time_us

SHAPES = {  # (n, k): the linears of the models that they are named for
    "SmolLM2-135M qkv": (576, 576),
    "SmolLM2-135M up": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "Llama-2-7B down": (4096, 11008),
    "Llama-3-8B o": (4096, 4096),
}
TOKENS = (1, 8, 32, 128, 512)


def problem(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Sparse24]:
    """Random x (m, k) fp32 and a random 2:4 weight (n, k), dense with zeros and packed."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator)
    w = (w * NM(2, 4).mask(w.abs())).to(dtype)
    return torch.randn(m, k, generator=generator), w, ops.compress24(w)


def row(name: str, m: int, n: int, k: int, dtype: torch.dtype, copy: float) -> dict:
    x, w, s = problem(m, n, k, dtype)
    calls = {"sparse": lambda: ops.linear24(x, s)}
    for rival in (torch.float32, torch.bfloat16, torch.float16):
        a, b = x.to(rival), w.to(rival)
        calls[str(rival).removeprefix("torch.")] = lambda a=a, b=b: torch.nn.functional.linear(a, b)
    times = time_us(calls)
    sparse = times.pop("sparse")
    fastest = min(times, key=times.__getitem__)
    truth = x.double() @ w.double().T
    return {
        "layer": name,
        "m": m,
        "n": n,
        "k": k,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": "cpu",
        "sparse_us": round(sparse, 1),
        "dense_us": round(times[fastest], 1),
        "dense_dtype": fastest,
        "dense_float32_us": round(times["float32"], 1),
        "speedup": round(times[fastest] / sparse, 3),
        "rel_err": float(f"{((ops.linear24(x, s) - truth).norm() / truth.norm()).item():.2e}"),
        "gflops": round(2 * m * n * k / sparse / 1e3, 1),
        "gbps": round(s.nbytes / sparse / 1e3, 2),
        "copy_gbps": round(copy, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    copy = copy_gbps()
    write([row(name, m, n, k, torch.bfloat16, copy) for name, (n, k) in SHAPES.items() for m in TOKENS], args.json, args.out)


@pytest.mark.parametrize("m", [1, 32], ids=["decode", "short prompt"])
def test_linear24(benchmark, m):
    x, _, s = problem(m, *SHAPES["SmolLM2-135M up"], torch.bfloat16)
    benchmark(ops.linear24, x, s)


if __name__ == "__main__":
    main()
