"""Heads, neurons, experts and layers taken out of a live model."""

from .architecture import ARCHITECTURES, Architecture, BlockShape, architecture_of, register
from .experts import RemovedExperts, expert_importance, prune_experts, remove_experts, select_experts
from .heads import head_importance, select_heads
from .layers import RemovedLayers, block_influence, prune_layers, remove_layers, remove_sublayers, select_layers
from .neurons import neuron_importance, select_neurons
from .surgery import keep_experts, keep_heads, keep_neurons, settle_config, shape_model

__all__ = [
    "ARCHITECTURES", "Architecture", "BlockShape", "RemovedExperts", "RemovedLayers", "architecture_of", "block_influence",
    "expert_importance", "head_importance", "keep_experts", "keep_heads", "keep_neurons", "neuron_importance", "prune_experts",
    "prune_layers", "register", "remove_experts", "remove_layers", "remove_sublayers", "select_experts", "select_heads",
    "select_layers", "select_neurons", "settle_config", "shape_model",
]  # fmt: skip
