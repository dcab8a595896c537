"""Each op in plain PyTorch: readable, on any device, and the truth that the kernels are tested against.

Source of the format: Mishra et al. 2021, arXiv:2104.08378, with the conventions of sparsekit/format.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import padded_columns, widened

ACTIVATIONS = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}

# From the four bits "column j is non-zero" to the nibble that keeps them; 0 where more than two are.
_NIBBLE_OF_NONZEROS = (0x4, 0x4, 0x4, 0x4, 0x8, 0x8, 0x9, 0, 0xC, 0xC, 0xD, 0, 0xE, 0, 0, 0)


def compress24(w: Tensor) -> tuple[Tensor, Tensor]:
    """values, meta of a weight (n, k) that holds 2:4. Raises ValueError at the first group that does not, or holds NaN."""
    n, k = w.shape
    kp = padded_columns(k)
    wide = widened(w)
    if wide.is_floating_point() and torch.isnan(wide).any():
        row, column = torch.isnan(wide).nonzero()[0].tolist()
        raise ValueError(f"compress24: w must hold no NaN, got one in row {row}, column {column}")
    groups = torch.zeros(n, kp, dtype=w.dtype, device=w.device)
    groups[:, :k] = torch.where(wide == 0, torch.zeros_like(wide), wide).to(w.dtype)  # -0.0 is stored as 0.0
    groups = groups.view(n, kp // 4, 4)
    bits = torch.zeros(n, kp // 4, dtype=torch.uint8, device=w.device)
    for lane in range(4):
        bits |= (widened(groups[..., lane]) != 0).to(torch.uint8) << lane
    nibble = torch.tensor(_NIBBLE_OF_NONZEROS, dtype=torch.uint8, device=w.device)[bits.int()]
    if (nibble == 0).any():
        row, group = (nibble == 0).nonzero()[0].tolist()
        raise ValueError(
            f"compress24: every group of four columns must hold at most two non-zeros, got {int(bits[row, group]).bit_count()} "
            f"in row {row}, columns {4 * group} to {min(4 * group + 4, k) - 1}; prune to 2:4 first"
        )
    kept = torch.stack((nibble & 3, nibble >> 2), dim=-1).long()  # [n, kp/4, 2]
    # gather has no fp8 kernel, and moves bytes all the same.
    raw = groups.view(torch.uint8) if w.dtype.itemsize == 1 else groups
    values = raw.gather(-1, kept).view(n, kp // 2).view(w.dtype)
    meta = nibble[:, 0::2] | nibble[:, 1::2] << 4
    return values, meta


def expand24(values: Tensor, meta: Tensor, k: int) -> Tensor:
    """The dense weight (n, k) of values (n, kp/2) and meta (n, kp/8)."""
    n, kp = values.shape[0], padded_columns(k)
    nibble = torch.stack((meta & 0xF, meta >> 4), dim=-1).view(n, kp // 4)
    kept = torch.stack((nibble & 3, nibble >> 2), dim=-1).long()  # [n, kp/4, 2]
    raw = values.view(torch.uint8) if values.dtype.itemsize == 1 else values
    dense = torch.zeros(n, kp // 4, 4, dtype=raw.dtype, device=values.device).scatter_(-1, kept, raw.view(n, kp // 4, 2))
    return dense.view(n, kp)[:, :k].contiguous().view(values.dtype)


def linear24(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x @ W.T + bias), summed in fp32, in x's dtype."""
    y = x.float() @ expand24(values, meta, k).float().T
    if bias is not None:
        y = y + bias.float()
    return ACTIVATIONS[activation](y).to(x.dtype)
