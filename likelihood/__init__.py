"""How likely designs and latents are, under a pipeline's autoencoder and one of several models of its latents."""

from mechdiffusers.likelihood.latent_diffusion import ContinuousDiffusion, LatentDiffusion
from mechdiffusers.likelihood.latent_likelihood import LatentLikelihood, LikelihoodOutput
from mechdiffusers.likelihood.priors import AncestralPrior, ContinuousPrior, FlowPrior, StandardNormalPrior

__all__ = [
    "AncestralPrior",
    "ContinuousDiffusion",
    "ContinuousPrior",
    "FlowPrior",
    "LatentDiffusion",
    "LatentLikelihood",
    "LikelihoodOutput",
    "StandardNormalPrior",
]
