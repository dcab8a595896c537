"""Which linears of a model are pruned, which are not and why, and whether the pruned ones hold their pattern."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import SparsekitError
from ..linear import dense_weight, is_linear
from ..patterns import Pattern
from ..pruners import Pruner


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the ModuleList whose linears hold most weights. Raises SparsekitError where no list holds a linear."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    weights = [sum(m.weight.numel() for m in blocks.modules() if is_linear(m)) for blocks in lists]
    if not any(weights):
        raise SparsekitError(
            f"the model must have decoder blocks with a linear to prune, got {type(model).__name__} without one; "
            f"name the blocks with blocks="
        )
    return lists[weights.index(max(weights))]


def check_finite(linears: list[nn.Module], names: dict[nn.Module, str]) -> None:
    """Raises SparsekitError, naming the first linear whose weight holds NaN or Inf; what is not in memory yet is not looked at."""
    for linear in linears:
        if not linear.weight.is_meta and not torch.isfinite(linear.weight).all():
            raise SparsekitError(f"weights must be finite, got NaN or Inf in {names[linear]}")


def verify(linears: list[nn.Module], names: dict[nn.Module, str], pattern: Pattern, kind: type[Pruner]) -> None:
    """Raises SparsekitError, naming the first linear whose weight does not hold the pattern."""
    for linear in linears:
        if broken := pattern.check(dense_weight(linear), rowwise=kind.rowwise):
            raise SparsekitError(f"every pruned linear must hold {pattern}, got {names[linear]}, where {broken}")


def _asked(name: str, skip: tuple[str, ...]) -> bool:
    """Whether the module, or one that holds it, is named by ``skip``."""
    return any(fnmatchcase(name, text) or fnmatchcase(name, f"{text}.*") for text in skip)


def find_targets(blocks: nn.ModuleList, names: dict[nn.Module, str], skip: tuple[str, ...]) -> list[list[nn.Module]]:
    """The linears to prune, block by block."""
    unused = [text for text in skip if not any(fnmatchcase(name, text) for name in names.values())]
    if unused:
        raise SparsekitError(f"every skipped name must be a module of the model, got {unused[0]!r}")
    targets = [[m for m in block.modules() if is_linear(m) and not _asked(names[m], skip)] for block in blocks]
    if not any(targets):
        raise SparsekitError("there must be a linear to prune, and every one is skipped")
    held: set[int] = set()
    for linear in (linear for group in targets for linear in group):
        if id(linear.weight) in held:
            raise SparsekitError(
                f"the weight of {names[linear]} must be used once, and another linear or block uses it too; skip it"
            )
        held.add(id(linear.weight))
    return targets


def list_skipped(
    model: nn.Module, targets: list[list[nn.Module]], names: dict[nn.Module, str], skip: tuple[str, ...]
) -> dict[str, str]:
    """Every module with a weight matrix of its own that will not be pruned, with the reason."""
    pruned = {linear for group in targets for linear in group}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    skipped = {}
    for module, name in names.items():
        if module in pruned or all(weight.dim() < 2 for weight in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Embedding):
            skipped[name] = "embedding"
        elif module is output:
            skipped[name] = "output layer"
        elif not is_linear(module):
            skipped[name] = f"{type(module).__name__}, not a linear"
        else:
            skipped[name] = "asked for" if _asked(name, skip) else "outside the blocks"
    return skipped
