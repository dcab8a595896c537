"""linear24 against the dense product and the other 2:4 products: a row a shape, the error beside the time, the floor beside both.

    python -m benchmarks.linear24 [--device cpu|cuda] [--quick] [--json] [--out FILE]

On a GPU sparse_us, dense_us (cuBLAS), cusparselt_us (its best algorithm, searched) and torch_cutlass_us are CUDA graphs over
weights that L2 cannot all hold, sparse_eager_us is a call from Python. On a CPU dense_us is the fastest of torch's fp32, bf16 and
fp16 products of the same numbers, dense_dtype says which. A rival that cannot take a shape has no figure there. The floor of few
tokens is reading the packed weight once: copy_gbps is what a copy moves on this machine, gbps what the kernel reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu import clocks, gpu_copy_gbps, rivals_of
from benchmarks.measure import attempted, copy_gbps, relative_error, write
from sparsekit import ops
from sparsekit.format import to_fragments
from sparsekit.ops.linear import SPARSE_CPU, chosen_on_gpu
from sparsekit.timing import graph_us, time_us, variants

CPU_SHAPES = {  # (n, k): the linears of the models that they are named for
    "SmolLM2-135M qkv": (576, 576),
    "SmolLM2-135M up": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "Llama-2-7B down": (4096, 11008),
    "Llama-3-8B o": (4096, 4096),
}
CPU_TOKENS = (1, 8, 32, 128, 512)
GPU_SHAPES = {
    "Llama-3-8B o": (4096, 4096),
    "Llama-3-8B kv": (1024, 4096),
    "Llama-3-8B up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Qwen2.5-7B o": (3584, 3584),
    "Qwen2.5-7B up": (18944, 3584),
    "Qwen2.5-7B down": (3584, 18944),
    "Qwen2.5-14B o": (5120, 5120),
    "Qwen2.5-14B up": (13824, 5120),
    "Qwen2.5-14B down": (5120, 13824),
}
GPU_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
QUICK_TOKENS = (1, 16, 64, 512, 2048)
SQUARES = (1024, 2048, 4096, 8192, 16384)
QUICK_SQUARES = (4096, 8192)


def problem(m: int, n: int, k: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0):
    """Random x (m, k) fp32 and a random 2:4 weight (n, k), dense with zeros and packed."""
    generator = torch.Generator(device).manual_seed(seed)
    s = ops.prune_compress24(torch.randn(n, k, generator=generator, device=device).to(dtype))
    return torch.randn(m, k, generator=generator, device=device), ops.expand24(s), s


def cpu_row(name: str, m: int, n: int, k: int, dtype: torch.dtype, copy: float) -> dict:
    x, w, s = problem(m, n, k, dtype)
    calls = {"sparse": lambda: ops.linear24(x, s)}
    for rival in (torch.float32, torch.bfloat16, torch.float16):
        a, b = x.to(rival), w.to(rival)
        calls[str(rival).removeprefix("torch.")] = lambda a=a, b=b: torch.nn.functional.linear(a, b)
    times = time_us(calls)
    sparse = times.pop("sparse")
    fastest = min(times, key=times.__getitem__)
    return {
        **sizes(name, m, n, k, dtype),
        "kernel": SPARSE_CPU,
        "sparse_us": round(sparse, 1),
        "sparse_eager_us": round(sparse, 1),
        "dense_us": round(times[fastest], 1),
        "cusparselt_us": None,
        "torch_cutlass_us": None,
        "dense_dtype": fastest,
        "dense_float32_us": round(times["float32"], 1),
        "speedup": round(times[fastest] / sparse, 3),
        "rel_err": relative_error(ops.linear24(x, s), x.double() @ w.double().T),
        "tflops": round(2 * m * n * k / sparse / 1e6, 4),
        "gbps": round(s.nbytes / sparse / 1e3, 2),
        "copy_gbps": round(copy, 2),
        "sm_mhz": None,
        "watts": None,
    }


def sizes(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict:
    """What a row is of."""
    return {"layer": name, "m": m, "n": n, "k": k, "dtype": str(dtype).removeprefix("torch.")}


def gpu_row(name: str, m: int, n: int, k: int, dtype: torch.dtype, copy: float) -> dict:
    x, w, s = problem(m, n, k, dtype, "cuda")
    x = x.to(dtype)
    packed = [s, *(problem(1, n, k, dtype, "cuda", seed)[2] for seed in range(1, variants(s.nbytes)))]
    held = [to_fragments(s) for s in packed]
    dense = [torch.randn_like(w) for _ in range(variants(w.nbytes))]
    calls = {"sparse": [lambda f=f: ops.linear24(x, f) for f in held]}
    calls["dense"] = [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]
    times = graph_us({**calls, **rivals_of(x, packed)})
    eager = time_us({"eager": calls["sparse"][0]}, 0.1, torch.cuda.synchronize)["eager"]
    choice = chosen_on_gpu(x, dtype, n, k)
    sparse = times["sparse"]
    mhz, watts = clocks(calls["sparse"])
    return {
        **sizes(name, m, n, k, dtype),
        "kernel": f"{choice.kernel} {choice.tile}/{choice.split}",
        "sparse_us": round(sparse, 2),
        "sparse_eager_us": round(eager, 2),
        "dense_us": round(times["dense"], 2),
        "cusparselt_us": times.get("cusparselt") and round(times["cusparselt"], 2),
        "torch_cutlass_us": times.get("torch_cutlass") and round(times["torch_cutlass"], 2),
        "speedup": round(times["dense"] / sparse, 3),
        "rel_err": relative_error(ops.linear24(x, held[0]), x.double() @ w.double().T),
        "tflops": round(2 * m * n * k / sparse / 1e6, 2),
        "gbps": round(s.nbytes / sparse / 1e3, 1),
        "copy_gbps": round(copy, 1),
        "sm_mhz": mhz,
        "watts": watts,
    }


def rows(device: str, quick: bool) -> Iterator[dict]:
    if device == "cpu":
        copy = copy_gbps()
        cases = [(name, m, n, k, torch.bfloat16, copy) for name, (n, k) in CPU_SHAPES.items() for m in CPU_TOKENS]
        return attempted(cpu_row, cases)
    copy = gpu_copy_gbps()
    return attempted(gpu_row, [(*case, torch.bfloat16, copy) for case in gpu_cases(quick)])


def gpu_cases(quick: bool) -> list[tuple[str, int, int, int]]:
    """Layer, m, n and k of each row. The quick ones come first: who is cut short has them."""
    few = [(name, m, *GPU_SHAPES[name]) for name in list(GPU_SHAPES)[:4] for m in QUICK_TOKENS]
    few += [(f"square {size}", size, size, size) for size in QUICK_SQUARES]
    every = [(name, m, n, k) for name, (n, k) in GPU_SHAPES.items() for m in GPU_TOKENS]
    every += [(f"square {size}", size, size, size) for size in SQUARES]
    return few if quick else [*few, *(case for case in every if case not in few)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, on a GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write(rows(args.device, args.quick), args.json, args.out, args.device)


def pytest_generate_tests(metafunc):
    metafunc.parametrize("m", [1, 32], ids=["decode", "short prompt"])


def test_linear24(benchmark, m):
    x, _, s = problem(m, *CPU_SHAPES["SmolLM2-135M up"], torch.bfloat16)
    benchmark(ops.linear24, x, s)


if __name__ == "__main__":
    main()
