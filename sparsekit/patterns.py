"""What may be removed: value objects, read from and printed as text.

N:M counts the weights **kept**, as NVIDIA does. A tail of t < M columns is a group whose missing columns count as zeros: it keeps
min(N, t). A tail of a block is a block likewise: it is scored by what it holds and counts as one.
Masks are exact: k kept is k kept, and a tie goes to the lower column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from numbers import Integral

import torch
from torch import Tensor

from . import ops, reference
from .errors import SparsekitError, listed

_KNOWN = (
    'N:M with N kept of M, such as "2:4", "4:8" or "1:4", the same in whole pairs, such as "4:8 pairs", '
    'the share removed, such as "50%", or the same in whole blocks of rows x columns, such as "block:32x32@50%"'
)
GROUPS = ("row", "layer", "block", "model")  # what a share can be counted in; a block is a decoder block
JOINT = ("block", "model")  # those that hold several matrices
_SHARE = r"(-?\d+(?:\.\d*)?|-?\.\d+)\s*%"


def whole(count: int, share: float) -> int:
    """A share of so many, rounded down, exactly: 0.29 stands for 29/100, and not for the float a hair below it."""
    return math.floor(count * Fraction(share).limit_denominator(10**9))


class Pattern:
    """A shape that a weight (n, k) can be pruned to. ``Pattern.parse`` reads one; ``str`` gives the text back.

    ``rowwise`` compares and counts each row (output feature) by itself; it matters to unstructured patterns alone."""

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """Reads "2:4", "4:8 pairs", "50%" or "block:32x32@50%". Raises SparsekitError, listing the known, for any other text."""
        if isinstance(text, Pattern):
            return text
        if match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text)):
            return NM(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s+pairs\s*", str(text)):
            return PairNM(int(match[1]), int(match[2]))
        if match := re.fullmatch(rf"\s*{_SHARE}\s*", str(text)):
            return Unstructured(share_of(match[1]))
        if match := re.fullmatch(rf"\s*block\s*:\s*(\d+)\s*x\s*(\d+)\s*@\s*{_SHARE}\s*", str(text)):
            return Block(int(match[1]), int(match[2]), share_of(match[3]))
        raise SparsekitError(f"a pattern must be {_KNOWN}, got {text!r}")

    sparsity: float  # the share of weights removed, tails aside
    columns: int  # neighbours that are chosen from together, so that no block of columns may cut between them

    @property
    def brief(self) -> str:
        """For a reader: as ``str``, but for a share to four digits."""
        return str(self)

    def partway(self, share: float) -> Pattern:
        """The pattern with that share, 0 to 1, of its removals: what a schedule passes through. At 1 it is this pattern."""
        raise NotImplementedError

    def mask(self, scores: Tensor, rowwise: bool = False) -> Tensor:
        """The bool mask (n, k) of what is kept: the highest scores. Raises ValueError for NaN."""
        raise NotImplementedError

    def check(self, weight: Tensor, rowwise: bool = False) -> str | None:
        """None where the weight holds the pattern, else one phrase that says where it does not."""
        raise NotImplementedError


@dataclass(frozen=True)
class NM(Pattern):
    """n kept of each m neighbours in a row."""

    n: int
    m: int

    def __post_init__(self):
        if not _counts(self.n, self.m) or not 0 <= self.n <= self.m or self.m < 1:
            raise SparsekitError(f"N:M must keep 0 <= N <= M weights of M >= 1, got {self.n}:{self.m}")

    @classmethod
    def pruned(cls, n: int, m: int) -> NM:
        """From the other convention, where n of m are removed."""
        return cls(m - n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def columns(self) -> int:
        return self.m

    def partway(self, share: float) -> NM:
        return NM(self.m - whole(self.m - self.n, share), self.m)

    def mask(self, scores: Tensor, rowwise: bool = False) -> Tensor:
        if self.m <= ops.LARGEST_M:
            return ops.mask_nm(scores, self.n, self.m)
        groups = reference.in_groups(scores, self.m, missing=-math.inf)  # a missing column loses to every real one
        return keep_top(groups, self.n).flatten(1)[:, : scores.shape[1]].contiguous()

    def check(self, weight: Tensor, rowwise: bool = False) -> str | None:
        return _overfull(reference.in_groups(weight != 0, self.m), self.n, self.m, weight.shape[1], "non-zeros")


@dataclass(frozen=True)
class PairNM(Pattern):
    """n kept of each m neighbours in a row, as n/2 whole pairs of m/2: 4:8 is what the 4-bit formats of tensor cores take.

    The score of a pair is the sum of its two. Source: PTX ISA, "Sparse matrix storage", of .e2m1."""

    n: int
    m: int

    def __post_init__(self):
        sound = _counts(self.n, self.m) and 0 <= self.n <= self.m and 2 <= self.m <= 2 * ops.LARGEST_M
        if not sound or self.n % 2 or self.m % 2:
            raise SparsekitError(
                f"pairs must keep an even N of an even M, 0 <= N <= M and 2 <= M <= {2 * ops.LARGEST_M}, got {self.n}:{self.m}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m} pairs"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def columns(self) -> int:
        return self.m

    def partway(self, share: float) -> PairNM:
        return PairNM(self.m - 2 * whole((self.m - self.n) // 2, share), self.m)

    def mask(self, scores: Tensor, rowwise: bool = False) -> Tensor:
        return ops.mask_nm(scores, self.n // 2, self.m // 2, pairs=True)

    def check(self, weight: Tensor, rowwise: bool = False) -> str | None:
        groups = reference.in_groups(weight != 0, self.m)
        pairs = groups.view(*groups.shape[:2], self.m // 2, 2).any(-1)
        return _overfull(pairs, self.n // 2, self.m, weight.shape[1], "pairs with a non-zero")


class Share(Pattern):
    """A share of a weight's units removed, anywhere. A unit is a single weight unless a subclass says otherwise. The number removed
    is rounded down."""

    share: float
    _what, _line = "zeros", "row"  # what removed units are, and what ``rowwise`` counts within

    def __post_init__(self):
        if not isinstance(self.share, int | float) or isinstance(self.share, bool):
            raise SparsekitError(f"a share must be a number from 0 to 1, got {self.share!r}")
        if not 0 <= self.share <= 1:
            raise SparsekitError(f"sparsity must lie in 0% to 100%, got {percent(self.share)}")

    @property
    def sparsity(self) -> float:
        return self.share

    @property
    def brief(self) -> str:
        return str(replace(self, share=float(f"{self.share:.4g}")))

    def partway(self, share: float) -> Share:
        return replace(self, share=self.share * share)

    def removed(self, count: int) -> int:
        """How many of so many units go, exactly."""
        return whole(count, self.share)

    def units(self, scores: Tensor) -> Tensor:
        """The scores of the units (lines, units in a line) that scores (n, k) have. Raises ValueError for NaN, at the latest when
        they are compared."""
        return scores

    def spread(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """A mask of units as the mask of their weights."""
        return mask

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The units that a weight (n, k) has, as (lines, units in a line)."""
        return tuple(shape)

    def count(self, shapes: Iterable[tuple[int, int]]) -> int:
        """How many units weights of these shapes have."""
        return sum(lines * across for lines, across in map(self.grid, shapes))

    def gone(self, weight: Tensor) -> int:
        """How many units of the weight hold nothing but zeros."""
        return int(self._zero(weight).sum())

    def masks(self, units: Sequence[Tensor], shapes: Sequence[tuple[int, int]], wide: bool | None = None) -> Iterator[Tensor]:
        """The masks of several weights (n, k) of which the share goes exactly, counted over all of them together.

        units: of each what ``units`` makes of its scores, read as ``keep_top_of_all`` reads lines; wide: as there. One mask is made
        at a time."""
        count = self.count(shapes)
        for kept, shape in zip(keep_top_of_all(units, count - self.removed(count), wide), shapes):
            yield self.spread(kept, shape)

    def mask(self, scores: Tensor, rowwise: bool = False) -> Tensor:
        units = self.units(scores)
        line = units if rowwise else units.reshape(1, -1)
        return self.spread(keep_top(line, line.shape[-1] - self.removed(line.shape[-1])).view(units.shape), scores.shape)

    def check(self, weight: Tensor, rowwise: bool = False) -> str | None:
        gone = self._zero(weight)
        line = gone if rowwise else gone.reshape(1, -1)
        count, wanted = line.sum(-1), self.removed(line.shape[-1])
        if not (count < wanted).any():
            return None
        row = int((count < wanted).nonzero()[0])
        return f"{f'{self._line} {row}' if rowwise else 'the weight'} has {int(count[row])} {self._what}, {wanted} are asked for"

    def _zero(self, weight: Tensor) -> Tensor:
        """Which units (lines, units in a line) hold nothing but zeros."""
        return weight == 0


