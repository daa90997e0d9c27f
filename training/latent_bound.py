r"""How likely held-out designs are: the evidence lower bound of the whole latent model, in continuous time.

.. math:: \log p(x) \ge E_q[\log p(x \mid z_0)] + H[q(z_0 \mid x)] + E_q[\log p(z_0)],

and in place of :math:`\log p(z_0)` the bound of a variational diffusion model (Kingma et al. 2021, section 4; Luo 2022,
"Variational Diffusion Models") between the ends of its curve: the divergence of the noisiest latents from the prior,
the diffusion part, and :math:`p(z_0 \mid z_t) = N(z_t / \alpha_t, \sigma_t^2 / \alpha_t^2)` at the clean end.
A pipeline's ``log_likelihood`` draws several noise levels a design and asks the denoiser at the clean end too; here it
sees each design once, at the draw that gives the loss.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mechdiffusers.likelihood.latent_likelihood import log_prob_given
from mechdiffusers.likelihood.log_density import noise_divergence
from mechdiffusers.schedulers import VDMScheduler

__all__ = ["autoencoder_nats", "latent_nats"]

_BATCH = 256


@torch.no_grad()
def autoencoder_nats(
    vae: AutoencoderKL,
    logvar: Tensor,
    latents: Tensor,
    images: Tensor,
) -> float:
    """The reconstruction term of designs and the entropy of their posteriors: the mean.

    Args:
        vae: Trained autoencoder, its shift and scale measured, and what its decoder means in its configuration.
        logvar: Log-variances of the codes, shape ``(N, C, h, w)``.
        latents: Draws of :math:`z_0`, one a design, same shape.
        images: The designs, in [0, 1], shape ``(N, 1, H, W)``.
    """
    log_prob = [log_prob_given(vae, z, x) for z, x in zip(latents.split(_BATCH), images.split(_BATCH), strict=True)]
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
    last_step = (cleanest - math.log(2 * math.pi * math.e)) / 2 * latents[0].numel()
    return (last_step - noise_divergence(latents.double(), noisiest).mean() - diffusion.double().mean()).item()
