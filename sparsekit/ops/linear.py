"""The product with a weight stored 2:4."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..errors import listed
from ..format import Sparse24, check_layout
from .registry import _C, DTYPE_CODE, define, raw_stream, say_once, threads

LINEAR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATION_CODE = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # csrc/launch.h


def linear24(x: Tensor, s: Sparse24, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x @ W.T + bias) for a weight W (n, k) stored 2:4, summed in fp32.

    x (..., k), any rank and strides, fp32, fp16 or bf16; s of such a dtype, not necessarily that of x (16-bit storage under fp32
    activations is legal); bias (n,) in x's dtype; activation None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
    Returns (..., n) in x's dtype. The result is the same bit for bit from run to run.
    Raises TypeError for another dtype, ValueError for another shape, device or activation."""
    return torch.ops.sparsekit.linear24.default(x, s.values, s.meta, s.shape[1], bias, activation)


def _check_linear24(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> None:
    check_layout("linear24", values, meta, k)
    if x.dtype not in LINEAR_DTYPES or values.dtype not in LINEAR_DTYPES:
        raise TypeError(f"linear24: x and values must be one of {listed(LINEAR_DTYPES)}, got {x.dtype} and {values.dtype}")
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
        DTYPE_CODE[x.dtype],
        DTYPE_CODE[values.dtype],
        _ACTIVATION_CODE[activation],
        threads(),
    )
    return y


def _linear24_cuda(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    if x.dtype != values.dtype or x.dtype == torch.float32 or not _has_mma_sp(x.device.index):
        say_once(
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
        DTYPE_CODE[x.dtype],
        _ACTIVATION_CODE[activation],
        x.device.index,
        raw_stream(x.device.index),
    )
    return y


def _linear24_fake(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_linear24(x, values, meta, k, bias, activation)
    return x.new_empty(*x.shape[:-1], values.shape[0])


define(
    "linear24(Tensor x, Tensor values, Tensor meta, SymInt k, Tensor? bias, str? activation) -> Tensor",
    _linear24_cpu,
    _linear24_cuda,
    _linear24_fake,
)


@cache
def _has_mma_sp(index: int) -> bool:
    # Code for 80 runs on all that is later, from its PTX if need be; code for 90a on 90 alone.
    major, minor = torch.cuda.get_device_capability(index)
    mine = 10 * major + minor
    return any(int(arch) <= mine if arch.isdigit() else int(arch[:-1]) == mine for arch in _C.cuda_archs())
