"""Pipelines: what a user calls."""

from mechdiffusers.pipelines.classifier_guidance import ClassifierGuidance
from mechdiffusers.pipelines.pipeline_latent_ddpm import LatentDDPMPipeline

__all__ = ["ClassifierGuidance", "LatentDDPMPipeline"]
