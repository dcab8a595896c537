"""Pruners, by name. Each observes the inputs of one linear, a batch at a time, and then prunes its weight."""

from collections.abc import Iterable

from ..criteria import CRITERIA, Criterion
from ..errors import SparsekitError, listed
from ..patterns import Pattern, check_group
from .base import Pruner, PruneResult
from .functional import magnitude_prune, sparsegpt_prune, wanda_prune
from .own import identity
from .scored import Magnitude, Wanda, by_gradient, scored
from .sparsegpt import SparseGPT

METHODS: dict[str, type[Pruner]] = {
    name: SparseGPT if name == "sparsegpt" else scored(CRITERIA[name]) for name in sorted([*CRITERIA, "sparsegpt"])
}

_OF_A_CRITERION = ("name", "statistics", "rowwise", "scores")


def method_named(name: str | Criterion, patterns: Iterable[Pattern] = (), group: str | None = None) -> type[Pruner]:
    """The pruner of that name, or of a criterion, for those patterns. group: what a share is counted in, one of patterns.GROUPS; by
    default a row or a layer, as the method prefers. Over a block or the model the caller decides, from its scores.

    Raises SparsekitError, listing the known ones, for any other name, and for a group that means nothing to method or pattern."""
    if isinstance(name, str) and name not in METHODS:
        raise SparsekitError(f"the method must be {listed(METHODS, 'or')}, got {name!r}")
    if not isinstance(name, str) and (isinstance(name, type) or not all(hasattr(name, part) for part in _OF_A_CRITERION)):
        raise SparsekitError(f"a criterion of your own must be an object with {listed(_OF_A_CRITERION)}, got {name!r}")
    if group is not None:
        check_group(patterns, group)
        if name == "sparsegpt":
            raise SparsekitError(f"sparsegpt counts a pattern in blocks of columns, got group = {group!r}; leave it out")
    if isinstance(name, str) and group is None:
        return METHODS[name]
    return scored(CRITERIA[name] if isinstance(name, str) else name, None if group is None else group == "row")


def method_text(method: str | Criterion) -> str:
    """What a report calls the method."""
    return method if isinstance(method, str) else method.name


__all__ = [
    "METHODS",
    "Magnitude",
    "PruneResult",
    "Pruner",
    "SparseGPT",
    "Wanda",
    "by_gradient",
    "identity",
    "magnitude_prune",
    "method_named",
    "method_text",
    "scored",
    "sparsegpt_prune",
    "wanda_prune",
]
