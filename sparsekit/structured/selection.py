"""Which units of each block go, by their importance: a count or a share of each block, or of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from ..errors import SparsekitError, listed

SCOPES = ("layer", "global")
Remove = int | float | Sequence[int]


def select(importance: Sequence[Tensor], remove: Remove, scope: str, what: str, round_to: int | None = None) -> list[list[int]]:
    """The units to remove from each block, in rising order; those of ``select_heads`` and ``select_neurons``."""
    if scope not in SCOPES:
        raise SparsekitError(f"scope must be {listed(SCOPES, 'or')}, got {scope!r}")
    step = 1 if round_to is None else round_to
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise SparsekitError(f"round_to must be a number of {what} of at least 1, got {round_to!r}")
    if not all(torch.isfinite(scores).all() for scores in importance):
        raise SparsekitError(f"the importance of {what} must be finite, got NaN or Inf")
    units = [len(scores) for scores in importance]
    if not any(units):
        raise SparsekitError(f"there must be {what} to remove, and no block has any")
    # From the least important on, of equals the last first, so that a tie keeps the lower one.
    orders = [(len(s) - 1 - s.flip(0).argsort(stable=True)).tolist() for s in importance]
    if scope == "layer":
        counts = [_rounded(n, count, step) for n, count in zip(units, _per_block(units, remove, what))]
    else:
        counts = _global(importance, orders, _total(units, remove, what), step)
    if not any(counts):
        rounding = f", keeping multiples of {step}" if step > 1 else ""
        raise SparsekitError(
            f"at least one of the {what} must go, and {remove!r} of {listed(sorted(set(filter(None, units))), 'or')} in a block "
            f"is none{rounding}; ask for more"
        )
    return [sorted(order[:count]) for order, count in zip(orders, counts)]


def _per_block(units: Sequence[int], remove: Remove, what: str) -> list[int]:
    if isinstance(remove, Sequence) and not isinstance(remove, str):
        counts = list(remove)
        if len(counts) != len(units):
            raise SparsekitError(f"counts of {what} to remove must be given for each of the {len(units)} blocks, got {len(counts)}")
        if bad := [count for count in counts if isinstance(count, bool) or not isinstance(count, int) or count < 0]:
            raise SparsekitError(f"a count of {what} to remove must be a number of at least 0, got {bad[0]!r}")
    else:
        counts = [_amount(n, remove, what) if n else 0 for n in units]
    for n, count in zip(units, counts):
        if count and count >= n:
            raise SparsekitError(f"a block must keep at least one of its {n} {what}, got {count} to remove")
    return counts


def _total(units: Sequence[int], remove: Remove, what: str) -> int:
    if not isinstance(remove, int | float):
        raise SparsekitError(f"over all blocks together one share or count of {what} is removed, got {remove!r}")
    count, most = _amount(sum(units), remove, what), sum(n - 1 for n in units if n)
    if count > most:
        raise SparsekitError(
            f"each block must keep at least one of its {what}, so that at most {most} of {sum(units)} can go, got {count} to remove"
        )
    return count


def _amount(units: int, remove: int | float, what: str) -> int:
    """How many of the units a count or a share is; a share is never exceeded."""
    if isinstance(remove, int) and not isinstance(remove, bool) and remove >= 1:
        return remove
    if not isinstance(remove, float) or not 0 < remove < 1:
        raise SparsekitError(f"{what} to remove must be a share between 0 and 1 or a count of at least 1, got {remove!r}")
    return int(units * remove + 1e-6)  # 0.29 * 100 is 28.999999999999996


def _rounded(units: int, count: int, step: int) -> int:
    """The largest count not above the one asked for that keeps a multiple of step."""
    return max(units - -(-(units - count) // step) * step, 0) if count else 0


def _global(importance: Sequence[Tensor], orders: Sequence[Sequence[int]], asked: int, step: int) -> list[int]:
    """How many go from each block: the least important step by step, until one more would exceed what is asked for.

    Blocks are compared by the mean importance of the step that would go next. The first one leaves a multiple of step."""
    ranked = [scores[order].tolist() for scores, order in zip(importance, orders)]
    counts, total = [0] * len(ranked), 0

    def coming(i: int) -> tuple[float, int, int] | None:
        size = (len(ranked[i]) - counts[i]) % step or step
        if counts[i] + size >= len(ranked[i]):
            return None
        return sum(ranked[i][counts[i] : counts[i] + size]) / size, -i, size

    queue = [first for i in range(len(ranked)) if (first := coming(i))]
    heapify(queue)
    while queue:
        _, negative, size = heappop(queue)
        if total + size > asked:
            if step == 1:
                break
            continue
        counts[-negative] += size
        total += size
        if (following := coming(-negative)) is not None:
            heappush(queue, following)
    return counts
