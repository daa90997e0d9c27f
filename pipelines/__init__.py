"""Pipelines: what a user calls."""

from mechdiffusers.pipelines.classifier_guidance import ClassifierGuidance
from mechdiffusers.pipelines.pipeline_latent_ddpm import LatentDDPMPipeline
from mechdiffusers.pipelines.variational_likelihood import LikelihoodOutput

__all__ = ["ClassifierGuidance", "LatentDDPMPipeline", "LikelihoodOutput"]
