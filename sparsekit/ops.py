"""Each op: schema, CPU, CUDA, fake, and a public function that says what it takes.

The ops live in ``torch.ops.sparsekit``; torch.compile and opcheck see them. Kernels are called from here alone.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import env, reference
from .errors import listed
from .format import DTYPES, Sparse24, check_layout, padded_columns

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "sparsekit._C must be built, and there is none beside this file: install with `pip install .` and run outside the source "
        "tree, or install with `pip install -e .`"
    ) from error

lib = torch.library.Library("sparsekit", "DEF")

# The codes of csrc/launch.h.
_DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LINEAR_DTYPES = tuple(_DTYPE_CODE)
_ACTIVATION_CODE = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


# ---- compress24 and expand24 ----


def compress24(w: Tensor) -> Sparse24:
    """Stores a weight that holds 2:4 already: two values and one nibble for each group of four columns.

    w (n, k), any strides, fp32, fp16, bf16, fp8 e4m3 or int8; any n and k, columns past k count as zeros.
    Raises TypeError for another dtype, ValueError for another rank, for NaN and for a group with three or more non-zeros, naming
    the first. Layout: sparsekit/format.py. Source: Mishra et al. 2021, arXiv:2104.08378."""
    values, meta = torch.ops.sparsekit.compress24.default(w)
    return Sparse24(values, meta, (w.shape[0], w.shape[1]))


def expand24(s: Sparse24) -> Tensor:
    """The dense weight (n, k) of a Sparse24, in its dtype. Raises TypeError or ValueError where the layout does not hold."""
    return torch.ops.sparsekit.expand24.default(s.values, s.meta, s.shape[1])


def _check_dense(op: str, w: Tensor) -> None:
    if w.dtype not in DTYPES:
        raise TypeError(f"{op}: w must be one of {listed(DTYPES)}, got {w.dtype}")
    if w.dim() != 2:
        raise ValueError(f"{op}: w must be (out_features, in_features), got shape {tuple(w.shape)}")


def _compress24(w: Tensor) -> tuple[Tensor, Tensor]:
    _check_dense("compress24", w)
    return reference.compress24(w)


def _compress24_cuda(w: Tensor) -> tuple[Tensor, Tensor]:
    _check_dense("compress24", w)
    from .kernels.compress24 import compress24
    from .kernels.tiles import NOTHING

    values, meta, status = compress24(w)
    if status.min() != NOTHING:
        return reference.compress24(w)  # which raises, naming the place
    return values, meta


def _compress24_fake(w: Tensor) -> tuple[Tensor, Tensor]:
    _check_dense("compress24", w)
    n, kp = w.shape[0], padded_columns(w.shape[1])
    return w.new_empty(n, kp // 2), w.new_empty(n, kp // 8, dtype=torch.uint8)


def _expand24(values: Tensor, meta: Tensor, k: int) -> Tensor:
    check_layout("expand24", values, meta, k)
    return reference.expand24(values, meta, k)


def _expand24_cuda(values: Tensor, meta: Tensor, k: int) -> Tensor:
    check_layout("expand24", values, meta, k)
    from .kernels.expand24 import expand24

    return expand24(values.contiguous(), meta.contiguous(), k)


def _expand24_fake(values: Tensor, meta: Tensor, k: int) -> Tensor:
    check_layout("expand24", values, meta, k)
    return values.new_empty(values.shape[0], k)


lib.define("compress24(Tensor w) -> (Tensor, Tensor)")
lib.impl("compress24", _compress24, "CPU")
lib.impl("compress24", _compress24_cuda, "CUDA")
torch.library.register_fake("sparsekit::compress24", _compress24_fake, lib=lib)

lib.define("expand24(Tensor values, Tensor meta, SymInt k) -> Tensor")
lib.impl("expand24", _expand24, "CPU")
lib.impl("expand24", _expand24_cuda, "CUDA")
torch.library.register_fake("sparsekit::expand24", _expand24_fake, lib=lib)


# ---- linear24 ----


def linear24(x: Tensor, s: Sparse24, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x @ W.T + bias) for a weight W (n, k) stored 2:4, summed in fp32.

    x (..., k), any rank and strides, fp32, fp16 or bf16; s of such a dtype, not necessarily that of x (16-bit storage under fp32
    activations is legal); bias (n,) in x's dtype; activation None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
    Returns (..., n) in x's dtype. The result is the same bit for bit from run to run.
    Raises TypeError for another dtype, ValueError for another shape, device or activation."""
    return torch.ops.sparsekit.linear24.default(x, s.values, s.meta, s.shape[1], bias, activation)


