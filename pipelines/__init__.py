"""Pipelines: what a user calls."""

from mechdiffusers.pipelines.pipeline_latent_ddpm import LatentDDPMPipeline

__all__ = ["LatentDDPMPipeline"]
