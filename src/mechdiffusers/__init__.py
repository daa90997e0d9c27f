"""Diffusers for mechanics: latent diffusion models of microstructures.

The names below are imported from their rooms on first use, so that ``import mechdiffusers`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechdiffusers.mechanics import SimulationResult, simulate
    from mechdiffusers.microstructures import (
        build_dataset,
        load_mechanical_mnist,
        random_composites,
        response_meaning,
    )
    from mechdiffusers.models import ResponseEncoder
    from mechdiffusers.pipelines import ClassifierGuidance, LatentDDPMPipeline
    from mechdiffusers.schedulers import PredictorCorrectorScheduler, ProbabilityFlowScheduler, VDMScheduler

__version__ = "0.1.0"

_ROOMS = {
    "ClassifierGuidance": "mechdiffusers.pipelines",
    "LatentDDPMPipeline": "mechdiffusers.pipelines",
    "PredictorCorrectorScheduler": "mechdiffusers.schedulers",
    "ProbabilityFlowScheduler": "mechdiffusers.schedulers",
    "ResponseEncoder": "mechdiffusers.models",
    "SimulationResult": "mechdiffusers.mechanics",
    "VDMScheduler": "mechdiffusers.schedulers",
    "build_dataset": "mechdiffusers.microstructures",
    "load_mechanical_mnist": "mechdiffusers.microstructures",
    "random_composites": "mechdiffusers.microstructures",
    "response_meaning": "mechdiffusers.microstructures",
    "simulate": "mechdiffusers.mechanics",
}

__all__ = [
    "ClassifierGuidance",
    "LatentDDPMPipeline",
    "PredictorCorrectorScheduler",
    "ProbabilityFlowScheduler",
    "ResponseEncoder",
    "SimulationResult",
    "VDMScheduler",
    "__version__",
    "build_dataset",
    "load_mechanical_mnist",
    "random_composites",
    "response_meaning",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
