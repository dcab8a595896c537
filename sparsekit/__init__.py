"""sparsekit: 2:4 sparsity for language models, from pruning to kernels."""

from importlib import import_module

from .errors import SparsekitError
from .format import Sparse24
from .patterns import NM, Pattern, Unstructured

__version__ = "0.1.0"

# Loaded at first use: a kernel's user does not pay for the import of transformers.
_LAZY = {
    "SparseLinear": "linear",
    "compress": "linear",
    "prune": "pipeline",
    "save": "checkpoint",
    "load": "checkpoint",
    "perplexity": "evaluate",
    "ops": None,
}

__all__ = ["NM", "Pattern", "Sparse24", "SparsekitError", "Unstructured", *sorted(_LAZY)]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")
    home = _LAZY[name]
    return import_module(f".{name}", __name__) if home is None else getattr(import_module(f".{home}", __name__), name)


def __dir__():
    return sorted(__all__)
