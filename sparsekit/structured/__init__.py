"""Heads, neurons, experts and layers taken out of a live model."""

from .architecture import ARCHITECTURES, Architecture, BlockShape, architecture_of, register

__all__ = ["ARCHITECTURES", "Architecture", "BlockShape", "architecture_of", "register"]
