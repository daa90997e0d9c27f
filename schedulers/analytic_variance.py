r"""The error of a trained denoiser along the curve, which the optimal reverse variance follows from.

Of all isotropic Gaussians about a given mean, the one nearest to :math:`q(x_s \mid x_t)` is wider than
:math:`q(x_s \mid x_t, x_0)` by the denoiser's mean square error (Bao et al. 2022, theorem 1 with the exact denoiser;
with a trained one, its actual error takes the place of the least possible).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mechdiffusers.schedulers.log_snr_curve import alpha_sigma, prediction_coefficients
from mechdiffusers.schedulers.scheduling_vdm import VDMScheduler

__all__ = ["estimate_velocity_error"]


@torch.no_grad()
def estimate_velocity_error(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    samples: Tensor,
    num: int = 50,
    generator: torch.Generator | None = None,
) -> list[float]:
    r"""Mean square error of the velocity, an entry, at equally spaced timesteps: ``VDMScheduler``'s ``velocity_error``.

    Args:
        denoiser: Function of noisy samples ``(B, *)`` and a timestep ``()``.
        scheduler: Any variance-preserving scheduler with the noise schedule and prediction type of the denoiser.
        samples: Clean samples that the denoiser was not trained on, shape ``(B, *)``.
        num: Number of timesteps from 0 to T - 1, at least 2.
        generator: Source of the noise.

    Returns:
        :math:`E\|v - \hat v\|^2 / D` at each of them.

    Raises:
        ValueError: If ``num`` is below 2, or what the denoiser gives has another shape than the samples.

    Example:
        >>> errors = estimate_velocity_error(denoiser, pipe.scheduler, latents)  # doctest: +SKIP
        >>> VDMScheduler.from_config(pipe.scheduler.config, variance_type="optimal", velocity_error=errors)
        ... # doctest: +SKIP

    References:
        | Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance (Bao et al., 2022)
        | https://arxiv.org/abs/2201.06503
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num!r}")
    process = VDMScheduler.from_config(scheduler.config, variance_type="fixed_small")
    errors = []
    for t in torch.linspace(0, len(process) - 1, num, device=samples.device):
        noise = randn_tensor(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
        noisy = process.add_noise(samples, noise, t)
        alpha, sigma = (float(scale) for scale in alpha_sigma(process.curve(t)))
        (of_sample, of_output), _ = prediction_coefficients(process.config.prediction_type, alpha, sigma)
        output = denoiser(noisy, t)
        if output.shape != samples.shape:
            raise ValueError(f"denoiser must give the samples' shape {tuple(samples.shape)}, got {tuple(output.shape)}")
        clean = of_sample * noisy.cpu().double() + of_output * output.cpu().double()
        errors.append(((samples.cpu().double() - clean) / sigma).square().mean())
    return torch.stack(errors).tolist()
