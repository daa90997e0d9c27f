"""Inverse design: designs for wanted responses, and how near they come."""

from mechdiffusers.evaluation.inverse_design.refine import RefinedDesigns, refine
from mechdiffusers.evaluation.inverse_design.report import VerificationReport, save_verification_figure
from mechdiffusers.evaluation.inverse_design.response import response_error
from mechdiffusers.evaluation.inverse_design.retrieval import (
    NearestDesigns,
    load_split,
    nearest_training_designs,
    stored_designs,
    stored_responses,
)
from mechdiffusers.evaluation.inverse_design.sample import designs_for
from mechdiffusers.evaluation.inverse_design.select import curve_shape_error, nearest_in_curve_shape
from mechdiffusers.evaluation.inverse_design.target_range import OutOfRangeWarning, RangeCheck, TargetRange
from mechdiffusers.evaluation.inverse_design.targets import read_targets, write_targets
from mechdiffusers.evaluation.inverse_design.verify import verify

__all__ = [
    "NearestDesigns",
    "OutOfRangeWarning",
    "RangeCheck",
    "RefinedDesigns",
    "TargetRange",
    "VerificationReport",
    "curve_shape_error",
    "designs_for",
    "load_split",
    "nearest_in_curve_shape",
    "nearest_training_designs",
    "read_targets",
    "refine",
    "response_error",
    "save_verification_figure",
    "stored_designs",
    "stored_responses",
    "verify",
    "write_targets",
]
