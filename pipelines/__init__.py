"""Pipelines: what a user calls."""

from mechdiffusers.pipelines.classifier_guidance import ClassifierGuidance
from mechdiffusers.pipelines.pipeline_latent_ddpm import LatentDDPMPipeline, record_training_schedule

__all__ = ["ClassifierGuidance", "LatentDDPMPipeline", "record_training_schedule"]
