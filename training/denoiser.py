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
from diffusers.training_utils import compute_snr
from mechdiffusers.evaluation import two_point_error
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.models import ResponseEncoder
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.pipelines.latent_likelihood import latent_size
from mechdiffusers.schedulers import stock_scheduler
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.data import Designs
from mechdiffusers.training.loop import LossFunction, run_stage
from mechdiffusers.training.randomness import StepRandomness
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
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.response_encoder = ResponseEncoder(token_dim=config.token_dim)

    def forward(self, noisy: Tensor, timesteps: Tensor, response: Tensor) -> Tensor:
        """The prediction for noisy latents (B, C, h, w) at timesteps (B,) with responses (B, L, S)."""
        return self.unet(noisy, timesteps, encoder_hidden_states=self.response_encoder(response)).sample


def denoising_loss(
    scheduler: DDPMScheduler, shift: float, scale: float, snr_gamma: float | None = None, noise_offset: float = 0.0
) -> LossFunction:
    r"""The loss of a batch of cached latents.

    Args:
        scheduler: Noise schedule and prediction type.
        shift: Mean of the latents.
        scale: Inverse of their standard deviation.
        snr_gamma: :math:`\gamma` of the weight :math:`\min(\mathrm{SNR}, \gamma)` of an error of :math:`z_0` (Hang et
            al. 2023, section 3.4); ``None`` for the plain mean square of what is predicted.
        noise_offset: Standard deviation of noise that all pixels of a channel share (Guttenberg 2023).

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
        if noise_offset:
            noise = noise + noise_offset * randomness.normal(*mean.shape[:2], 1, 1).to(mean)
        timesteps = randomness.integers(scheduler.config.num_train_timesteps, len(mean)).to(mean.device)
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = module(noisy, timesteps, mean.new_empty(len(mean), 0, 0))
        if scheduler.config.prediction_type == "epsilon":
            target = noise
        elif scheduler.config.prediction_type == "sample":
            target = latents
        else:
            target = scheduler.get_velocity(latents, noise, timesteps)
        errors = (prediction.float() - target).square().mean((1, 2, 3))
        if snr_gamma is not None:
            snr = compute_snr(scheduler, timesteps)
            # an error of the noise is SNR times, one of the velocity SNR + 1 times, the error of z_0 that it makes
            share = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
            errors = errors * snr.clamp(max=snr_gamma) / share[scheduler.config.prediction_type]
        loss = errors.mean()
        return loss, {"loss": loss}

    return compute_loss


def train_denoiser(
    accelerator: Accelerator,
    config: TrainingConfig,
    vae: AutoencoderKL,
    decoder_scale: float | None,
    designs: Designs,
    moments: Tensor,
    heldout_moments: Tensor,
) -> LatentDDPMPipeline:
    """Trains the denoiser.

    Args:
        accelerator: From :func:`~mechdiffusers.training.accelerators.stage_accelerator`.
        config: Settings of the run.
        vae: Trained autoencoder, its shift and scale measured.
        decoder_scale: Scale of its decoder, if that has one.
        designs: What the latents are of.
        moments: Means and log-variances of the training designs, shape ``(N, 2 C, h, w)``.
        heldout_moments: The same of the held-out designs.

    Returns:
        The pipeline with averaged weights, on the CPU, in the main process.
    """
    scheduler = DDPMScheduler(
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",  # starts where training ends, at pure noise (Lin et al. 2024, section 3.3)
    )
    compute_loss = denoising_loss(
        scheduler, vae.config.shift_factor, vae.config.scaling_factor, config.snr_gamma, config.noise_offset
    )

    def pipeline(module: nn.Module) -> LatentDDPMPipeline:
        assert isinstance(module, LatentDenoiser)
        return LatentDDPMPipeline(
            vae, module.unet, scheduler, module.response_encoder, config.decoder_likelihood, decoder_scale
        )

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        device = next(module.parameters()).device
        randomness = StepRandomness((config.seed, "denoiser validation"))
        loss, _ = compute_loss(module, (heldout_moments.to(device),), randomness)
        pipe = pipeline(module).to(device)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = stock_scheduler(config.validation_scheduler, scheduler.config)
        samples = pipe(
            batch_size=config.num_validation_images,
            num_inference_steps=config.validation_inference_steps,
            generator=torch.Generator().manual_seed(config.seed),
            output_type="np",
        ).images[..., 0]
        folder = Path(config.output_dir) / "validation"
        save_image_grid(samples[:_GRID], folder / f"denoiser-{step:08d}.png", columns=8)
        heldout = designs.heldout[:, 0].numpy() / 255
        return {"loss": loss.item(), "two_point_error": two_point_error(samples, heldout)}

    denoiser = LatentDenoiser(config, latent_size(vae))
    trained = run_stage(accelerator, config, "denoiser", denoiser, TensorDataset(moments), compute_loss, validate)
    return pipeline(trained).to("cpu")
