"""What a pruning would cost and did cost: sensitivity, allocation, forecast, diagnosis, a page to read."""

from .curves import Curve, error_curves
from .weights import gradient_weights

__all__ = ["Curve", "error_curves", "gradient_weights"]
