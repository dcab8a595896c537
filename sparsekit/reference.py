"""Each op in plain PyTorch: readable, on any device, and the truth that the kernels are tested against.

Source of the format: Mishra et al. 2021, arXiv:2104.08378, with the conventions of sparsekit/format.py. ``first_row`` is what an
error calls the first row, for a caller who knows which row of a large matrix is wrong and gives that one alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import pack_nibbles, unpack_nibbles, widened

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

ACTIVATIONS = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def compress24(w: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """values, meta of a weight (n, k) that holds 2:4. Raises ValueError at the first group that does not, or holds NaN."""
    check_no_nan("compress24", "w", w, first_row)
    nonzero = groups_of_four(w.double() != 0)
    must = "compress24: every group of four columns must hold at most two non-zeros"
    _check_at_most_two(must, nonzero, w.shape[1], first_row, "; prune to 2:4 first")
    return pack(w, highest(nonzero.byte(), 2))


def expand24(values: Tensor, meta: Tensor, k: int) -> Tensor:
    """The dense weight (n, k) of values (n, kp/2) and meta (n, kp/8)."""
    kept = kept_columns(meta)
    raw = values.view(_BITS[values.dtype.itemsize]).reshape(kept.shape)  # as numbers a NaN of 16 bits would lose its payload
    dense = torch.zeros(*kept.shape[:2], 4, dtype=raw.dtype, device=values.device).scatter_(-1, kept, raw)
    return dense.flatten(1)[:, :k].contiguous().view(values.dtype)


def take24(dense: Tensor, meta: Tensor) -> Tensor:
    """The elements (n, kp/2) of a dense (n, k) at the places that meta keeps: the gradient of expand24."""
    return groups_of_four(widened(dense)).gather(-1, kept_columns(meta)).flatten(1).to(dense.dtype)  # fp8 cannot be gathered


def prune_compress24(
    w: Tensor, scores: Tensor | None, mask: Tensor | None, first_row: int = 0, op: str = "prune_compress24"
) -> tuple[Tensor, Tensor]:
    """values, meta of a weight (n, k) of which two of every four columns are kept: by |w|, by scores or by a mask, each (n, k).

    Raises ValueError at the first row with a NaN in w or scores, and at the first group of which the mask keeps more than two."""
    bad = torch.stack([torch.isnan(t.float()).any(1) for t in (w, scores) if t is not None]).any(0)
    row = int(bad.nonzero()[0]) if bad.any() else 0
    for name, t in (("w", w), ("scores", scores)):
        if t is not None:
            check_no_nan(op, name, t[row : row + 1], first_row + row)
    if mask is not None:
        on = groups_of_four(mask != 0)
        _check_at_most_two(f"{op}: mask must keep at most two of every four columns", on, w.shape[1], first_row)
        return pack(w.double().where(mask != 0, 0.0).to(w.dtype), highest(on.byte(), 2))
    rank = w.double().abs() if scores is None else scores.double()
    return pack(w, highest(groups_of_four(rank, missing=-math.inf), 2))


def prune24(w: Tensor, scores: Tensor | None, mask: Tensor | None, first_row: int = 0) -> Tensor:
    """What expand24 makes of prune_compress24."""
    return expand24(*prune_compress24(w, scores, mask, first_row, "prune24"), w.shape[1])


def mask_nm(scores: Tensor, n: int, m: int, pairs: bool, first_row: int = 0) -> Tensor:
    """The bool mask (rows, k) that keeps the n highest of every m columns, or pairs of columns, of a row.

    Raises ValueError at the first NaN, and at the first pair whose scores have no sum."""
    check_no_nan("mask_nm", "scores", scores, first_row)
    rank = scores.double()
    if pairs:
        sums = in_groups(rank if scores.dtype == torch.float64 else scores.float(), 2).sum(-1)
        if torch.isnan(sums).any():
            row, pair = torch.isnan(sums).nonzero()[0].tolist()
            raise ValueError(
                f"mask_nm: the two scores of a pair must have a sum, got inf and -inf in row {first_row + row}, "
                f"columns {2 * pair} and {2 * pair + 1}"
            )
        rank = sums.double()
    groups = in_groups(rank, m, missing=-math.inf)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, highest(groups, n), True).flatten(1)[:, : rank.shape[1]]
    return (kept.repeat_interleave(2, dim=1) if pairs else kept)[:, : scores.shape[1]].contiguous()


def mask_rows(scores: Tensor, kept: int, first_row: int = 0) -> Tensor:
    """The bool mask (rows, k) of the ``kept`` highest scores of each row. Raises ValueError at the first NaN."""
    check_no_nan("mask_rows", "scores", scores, first_row)
    return torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format).scatter_(
        1, highest(scores.double(), kept), True
    )


def obs_block(w: Tensor, upper: Tensor, mask: Tensor | None, n: int, m: int, pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pruned block, its mask, the errors and the loss of w (rows, b): one column after the other, from left to right.

    upper (b, b) is the diagonal block of U. With e = w_j / U_jj for a column that goes, else 0: w[:, j:] -= e U[j, j:]."""
    w, kept = w.clone(), torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    errors, inverse, group = torch.zeros_like(w), 1 / upper.diagonal(), 2 * m if pairs else m
    for j in range(w.shape[1]):
        if mask is None and j % group == 0:
            ahead = slice(j, j + group)
            scores = (w[:, ahead] * inverse[ahead]).square()
            kept[:, ahead] = mask_nm(scores.masked_fill(scores.isnan(), -1), n, m, pairs)  # whoever asked finds a NaN in w
        errors[:, j] = torch.where(kept[:, j], 0, w[:, j] * inverse[j])
        w[:, j:] -= errors[:, j, None] * upper[j, j:]
        w[:, j] = w[:, j].masked_fill(~kept[:, j], 0)  # an exact zero, neither the rounding of w - w nor -0.0
    return w, kept, errors, errors.square().sum(1)


