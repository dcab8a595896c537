"""Heads, neurons, experts and layers taken out of a live model."""
