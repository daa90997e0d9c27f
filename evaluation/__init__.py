"""Evaluation: how good generated designs are."""

from mechdiffusers.evaluation.analytic_denoisers import GaussianMixture, two_moons
from mechdiffusers.evaluation.curve_shape import curve_shape_error, nearest_in_curve_shape
from mechdiffusers.evaluation.design import designs_for
from mechdiffusers.evaluation.novelty import diversity, novelty, stiff_connectivity
from mechdiffusers.evaluation.out_of_distribution import (
    DESIGN_FAMILIES,
    StatisticsDistance,
    receiver_operating_characteristic,
)
from mechdiffusers.evaluation.refine import RefinedDesigns, refine
from mechdiffusers.evaluation.response import (
    NearestDesigns,
    nearest_training_designs,
    response_error,
    stored_designs,
    stored_responses,
)
from mechdiffusers.evaluation.statistics import (
    bootstrap_interval,
    distance_of_means,
    sliced_wasserstein_distance,
    two_point_correlation,
    two_point_error,
    volume_fraction_distance,
)
from mechdiffusers.evaluation.target_range import OutOfRangeWarning, RangeCheck, TargetRange
from mechdiffusers.evaluation.targets import read_targets, write_targets
from mechdiffusers.evaluation.verify import VerificationReport, verify

__all__ = [
    "DESIGN_FAMILIES",
    "GaussianMixture",
    "NearestDesigns",
    "OutOfRangeWarning",
    "RangeCheck",
    "RefinedDesigns",
    "StatisticsDistance",
    "TargetRange",
    "VerificationReport",
    "bootstrap_interval",
    "curve_shape_error",
    "designs_for",
    "distance_of_means",
    "diversity",
    "nearest_in_curve_shape",
    "nearest_training_designs",
    "novelty",
    "read_targets",
    "receiver_operating_characteristic",
    "refine",
    "response_error",
    "sliced_wasserstein_distance",
    "stiff_connectivity",
    "stored_designs",
    "stored_responses",
    "two_moons",
    "two_point_correlation",
    "two_point_error",
    "verify",
    "volume_fraction_distance",
    "write_targets",
]
