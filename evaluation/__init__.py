"""Evaluation: how good generated designs are."""

from mechdiffusers.evaluation.analytic_denoisers import GaussianMixture, two_moons
from mechdiffusers.evaluation.statistics import (
    bootstrap_interval,
    distance_of_means,
    sliced_wasserstein_distance,
    two_point_correlation,
    two_point_error,
    volume_fraction_distance,
)

__all__ = [
    "GaussianMixture",
    "bootstrap_interval",
    "distance_of_means",
    "sliced_wasserstein_distance",
    "two_moons",
    "two_point_correlation",
    "two_point_error",
    "volume_fraction_distance",
]