@dataclass(frozen=True)
class Unstructured(Share):
    """A share of all weights removed, anywhere. The number removed is rounded down."""

    share: float
    columns = 1

    def __str__(self) -> str:
        return percent(self.share)


@dataclass(frozen=True)
class Block(Share):
    """A share of the blocks of rows x cols neighbours removed whole. The number removed is rounded down.

    The score of a block is the sum of its scores, in fp64. ``rowwise`` counts each line of blocks by itself."""

    rows: int
    cols: int
    share: float
    _what, _line = "blocks of zeros", "line of blocks"

    def __post_init__(self):
        if not _counts(self.rows, self.cols) or self.rows < 1 or self.cols < 1:
            raise SparsekitError(f"a block must have at least one row and one column, got {self.rows}x{self.cols}")
        super().__post_init__()

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}@{percent(self.share)}"

    @property
    def columns(self) -> int:
        return self.cols

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)

    def units(self, scores: Tensor) -> Tensor:
        reference.check_no_nan("mask", "scores", scores)
        return self._by_block(scores.float() if scores.element_size() == 1 else scores).sum((1, 3), dtype=torch.float64)

    def spread(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        n, k = shape
        return mask.repeat_interleave(self.rows, 0)[:n].repeat_interleave(self.cols, 1)[:, :k].contiguous()

    def _zero(self, weight: Tensor) -> Tensor:
        return ~self._by_block(weight != 0).any(3).any(1)

    def _by_block(self, t: Tensor) -> Tensor:
        """(lines of blocks, rows, blocks in a line, cols), what is missing at the end as zeros."""
        lines, across = self.grid(t.shape)
        full = t.new_zeros(lines * self.rows, across * self.cols)
        full[: t.shape[0], : t.shape[1]] = t
        return full.view(lines, self.rows, across, self.cols)


@dataclass(frozen=True, eq=False)
class Given(Pattern):
    """A mask that is decided already, (n, k) bool, True where kept: whatever the scores are, and by whom ``text`` tells."""

    kept: Tensor
    text: str = "given mask"
    columns = 1

    def __str__(self) -> str:
        return self.text

    @property
    def sparsity(self) -> float:
        return 1 - int(self.kept.count_nonzero()) / max(self.kept.numel(), 1)

    def mask(self, scores: Tensor, rowwise: bool = False) -> Tensor:
        return self.kept.to(scores.device)

    def check(self, weight: Tensor, rowwise: bool = False) -> str | None:
        left = (weight != 0) & ~self.kept.to(weight.device)
        if not left.any():
            return None
        row, column = left.nonzero()[0].tolist()
        return f"row {row}, column {column} is {weight[row, column].item():g} where its mask has none"


def check_group(patterns: Iterable[Pattern], group: str) -> None:
    """Raises SparsekitError for a comparison group that is not known, for any where a pattern has groups of its own, and for one of
    several matrices where they do not all have one pattern."""
    if group not in GROUPS:
        raise SparsekitError(f"the group must be {listed(GROUPS, 'or')}, got {group!r}")
    patterns = list(patterns)
    for pattern in patterns:
        if isinstance(pattern, Given):
            raise SparsekitError(f"a given mask is not counted in anything, got group = {group!r}; leave it out")
        if not isinstance(pattern, Share):
            raise SparsekitError(f"{pattern} compares weights within its own groups, got group = {group!r}; leave it out")
    if group in JOINT and len(set(patterns)) > 1:
        raise SparsekitError(f"the linears of a {group} must all have one pattern, got {patterns[0]} and {patterns[1]}")


def share_of(text: str) -> float:
    """Of the number that stands before a percent sign."""
    return float(Decimal(text).scaleb(-2))


def _counts(*numbers: int) -> bool:
    return all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)


