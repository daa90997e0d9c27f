r"""How likely held-out designs are: the evidence lower bound of the whole latent model, in continuous time.

.. math:: \log p(x) \ge E_q[\log p(x \mid z)] + H[q(z \mid x)] + E_q[\log p(z_0)] + D \log s, \quad z_0 = s (z - m),

and in place of :math:`\log p(z_0)` the bound of a variational diffusion model (Kingma et al. 2021, section 4; Luo 2022,
"Variational Diffusion Models") between the ends of its curve: the divergence of the noisiest latents from the prior,
the diffusion part, and :math:`p(z_0 \mid z_t) = N(z_t / \alpha_t, \sigma_t^2 / \alpha_t^2)` at the clean end.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL
from mechdiffusers.pipelines.latent_likelihood import decoder_log_prob, decoder_output
from mechdiffusers.schedulers import VDMScheduler
from mechdiffusers.training.randomness import StepRandomness
from torch import Tensor

__all__ = ["autoencoder_nats", "latent_nats"]

_BATCH = 256


@torch.no_grad()
def autoencoder_nats(
    vae: AutoencoderKL,
    moments: Tensor,
    images: Tensor,
    likelihood: str,
    decoder_scale: float | None,
    randomness: StepRandomness,
) -> float:
    """The reconstruction term of held-out designs and the entropy of their posteriors, as latents have it: the mean.

    Args:
        vae: Trained autoencoder, its shift and scale measured.
        moments: Means and log-variances, shape ``(N, 2 C, h, w)``.
        images: The designs, in [0, 1], shape ``(N, 1, H, W)``.
        likelihood: Of the decoder.
        decoder_scale: Of the decoder, if it has one.
        randomness: Of the draws from the posteriors.
    """
    mean, logvar = moments.chunk(2, dim=1)
    codes = mean + torch.exp(logvar / 2) * randomness.normal(*mean.shape).to(mean)
    log_prob = [
        decoder_log_prob(decoder_output(vae, z).float(), x, likelihood, decoder_scale).double().sum((1, 2, 3))  # type: ignore[arg-type]
        for z, x in zip(codes.split(_BATCH), images.split(_BATCH), strict=True)
    ]
    entropy = (math.log(2 * math.pi * math.e) + logvar.double()) / 2 + math.log(vae.config.scaling_factor)
    return (torch.cat(log_prob).mean() + entropy.flatten(1).sum(1).mean()).item()


def latent_nats(process: VDMScheduler, latents: Tensor, diffusion: Tensor) -> float:
    """The bound on the log-density of latents, the mean.

    Args:
        process: The forward process.
        latents: Draws of :math:`z_0`, shape ``(N, C, h, w)``.
        diffusion: The diffusion part of the negative bound, shape ``(N,)``.
    """
    ends = torch.tensor([0.0, len(process) - 1.0], device=latents.device)
    cleanest, noisiest = process.curve(ends)
    variance, signal = torch.sigmoid(-noisiest), torch.sigmoid(noisiest)
    prior = (signal * latents.double().square() + variance - 1 - variance.log()).flatten(1).sum(1) / 2
    reconstruction = (cleanest - math.log(2 * math.pi * math.e)) / 2 * latents[0].numel()
    return (reconstruction - prior.mean() - diffusion.double().mean()).item()
