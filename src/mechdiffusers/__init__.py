"""Diffusers for mechanics: latent diffusion models of microstructures.

The names below are imported from their subpackages on first use, so that ``import mechdiffusers`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; an alias that repeats the name is what exports it (PEP 484)
    from mechdiffusers.evaluation.inverse_design import TargetRange as TargetRange
    from mechdiffusers.evaluation.inverse_design import VerificationReport as VerificationReport
    from mechdiffusers.evaluation.inverse_design import nearest_in_curve_shape as nearest_in_curve_shape
    from mechdiffusers.evaluation.inverse_design import nearest_training_designs as nearest_training_designs
    from mechdiffusers.evaluation.inverse_design import refine as refine
    from mechdiffusers.evaluation.inverse_design import response_error as response_error
    from mechdiffusers.evaluation.inverse_design import verify as verify
    from mechdiffusers.mechanics import ResponseSpec as ResponseSpec
    from mechdiffusers.mechanics import SimulationResult as SimulationResult
    from mechdiffusers.mechanics import export_designs as export_designs
    from mechdiffusers.mechanics import simulate as simulate
    from mechdiffusers.microstructures import build_dataset as build_dataset
    from mechdiffusers.microstructures import dataset_from_responses as dataset_from_responses
    from mechdiffusers.microstructures import load_mechanical_mnist as load_mechanical_mnist
    from mechdiffusers.microstructures import random_composites as random_composites
    from mechdiffusers.microstructures import read_designs as read_designs
    from mechdiffusers.models import ResponseEncoder as ResponseEncoder
    from mechdiffusers.models import ResponsePredictor as ResponsePredictor
    from mechdiffusers.pipelines import ClassifierGuidance as ClassifierGuidance
    from mechdiffusers.pipelines import LatentDDPMPipeline as LatentDDPMPipeline
    from mechdiffusers.schedulers import PredictorCorrectorScheduler as PredictorCorrectorScheduler
    from mechdiffusers.schedulers import ProbabilityFlowScheduler as ProbabilityFlowScheduler
    from mechdiffusers.schedulers import VDMScheduler as VDMScheduler

__version__ = "0.1.0"

_NAMES = {
    "evaluation.inverse_design": (
        "TargetRange",
        "VerificationReport",
        "nearest_in_curve_shape",
        "nearest_training_designs",
        "refine",
        "response_error",
        "verify",
    ),
    "mechanics": ("ResponseSpec", "SimulationResult", "export_designs", "simulate"),
    "microstructures": (
        "build_dataset",
        "dataset_from_responses",
        "load_mechanical_mnist",
        "random_composites",
        "read_designs",
    ),
    "models": ("ResponseEncoder", "ResponsePredictor"),
    "pipelines": ("ClassifierGuidance", "LatentDDPMPipeline"),
    "schedulers": ("PredictorCorrectorScheduler", "ProbabilityFlowScheduler", "VDMScheduler"),
}
_SUBPACKAGE_OF = {name: f"mechdiffusers.{subpackage}" for subpackage, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_SUBPACKAGE_OF]


def __getattr__(name: str) -> Any:
    if name not in _SUBPACKAGE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_SUBPACKAGE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