def linear24(x: Tensor, values: Tensor, meta: Tensor, k: int, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x @ W.T + bias), summed in fp32, in x's dtype."""
    y = x.float() @ expand24(values, meta, k).float().T
    if bias is not None:
        y = y + bias.float()
    return ACTIVATIONS[activation](y).to(x.dtype)


# ---- the parts ----


def in_groups(t: Tensor, m: int, missing: float = 0, whole: int | None = None) -> Tensor:
    """(rows, k) -> (rows, groups, m): k filled up with ``missing`` to a multiple of ``whole``, m by default."""
    rows, k = t.shape
    whole = whole or m
    full = t.new_full((rows, -(-k // whole) * whole), missing)
    full[:, :k] = t
    return full.view(rows, full.shape[1] // m, m)


def groups_of_four(t: Tensor, missing: float = 0) -> Tensor:
    """The groups of the 2:4 form, of which a byte of metadata describes two."""
    return in_groups(t, 4, missing, whole=8)


def kept_columns(meta: Tensor) -> Tensor:
    """Which two of its four columns each group of meta (n, kp/8) keeps: (n, kp/4, 2) int64."""
    nibble = unpack_nibbles(meta)
    return torch.stack((nibble & 3, nibble >> 2), dim=-1).long()


def highest(scores: Tensor, n: int) -> Tensor:
    """The places of the n highest along the last dimension, ascending; a tie goes to the lower place."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :n].sort(dim=-1).values


def pack(w: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """values, meta of a weight (n, k) whose group g of row r keeps columns kept[r, g] (n, kp/4, 2), ascending."""
    n, groups, _ = kept.shape
    plus = w.double().where(w.double() != 0, 0.0).to(w.dtype)  # -0.0 is stored as 0.0
    raw = plus.view(torch.uint8) if w.dtype.itemsize == 1 else plus  # gather has no fp8 kernel, and moves bytes all the same
    values = groups_of_four(raw).gather(-1, kept).view(n, groups * 2).view(w.dtype)
    nibble = (kept[..., 1] << 2 | kept[..., 0]).to(torch.uint8)
    return values, pack_nibbles(nibble)


def check_no_nan(op: str, name: str, t: Tensor, first_row: int = 0) -> None:
    """Raises ValueError at the first NaN of a matrix."""
    nan = torch.isnan(t.float() if t.dtype.itemsize == 1 else t)
    if nan.any():
        row, column = nan.nonzero()[0].tolist()
        raise ValueError(f"{op}: {name} must hold no NaN, got one in row {first_row + row}, column {column}")


def _check_at_most_two(must: str, on: Tensor, k: int, first_row: int, advice: str = "") -> None:
    count = on.sum(-1)
    if (count > 2).any():
        row, group = (count > 2).nonzero()[0].tolist()
        place = f"row {first_row + row}, columns {4 * group} to {min(4 * group + 4, k) - 1}"
        raise ValueError(f"{must}, got {int(count[row, group])} in {place}{advice}")
