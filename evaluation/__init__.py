"""Evaluation of sets of designs: statistics, novelty, and how a score tells other designs from usual ones.

Designs for wanted responses, and how near they come, are in :mod:`mechdiffusers.evaluation.inverse_design`.
"""

from mechdiffusers.evaluation.novelty import diversity, diversity_ratio, novelty, stiff_connectivity
from mechdiffusers.evaluation.out_of_distribution import StatisticsDistance, receiver_operating_characteristic
from mechdiffusers.evaluation.statistics import (
    bootstrap_interval,
    distance_of_means,
    sliced_wasserstein_distance,
    two_point_correlation,
    two_point_error,
    volume_fraction_distance,
)

__all__ = [
    "StatisticsDistance",
    "bootstrap_interval",
    "distance_of_means",
    "diversity",
    "diversity_ratio",
    "novelty",
    "receiver_operating_characteristic",
    "sliced_wasserstein_distance",
    "stiff_connectivity",
    "two_point_correlation",
    "two_point_error",
    "volume_fraction_distance",
]
