"""Diffusers for mechanics: latent diffusion models of microstructures.

The names below are imported from their rooms on first use, so that ``import mechdiffusers`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechdiffusers.evaluation import (
        TargetRange,
        VerificationReport,
        nearest_in_curve_shape,
        nearest_training_designs,
        refine,
        response_error,
        verify,
    )
    from mechdiffusers.mechanics import SimulationResult, simulate
    from mechdiffusers.microstructures import (
        build_dataset,
        load_mechanical_mnist,
        random_composites,
        response_meaning,
    )
    from mechdiffusers.models import ResponseEncoder, ResponsePredictor
    from mechdiffusers.pipelines import ClassifierGuidance, LatentDDPMPipeline
    from mechdiffusers.schedulers import PredictorCorrectorScheduler, ProbabilityFlowScheduler, VDMScheduler

__version__ = "0.1.0"

_ROOMS = {
    "ClassifierGuidance": "mechdiffusers.pipelines",
    "LatentDDPMPipeline": "mechdiffusers.pipelines",
    "PredictorCorrectorScheduler": "mechdiffusers.schedulers",
    "ProbabilityFlowScheduler": "mechdiffusers.schedulers",
    "ResponseEncoder": "mechdiffusers.models",
    "ResponsePredictor": "mechdiffusers.models",
    "SimulationResult": "mechdiffusers.mechanics",
    "TargetRange": "mechdiffusers.evaluation",
    "VDMScheduler": "mechdiffusers.schedulers",
    "VerificationReport": "mechdiffusers.evaluation",
    "build_dataset": "mechdiffusers.microstructures",
    "load_mechanical_mnist": "mechdiffusers.microstructures",
    "nearest_in_curve_shape": "mechdiffusers.evaluation",
    "nearest_training_designs": "mechdiffusers.evaluation",
    "random_composites": "mechdiffusers.microstructures",
    "refine": "mechdiffusers.evaluation",
    "response_error": "mechdiffusers.evaluation",
    "response_meaning": "mechdiffusers.microstructures",
    "simulate": "mechdiffusers.mechanics",
    "verify": "mechdiffusers.evaluation",
}

__all__ = [
    "ClassifierGuidance",
    "LatentDDPMPipeline",
    "PredictorCorrectorScheduler",
    "ProbabilityFlowScheduler",
    "ResponseEncoder",
    "ResponsePredictor",
    "SimulationResult",
    "TargetRange",
    "VDMScheduler",
    "VerificationReport",
    "__version__",
    "build_dataset",
    "load_mechanical_mnist",
    "nearest_in_curve_shape",
    "nearest_training_designs",
    "random_composites",
    "refine",
    "response_error",
    "response_meaning",
    "simulate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
