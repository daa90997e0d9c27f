"""Evaluation: how good generated designs are."""

from mechdiffusers.evaluation.statistics import (
    bootstrap_interval,
    distance_of_means,
    two_point_correlation,
    two_point_error,
    volume_fraction_distance,
)

__all__ = [
    "bootstrap_interval",
    "distance_of_means",
    "two_point_correlation",
    "two_point_error",
    "volume_fraction_distance",
]
