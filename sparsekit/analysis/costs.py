"""What a plan makes of a model's size, exactly, and of its speed, by the rows of this machine or those shipped for its kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import bench, catalog, tune
from ..format import nbytes24
from ..linear import NM24, is_linear
from ..patterns import NM, PairNM, Pattern
from ..pipeline.blocks import Target
from ..plan import Plan

DTypeOf = Callable[[str], torch.dtype]  # of a tensor of the model, by its name: what it is stored in

# How far a measured product may lie from the one it speaks for: a weight's sides, and the number of tokens.
NEAR_WEIGHT, NEAR_TOKENS = 2, 4


def holds_24(pattern: Pattern | None) -> bool:
    """Whether every weight that holds the pattern holds 2:4 too. A share of weights says nothing of its groups."""
    if not isinstance(pattern, NM | PairNM):
        return False
    n, m = pattern.n, pattern.m
    for left in range(0, math.lcm(4, m), 4):
        groups = Counter(column // m for column in range(left, left + 4))
        if sum(min(n, columns) for columns in groups.values()) > 2:
            return False
    return True


def compressible(model: nn.Module, targets: Sequence[Target], plan: Plan, dtype_of: DTypeOf) -> list[Target]:
    """The targets that ``save`` will store as 2:4, and SparseLinear run, after the plan was followed.

    A matrix that is left alone is looked at; one that a share is taken from is reckoned not to hold 2:4."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = []
    for target in targets:
        pattern, (n, k) = plan.patterns[target.name], target.weight.shape
        if not is_linear(target.module) or owners[id(target.module.weight)] > 1:
            continue
        dtype = dtype_of(target.tensor)
        holds = NM24.check(target.weight) is None if pattern is None else holds_24(pattern)
        if holds and nbytes24(n, k, dtype) < n * k * dtype.itemsize:
            found.append(target)
    return found


@dataclass(frozen=True)
class Size:
    """Bytes of all tensors in a model's weight files. dense: of the model as it is. stored: after pruning, as ``save`` and
    ``prune_folder`` write it, compressed, indices included. bitmask: the same if what they store dense were kept as values and a
    bitmask by other tools."""

    dense: int
    stored: int
    bitmask: int


def size_of(model: nn.Module, targets: Sequence[Target], plan: Plan, dtype_of: DTypeOf | None = None) -> Size:
    """dtype_of: by default the dtypes that the model has. Headers of the files, a few kilobytes, are not counted."""
    held = model.state_dict(keep_vars=True)
    dtype_of = dtype_of or (lambda name: held[name].dtype)
    once = {id(tensor): name for name, tensor in reversed(held.items())}
    dense = sum(
        held[name].numel() * (dtype_of(name) if held[name].is_floating_point() else held[name].dtype).itemsize
        for name in once.values()
    )
    stored = bitmask = dense
    sparse = set(compressible(model, targets, plan, dtype_of))
    for target in targets:
        dtype, (n, k), pattern = dtype_of(target.tensor), target.weight.shape, plan.patterns[target.name]
        if target in sparse:
            saved = n * k * dtype.itemsize - nbytes24(n, k, dtype)
            stored, bitmask = stored - saved, bitmask - saved
        elif pattern is not None:
            bitmask -= max(math.floor(n * k * (dtype.itemsize - catalog.entry(pattern, "cpu").bytes_per_weight(dtype))), 0)
    return Size(dense, stored, bitmask)


@dataclass(frozen=True)
class Speed:
    """times: how many times as fast as the dense model's all linears of the blocks run together; None where that was not measured.
    said: the same in words."""

    times: float | None
    said: str


def near(times: tune.Times, batch: int, n: int, k: int) -> bool:
    """Whether what was measured speaks for this product of ``batch`` tokens."""
    sides = max(tune.ratio(times.n, n), tune.ratio(times.k, k))
    return sides <= math.log(NEAR_WEIGHT) and tune.ratio(times.m, batch) <= math.log(NEAR_TOKENS)


def speed_of(
    model: nn.Module, targets: Sequence[Target], plan: Plan, batch: int, dtype: torch.dtype, device: torch.device | None
) -> Speed:
    """With ``batch`` tokens a product, by the rows that ``sparsekit bench --tune`` kept for the device, or that are shipped for its
    kind; None is another machine.

    Every linear is looked up as the product itself does. A row speaks for weights up to twice its size or half of it in either
    direction, and for four times the tokens or a quarter."""
    sparse = set(compressible(model, targets, plan, lambda name: dtype))
    if not sparse:
        return Speed(1.0, "not faster: no kernel runs these patterns, the products are the dense ones")
    if device is None:
        return Speed(None, "not measured on that machine")
    key, text = bench.key(device), str(dtype).removeprefix("torch.")
    dense = pruned = 0.0
    for target in targets:
        n, k = target.weight.shape
        times = tune.times(key, text, batch, n, k)
        if times is None or not near(times, batch, n, k):
            how = f"`sparsekit bench DIR --tokens {batch} --dtype {text} --tune` measures it"
            return Speed(None, f"speed at {batch} tokens not measured, {text} {n}x{k} is not among the rows: {how}")
        share = n * k / (times.n * times.k)
        dense += share * times.dense
        pruned += share * (times.sparse if target in sparse else times.dense)
    found = dense / pruned
    faster, where = "faster" if found > 1 else "not faster", tune.measured_on(key)
    said = f"{faster} at {batch} tokens: the linears ran at {found:.2f} of their dense speed, by {text} rows measured {where}"
    return Speed(found, said)
