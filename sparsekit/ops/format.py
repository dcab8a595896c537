"""The ops on the 2:4 form and on masks.

A kernel that reads a user's weights or scores returns, beside its result, the first place where they are not what they must be;
the reference then runs on the row of that place and raises, naming it. Gradients: a kept place has that of the value which it went
to or came from, every other none, and the choice of places none; in forward mode and under torch.func too.

``out``: a tensor (a Sparse24) of the result's sizes, contiguous, to write to and return. A new one costs a CPU as much again as the
op: its memory has to be given and cleared by the system first. It shares no memory with what is read; no gradients go through it;
where the op raises for what the input holds, ``out`` holds nothing of use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..errors import listed
from ..format import (
    DTYPES,
    Fragments24,
    Sparse24,
    check_fragments,
    check_layout,
    check_shape,
    from_fragments,
    in_transform,
    padded_columns,
    widened,
)
from .gradient import in_forward_mode, written_out
from .registry import _C, DTYPE_CODE, define, launch, outputs, threads

LARGEST_M = 32  # columns (or pairs) a group of a mask may have
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8)
_BY_WEIGHT, _BY_SCORES, _BY_MASK = 0, 1, 2  # csrc/launch.h
_Out = tuple[Tensor, ...] | None  # tensors to write to
_NOTHING = torch.iinfo(torch.int64).max  # a kernel's status word where it found nothing wrong


def _clean(status: Tensor) -> bool:
    return int(status.min()) == _NOTHING


def _check_status(check, status: Tensor, per_row: int, *arguments) -> None:
    """Where the kernel found a bad place, of per_row places a row, raises what the reference says of the row of the first one."""
    if _clean(status):
        return
    row = next(place for place in status.tolist() if place != _NOTHING) // per_row
    check(*(a[row : row + 1] if isinstance(a, Tensor) else a for a in arguments), first_row=row)
    raise RuntimeError(f"{check.__name__}: the kernel must agree with the reference, and refused row {row}; please report it")


def _new_status(like: Tensor, words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64, device=like.device)


def _packed(op: str, w: Tensor, out: _Out) -> tuple[Tensor, Tensor]:
    """The values and meta to write for a weight (n, k)."""
    n, kp = w.shape[0], padded_columns(w.shape[1])
    values, meta = outputs(op, out, w, ((n, kp // 2), w.dtype), ((n, kp // 8), torch.uint8))
    return values, meta


def _to_sparse24(op: str, out: Sparse24 | None, w: Tensor, *choice) -> Sparse24:
    """What an op packs of w: new, or written to ``out``."""
    if out is None:
        packed = getattr(torch.ops.sparsekit, op).default
        values, meta = _packed_in_torch(packed, w, *choice) if _in_torch(w) else packed(w, *choice)
        return Sparse24(values, meta, (w.shape[0], w.shape[1]))
    if not isinstance(out, Sparse24):
        raise TypeError(f"{op}: out must be a Sparse24, got a {type(out).__name__}")
    _check_no_transform(op, w)
    if out.shape != w.shape:
        raise ValueError(f"{op}: out must be of a weight {tuple(w.shape)} as w is, got one of {tuple(out.shape)}")
    getattr(torch.ops.sparsekit, f"{op}_out").default(w, *choice, out.values, out.meta)
    return out


def _to_dense(op: str, out: Tensor | None, *args) -> Tensor:
    """What an op gives: new, or written to ``out``."""
    if out is None:
        return getattr(torch.ops.sparsekit, op).default(*args)
    if not isinstance(out, Tensor):
        raise TypeError(f"{op}: out must be a tensor, got a {type(out).__name__}")
    _check_no_transform(op, args[0])
    getattr(torch.ops.sparsekit, f"{op}_out").default(*args, out)
    return out


def _in_torch(t: Tensor) -> bool:
    """Whether a derivative by t may be asked for in a way that an op has none of, forward mode or a transform of torch.func. torch
    says nothing of it and takes 0 for the one of forward mode; so its own operators then do what the op does, and have theirs."""
    return (in_forward_mode() or in_transform()) and t.dtype.is_floating_point


def _check_no_transform(op: str, t: Tensor) -> None:
    if _in_torch(t):
        raise ValueError(
            f"{op}: out= must not be given in forward mode or under torch.func, where it has no derivative; leave it out"
        )


def _packed_in_torch(op, w: Tensor, *choice: Tensor | None) -> tuple[Tensor, Tensor]:
    _, meta = op(*_detached(w, *choice))
    mask = choice[1] if choice else None
    kept = widened(w) if mask is None else torch.where(mask != 0, widened(w), 0)
    return reference.take24(kept + 0.0, meta).to(w.dtype), meta  # -0.0 + 0.0 is 0.0


def _detached(*given: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.detach() for t in given]


def _matrix(t: Tensor) -> tuple[int, int, int, int, int]:
    """Address, rows, columns and strides: how a kernel on the CPU is told of a matrix."""
    return t.data_ptr(), *t.shape, *t.stride()


# ---- compress24 and expand24 ----


def compress24(w: Tensor, *, out: Sparse24 | None = None) -> Sparse24:
    """Stores a weight that holds 2:4 already: two values and one nibble for each group of four columns.

    w (n, k), any strides, fp32, fp16, bf16, fp8 e4m3 or int8; any n and k, columns past k count as zeros.
    Raises TypeError for another dtype, ValueError for another rank, for NaN and for a group with three or more non-zeros, naming
    the first. Layout: sparsekit/format.py. Source: Mishra et al. 2021, arXiv:2104.08378."""
    return _to_sparse24("compress24", out, w)


def expand24(s: Sparse24, *, out: Tensor | None = None) -> Tensor:
    """The dense weight (n, k) of a Sparse24, in its dtype. Raises TypeError or ValueError for other dtypes and sizes; what the
    nibbles are is not looked at, validate24 does that."""
    _check_rows("expand24", s)
    if out is None and _in_torch(s.values):
        check_layout("expand24", s.values, s.meta, s.shape[1])
        return written_out(s.values, s.meta, s.shape[1]).contiguous()
    return _to_dense("expand24", out, s.values, s.meta, s.shape[1])


def _check_dense(op: str, w: Tensor) -> None:
    if w.dtype not in DTYPES:
        raise TypeError(f"{op}: w must be one of {listed(DTYPES)}, got {w.dtype}")
    if w.dim() != 2:
        raise ValueError(f"{op}: w must be (out_features, in_features), got shape {tuple(w.shape)}")


def _compress24(w: Tensor, out: _Out = None) -> tuple[Tensor, Tensor]:
    (values, meta), status = _compress24_fake(w, out), _new_status(w, 2)
    _C.compress24_cpu(*_matrix(w), DTYPE_CODE[w.dtype], values.data_ptr(), meta.data_ptr(), status.data_ptr(), threads())
    _check_status(reference.compress24, status, 2 * meta.shape[1], w)
    return values, meta


def _compress24_cuda(w: Tensor, out: _Out = None) -> tuple[Tensor, Tensor]:
    values, meta, status = launch("compress24", w, _compress24_fake(w, out))
    _check_status(reference.compress24, status, 2 * meta.shape[1], w)
    return values, meta


def _compress24_fake(w: Tensor, out: _Out = None) -> tuple[Tensor, Tensor]:
    _check_dense("compress24", w)
    return _packed("compress24", w, out)


def _expand24(values: Tensor, meta: Tensor, k: int, out: _Out = None) -> Tensor:
    w, values, meta = _expand24_fake(values, meta, k, out), values.contiguous(), meta.contiguous()
    _C.expand24_cpu(values.data_ptr(), meta.data_ptr(), values.element_size(), *w.shape, w.data_ptr(), threads())
    return w


def _expand24_cuda(values: Tensor, meta: Tensor, k: int, out: _Out = None) -> Tensor:
    w = _expand24_fake(values, meta, k, out)
    return launch("expand24", values.contiguous(), meta.contiguous(), k, w)


def _expand24_fake(values: Tensor, meta: Tensor, k: int, out: _Out = None) -> Tensor:
    check_layout("expand24", values, meta, k)
    return outputs("expand24", out, values, ((values.shape[0], k), values.dtype))[0]


# The dense weight (n, k) of a Fragments24, in one pass on a GPU.


def _expand_fragments(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    check_fragments("expand_fragments", Fragments24(values, meta, (n, k)))
    s = from_fragments(Fragments24(values, meta, (n, k)))
    return _expand24(s.values, s.meta, k)


def _expand_fragments_cuda(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    check_fragments("expand_fragments", Fragments24(values, meta, (n, k)))
    return launch("expand_fragments", values.contiguous(), meta.contiguous(), n, k)


def _expand_fragments_fake(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    check_fragments("expand_fragments", Fragments24(values, meta, (n, k)))
    return values.new_empty(n, k)


def _compress24_save(ctx, inputs, output) -> None:
    ctx.k = inputs[0].shape[1]
    ctx.save_for_backward(output[1])


def _compress24_backward(ctx, values: Tensor, _meta) -> Tensor:
    return torch.ops.sparsekit.expand24.default(values, ctx.saved_tensors[0], ctx.k)


def _expand24_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _expand24_backward(ctx, w: Tensor) -> tuple[Tensor, None, None]:
    return reference.take24(w, ctx.saved_tensors[0]), None, None


define(
    "compress24(Tensor w) -> (Tensor, Tensor)",
    _compress24,
    _compress24_cuda,
    _compress24_fake,
    (_compress24_backward, _compress24_save),
    into=2,
)
define(
    "expand24(Tensor values, Tensor meta, SymInt k) -> Tensor",
    _expand24,
    _expand24_cuda,
    _expand24_fake,
    (_expand24_backward, _expand24_save),
    into=1,
)
define(
    "expand_fragments(Tensor values, Tensor meta, SymInt n, SymInt k) -> Tensor",
    _expand_fragments,
    _expand_fragments_cuda,
    _expand_fragments_fake,
)


# ---- prune_compress24 and prune24 ----


def prune_compress24(
    w: Tensor, scores: Tensor | None = None, mask: Tensor | None = None, *, out: Sparse24 | None = None
) -> Sparse24:
    """Prunes to 2:4 and stores the result, in one pass over the weight.

    w (n, k), any strides, fp32, fp16, bf16, fp8 e4m3 or int8; any n and k. Of every four columns two are kept: those with the
    largest |w|, or with the highest ``scores`` (n, k; any of these dtypes, fp64 or fp8 e5m2), or those that ``mask`` (n, k; bool,
    uint8 or int8; non-zero keeps) names, at most two, kept even where the weight is zero. A tie goes to the lower column. At most
    one of scores and mask, of any strides. Bit for bit compress24 of prune24, unless scores or a mask keep a zero.
    Raises TypeError for another dtype, ValueError for another shape or device, for NaN in w or scores and for a group of which the
    mask keeps more than two, naming the first. Source: Mishra et al. 2021, arXiv:2104.08378."""
    return _to_sparse24("prune_compress24", out, w, scores, mask)


def prune24(w: Tensor, scores: Tensor | None = None, mask: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """The weight (n, k) with two of every four columns kept and zeros elsewhere: expand24 of prune_compress24, in one pass.

    Takes what prune_compress24 takes, refuses what it refuses, and returns a contiguous tensor in w's dtype. -0.0 becomes 0.0."""
    if out is None and _in_torch(w):
        torch.ops.sparsekit.prune24.default(*_detached(w, scores, mask))  # may refuse, by its name
        return expand24(prune_compress24(w, scores, mask))
    return _to_dense("prune24", out, w, scores, mask)