def percent(share: float) -> str:
    return f"{Decimal(repr(float(share))).scaleb(2):f}%"  # the point moves, no digit does: parse gives the same share back


def _overfull(members: Tensor, most: int, m: int, k: int, what: str) -> str | None:
    """None, or where the first of the groups (rows, groups, members) of m columns each is that holds more than ``most``."""
    count = members.sum(-1)
    if not (count > most).any():
        return None
    row, group = (count > most).nonzero()[0].tolist()
    return f"row {row}, columns {group * m} to {min(group * m + m, k) - 1} hold {int(count[row, group])} {what}"


def keep_top(scores: Tensor, kept: int, check: bool = True) -> Tensor:
    """The bool mask of the ``kept`` highest scores along the last dimension, exactly; a tie goes to the lower index.

    scores (..., k) of a dtype that ops.mask_rows takes, 0 <= kept <= k, check as for it. Raises what mask_rows raises, rows counted
    over all the leading dimensions."""
    return ops.mask_rows(scores.reshape(scores.shape[:-1].numel(), scores.shape[-1]), kept, check=check).view(scores.shape)


def keep_top_of_all(lines: Iterable[Tensor], kept: int, wide: bool | None = None) -> Iterator[Tensor]:
    """The bool masks of the ``kept`` highest scores of all the lines together, exactly, a line at a time; a tie goes to the earlier
    line, and within it to the lower index.

    lines: float tensors of any shapes, gone through once for every 16 bits of fp64 where one is of it (``wide``; by default that is
    looked for first), else of fp32, and once for the masks: they may come from a disk, one is held at a time.
    Raises ValueError for NaN and for fewer scores than kept."""
    threshold, left = None, kept  # of the key of the last one kept: its leading bits; how many are still to be kept below them
    wide = any(line.element_size() == 8 for line in lines) if wide is None else wide
    for shift in range(48 if wide else 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for key in (key for line in lines for key in _keys(line, wide)):
            if threshold is not None:
                key = key[key >> (shift + 16) == threshold]
            digit = (key >> shift) + (1 << 15) if threshold is None else (key >> shift) & 0xFFFF  # the first one has the sign
            counts += torch.bincount(digit, minlength=1 << 16).cpu()
        at_least = counts.flip(0).cumsum(0)  # [i]: of the i + 1 highest digits
        if left > at_least[-1]:
            raise ValueError(f"there must be {kept} scores to keep, got {int(at_least[-1])}")
        highest = int(torch.searchsorted(at_least, left))
        left -= int(at_least[highest - 1]) if highest else 0
        threshold = (1 << 15) - 1 - highest if threshold is None else (threshold << 16) + (1 << 16) - 1 - highest
    for line in lines:
        masks = []
        for key in _keys(line, wide):
            mask, tied = key > threshold, (key == threshold).nonzero()[:left]
            mask[tied] = True
            left -= len(tied)
            masks.append(mask)
        yield torch.cat(masks).view(line.shape)


def _keys(line: Tensor, wide: bool) -> Iterator[Tensor]:
    """Integers (count,) in the order of the scores, as wide as fp64 or fp32; some at a time."""
    whole, held = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
    for scores in line.flatten().split(1 << 22):
        if scores.isnan().any():
            raise ValueError("mask: scores must hold no NaN, got one")
        bits = (scores.to(held) + 0.0).view(whole)  # -0.0 is 0.0
        yield torch.where(bits < 0, bits ^ torch.iinfo(whole).max, bits)
