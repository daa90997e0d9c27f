"""A latent diffusion pipeline whose every part has a closed form: an exact denoiser and a linear autoencoder."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from mechdiffusers.pipelines.continuous_diffusion import ContinuousDiffusion, log_snr_table
from torch import Tensor

from analytic_denoisers import GaussianMixture
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import VDMScheduler

NOISE = 0.4  # standard deviation of the Gaussian decoder


def exact_denoiser(mixture: GaussianMixture, scheduler: Any, counted: list[int] | None = None) -> Any:
    """What a perfect network says of latents (B, 1, 1, D) at timesteps of a scheduler."""
    reading = ContinuousDiffusion(lambda x, t: x, log_snr_table(scheduler), "sample")

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        if counted is not None:
            counted.append(len(x))
        log_snr = reading.log_snr(timesteps).expand(len(x))
        return mixture.predict(x.flatten(1), log_snr, scheduler.config.prediction_type).reshape(x.shape)

    return denoise


def exact_diffusion(mixture: GaussianMixture, scheduler: Any, counted: list[int] | None = None) -> ContinuousDiffusion:
    denoise = exact_denoiser(mixture, scheduler, counted)
    return ContinuousDiffusion(denoise, log_snr_table(scheduler), scheduler.config.prediction_type)


class Denoiser(torch.nn.Module):
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, mixture: GaussianMixture, scheduler: Any):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1)
        self.denoise = exact_denoiser(mixture, scheduler)

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        return SimpleNamespace(sample=self.denoise(x, timesteps.double()))


class LinearAutoencoder(torch.nn.Module):
    """The posterior of images (B, 1, 1, D) is N(share x + 0.1, std^2), the decoder's output ``gain`` times the code."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, dims: int, share: float, std: float, gain: float = 1.0):
        super().__init__()
        self.config = SimpleNamespace(
            sample_size=(1, dims), block_out_channels=(1,), latent_channels=1, scaling_factor=0.8, shift_factor=0.3
        )
        self.share, self.std, self.gain = share, std, gain

    def encode(self, inputs: Tensor) -> Any:
        mean = self.share * (inputs + 1) / 2 + 0.1
        logvar = torch.full_like(mean, 2 * math.log(self.std))
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)))

    def decode(self, codes: Tensor) -> Any:
        return SimpleNamespace(sample=self.gain * codes)


class NullEncoder(torch.nn.Module):
    response_shape, device = (0, 0), torch.device("cpu")

    def forward(self, response: Tensor) -> Tensor:
        return response.new_zeros(len(response), 1, 1)


class ExactPipeline(LatentDDPMPipeline):
    """With a Bernoulli decoder of the codes as logits, or a Gaussian one, whose p(x) has a closed form."""

    gaussian = True

    def _check_mass(self, pixels: Tensor) -> None:
        if not self.gaussian:
            super()._check_mass(pixels)

    def _log_prob_given(self, latents: Tensor, pixels: Tensor) -> Tensor:
        if not self.gaussian:
            return super()._log_prob_given(latents, pixels)
        codes = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        squared = (pixels - codes).square().flatten(1).sum(1) / NOISE**2
        return -(squared + pixels[0].numel() * math.log(2 * math.pi * NOISE**2)) / 2


def exact_pipeline(
    mixture: GaussianMixture,
    scheduler: Any = None,
    share: float = 0.7,
    std: float = 0.5,
    gain: float = 1.0,
    gaussian: bool = True,
) -> ExactPipeline:
    """A pipeline whose latents have the density ``mixture``."""
    scheduler = scheduler or VDMScheduler(log_snr="linear")
    autoencoder = LinearAutoencoder(mixture.means.shape[1], share, std, gain)
    pipe = ExactPipeline(autoencoder, Denoiser(mixture, scheduler), scheduler, NullEncoder())
    pipe.gaussian = gaussian
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rotated_gaussian(stds: list[float], seed: int = 0) -> GaussianMixture:
    """A Gaussian with these standard deviations along random axes."""
    generator = torch.Generator().manual_seed(seed)
    dims = len(stds)
    axes, _ = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))
    variances = torch.tensor(stds, dtype=torch.float64) ** 2
    return GaussianMixture([1.0], [[0.0] * dims], (axes @ variances.diag() @ axes.T)[None])