def _check_linear24(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> None:
    check_layout("linear24", values, meta, k)
    if x.dtype not in _DTYPE_CODE or values.dtype not in _DTYPE_CODE:
        raise TypeError(f"linear24: x and values must be one of {listed(_DTYPE_CODE)}, got {x.dtype} and {values.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"linear24: the last dimension of x must be k = {k}, got x {tuple(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"linear24: x and values must be on one device, got {x.device} and {values.device}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != values.shape[:1] or bias.device != x.device):
        raise ValueError(
            f"linear24: bias must be ({values.shape[0]},) in {x.dtype} on {x.device}, "
            f"got {tuple(bias.shape)} in {bias.dtype} on {bias.device}"
        )
    if activation not in _ACTIVATION_CODE:
        raise ValueError(f"linear24: activation must be {listed(map(repr, _ACTIVATION_CODE))}, got {activation!r}")


def _rows(x: Tensor) -> Tensor:
    """x as (m, k) with unit stride along k: a view where one exists, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _linear24_cpu(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    rows, n = _rows(x), values.shape[0]
    values, meta = values.contiguous(), meta.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    _C.linear24_cpu(
        rows.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows.shape[0],
        n,
        k,
        rows.stride(0),
        _DTYPE_CODE[x.dtype],
        _DTYPE_CODE[values.dtype],
        _ACTIVATION_CODE[activation],
        env.THREADS or torch.get_num_threads(),
    )
    return y


def _linear24_cuda(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    if x.dtype != values.dtype or x.dtype == torch.float32 or not _has_mma_sp(x.device.index):
        _say_once(
            f"linear24: no kernel for {x.dtype} x {values.dtype} on {torch.cuda.get_device_name(x.device)} in this build "
            f"(architectures: {', '.join(_C.cuda_archs()) or 'none'}); each call expands the weight"
        )
        y = F.linear(x, torch.ops.sparsekit.expand24.default(values, meta, k).to(x.dtype), bias)
        return reference.ACTIVATIONS[activation](y)
    rows, n = _rows(x), values.shape[0]
    values, meta = values.contiguous(), meta.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    _C.linear24_sm80(
        rows.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows.shape[0],
        n,
        k,
        rows.stride(0),
        _DTYPE_CODE[x.dtype],
        _ACTIVATION_CODE[activation],
        x.device.index,
        _raw_stream(x.device.index),
    )
    return y


def _linear24_fake(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    return x.new_empty(*x.shape[:-1], values.shape[0])


# No defaults: the dispatcher would not pass on an argument that equals its default.
lib.define("linear24(Tensor x, Tensor values, Tensor meta, SymInt k, Tensor? bias, str? activation) -> Tensor")
lib.impl("linear24", _linear24_cpu, "CPU")
lib.impl("linear24", _linear24_cuda, "CUDA")
torch.library.register_fake("sparsekit::linear24", _linear24_fake, lib=lib)


# ---- the device ----


def _raw_stream(index: int) -> int:
    # The private name costs 0.2 us, the public call 5.
    fast = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return fast(index) if fast else torch.cuda.current_stream(index).cuda_stream


@cache
def _has_mma_sp(index: int) -> bool:
    # Code for 80 runs on all that is later, from its PTX if need be; code for 90a on 90 alone.
    major, minor = torch.cuda.get_device_capability(index)
    mine = 10 * major + minor
    return any(int(arch) <= mine if arch.isdigit() else int(arch[:-1]) == mine for arch in _C.cuda_archs())


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)
