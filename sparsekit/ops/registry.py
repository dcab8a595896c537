"""What every op needs: the library it is registered in, the codes of its dtypes, and the way to its kernels."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from .. import env

try:
    from .. import _C
except ImportError as error:
    raise ImportError(
        "sparsekit._C must be built, and there is none beside this file: install with `pip install .` and run outside the source "
        "tree, or install with `pip install -e .`"
    ) from error

lib = torch.library.Library("sparsekit", "DEF")

# The codes of csrc/launch.h.
DTYPE_CODE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.int8: 4,
    torch.float64: 5,
    torch.float8_e5m2: 6,
}


def define(schema: str, cpu, cuda, fake, gradient=None) -> None:
    """Registers an op; gradient: its backward and what that saves, in this order. No schema has defaults: the dispatcher would not
    pass on an argument that equals its default."""
    name = schema[: schema.index("(")]
    lib.define(schema)
    lib.impl(name, cpu, "CPU")
    lib.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"sparsekit::{name}", fake, lib=lib)
    if gradient:
        backward, save = gradient
        torch.library.register_autograd(f"sparsekit::{name}", backward, setup_context=save, lib=lib)


def threads() -> int:
    """Of a kernel on the CPU."""
    return env.THREADS or torch.get_num_threads()


def launch(name: str, first: Tensor, *others):
    """Calls the Triton launcher of that name, on the device and the current stream of its first argument."""
    with torch.cuda.device(first.device):
        return _launcher(name)(first, *others)


@cache
def _launcher(name: str):
    try:
        return getattr(import_module(f"...kernels.{name}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(f"{name}: Triton must be installed to run on a GPU, found none; install triton") from error


def raw_stream(index: int) -> int:
    """The current stream of a CUDA device, as an address. The private name costs 0.2 us, the public call 5."""
    fast = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return fast(index) if fast else torch.cuda.current_stream(index).cuda_stream


@cache
def say_once(text: str) -> None:
    warnings.warn(text, stacklevel=5)


__all__ = ["DTYPE_CODE", "_C", "define", "launch", "lib", "raw_stream", "say_once", "threads"]
