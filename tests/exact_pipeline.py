"""A latent diffusion pipeline whose every part has a closed form: an exact denoiser and a linear autoencoder."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from analytic_denoisers import GaussianMixture
from mechdiffusers.likelihood import ContinuousDiffusion, LatentLikelihood
from mechdiffusers.models import ResponseEncoder
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import VDMScheduler
from mechdiffusers.schedulers.log_snr_curve import LogSnrCurve

NOISE = 0.4  # standard deviation of the Gaussian decoder


def exact_denoiser(mixture: GaussianMixture, scheduler: Any, counted: list[int] | None = None) -> Any:
    """What a perfect network predicts for latents (B, 1, 1, D) at timesteps of a scheduler."""
    curve = LogSnrCurve.of_scheduler(scheduler)

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        if counted is not None:
            counted.append(len(x))
        log_snr = torch.as_tensor(curve.at(timesteps.double().numpy())).expand(len(x))
        return mixture.predict(x.flatten(1), log_snr, scheduler.config.prediction_type).reshape(x.shape)

    return denoise


def exact_diffusion(mixture: GaussianMixture, scheduler: Any, counted: list[int] | None = None) -> ContinuousDiffusion:
    denoise = exact_denoiser(mixture, scheduler, counted)
    return ContinuousDiffusion(denoise, LogSnrCurve.of_scheduler(scheduler), scheduler.config.prediction_type)


class Denoiser(torch.nn.Module, ConfigMixin):
    config_name = "config.json"
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, mixture: GaussianMixture, scheduler: Any):
        super().__init__()
        self.register_to_config(in_channels=1, out_channels=1, cross_attention_dim=1)
        self.denoise = exact_denoiser(mixture, scheduler)

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        return SimpleNamespace(sample=self.denoise(x, timesteps.double()))


class LinearAutoencoder(torch.nn.Module, ConfigMixin):
    """For images (B, 1, 1, D) the posterior is N(share x + offset, std^2); a code is decoded to gain code + bias."""

    config_name = "config.json"
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, dims: int, share: float, std: float, gain: float = 1.0, offset: float = 0.1, bias: float = 0.0):
        super().__init__()
        self.register_to_config(
            sample_size=(1, dims), block_out_channels=(1,), latent_channels=1, scaling_factor=0.8, shift_factor=0.3
        )
        self.share, self.std, self.gain, self.offset, self.bias = share, std, gain, offset, bias

    def encode(self, inputs: Tensor) -> Any:
        mean = self.share * (inputs + 1) / 2 + self.offset
        logvar = torch.full_like(mean, 2 * math.log(self.std))
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)))

    def decode(self, codes: Tensor) -> Any:
        return SimpleNamespace(sample=self.gain * codes + self.bias)


def exact_pipeline(
    mixture: GaussianMixture, scheduler: Any = None, share: float = 0.7, std: float = 0.5, **autoencoder: float
) -> LatentDDPMPipeline:
    """A pipeline whose latents have the density ``mixture``; its decoder's output is the logit of a pixel."""
    scheduler = scheduler or VDMScheduler(log_snr="linear")
    vae = LinearAutoencoder(mixture.means.shape[1], share, std, **autoencoder)
    pipe = LatentDDPMPipeline(vae, Denoiser(mixture, scheduler), scheduler, ResponseEncoder(token_dim=1))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class GaussianLikelihood(LatentLikelihood):
    """As if pixels were N(decoder's output, NOISE^2), with which p(x) has a closed form."""

    def _check_mass(self, pixels: Tensor) -> None:
        pass

    def _log_prob_given(self, latents: Tensor, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        squared = (pixels - decoded).square().flatten(1).sum(1) / NOISE**2
        return -(squared + pixels[0].numel() * math.log(2 * math.pi * NOISE**2)) / 2


def gaussian_evidence(pipe: LatentDDPMPipeline, mixture: GaussianMixture, images: Tensor) -> Tensor:
    """The log p(x) that :class:`GaussianLikelihood` bounds, for latents of a single Gaussian."""
    vae, dims = pipe.vae, images.shape[-1]
    scale = vae.gain / vae.config.scaling_factor
    covariance = mixture.covariance * scale**2 + NOISE**2 * torch.eye(dims, dtype=torch.float64)
    mean = mixture.mean * scale + vae.gain * vae.config.shift_factor + vae.bias
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(images.flatten(1).double())


def rotated_gaussian(stds: list[float], seed: int = 0) -> GaussianMixture:
    """A Gaussian with these standard deviations along random axes."""
    generator = torch.Generator().manual_seed(seed)
    dims = len(stds)
    axes, _ = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))
    variances = torch.tensor(stds, dtype=torch.float64) ** 2
    return GaussianMixture([1.0], [[0.0] * dims], (axes @ variances.diag() @ axes.T)[None])


def chain_std(std, levels, velocity_error):
    """Standard deviation of what a chain of ancestral steps with the exact denoiser of N(0, std^2) draws."""
    alpha, sigma = torch.sigmoid(levels).sqrt(), torch.sigmoid(-levels).sqrt()
    shrink = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # the clean latent is this times the noisy one
    variance = torch.ones((), dtype=torch.float64)
    for t in range(len(levels) - 1):
        c = -torch.expm1(levels[t] - levels[t + 1])
        mean = alpha[t + 1] / alpha[t] * (1 - c) + alpha[t + 1] * c * shrink[t]
        variance = mean**2 * variance + sigma[t + 1] ** 2 * c + (alpha[t + 1] * c * sigma[t]) ** 2 * velocity_error
    return (shrink[-1] ** 2 * variance + (sigma[-1] / alpha[-1]) ** 2).sqrt().item()