def _check_scores(op: str, scores: Tensor) -> None:
    if scores.dtype not in DTYPE_CODE:
        raise TypeError(f"{op}: scores must be one of {listed(DTYPE_CODE)}, got {scores.dtype}")


def _check_prune(op: str, w: Tensor, scores: Tensor | None, mask: Tensor | None) -> None:
    _check_dense(op, w)
    if scores is not None and mask is not None:
        raise ValueError(f"{op}: at most one of scores and mask must be given, got both")
    if scores is not None:
        _check_scores(op, scores)
    if mask is not None and mask.dtype not in _MASK_DTYPES:
        raise TypeError(f"{op}: mask must be one of {listed(_MASK_DTYPES)}, got {mask.dtype}")
    for name, t in (("scores", scores), ("mask", mask)):
        if t is not None and (t.shape != w.shape or t.device != w.device):
            raise ValueError(f"{op}: {name} must be {tuple(w.shape)} on {w.device} as w is, got {tuple(t.shape)} on {t.device}")


def _rank(scores: Tensor | None, mask: Tensor | None) -> tuple[int, int, int, int, int]:
    """What decides, as prune_compress24_cpu takes it: address, kind, dtype, strides."""
    rank, kind = (scores, _BY_SCORES) if mask is None else (mask, _BY_MASK)
    if rank is None:
        return 0, _BY_WEIGHT, 0, 0, 0
    return rank.data_ptr(), kind, DTYPE_CODE.get(rank.dtype, 0), *rank.stride()


