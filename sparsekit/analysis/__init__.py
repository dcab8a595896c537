"""What a pruning would cost and did cost: sensitivity, allocation, forecast, diagnosis, a page to read."""

from .allocation import allocate, allocate_choices, allocate_latency
from .curves import Curve, error_curves
from .doctor import diagnose
from .owl import Outliers, allocate_owl, outlier_shares
from .page import make_page, write_page
from .patient import Check
from .planning import make_plan
from .sensitivity import Loss, Sensitivity, loss_weights, losses_alone, measure_sensitivity, rank_correlation, spearman
from .weights import gradient_weights

__all__ = [
    "Check", "Curve", "Loss", "Outliers", "Sensitivity", "allocate", "allocate_choices", "allocate_latency", "allocate_owl",
    "diagnose", "error_curves", "gradient_weights", "loss_weights", "losses_alone", "make_page", "make_plan",
    "measure_sensitivity", "outlier_shares", "rank_correlation", "spearman", "write_page",
]  # fmt: skip
