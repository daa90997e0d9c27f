r"""The second stage: a denoiser of cached latents, conditioned on responses where the designs have them.

The loss is the mean square of the prediction's error at random times (Ho et al. 2020, equation 14; Luo 2022, "Three
Equivalent Interpretations"), the prediction being the noise, the latents, or the velocity
:math:`\alpha_t \epsilon - \sigma_t z_0` (Salimans & Ho 2022, section 4 and appendix D). The times of a batch are one
random number and equal steps from it, which lowers the variance of the mean (Kingma et al. 2021, appendix on the
low-discrepancy sampler). Latents are drawn anew from their posteriors each time they are seen.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from mechdiffusers.evaluation import diversity_ratio, two_point_error
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.models import response_normalisation
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.pipelines.pipeline_latent_ddpm import latent_size, record_training_schedule
from mechdiffusers.schedulers import estimate_velocity_error, stock_scheduler
from mechdiffusers.training.conditioning import mask_responses
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.data import Designs
from mechdiffusers.training.latent_bound import autoencoder_nats, latent_nats
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.loop import LossFunction, run_stage
from mechdiffusers.training.randomness import StepRandomness

__all__ = ["denoising_loss", "draw_latents", "train_denoiser"]

logger = logging.getLogger(__name__)

_GRID = 16
#: Held-out designs that the denoiser sees at once.
_VALIDATION_BATCH = 256
#: Draws of noise that the held-out loss and bound are at least the mean of.
_VALIDATION_DRAWS = 512
#: Held-out latents that the error along the curve is measured on, at 50 times.
_MEASURED = 128
#: Diversity of the samples, over the diversity of the held-out designs, below which validation warns.
_LEAST_DIVERSITY = 0.1


def denoising_loss(config: TrainingConfig, shift: float, scale: float) -> LossFunction:
    r"""The loss of a batch of cached latents with their responses.

    Args:
        config: Settings of the run.
        shift: Mean of the latents.
        scale: Inverse of their standard deviation.

    Returns:
        Function of a :class:`~mechdiffusers.training.latent_denoiser.LatentDenoiser`; a batch of moments, shape
        ``(B, V, 2 C, h, w)``, of V views of a design, and of responses ``(B, L, S)``; and randomness.
    """

    def compute_loss(
        module: nn.Module, batch: tuple[Tensor, ...], randomness: StepRandomness
    ) -> tuple[Tensor, dict[str, Tensor]]:
        moments, response = batch
        latents = draw_latents(moments, shift, scale, randomness)
        noise = randomness.normal(*latents.shape).to(latents)
        if config.noise_offset:  # noise that all pixels of a channel share (Guttenberg 2023)
            noise = noise + config.noise_offset * randomness.normal(*latents.shape[:2], 1, 1).to(latents)
        times = randomness.stratified(len(latents)).to(latents)
        if response.numel():
            response = mask_responses(response, randomness, config.response_dropout, config.response_masking)
        errors, nats, curve_loss = module(latents, noise, times, response)
        loss = errors.mean()
        return loss + curve_loss, {"loss": loss, "diffusion_nats": nats.mean()}

    return compute_loss


def draw_latents(moments: Tensor, shift: float, scale: float, randomness: StepRandomness) -> Tensor:
    """Draws from the posteriors of one view of each design.

    Args:
        moments: Means and log-variances, shape ``(B, V, 2 C, h, w)``.
        shift: Mean of the latents.
        scale: Inverse of their standard deviation.
        randomness: Of the step.

    Returns:
        Latents in the denoiser's space, shape ``(B, C, h, w)``.
    """
    num, num_views = moments.shape[:2]
    view = randomness.integers(num_views, num).to(moments.device)
    mean, logvar = moments[torch.arange(num, device=moments.device), view].chunk(2, dim=1)
    return (mean + torch.exp(logvar / 2) * randomness.normal(*mean.shape).to(mean) - shift) * scale


def train_denoiser(
    accelerator: Accelerator,
    config: TrainingConfig,
    vae: AutoencoderKL,
    designs: Designs,
    train: TensorDataset,
    heldout_moments: Tensor,
) -> LatentDDPMPipeline:
    """Trains the denoiser.

    Args:
        accelerator: From :func:`~mechdiffusers.training.accelerators.stage_accelerator`.
        config: Settings of the run.
        vae: Trained autoencoder, its shift and scale measured, and what its decoder means in its configuration.
        designs: What the latents are of.
        train: Means and log-variances of the training designs, shape ``(N, V, 2 C, h, w)``, and their responses.
        heldout_moments: Those of the held-out designs, shape ``(N, 1, 2 C, h, w)``.

    Returns:
        The pipeline with averaged weights, on the CPU, in the main process.
    """
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    heldout_response = designs.heldout_response
    known = ~heldout_response.isnan().flatten(1).all(1)
    of_autoencoder: list[float] = []  # does not change while the denoiser is trained

    def pipeline(module: nn.Module, velocity_error: list[float] | None = None) -> LatentDDPMPipeline:
        assert isinstance(module, LatentDenoiser)
        scheduler = module.scheduler(velocity_error)
        record_training_schedule(module.unet, scheduler)  # anew, as it may be learned
        return LatentDDPMPipeline(vae, module.unet, scheduler, module.response_encoder)

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, LatentDenoiser)
        device = module.unet.device
        # several draws of few designs: the bound of one draw each scatters by its own size
        draws = -(-_VALIDATION_DRAWS // len(heldout_moments))
        moments, response = (
            each.to(device).repeat(draws, *[1] * (each.ndim - 1)) for each in (heldout_moments, heldout_response)
        )
        randomness = StepRandomness((config.seed, "denoiser validation"))
        latents = draw_latents(moments, shift, scale, randomness)
        noise = randomness.normal(*latents.shape).to(latents)
        times = randomness.stratified(len(latents)).to(latents)

        def seen_with(given: Tensor) -> list[Tensor]:
            parts = zip(*(tensor.split(_VALIDATION_BATCH) for tensor in (latents, noise, times, given)), strict=True)
            return [torch.cat(values) for values in zip(*(module(*part)[:2] for part in parts), strict=True)]

        errors, nats = seen_with(response)
        metrics = {"loss": errors.double().mean().item()}
        if designs.spec is not None:
            alone, _ = seen_with(torch.full_like(response, math.nan))
            metrics["loss_without_response"] = alone.double().mean().item()
        pipe = pipeline(module).to(device)
        if not of_autoencoder:
            images = designs.heldout.to(device).float().repeat(draws, 1, 1, 1) / 255
            logvar = moments[:, 0].chunk(2, dim=1)[1]
            of_autoencoder.append(autoencoder_nats(vae, logvar, latents, images))
        metrics["elbo_nats"] = of_autoencoder[0] + latent_nats(module.process, latents, nats)
        metrics["elbo_bits_per_dim"] = -metrics["elbo_nats"] / (math.prod(designs.size) * math.log(2))

        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = stock_scheduler(config.validation_scheduler, pipe.scheduler.config)
        asked = heldout_response[known][: config.num_validation_images] if known.any() else None
        samples = pipe(
            batch_size=config.num_validation_images if asked is None else len(asked),
            response=asked,
            num_inference_steps=config.validation_inference_steps,
            generator=torch.Generator().manual_seed(config.seed),
            output_type="np",
        ).images[..., 0]
        folder = Path(config.output_dir) / "validation"
        save_image_grid(samples[:_GRID], folder / f"denoiser-{step:08d}.png", columns=8)
        heldout = designs.heldout[:, 0].numpy() / 255
        metrics["two_point_error"] = two_point_error(samples, heldout, periodic=config.crop_size is None)
        if len(samples) > 1 and (heldout != heldout[0]).any():
            metrics["diversity_ratio"] = diversity_ratio(samples, heldout)
            if metrics["diversity_ratio"] < _LEAST_DIVERSITY:
                logger.warning(
                    "the samples of step %d have %.2g of the diversity of the held-out designs: look at %s, and do not "
                    "trust two_point_error",
                    step,
                    metrics["diversity_ratio"],
                    folder,
                )
        return metrics

    responses = train.tensors[1]
    conditioning = {}
    if designs.spec is not None:
        conditioning = {"spec": designs.spec.to_dict(), **response_normalisation(responses, designs.spec.signed)}
    denoiser = LatentDenoiser(config, latent_size(vae), **conditioning)
    compute_loss = denoising_loss(config, shift, scale)
    trained = run_stage(accelerator, config, "denoiser", denoiser, train, compute_loss, validate)
    assert isinstance(trained, LatentDenoiser)
    if not accelerator.is_main_process:
        return pipeline(trained)
    randomness = StepRandomness((config.seed, "velocity error"))
    latents = draw_latents(heldout_moments[:_MEASURED], shift, scale, randomness).to(accelerator.device)
    with torch.no_grad():
        tokens = trained.to(accelerator.device).response_encoder(heldout_response[:_MEASURED].to(accelerator.device))
    velocity_error = estimate_velocity_error(
        lambda noisy, t: trained.unet(noisy, t, encoder_hidden_states=tokens).sample,
        trained.scheduler(),
        latents.contiguous(memory_format=torch.channels_last),
        generator=torch.Generator().manual_seed(config.seed),
    )
    return pipeline(trained, velocity_error).to("cpu")