def _prune_compress24(w: Tensor, scores: Tensor | None, mask: Tensor | None, out: _Out = None) -> tuple[Tensor, Tensor]:
    (values, meta), status = _prune_compress24_fake(w, scores, mask, out), _new_status(w, 2)
    _C.prune_compress24_cpu(
        *_matrix(w), DTYPE_CODE[w.dtype], *_rank(scores, mask), values.data_ptr(), meta.data_ptr(), status.data_ptr(), threads()
    )
    _check_status(reference.prune_compress24, status, 2 * meta.shape[1], w, scores, mask)
    return values, meta


def _prune_compress24_cuda(w: Tensor, scores: Tensor | None, mask: Tensor | None, out: _Out = None) -> tuple[Tensor, Tensor]:
    values, meta, status = launch("prune_compress24", w, scores, mask, _prune_compress24_fake(w, scores, mask, out))
    _check_status(reference.prune_compress24, status, 2 * meta.shape[1], w, scores, mask)
    return values, meta


def _prune_compress24_fake(w: Tensor, scores: Tensor | None, mask: Tensor | None, out: _Out = None) -> tuple[Tensor, Tensor]:
    _check_prune("prune_compress24", w, scores, mask)
    return _packed("prune_compress24", w, out)


def _prune24(w: Tensor, scores: Tensor | None, mask: Tensor | None, out: _Out = None) -> Tensor:
    pruned, status = _prune24_fake(w, scores, mask, out), _new_status(w, 2)
    _C.prune24_cpu(*_matrix(w), DTYPE_CODE[w.dtype], *_rank(scores, mask), pruned.data_ptr(), status.data_ptr(), threads())
    _check_status(reference.prune24, status, padded_columns(w.shape[1]) // 4, w, scores, mask)
    return pruned


def _prune24_cuda(w: Tensor, scores: Tensor | None, mask: Tensor | None, out: _Out = None) -> Tensor:
    pruned, status = launch("prune24", w, scores, mask, _prune24_fake(w, scores, mask, out))
    _check_status(reference.prune24, status, padded_columns(w.shape[1]) // 4, w, scores, mask)
    return pruned


def _prune24_fake(w: Tensor, scores: Tensor | None, mask: Tensor | None, out: _Out = None) -> Tensor:
    _check_prune("prune24", w, scores, mask)
    return outputs("prune24", out, w, (w.shape, w.dtype))[0]


def _prune_compress24_save(ctx, inputs, output) -> None:
    ctx.k = inputs[0].shape[1]
    ctx.save_for_backward(output[1], inputs[2])


def _prune_compress24_backward(ctx, values: Tensor, _meta) -> tuple[Tensor, None, None]:
    meta, mask = ctx.saved_tensors
    return _masked(torch.ops.sparsekit.expand24.default(values, meta, ctx.k), mask), None, None


def _prune24_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _prune24_backward(ctx, out: Tensor) -> tuple[Tensor, None, None]:
    w, scores, mask = ctx.saved_tensors
    _, meta = torch.ops.sparsekit.prune_compress24.default(w, scores, mask)
    return _masked(torch.ops.sparsekit.expand24.default(reference.take24(out, meta), meta, w.shape[1]), mask), None, None


def _masked(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """Nothing for what a mask drops, also where it fills up a group of fewer than two."""
    return gradient if mask is None else torch.where(mask != 0, gradient, 0)


define(
    "prune_compress24(Tensor w, Tensor? scores, Tensor? mask) -> (Tensor, Tensor)",
    _prune_compress24,
    _prune_compress24_cuda,
    _prune_compress24_fake,
    (_prune_compress24_backward, _prune_compress24_save),
    into=2,
)
define(
    "prune24(Tensor w, Tensor? scores, Tensor? mask) -> Tensor",
    _prune24,
    _prune24_cuda,
    _prune24_fake,
    (_prune24_backward, _prune24_save),
    into=1,
)


# ---- validate24 ----


def validate24(s: Sparse24) -> None:
    """Returns where a Sparse24 is what sparsekit/format.py says, in one pass over its metadata.

    Raises TypeError for another dtype; ValueError for other sizes, a nibble that is none of 4, 8, 9, C, D and E, or a value other
    than zero past the last column, naming the first: what Sparse24.validate raises. ``torch.ops.sparsekit.validate24`` gives, with
    no wait for the device, the flat places (2,) int64 of the first bad nibble and the first such value; the largest int64 where
    there is none."""
    _check_rows("validate24", s)
    if not _clean(torch.ops.sparsekit.validate24.default(s.values, s.meta, s.shape[1])):
        s.validate()


def _check_rows(op: str, s: Sparse24) -> None:
    """What the ops cannot check, which are given the number of columns alone."""
    if not isinstance(s, Sparse24):
        raise TypeError(f"{op}: s must be a Sparse24, got a {type(s).__name__}")
    n, _ = check_shape(op, s.shape)
    if s.values.dim() == 2 and s.values.shape[0] != n:
        raise ValueError(f"{op}: values must have the {n} rows of shape, got {s.values.shape[0]}")


def _validate24(values: Tensor, meta: Tensor, k: int) -> Tensor:
    check_layout("validate24", values, meta, k)
    values, meta, status = values.contiguous(), meta.contiguous(), _new_status(values, 2)
    _C.validate24_cpu(
        values.data_ptr(), meta.data_ptr(), DTYPE_CODE[values.dtype], values.shape[0], k, status.data_ptr(), threads()
    )
    return status


def _validate24_cuda(values: Tensor, meta: Tensor, k: int) -> Tensor:
    check_layout("validate24", values, meta, k)
    return launch("validate24", values.contiguous(), meta.contiguous(), k)


def _validate24_fake(values: Tensor, meta: Tensor, k: int) -> Tensor:
    check_layout("validate24", values, meta, k)
    return _new_status(values, 2)


define("validate24(Tensor values, Tensor meta, SymInt k) -> Tensor", _validate24, _validate24_cuda, _validate24_fake)


# ---- masks ----


def mask_nm(scores: Tensor, n: int, m: int, pairs: bool = False, *, out: Tensor | None = None) -> Tensor:
    """The mask (rows, k) bool of an N:M pattern: of every m neighbours of a row the n with the highest scores are kept, exactly.

    scores (rows, k), any strides, fp64, fp32, fp16, bf16, fp8 e4m3, fp8 e5m2 or int8; 0 <= n <= m <= 32. A tie goes to the lower
    column. A last group of t < m keeps min(n, t). ``pairs``: the neighbours are pairs of columns, kept or dropped whole; the score
    of a pair is the sum of its two, in fp32 (fp64 for fp64), a column past k adding nothing.
    Raises TypeError for another dtype, ValueError for another rank, n or m, and for NaN, naming the first."""
    return _to_dense("mask_nm", out, scores, n, m, pairs)


def mask_rows(scores: Tensor, kept: int, *, out: Tensor | None = None, check: bool = True) -> Tensor:
    """The mask (rows, k) bool that keeps exactly ``kept`` columns of each row: those with the highest scores.

    scores (rows, k) as for mask_nm; 0 <= kept <= k. A tie goes to the lower column.
    Raises TypeError for another dtype, ValueError for another rank or count, and for NaN, naming the first. Not to ``check`` for
    NaN spares the host its wait for a GPU: then nothing is said of the mask of a row with one."""
    return _to_dense("mask_rows", out, scores, kept, check)


def _check_mask_nm(scores: Tensor, n: int, m: int) -> None:
    _check_scores("mask_nm", scores)
    if scores.dim() != 2:
        raise ValueError(f"mask_nm: scores must be (rows, columns), got shape {tuple(scores.shape)}")
    if not 0 <= n <= m or not 1 <= m <= LARGEST_M:
        raise ValueError(f"mask_nm: n of m must be kept with 0 <= n <= m and 1 <= m <= {LARGEST_M}, got n = {n}, m = {m}")


def _mask_nm(scores: Tensor, n: int, m: int, pairs: bool, out: _Out = None) -> Tensor:
    mask, status = _mask_nm_fake(scores, n, m, pairs, out), _new_status(scores, 1)
    code = DTYPE_CODE[scores.dtype]
    _C.mask_nm_cpu(*_matrix(scores), code, n, m, pairs, mask.data_ptr(), status.data_ptr(), threads())
    _check_status(reference.mask_nm, status, _groups(scores, m, pairs), scores, n, m, pairs)
    return mask


def _groups(scores: Tensor, m: int, pairs: bool) -> int:
    return -(-scores.shape[1] // (2 * m if pairs else m))


def _mask_nm_cuda(scores: Tensor, n: int, m: int, pairs: bool, out: _Out = None) -> Tensor:
    mask, status = launch("mask_nm", scores, n, m, pairs, _mask_nm_fake(scores, n, m, pairs, out))
    _check_status(reference.mask_nm, status, _groups(scores, m, pairs), scores, n, m, pairs)
    return mask


def _mask_nm_fake(scores: Tensor, n: int, m: int, pairs: bool, out: _Out = None) -> Tensor:
    _check_mask_nm(scores, n, m)
    return outputs("mask_nm", out, scores, (scores.shape, torch.bool))[0]


def _check_mask_rows(scores: Tensor, kept: int) -> None:
    _check_scores("mask_rows", scores)
    if scores.dim() != 2:
        raise ValueError(f"mask_rows: scores must be (rows, columns), got shape {tuple(scores.shape)}")
    if not 0 <= kept <= scores.shape[1]:
        raise ValueError(f"mask_rows: kept must be from 0 to the {scores.shape[1]} columns of scores, got {kept}")


def _mask_rows(scores: Tensor, kept: int, check: bool = True, out: _Out = None) -> Tensor:
    mask, status = _mask_rows_fake(scores, kept, check, out), _new_status(scores, 1)
    _C.mask_rows_cpu(*_matrix(scores), DTYPE_CODE[scores.dtype], kept, mask.data_ptr(), status.data_ptr(), threads())
    if check:
        _check_status(reference.mask_rows, status, 1, scores, kept)
    return mask


def _mask_rows_cuda(scores: Tensor, kept: int, check: bool = True, out: _Out = None) -> Tensor:
    mask, status = launch("mask_rows", scores, kept, _mask_rows_fake(scores, kept, check, out))
    if check:
        _check_status(reference.mask_rows, status, 1, scores, kept)
    return mask


def _mask_rows_fake(scores: Tensor, kept: int, check: bool, out: _Out = None) -> Tensor:
    _check_mask_rows(scores, kept)
    return outputs("mask_rows", out, scores, (scores.shape, torch.bool))[0]


define("mask_nm(Tensor scores, int n, int m, bool pairs) -> Tensor", _mask_nm, _mask_nm_cuda, _mask_nm_fake, into=1)
define("mask_rows(Tensor scores, SymInt kept, bool check) -> Tensor", _mask_rows, _mask_rows_cuda, _mask_rows_fake, into=1)
