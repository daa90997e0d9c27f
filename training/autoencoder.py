r"""The first stage: an autoencoder trained by the evidence lower bound.

The loss is :math:`-E_q[\log p(x \mid z)] + \beta\, KL(q(z \mid x) \| N(0, I))` (Kingma & Welling 2014, equation 3;
:math:`\beta` of Higgins et al. 2017, equation 4). The bound is always reported at :math:`\beta = 1`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.models.response_predictor import SYMMETRIES
from mechdiffusers.pipelines.pipeline_latent_ddpm import (
    decoder_log_prob,
    decoder_output,
    latent_size,
    most_likely_images,
    posterior_of,
)
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.data import Designs
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.randomness import StepRandomness

__all__ = ["LikelihoodAutoencoder", "encode_all", "measure_latents", "train_autoencoder"]

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 256
#: Designs (*, H, W) turned by 180 degrees. Under every load case of :mod:`mechdiffusers.mechanics` they respond as they
#: are: what moved then stands still and what stood still moves, which is the same load seen from the other side.
_half_turn = SYMMETRIES["half_turn"]


class LikelihoodAutoencoder(nn.Module):
    """A stock ``AutoencoderKL`` and the scale of its decoder's likelihood, where that has one.

    Args:
        config: Settings of the run.
        size: Height and width of the designs.
    """

    def __init__(self, config: TrainingConfig, size: tuple[int, int]):
        super().__init__()
        widths = config.autoencoder_block_out_channels
        self.vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=config.autoencoder_layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=1,  # groups of few channels would take a pixel's level away
            sample_size=size[0] if size[0] == size[1] else size,
            scaling_factor=1.0,
            shift_factor=0.0,
            mid_block_add_attention=False,
        )
        if config.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.likelihood = config.decoder_likelihood
        if self.likelihood == "discretized_logistic":
            self.log_scale = nn.Parameter(torch.full((1,), -2.0))  # of one dimension, as what is sharded has to be

    @property
    def decoder_scale(self) -> Tensor | None:
        """Scale of the discretised logistic distribution, ``None`` for a Bernoulli decoder."""
        return self.log_scale.exp() if self.likelihood == "discretized_logistic" else None

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, DiagonalGaussianDistribution]:
        r"""The two terms of the bound for images (B, 1, H, W) in [0, 1] and noise of the latents' shape.

        Returns:
            The reconstruction :math:`\log p(x \mid z)` and the KL divergence, nats, shape ``(B,)`` each, and
            the posterior, of latents (B, C, h, w).
        """
        # half precision has too few digits for a sum of hundreds of nats
        posterior = DiagonalGaussianDistribution(posterior_of(self.vae, images).parameters.float())
        decoded = decoder_output(self.vae, posterior.mean + posterior.std * noise).float()
        log_prob = decoder_log_prob(decoded, images, self.likelihood, self.decoder_scale)
        return log_prob.sum((1, 2, 3)), posterior.kl(), posterior


def train_autoencoder(accelerator: Accelerator, config: TrainingConfig, designs: Designs) -> LikelihoodAutoencoder:
    """Trains the autoencoder.

    Args:
        accelerator: From :func:`~mechdiffusers.training.accelerators.stage_accelerator`.
        config: Settings of the run.
        designs: What to train on.

    Returns:
        The autoencoder with averaged weights, on the CPU, in the main process.
    """
    autoencoder = LikelihoodAutoencoder(config, designs.size)
    latent_shape = (config.latent_channels, *latent_size(autoencoder.vae))
    num_pixels = math.prod(designs.size)

    def compute_loss(
        module: nn.Module, batch: tuple[Tensor, ...], randomness: StepRandomness
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch[0].float() / 255
        noise = randomness.normal(len(images), *latent_shape).to(images.device)
        if config.random_half_turn:
            turned = randomness.integers(2, len(images)).bool().to(images.device)
            images = torch.where(turned[:, None, None, None], _half_turn(images), images)
        reconstruction, kl, _ = module(images, noise)
        loss = (config.kl_weight * kl - reconstruction).mean() / num_pixels
        return loss, {"loss": loss, **_bound(reconstruction.mean(), kl.mean(), num_pixels)}

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, LikelihoodAutoencoder)
        heldout = designs.heldout.to(module.vae.device).float() / 255
        noise = StepRandomness((config.seed, "autoencoder validation")).normal(len(heldout), *latent_shape)
        parts = []
        for x, eps in zip(heldout.split(_VALIDATION_BATCH), noise.split(_VALIDATION_BATCH), strict=True):
            terms_of_bound = module(x, eps.to(x.device))
            posterior = terms_of_bound[2]
            parts.append(
                (*terms_of_bound[:2], posterior.mean, posterior.var, decoder_output(module.vae, posterior.mean))
            )
        reconstruction, kl, means, variances, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
        faithful = most_likely_images(decoded, module.likelihood, module.decoder_scale)
        folder = Path(config.output_dir) / "validation"
        pairs = torch.stack([heldout[:16, 0], faithful[:16, 0]], dim=1).flatten(0, 1)
        save_image_grid(pairs.cpu().numpy(), folder / f"autoencoder-{step:08d}.png", columns=8)
        bound = _bound(reconstruction.double().mean(), kl.double().mean(), num_pixels)
        return {
            "loss": ((config.kl_weight * kl - reconstruction).double().mean() / num_pixels).item(),
            **{name: value.item() for name, value in bound.items()},
            "wrong_pixels": (faithful != heldout).double().mean().item(),
            "posterior_over_latent_std": (variances.mean() / (means.var() + variances.mean())).sqrt().item(),
        }

    trained = run_stage(accelerator, config, "autoencoder", autoencoder, designs.train, compute_loss, validate)
    assert isinstance(trained, LikelihoodAutoencoder)
    return trained


def _bound(reconstruction: Tensor, kl: Tensor, num_pixels: int) -> dict[str, Tensor]:
    """The bound and its terms in nats, as they are, and in bits per pixel, as costs."""
    nats = {"reconstruction": reconstruction, "kl": kl, "elbo": reconstruction - kl}
    cost = {"reconstruction": -reconstruction, "kl": kl, "elbo": kl - reconstruction}
    return {
        **{f"{name}_nats": value for name, value in nats.items()},
        **{f"{name}_bits_per_dim": value / (num_pixels * math.log(2)) for name, value in cost.items()},
    }


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, designs: Dataset, device: torch.device, num: int, with_half_turn: bool = False
) -> tuple[Tensor, Tensor]:
    """Means and log-variances of the posteriors of all designs, and their responses.

    Args:
        vae: Trained autoencoder; left on the CPU.
        designs: Yields pairs of a uint8 image and its response.
        device: Where to encode.
        num: Number of designs to encode.
        with_half_turn: Whether to encode the half-turn of each design too.

    Returns:
        The means, then the log-variances, of each design and, if asked for, of its half-turn behind it: shape
        ``(num, 1 or 2, 2 C, h, w)``, float32. The responses, shape ``(num, L, S)``.
    """
    vae.to(device)
    moments: list[Tensor] = []
    responses: list[Tensor] = []
    left = num
    with tqdm(total=num, desc="caching latents", unit="design") as progress:
        for images, response in DataLoader(designs, batch_size=_VALIDATION_BATCH):
            pixels = images[:left].to(device).float() / 255
            posteriors = [posterior_of(vae, x) for x in ((pixels, _half_turn(pixels)) if with_half_turn else (pixels,))]
            views = [torch.cat([posterior.mean, posterior.logvar], dim=1) for posterior in posteriors]
            moments.append(torch.stack(views, dim=1).cpu())
            responses.append(response[:left])
            progress.update(len(moments[-1]))
            left -= len(moments[-1])
            if left == 0:
                break
    vae.cpu()
    return torch.cat(moments), torch.cat(responses)


def measure_latents(vae: AutoencoderKL, moments: Tensor) -> None:
    """Stores the mean and the standard deviation of the latents as the autoencoder's shift and scale.

    Latents are draws from the posteriors, so that their variance is that of the means and the mean of the variances.

    Args:
        vae: Its configuration is changed.
        moments: From :func:`encode_all`.
    """
    means, logvars = moments.double().chunk(2, dim=-3)
    variance, posterior_variance = means.var(correction=0), logvars.exp().mean()
    std = (variance + posterior_variance).sqrt().item()
    vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / std)
    logger.info(
        "latents: mean %.4g, standard deviation %.4g; the posteriors' is %.2g of it",
        means.mean().item(),
        std,
        posterior_variance.sqrt().item() / std,
    )
