"""The sum of x' x over tokens: all that SparseGPT knows of a linear's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import define, launch

_PANEL = 256  # columns of one product on the CPU: narrower ones cost the library more than the triangle saves


def gram_(total: Tensor, x: Tensor) -> None:
    """total += x' x, in place, summed in fp32.

    total (k, k) fp32, unit column stride, symmetric: its lower triangle is read, both are valid afterwards, equal bit for bit off
    the diagonal's tiles. x (tokens, k), any float dtype: products of fp16 and bf16 are exact on CPU and GPU; others are rounded to
    fp32 first, and on a GPU multiplied at the precision that torch is set to for fp32 products, full by default.
    Raises TypeError for another dtype, ValueError for another shape or device. NaN and Inf are summed like any number."""
    torch.ops.sparsekit.gram_.default(total, x)


def _check(total: Tensor, x: Tensor) -> None:
    if total.dtype != torch.float32 or not x.dtype.is_floating_point:
        raise TypeError(f"gram_: total must be torch.float32 and x of a float dtype, got {total.dtype} and {x.dtype}")
    if x.dim() != 2 or total.shape != 2 * x.shape[1:] or (len(total) > 1 and total.stride(1) != 1) or x.device != total.device:
        raise ValueError(
            f"gram_: total must be (k, k), column stride 1, for x (tokens, k) on the same device, got {tuple(total.shape)}, "
            f"strides {total.stride()}, on {total.device} and {tuple(x.shape)} on {x.device}"
        )


def _gram(total: Tensor, x: Tensor) -> None:
    _check(total, x)
    x = x.float()
    panel = _PANEL if len(x) >= _PANEL else max(len(total), 1)  # for few tokens the mirror costs more than the triangle saves
    for begin in range(0, len(total), panel):
        end = min(begin + panel, len(total))
        total[begin:, begin:end].addmm_(x[:, begin:].T, x[:, begin:end])
        total[begin:end, end:] = total[end:, begin:end].T


def _gram_cuda(total: Tensor, x: Tensor) -> None:
    _check(total, x)
    if x.dtype in (torch.float16, torch.bfloat16):
        launch("gram", total, x)
    else:
        x = x.float()
        total.addmm_(x.T, x)


define("gram_(Tensor(a!) total, Tensor x) -> ()", _gram, _gram_cuda, _check)
