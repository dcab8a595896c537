"""Measures every kernel that can run a product on this machine: for a person to read, and for tune.py to choose by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from . import tune
from .errors import SparsekitError
from .format import Fragments24, Sparse24, nbytes24, to_fragments
from .ops import linear as product
from .ops import prune_compress24
from .timing import graph_us, time_us, variants
from .tune import DENSE, EXPAND, Choice, Row

TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # Llama-3-8B: q and o, up, down


def key(device: torch.device) -> str:
    """What the rows of a device are kept under."""
    return product.cpu_key(product.threads()) if device.type == "cpu" else product.gpu_key(_index(device))


def measure(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """A row for every weight (n, k), number of tokens and kernel, and one of the dense product for each of the former two.

    Random weights and activations; on a GPU by CUDA graphs over weights that L2 cannot all hold. Raises SparsekitError for a dtype
    without a kernel, for no sizes and for sizes below 1."""
    if dtype not in product.LINEAR_DTYPES:
        raise SparsekitError(f"the dtype must be one that a product takes, got {dtype}")
    if device.type != "cpu" and dtype not in product.GPU_DTYPES:
        raise SparsekitError(f"a GPU multiplies 2:4 weights of float16 and bfloat16, got {dtype}; measure one of these")
    if not shapes or not tokens or min(map(min, (*shapes, tokens))) < 1:
        raise SparsekitError(f"there must be shapes and tokens of 1 or more, got {shapes} and {tokens}")
    rows, cases = [], [(n, k, m) for n, k in shapes for m in tokens]
    for done, (n, k, m) in enumerate(cases):
        if progress:
            progress(f"{n} x {k}, {m} tokens", done, len(cases))
        timed = _on_cpu(dtype, m, n, k) if device.type == "cpu" else _on_gpu(device, dtype, m, n, k)
        name = str(dtype).removeprefix("torch.")
        rows += [Row(name, m, n, k, *choice, us) for choice, us in timed.items()]
    return rows


def check_writable(device: torch.device) -> None:
    """Raises SparsekitError where save() could not keep rows: to be known before they are measured."""
    tune.check_writable(key(device))


def save(device: torch.device, rows: list[Row]) -> Path:
    """Keeps the rows where lookups on this machine find them, in place of former ones of the same sizes and of a damaged file.
    Returns the file."""
    name, former = key(device), []
    with suppress(FileNotFoundError, SparsekitError):
        former = tune.read(tune.cache_file(name), name)
    measured = {row[:4] for row in rows}
    return tune.write(name, [row for row in former if row[:4] not in measured] + rows)


def candidates(device: torch.device, m: int) -> Iterator[Choice]:
    """The kernels that this build can run m tokens with on the device, in every tile and split worth trying."""
    yield Choice(EXPAND)
    if device.type == "cpu":
        yield Choice(product.SPARSE_CPU)
        return
    index = _index(device)
    for kernel in product.gpu_kernels(index):
        yield from (Choice(kernel, tile, split) for tile, split in product.variants(kernel, m, index))


def _weight(device: torch.device, dtype: torch.dtype, n: int, k: int, seed: int) -> Sparse24:
    generator = torch.Generator(device).manual_seed(seed)
    return prune_compress24(torch.randn(n, k, generator=generator, device=device).to(dtype))


def _on_cpu(dtype: torch.dtype, m: int, n: int, k: int) -> dict[Choice, float]:
    cpu = torch.device("cpu")
    s, x = _weight(cpu, dtype, n, k, 0), torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense = torch.ops.sparsekit.expand24.default(s.values, s.meta, k)
    calls = {choice: lambda choice=choice: product.run_on_cpu(choice, x, s, None, None) for choice in candidates(cpu, m)}
    return time_us({**calls, Choice(DENSE): lambda: torch.nn.functional.linear(x, dense)})


def _on_gpu(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> dict[Choice, float]:
    with torch.cuda.device(device):
        seeds = range(variants(nbytes24(n, k, dtype)))
        x = torch.randn(m, k, device=device, dtype=dtype)
        weights = [to_fragments(_weight(device, dtype, n, k, seed)) for seed in seeds]
        dense = [torch.randn(n, k, device=device, dtype=dtype) for _ in seeds]

        def calls(choice: Choice, held: list[Fragments24]):
            return [lambda f=f: product.run_on_gpu(choice, x, f, None, None) for f in held]

        timed = {choice: calls(choice, weights) for choice in candidates(device, m)}
        return graph_us({**timed, Choice(DENSE): [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]})


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
