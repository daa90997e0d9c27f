r"""The second stage: a denoiser of cached latents.

The loss is the mean square of the prediction's error at uniform times (Ho et al. 2020, equation 14; Luo 2022, "Three
Equivalent Interpretations"), the prediction being the noise, the latents, or the velocity
:math:`\alpha_t \epsilon - \sigma_t z_0` (Salimans & Ho 2022, section 4 and appendix D). Latents are drawn anew from
their posteriors each time they are seen.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.models import ResponseEncoder
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.pipelines.latent_likelihood import latent_size
from mechdiffusers.schedulers import stock_scheduler
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.loop import LossFunction, StepRandomness, run_stage
from torch import Tensor, nn
from torch.utils.data import TensorDataset

__all__ = ["LatentDenoiser", "denoising_loss", "train_denoiser"]

_GRID = 16


class LatentDenoiser(nn.Module):
    """A stock ``UNet2DConditionModel`` and the encoder of the tokens that it attends to.

    Args:
        config: Settings of the run.
        size: Height and width of the latents.
    """

    def __init__(self, config: TrainingConfig, size: tuple[int, int]):
        super().__init__()
        widths = config.denoiser_block_out_channels
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
        )
        self.response_encoder = ResponseEncoder(token_dim=config.token_dim)

    def forward(self, noisy: Tensor, timesteps: Tensor, response: Tensor) -> Tensor:
        """The prediction for noisy latents (B, C, h, w) at timesteps (B,) with responses (B, L, S)."""
        return self.unet(noisy, timesteps, encoder_hidden_states=self.response_encoder(response)).sample


def denoising_loss(scheduler: DDPMScheduler, shift: float, scale: float) -> LossFunction:
    """The loss of a batch of cached latents.

    Args:
        scheduler: Noise schedule and prediction type.
        shift: Mean of the latents.
        scale: Inverse of their standard deviation.

    Returns:
        Function of a :class:`LatentDenoiser`, a batch with moments of shape ``(B, 2 C, h, w)``, and randomness.
    """

    def compute_loss(
        module: nn.Module, batch: tuple[Tensor, ...], randomness: StepRandomness
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mean, logvar = batch[0].chunk(2, dim=1)
        draw = randomness.normal(*mean.shape).to(mean)
        latents = (mean + torch.exp(logvar / 2) * draw - shift) * scale
        noise = randomness.normal(*mean.shape).to(mean)
        timesteps = randomness.integers(scheduler.config.num_train_timesteps, len(mean)).to(mean.device)
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = module(noisy, timesteps, mean.new_empty(len(mean), 0, 0))
        if scheduler.config.prediction_type == "epsilon":
            target = noise
        elif scheduler.config.prediction_type == "sample":
            target = latents
        else:
            target = scheduler.get_velocity(latents, noise, timesteps)
        loss = nn.functional.mse_loss(prediction.float(), target)
        return loss, {"loss": loss}

    return compute_loss


def train_denoiser(
    accelerator: Accelerator,
    config: TrainingConfig,
    vae: AutoencoderKL,
    decoder_scale: float | None,
    moments: Tensor,
    heldout_moments: Tensor,
) -> LatentDDPMPipeline:
    """Trains the denoiser.

    Args:
        accelerator: From :func:`~mechdiffusers.training.loop.stage_accelerator`.
        config: Settings of the run.
        vae: Trained autoencoder, its shift and scale measured.
        decoder_scale: Scale of its decoder, if that has one.
        moments: Means and log-variances of the training designs, shape ``(N, 2 C, h, w)``.
        heldout_moments: The same of the held-out designs.

    Returns:
        The pipeline with averaged weights, on the CPU.
    """
    scheduler = DDPMScheduler(
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",  # starts where training ends, at pure noise (Lin et al. 2024, section 3.3)
    )
    denoiser = LatentDenoiser(config, latent_size(vae))
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compute_loss = denoising_loss(scheduler, vae.config.shift_factor, vae.config.scaling_factor)

    def pipeline(module: nn.Module) -> LatentDDPMPipeline:
        assert isinstance(module, LatentDenoiser)
        pipe = LatentDDPMPipeline(
            vae, module.unet, scheduler, module.response_encoder, config.decoder_likelihood, decoder_scale
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        device = next(module.parameters()).device
        randomness = StepRandomness((config.seed, "denoiser validation"))
        loss, _ = compute_loss(module, (heldout_moments.to(device),), randomness)
        pipe = pipeline(module).to(device)
        pipe.scheduler = stock_scheduler(config.validation_scheduler, scheduler.config)
        images = pipe(
            batch_size=_GRID,
            num_inference_steps=config.validation_inference_steps,
            generator=torch.Generator().manual_seed(config.seed),
            output_type="np",
        ).images
        save_image_grid(images[..., 0], Path(config.output_dir) / "validation" / f"denoiser-{step:08d}.png", columns=8)
        return {"loss": loss.item()}

    run_stage(accelerator, config, "denoiser", denoiser, TensorDataset(moments), compute_loss, validate)
    denoiser.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    trained = pipeline(denoiser).to("cpu")
    trained.set_progress_bar_config(disable=False)
    return trained
