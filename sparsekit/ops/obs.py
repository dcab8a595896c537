"""The block step of SparseGPT: columns of a weight pruned one after the other, what is left of the block making up for each."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .format import LARGEST_M
from .registry import _C, define, launch, threads


def obs_block_(
    w: Tensor, upper: Tensor, *, n: int = 0, m: int = 0, pairs: bool = False, mask: Tensor | None = None, check: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes a block of b columns of a weight in place by OBS, and returns mask, errors and loss.

    w (rows, b) or (batch, rows, b), fp32, unit column stride (a view of a wider weight as it lies): becomes the updated weights
    where kept and +0.0 where not. upper (b, b) or (batch, b, b), fp32: the block's own part of U, upper triangular, H^-1 = U' U.
    What goes: where ``mask`` (the shape of w, bool, True keeps) says so; else, of each group of m columns (of m pairs of columns,
    where ``pairs``), all but the n with the highest (w_j / U_jj)^2, chosen when the group's first column is reached. A tie goes to
    the lower column; a tail group of t columns keeps min(n, t).
    Returns the mask (the shape of w, bool), the errors (the shape of w, fp32): e_j = w_j / U_jj where column j went, else 0, which
    the columns after the block are to be updated by: w_later -= errors @ U[block, later]; and the loss (rows,) or (batch, rows):
    the sum of e^2, twice what the row's pruning costs by OBS.
    Raises TypeError for another dtype, ValueError for another shape, device or n and m, and for NaN, naming the row; w is then
    part pruned. Not to ``check`` for NaN spares the host its wait for a GPU: then the loss of the first row with one is NaN.
    Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1; Hassibi and Stork 1993."""
    return torch.ops.sparsekit.obs_block_.default(w, upper, mask, n, m, pairs, check)


def _check(w: Tensor, upper: Tensor, mask: Tensor | None, n: int, m: int, pairs: bool) -> None:
    for name, t, dtype in (("w", w, torch.float32), ("upper", upper, torch.float32), ("mask", mask, torch.bool)):
        if t is not None and t.dtype != dtype:
            raise TypeError(f"obs_block_: {name} must be {dtype}, got {t.dtype}")
        if t is not None and t.device != w.device:
            raise ValueError(f"obs_block_: {name} must be on the device of w, {w.device}, got {t.device}")
    if w.dim() not in (2, 3) or (w.shape[-1] > 1 and w.stride(-1) != 1):
        raise ValueError(
            f"obs_block_: w must be (rows, b) or (batch, rows, b), column stride 1, got {tuple(w.shape)}, strides {w.stride()}"
        )
    if upper.shape != (*w.shape[:-2], w.shape[-1], w.shape[-1]):
        raise ValueError(f"obs_block_: upper must be b x b for each b columns of w {tuple(w.shape)}, got {tuple(upper.shape)}")
    if mask is not None and mask.shape != w.shape:
        raise ValueError(f"obs_block_: mask must be of the shape of w, {tuple(w.shape)}, got {tuple(mask.shape)}")
    if mask is None and not (0 <= n <= m and m >= 1):
        raise ValueError(f"obs_block_: without a mask, 0 <= n <= m and m >= 1 must hold, got n = {n} and m = {m}")


def _obs_block(
    w: Tensor, upper: Tensor, mask: Tensor | None, n: int, m: int, pairs: bool, check: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    kept, errors, loss = _obs_block_fake(w, upper, mask, n, m, pairs, check)
    if mask is not None:
        kept.copy_(mask)
    status = torch.empty(1, dtype=torch.int64, device="cpu")
    batch, rows, columns = w.shape if w.dim() == 3 else (1, *w.shape)
    strides = w.stride(0) if w.dim() == 3 else 0, w.stride(-2)
    upper = upper.contiguous()
    given = mask is not None
    arrays = kept.data_ptr(), errors.data_ptr(), loss.data_ptr(), status.data_ptr()
    _C.obs_block_cpu(w.data_ptr(), upper.data_ptr(), batch, rows, columns, *strides, given, n, m, pairs, *arrays, threads())
    if (bad := int(status)) < batch * rows:
        if check:
            _refuse_nan(w, bad)
        loss.view(-1)[bad] = torch.nan
    return kept, errors, loss


def _obs_block_cuda(
    w: Tensor, upper: Tensor, mask: Tensor | None, n: int, m: int, pairs: bool, check: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    _check(w, upper, mask, n, m, pairs)
    if mask is None and m > LARGEST_M and w.numel():  # of no format: column by column, by the library
        blocks = w if w.dim() == 3 else w[None]
        found = [reference.obs_block(*one, None, n, m, pairs) for one in zip(blocks, upper if w.dim() == 3 else upper[None])]
        new, *rest = (torch.stack(parts).view(*w.shape[:-2], *parts[0].shape) for parts in zip(*found))
        w.copy_(new)
        kept, errors, loss = rest
        loss.masked_fill_(w.isnan().any(-1), torch.nan)
        if check and loss.isnan().any():
            _refuse_nan(w, int(loss.view(-1).isnan().nonzero()[0]))
        return kept, errors, loss
    *found, status = launch("obs", w, upper, mask, n, m, pairs)
    if check and (bad := int(status)) < w.shape[:-1].numel():
        _refuse_nan(w, bad)
    return tuple(found)


def _refuse_nan(w: Tensor, row: int) -> None:
    of_weight = f" of weight {row // w.shape[-2]}" if w.dim() == 3 else ""
    raise ValueError(f"obs_block_: w and upper must give no NaN, got one in row {row % w.shape[-2]}{of_weight}")


def _obs_block_fake(
    w: Tensor, upper: Tensor, mask: Tensor | None, n: int, m: int, pairs: bool, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(w, upper, mask, n, m, pairs)
    return w.new_empty(w.shape, dtype=torch.bool), w.new_empty(w.shape), w.new_empty(w.shape[:-1])


define(
    "obs_block_(Tensor(a!) w, Tensor upper, Tensor? mask, int n, int m, bool pairs, bool check) -> (Tensor, Tensor, Tensor)",
    _obs_block,
    _obs_block_cuda,
    _obs_block_fake,
)
