"""sparsekit: 2:4 sparsity for language models, from pruning to kernels."""

from importlib import import_module

from .errors import SparsekitError

__version__ = "0.1.0"

# Loaded at first use: `sparsekit --help` does not pay for torch, nor a kernel's user for transformers.
_LAZY = {
    "Block": "patterns",
    "GradualPruner": "gradual",
    "NM": "patterns",
    "PairNM": "patterns",
    "Plan": "plan",
    "Pattern": "patterns",
    "PruningConfig": "config",
    "Schedule": "schedules",
    "Sparse24": "format",
    "SparseLinear": "linear",
    "Unstructured": "patterns",
    "block_influence": "structured",
    "compress": "linear",
    "expert_importance": "structured",
    "forecast": "analysis.forecast",
    "head_importance": "structured",
    "load": "checkpoint",
    "magnitude_prune": "pruners",
    "neuron_importance": "structured",
    "ops": None,
    "perplexity": "evaluate",
    "prune": "pipeline",
    "prune_folder": "pipeline",
    "prune_heads": "pipeline",
    "prune_neurons": "pipeline",
    "prune_structured": "pipeline",
    "prune_structured_folder": "pipeline",
    "recommend": "analysis.forecast",
    "save": "checkpoint",
    "select_experts": "structured",
    "select_heads": "structured",
    "select_layers": "structured",
    "select_neurons": "structured",
    "sparsegpt_prune": "pruners",
    "wanda_prune": "pruners",
}

__all__ = ["SparsekitError", *sorted(_LAZY)]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")
    home = _LAZY[name]
    return import_module(f".{name}", __name__) if home is None else getattr(import_module(f".{home}", __name__), name)


def __dir__():
    return sorted(__all__)
