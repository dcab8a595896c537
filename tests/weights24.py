"""Weights stored 2:4 for the tests of layouts, and comparison by bits."""

import numpy as np
import torch

from sparsekit import Sparse24
from sparsekit.format import VALID_NIBBLES, padded_columns

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # by bytes of an element
UNDER_FULL = [(), (0,), (1,), (2,), (3,)]  # the columns of a group that are not zero


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().contiguous().view(BITS[t.dtype.itemsize])


def array(t: torch.Tensor) -> np.ndarray:
    """The bit patterns, unsigned."""
    return bits(t).numpy().view(f"u{t.dtype.itemsize}")


def same(a, b) -> bool:
    """Whether two results are equal bit for bit: tensors, and tuples of them and of sizes."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def any_sparse(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Sparse24:
    """Any valid nibbles and any bits, save NaN: both zeros, infinities, zeros that are kept. Columns past k: +0, in a group of its
    own canonical."""
    g, kp = torch.Generator().manual_seed(seed), padded_columns(k)
    nibbles = torch.tensor(VALID_NIBBLES, dtype=torch.uint8)[torch.randint(6, (n, kp // 4), generator=g)]
    nibbles[:, -(-k // 4) :] = 4
    info, shape = torch.iinfo(BITS[dtype.itemsize]), (n, kp // 4, 2)
    raw = torch.randint(info.min, info.max + 1, shape, generator=g)
    raw[torch.rand(shape, generator=g) < 0.3] = 0
    raw[torch.rand(shape, generator=g) < 0.1] = 0x80 if dtype.itemsize == 1 else info.min  # -0.0, or -128
    raw = raw.to(BITS[dtype.itemsize])
    raw[raw.view(dtype).float().isnan()] = 1
    raw[torch.stack((nibbles & 3, nibbles >> 2), -1) + 4 * torch.arange(kp // 4)[:, None] >= k] = 0
    values = raw.view(dtype)
    s = Sparse24(values.view(n, kp // 2), nibbles[:, 0::2] | nibbles[:, 1::2] << 4, (n, k))
    s.validate()
    return s


def full_weight(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A weight with exactly two non-zeros in each group, none of them -128, and both zeros; k a multiple of 4."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, k // 4, 4, generator=g).argsort(-1) < 2
    size = torch.randint(1, 97, kept.shape, generator=g).float() / (1 if dtype == torch.int8 else 8)
    sign = torch.randint(0, 2, kept.shape, generator=g) * 2 - 1
    return (kept * size * sign).view(n, k).to(dtype)


def group_weight(columns: tuple[int, ...], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    w = torch.zeros(n, k // 4, 4)
    w[..., list(columns)] = 1
    return w.view(n, k).to(dtype)
