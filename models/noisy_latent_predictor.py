r"""What noisy latents tell of a quantity of the design, such as its volume fraction: the classifier of guidance.

A small network gives a Gaussian :math:`p(y \mid x_t)`, its mean and its variance, at every noise level: where the noise
hides the quantity the variance says so, and the gradient that guides a sample is small (Dhariwal & Nichol 2021,
section 4, train their classifier on noisy images likewise).

This file imports torch and diffusers alone.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["NoisyLatentPredictor"]


class NoisyLatentPredictor(ModelMixin, ConfigMixin):
    r"""Predicts quantities, as independent Gaussians, from noisy latents and their timestep.

    Args:
        in_channels: C, channels of the latents.
        num_targets: K, number of quantities.
        hidden_dim: Width of the network.
        num_train_timesteps: T; timesteps are in [0, T).

    Example:
        >>> predictor = NoisyLatentPredictor(in_channels=2)
        >>> mean, log_variance = predictor(torch.zeros(5, 2, 16, 16), torch.tensor(500.0))
        >>> mean.shape
        torch.Size([5, 1])
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 2, num_targets: int = 1, hidden_dim: int = 32, num_train_timesteps: int = 1000
    ):
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(16, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 2 * hidden_dim))
        self.conv_in = nn.Conv2d(in_channels, hidden_dim, 3, padding=1)
        self.conv_down = nn.Conv2d(hidden_dim, hidden_dim, 3, stride=2, padding=1)
        self.conv_out = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1)
        self.head = nn.Linear(hidden_dim, 2 * num_targets)

    def forward(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the quantities.

        Args:
            latents: Noisy latents, shape ``(B, C, h, w)``.
            timesteps: Timesteps, shape ``(B,)`` or ``()``.

        Returns:
            Two tensors of shape ``(B, K)``.
        """
        position = timesteps.to(latents) / self.config.num_train_timesteps
        angles = math.pi * position.reshape(-1, 1) * 2.0 ** torch.arange(8, device=latents.device, dtype=latents.dtype)
        embedding = self.time_embedding(torch.cat([angles.sin(), angles.cos()], dim=1))
        scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
        hidden = nn.functional.silu(self.conv_in(latents) * (1 + scale) + shift)
        hidden = nn.functional.silu(self.conv_out(nn.functional.silu(self.conv_down(hidden))))
        mean, log_variance = self.head(hidden.mean((2, 3))).chunk(2, dim=1)
        return mean, log_variance

    def log_likelihood(self, latents: Tensor, timesteps: Tensor, target: Tensor) -> Tensor:
        """Log-likelihood of the quantities given noisy latents.

        Args:
            latents: Noisy latents, shape ``(B, C, h, w)``.
            timesteps: Timesteps, shape ``(B,)`` or ``()``.
            target: Quantities, shape ``(B, K)`` or ``(K,)``; NaN where open.

        Returns:
            Shape ``(B,)``, nats; less its mean over a batch is the loss to train by.

        Raises:
            ValueError: If ``target`` has another shape.
        """
        mean, log_variance = self(latents, timesteps)
        if target.shape not in (mean.shape, mean.shape[1:]):
            raise ValueError(
                f"target must have shape {tuple(mean.shape)} or {tuple(mean.shape[1:])}, got {tuple(target.shape)}"
            )
        given = ~target.isnan()
        error = torch.where(given, target, 0.0) - mean
        log_density = -(error**2 * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi)) / 2
        return torch.where(given, log_density, 0.0).sum(dim=1)
