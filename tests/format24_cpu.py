"""The CPU kernels of the 2:4 format by tensors: addresses, strides and codes in, what they write checked for its borders.

Every call runs on every instruction set of this CPU, and all must write the same. What is written lies between marked bytes, at
odd addresses, and is marked before."""

import torch

from sparsekit import _C

# The codes of csrc/launch.h.
DTYPE_CODES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64, torch.float8_e5m2]
CODE = {dtype: code for code, dtype in enumerate(DTYPE_CODES)}
MARK = 0x5B


def code_of(x: torch.Tensor) -> int:
    return CODE[x.dtype]


class Output:
    """A tensor between marked bytes, which `close` checks; aligned to its items and no more, or to a line of the cache."""

    lines = False

    def __init__(self, shape, dtype):
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.room = torch.full((192 + nbytes,), MARK, dtype=torch.uint8)
        self.begin = 64 + (-self.room.data_ptr() + (0 if self.lines else dtype.itemsize)) % 64
        self.end = self.begin + nbytes
        self.tensor = self.room[self.begin : self.end].view(dtype).view(shape)

    def close(self) -> torch.Tensor:
        assert (self.room[: self.begin] == MARK).all() and (self.room[self.end :] == MARK).all(), "written outside"
        return self.tensor


def paths() -> list[str]:
    """The instruction sets that this CPU has kernels for."""
    before, found = _C.cpu_isa(), []
    for name in ("portable", "avx2", "avx512"):
        try:
            _C.set_cpu_isa(name)
        except ValueError:
            continue
        found.append(name)
    _C.set_cpu_isa(before)
    return found


PATHS, CHOSEN = paths(), _C.cpu_isa()  # CHOSEN: to go back to, whatever another thread has set meanwhile


def call(function, *arguments, **outputs) -> list[torch.Tensor]:
    """What every path writes alike. Tensors go as addresses; outputs are given as (shape, dtype)."""
    first = None
    for path in PATHS:
        made = {name: Output(*spec) for name, spec in outputs.items()}
        by_name = {name: output.tensor.data_ptr() for name, output in made.items()}
        _C.set_cpu_isa(path)
        function(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments], **by_name)
        _C.set_cpu_isa(CHOSEN)
        written = [output.close() for output in made.values()]
        first = first or written
        for name, a, b in zip(made, first, written):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name} of {path} differs from that of {PATHS[0]}"
    return first


def packed(rows, cols, dtype):
    blocks = -(-cols // 8)
    return {"values": ((rows, 4 * blocks), dtype), "meta": ((rows, blocks), torch.uint8)}


def compress24(w, threads=3):
    outputs = packed(*w.shape, w.dtype) | {"status": ((2,), torch.int64)}
    return call(lambda *a, **k: _C.compress24_cpu(*a, threads=threads, **k), w, *w.shape, *w.stride(), code_of(w), **outputs)


def rank_of(scores, mask):
    if scores is not None:
        return scores, 1, code_of(scores), *scores.stride()
    return (0, 0, 0, 0, 0) if mask is None else (mask, 2, 0, *mask.stride())


def prune_compress24(w, scores=None, mask=None, threads=3):
    outputs = packed(*w.shape, w.dtype) | {"status": ((2,), torch.int64)}
    arguments = (w, *w.shape, *w.stride(), code_of(w), *rank_of(scores, mask))
    return call(lambda *a, **k: _C.prune_compress24_cpu(*a, threads=threads, **k), *arguments, **outputs)


def prune24(w, scores=None, mask=None, threads=3):
    arguments = (w, *w.shape, *w.stride(), code_of(w), *rank_of(scores, mask))
    outputs = {"out": (w.shape, w.dtype), "status": ((2,), torch.int64)}
    return call(lambda *a, **k: _C.prune24_cpu(*a, threads=threads, **k), *arguments, **outputs)


def expand24(values, meta, cols, threads=3):
    arguments = (values, meta, values.itemsize, values.shape[0], cols)
    return call(lambda *a, **k: _C.expand24_cpu(*a, threads=threads, **k), *arguments, out=((len(values), cols), values.dtype))[0]


def mask_nm(scores, n, m, pairs=False, threads=3):
    arguments = (scores, *scores.shape, *scores.stride(), code_of(scores), n, m, pairs)
    outputs = {"mask": (scores.shape, torch.uint8), "status": ((1,), torch.int64)}
    return call(lambda *a, **k: _C.mask_nm_cpu(*a, threads=threads, **k), *arguments, **outputs)


def mask_rows(scores, kept, threads=3):
    arguments = (scores, *scores.shape, *scores.stride(), code_of(scores), kept)
    outputs = {"mask": (scores.shape, torch.uint8), "status": ((1,), torch.int64)}
    return call(lambda *a, **k: _C.mask_rows_cpu(*a, threads=threads, **k), *arguments, **outputs)


def validate24(values, meta, cols, threads=3):
    arguments = (values, meta, code_of(values), values.shape[0], cols)
    return call(lambda *a, **k: _C.validate24_cpu(*a, threads=threads, **k), *arguments, status=((2,), torch.int64))[0].tolist()
