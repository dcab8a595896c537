"""What every op needs: the library it is registered in, the codes of its dtypes, and the way to its kernels."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd.graph import increment_version
from torch.nn import Parameter

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


def define(schema: str, cpu, cuda, fake, gradient=None, into: int = 0, vmap=None) -> None:
    """Registers an op; gradient: its backward and what that saves, in this order. No schema has defaults: the dispatcher would not
    pass on an argument that equals its default.

    vmap: makes the rule of torch.library.register_vmap of the op, by default one that calls it for each of the batch; an op that
    writes to what it is given has none.

    into: how many tensors it gives, where it can also write to tensors that are there: then NAME_out takes them last and gives
    nothing, and the three functions take them as ``out``, a tuple, and hand it to ``outputs``."""
    name = schema[: schema.index("(")]
    _implement(schema, cpu, cuda)
    torch.library.register_fake(f"sparsekit::{name}", fake, lib=lib)
    if "!" not in schema:
        rule = (vmap or _one_by_one)(getattr(torch.ops.sparsekit, name).default)
        torch.library.register_vmap(f"sparsekit::{name}", rule, lib=lib)
    if gradient:
        backward, save = gradient
        torch.library.register_autograd(f"sparsekit::{name}", backward, setup_context=save, lib=lib)
    if into:
        given = ", ".join(f"Tensor({letter}!) out_{letter}" for letter in "ab"[:into])
        writing = f"{name}_out{schema[len(name) : schema.index(') ->')]}, {given}) -> ()"
        _implement(writing, _writing(name, cpu, into), _writing(name, cuda, into))
        torch.library.register_fake(f"sparsekit::{name}_out", _writing(name, fake, into, apart=False), lib=lib)


def _implement(schema: str, cpu, cuda) -> None:
    """Defines an op and its kernels. Of what they write to autograd is told, as torch's own operators tell it: it then refuses a
    gradient that needs what was there, where it would be wrong without a word."""
    lib.define(schema)
    name = schema[: schema.index("(")]
    arguments = getattr(torch.ops.sparsekit, name).default._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def telling(kernel):
        def call(*args):
            increment_version([args[i] for i in written])
            return kernel(*args)

        return call if written else kernel

    lib.impl(name, telling(cpu), "CPU")
    lib.impl(name, telling(cuda), "CUDA")


def _one_by_one(op):
    def rule(info, in_dims, *args):
        return stacked(info.batch_size, in_dims, args, op)

    return rule


def stacked(batch: int, in_dims: tuple[int | None, ...], args: tuple, function):
    """What a vmap rule gives: the function called for each of the batch, its results one above the other."""
    if not batch:
        raise ValueError("vmap: a batch of weights or masks must hold one or more, got none")
    calls = [function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(batch)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])


def _writing(name: str, function, into: int, apart: bool = True):
    """The function on tensors to read and, last, tensors to write; apart: which are seen to share no memory."""

    def write(*args) -> None:
        written, read = args[-into:], [a for a in args[:-into] if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*read, *written)):
            raise ValueError(f"{name}: with out= no tensor may require a gradient, got one that does; use torch.no_grad()")
        for i, t in enumerate(written):
            if apart and any(_overlap(t, other) for other in (*read, *written[:i])):
                raise ValueError(f"{name}: out must share no memory with what is read or also written, got a tensor that does")
        function(*args[:-into], out=written)

    return write


def _overlap(a: Tensor, b: Tensor) -> bool:
    if not a.numel() or not b.numel() or a.device != b.device:
        return False
    begin, end = zip(*((t.data_ptr(), t.data_ptr() + _extent(t)) for t in (a, b)), strict=True)
    return max(begin) < min(end)


def _extent(t: Tensor) -> int:
    """Bytes from its first element to behind its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def outputs(op: str, out: tuple[Tensor, ...] | None, like: Tensor, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """The tensors that an op writes, of these shapes and dtypes on the device of ``like``: unwritten ones, or those given."""
    if out is None:
        return [like.new_empty(shape, dtype=dtype) for shape, dtype in wanted]
    for t, (shape, dtype) in zip(out, wanted, strict=True):
        if t.dtype != dtype:
            raise TypeError(f"{op}: out must be {dtype}, got {t.dtype}")
        if t.shape != shape or t.device != like.device or not t.is_contiguous():
            got = f"{tuple(t.shape)} on {t.device}{'' if t.is_contiguous() else ', strided'}"
            raise ValueError(f"{op}: out must be {tuple(shape)} on {like.device}, contiguous, got {got}")
    return list(out)


def threads() -> int:
    """Of a kernel on the CPU."""
    return env.THREADS or torch.get_num_threads()


# The dispatch keys of a thread that is in no mode.
_PLAIN = sum(torch._C.DispatchKeySet(key).raw_repr() for key in (DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView))


def straight(x: Tensor, *others: Tensor | None) -> bool:
    """Whether torch's dispatcher would do nothing with an op of these, none of which requires a gradient, but call its CPU kernel:
    who calls that one himself saves what the dispatcher takes, which is as long as a small product.

    Not so in a mode, a transform, a trace or a profile, nor for what is no tensor, a subclass, or not yet negated."""
    if torch._C._dispatch_tls_local_include_set().raw_repr() & ~_PLAIN:
        return False
    for t in (x, *others):
        plain = type(t) is Tensor or type(t) is Parameter
        if t is not None and (not plain or t.is_neg() or t._is_zerotensor()):
            return False
    return x is not None and x.is_cpu and not torch._C._is_torch_function_mode_enabled() and not torch.autograd._profiler_enabled()


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


__all__ = ["DTYPE_CODE", "_C", "define", "launch", "lib", "outputs", "raw_stream", "say_once", "stacked", "straight", "threads"]
