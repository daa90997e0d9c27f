r"""The module of the second stage: the network that is trained, and the diffusion that it is trained to reverse.

The process is :math:`z_t = \alpha_t z_0 + \sigma_t \epsilon` on a curve of log-SNR: that of a stock beta schedule, or
one learned between the ends of it (Kingma et al. 2021, section 5; Luo 2022, "Learning Diffusion Noise Parameters").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mechdiffusers.models import MonotoneNoiseSchedule, ResponseEncoder
from mechdiffusers.schedulers import VDMScheduler
from mechdiffusers.training.config import TrainingConfig

__all__ = ["LatentDenoiser"]

#: Of the loss by which the curve is learned. AdamW's steps do not depend on it, but the clipping of all gradients does.
_CURVE_WEIGHT = 1e-2


class LatentDenoiser(nn.Module):
    """A stock ``UNet2DConditionModel``, the encoder of the tokens that it attends to, and the curve of the diffusion.

    Args:
        config: Settings of the run.
        size: Height and width of the latents.
        response_encoder: Options of the :class:`~mechdiffusers.models.ResponseEncoder`: the specification of the
            responses and what they are normalised by. Without any, the model is unconditional.
    """

    def __init__(self, config: TrainingConfig, size: tuple[int, int], **response_encoder: Any):
        super().__init__()
        widths = config.denoiser_block_out_channels
        conditional = bool(response_encoder)
        self.unet = UNet2DConditionModel(
            sample_size=size[0] if size[0] == size[1] else size,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            # attention at the coarsest level alone: one level finer it takes a third of the time of a step
            down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
            block_out_channels=tuple(widths),
            layers_per_block=config.denoiser_layers_per_block,
            norm_num_groups=math.gcd(8, *widths),
            cross_attention_dim=config.token_dim,
            attention_head_dim=4,
            # a response concerns every pixel: added to the time's embedding its tokens reach all levels
            addition_embed_type="text" if conditional else None,
            addition_embed_type_num_heads=math.gcd(4, config.token_dim),
        )
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.response_encoder = ResponseEncoder(token_dim=config.token_dim, **response_encoder)
        self.weighting, self.snr_gamma = config.loss_weighting, config.snr_gamma
        #: The forward process. What is sampled with is :meth:`scheduler`.
        self.process = VDMScheduler(
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            timestep_spacing="trailing",  # starts where training ends, at pure noise (Lin et al. 2024, section 3.3)
        )
        self.noise_schedule = None
        if config.learned_noise_schedule:
            ends = self.process.curve.at([0, len(self.process) - 1])
            self.noise_schedule = MonotoneNoiseSchedule(*map(float, ends))
            self.process.curve = _LearnedCurve(self.noise_schedule, len(self.process) - 1)

    def forward(self, latents: Tensor, noise: Tensor, times: Tensor, response: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""What the noisy latents of a batch cost.

        Args:
            latents: :math:`z_0`, shape ``(B, C, h, w)``.
            noise: :math:`\epsilon`, same shape.
            times: In [0, 1], 0 at the data, shape ``(B,)``.
            response: Shape ``(B, L, S)``, NaN where unspecified.

        Returns:
            The weighted mean square error of the prediction, shape ``(B,)``; at uniform times the diffusion part of
            the negative evidence lower bound in nats, shape ``(B,)``; and the loss by which the curve is learned, 0
            where it is fixed.
        """
        last = len(self.process) - 1
        timesteps = times * last
        noisy = self.process.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        tokens = self.response_encoder(response)
        prediction = self.unet(noisy, timesteps, encoder_hidden_states=tokens).sample.float()
        kind = self.process.config.prediction_type
        if kind == "v_prediction":
            target = self.process.get_velocity(latents, noise, timesteps)
        else:
            target = noise if kind == "epsilon" else latents
        error = (prediction - target).square().flatten(1).sum(1)
        nats = self.process.loss_weights(timesteps, "elbo") * error
        weights = torch.ones_like(nats)
        if self.weighting != "prediction":
            weights = self.process.loss_weights(timesteps, self.weighting, self.snr_gamma)
        curve_loss = error.new_zeros(())
        if self.noise_schedule is not None:
            # the bound weighs the squared error of the noise by minus half the slope of the log-SNR over [0, 1]
            noise_error = -2 * nats / (last * self.process.curve.slope(timesteps)) / latents[0].numel()
            span = self.noise_schedule.config.log_snr_max - self.noise_schedule.config.log_snr_min
            curve_loss = _CURVE_WEIGHT * self.noise_schedule.variance_loss(times, noise_error) / span**2
        return (weights * error).float() / latents[0].numel(), nats.float(), curve_loss.float()

    def scheduler(self, velocity_error: list[float] | None = None) -> VDMScheduler:
        """The scheduler to sample with.

        Args:
            velocity_error: The error of the denoiser along the curve; with it the variance is the optimal one.
        """
        options: dict[str, Any] = {}
        if self.noise_schedule is not None:
            options["log_snr"] = self.noise_schedule.table()
        if velocity_error is not None:
            options |= {"variance_type": "optimal", "velocity_error": velocity_error}
        return VDMScheduler.from_config(self.process.config, **options)


class _LearnedCurve:
    """A network's log-SNR in the place of a table's; no gradient flows to it from what it is used in."""

    def __init__(self, noise_schedule: MonotoneNoiseSchedule, last: int):
        self._noise_schedule, self._last = noise_schedule, last

    def __call__(self, timesteps: Tensor) -> Tensor:
        return self._noise_schedule(timesteps / self._last).detach()

    def slope(self, timesteps: Tensor) -> Tensor:
        with torch.enable_grad():
            at = timesteps.double().requires_grad_()
            (slope,) = torch.autograd.grad(self._noise_schedule(at / self._last).sum(), at)
        return slope
