"""Heads, neurons, experts and layers taken out of a live model."""

from .architecture import ARCHITECTURES, Architecture, BlockShape, architecture_of, register
from .surgery import keep_experts, keep_heads, keep_neurons, settle_config, shape_model

__all__ = [
    "ARCHITECTURES", "Architecture", "BlockShape", "architecture_of", "keep_experts", "keep_heads", "keep_neurons", "register",
    "settle_config", "shape_model",
]  # fmt: skip
