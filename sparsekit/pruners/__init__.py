"""Pruners, by name. Each observes the inputs of one linear, a batch at a time, and then prunes its weight."""

from ..errors import SparsekitError, listed
from .base import Pruner, PruneResult
from .functional import magnitude_prune, sparsegpt_prune, wanda_prune
from .magnitude import Magnitude
from .sparsegpt import SparseGPT
from .wanda import Wanda

METHODS: dict[str, type[Pruner]] = {"magnitude": Magnitude, "sparsegpt": SparseGPT, "wanda": Wanda}


def method_named(name: str) -> type[Pruner]:
    """The pruner of that name. Raises SparsekitError, listing the known ones, for any other."""
    if name not in METHODS:
        raise SparsekitError(f"the method must be {listed(METHODS, 'or')}, got {name!r}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "Magnitude",
    "PruneResult",
    "Pruner",
    "SparseGPT",
    "Wanda",
    "magnitude_prune",
    "method_named",
    "sparsegpt_prune",
    "wanda_prune",
]
