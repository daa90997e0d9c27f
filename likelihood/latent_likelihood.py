r"""How likely images are: the evidence lower bound of a latent diffusion model, and the importance-weighted bound.

.. math:: \log p(x) \ge E_q[\log p(x \mid z)] + H[q(z \mid x)] + E_q[\log p_\theta(z)]

in the space of the diffusion's latents (Luo 2022, equations 16 and 19, where the last two terms are one divergence).
The first two are the autoencoder's, the last is the prior's. The importance-weighted bound weights a draw by the ratio
in the logarithm of Luo's equation 16, or of equation 29 for the path of a chain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from mechdiffusers.likelihood.latent_diffusion import LatentDiffusion, as_float64
from mechdiffusers.likelihood.priors import ContinuousPrior, Prior
from mechdiffusers.pipelines.pipeline_latent_ddpm import (
    Generators,
    check_count,
    codes_of,
    decoder_log_prob,
    decoder_meaning,
    decoder_output,
    one_for_each,
    posterior_of,
)

__all__ = ["LatentLikelihood", "LikelihoodOutput", "log_prob_given"]

logger = logging.getLogger(__name__)

_ENTRIES_A_BATCH = 2**17  #: Numbers in the largest tensor of a batch, of pixels or of latents.
_LARGE_ERROR = 0.01  #: Nats a latent dimension above which a value is unreliable.
_LEVELS = 255


@dataclass
class LikelihoodOutput(BaseOutput):
    """Log-likelihoods, each with its error; all tensors are float64, of shape ``(B,)``.

    Args:
        log_likelihood: Log-probability of each image or a lower bound of it, in nats.
        bits_per_dim: Its negative in bits a pixel.
        terms: The terms that sum to it, by name, in nats.
        error: Estimated error in nats: the standard error over the draws, and the error of a flow. For one draw, it is
            the error of the noise levels or of the flow; NaN where there is neither.
        is_lower_bound: Whether the expected value is below the log-likelihood. A flow whose error exceeds 0.01 nats a
            latent dimension may lie above.
        effective_sample_size: Effective number of importance weights, between 1 and ``num_samples``; only of ``iwae``.
    """

    log_likelihood: Tensor
    bits_per_dim: Tensor
    terms: dict[str, Tensor]
    error: Tensor
    is_lower_bound: bool
    effective_sample_size: Tensor | None = None


class LatentLikelihood:
    """Log-likelihoods of images under a pipeline: its autoencoder, and a prior of the latents.

    Args:
        pipe: A [`LatentDDPMPipeline`]; it is not changed.
        prior: [`ContinuousPrior`] (default), [`AncestralPrior`], [`FlowPrior`] or [`StandardNormalPrior`].

    Raises:
        ValueError: If the prior is none of these.

    Example:
        >>> likelihood = LatentLikelihood(pipe, FlowPrior(num_steps=16))  # doctest: +SKIP
        >>> output = likelihood.elbo(designs)  # doctest: +SKIP
        >>> output.bits_per_dim.mean(), output.error.max()  # doctest: +SKIP

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016)
        | https://arxiv.org/abs/1509.00519
    """

    def __init__(self, pipe: Any, prior: Prior | None = None):
        self.pipe, self.prior = pipe, ContinuousPrior() if prior is None else prior
        if not isinstance(self.prior, Prior):
            raise ValueError(f"prior must be a prior such as ContinuousPrior(num_levels=16), got {prior!r}")

    def elbo(
        self,
        images: Any,
        num_samples: int = 1,
        response: Any = None,
        generator: Generators = None,
        batch_size: int | None = None,
    ) -> LikelihoodOutput:
        r"""The evidence lower bound of images.

        Args:
            images: Images of the checkpoint's size, with the pixel values that the decoder has: only 0 and 1, or
                multiples of 1/255.
            num_samples: Draws from the posterior for each image.
            response: Condition, shape ``(B, L, S)``, NaN where unspecified: the likelihood given these responses.
            generator: Source of all random numbers; a list has one for each image.
            batch_size: Draws in memory at once; by default as many as suit the size of the images and the prior.

        Raises:
            ValueError: If the images have another size or range, or the decoder gives them no probability, the
                autoencoder is deterministic, the pipeline cannot give the prior, or an argument is out of range.
        """
        return self._bound(images, num_samples, response, generator, batch_size, importance=False)

    def iwae(
        self,
        images: Any,
        num_samples: int = 64,
        response: Any = None,
        generator: Generators = None,
        batch_size: int | None = None,
    ) -> LikelihoodOutput:
        """The importance-weighted bound of images, which rises with ``num_samples`` to the log-likelihood.

        Arguments and errors are as in :meth:`elbo`. ``AncestralPrior`` takes the weights of whole paths, ``FlowPrior``
        needs the exact trace, ``ContinuousPrior`` is refused.
        """
        return self._bound(images, num_samples, response, generator, batch_size, importance=True)

    # the flow's divergence is a gradient, which an inference_mode around the call would forbid
    @torch.inference_mode(False)
    @torch.no_grad()
    def _bound(
        self,
        images: Any,
        num_samples: int,
        response: Any,
        generator: Generators,
        batch_size: int | None,
        importance: bool,
    ) -> LikelihoodOutput:
        pipe = self.pipe
        check_count("num_samples", num_samples)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        pixels = pipe.prepare_images(images)
        self._check_mass(pixels)
        self.prior.check(pipe, importance)
        diffusion = LatentDiffusion(pipe, response)
        if len(diffusion.tokens) not in (1, len(pixels)):
            raise ValueError(f"response must be one for each of {len(pixels)} samples, got {len(diffusion.tokens)}")
        seeds = _row_seeds(generator, len(pixels), num_samples)
        dims, num_pixels = math.prod(pipe.latent_shape), pixels[0].numel()

        rows = torch.arange(len(pixels)).repeat_interleave(num_samples)
        values, errors = dict[str, Tensor](), dict[str, Tensor]()
        size = batch_size or max(1, _ENTRIES_A_BATCH // max(self.prior.numbers_in_memory(dims), num_pixels))
        for chunk in pipe.progress_bar(torch.arange(len(rows)).split(size)):
            of = pixels[rows[chunk]]
            mean, std = self._posterior(of)
            draw = _source([torch.Generator().manual_seed(seeds[row]) for row in chunk.tolist()], mean.device)
            noise = draw(mean.shape[1:])
            latents = mean + std * noise  # Luo 2022, equation 20
            spread = noise.square().flatten(1).sum(1) if importance else dims  # minus log q, as drawn or its mean
            prior = self.prior.log_density(pipe, diffusion.rows(rows[chunk]), latents, draw, importance)
            terms = {  # Luo 2022, equation 19
                "reconstruction": self._log_prob_given(latents, of),
                "entropy": std.log().flatten(1).sum(1) + (dims * math.log(2 * math.pi) + spread) / 2,
                **prior.terms,
            }
            for kept, found in ((values, terms), (errors, prior.errors)):
                for name, value in found.items():
                    # one tensor for all draws: small ones between large ones would fragment the memory
                    kept.setdefault(name, torch.empty(len(rows), dtype=torch.float64))[chunk] = value.cpu()
        pipe.maybe_free_model_hooks()
        values, errors = ({name: x.reshape(-1, num_samples) for name, x in kept.items()} for kept in (values, errors))
        return _summary(values, errors, importance, dims, num_pixels)

    def _check_mass(self, pixels: Tensor) -> None:
        """Raises a ``ValueError`` unless the decoder gives a probability to pixels in [0, 1]."""
        levels = 1 if self.pipe.decoder_likelihood == "bernoulli" else _LEVELS
        # in parts: there may be more images than memory for their copies
        if any(((part * levels).round() - part * levels).abs().max() > 1e-3 for part in pixels.split(1024)):
            accepted = f"pixels of {'0 or 1' if levels == 1 else 'multiples of 1/255'}"
            reason = f"to which alone a {self.pipe.decoder_likelihood} decoder gives a probability"
            raise ValueError(f"images must have {accepted}, {reason}, got others")

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pixels, float64."""
        vae = self.pipe.vae
        posterior = posterior_of(vae, pixels.to(self.pipe._execution_device, vae.dtype))
        if posterior.deterministic or not (posterior.std > 0).all():
            raise ValueError(
                "vae must have a posterior of positive variance for a likelihood of images, got a deterministic one: "
                "without it only LatentDiffusion is possible"
            )
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        return (as_float64(posterior.mean) - shift) * scale, as_float64(posterior.std) * abs(scale)

    def _log_prob_given(self, latents: Tensor, pixels: Tensor) -> Tensor:
        return log_prob_given(self.pipe.vae, latents, pixels, self.pipe._execution_device)


def log_prob_given(vae: Any, latents: Tensor, pixels: Tensor, device: Any = None) -> Tensor:
    r"""Log-probability of images given their latents, in nats, shape ``(B,)``, float64.

    Args:
        vae: Autoencoder; its configuration has its shift, its scale and what its decoder means.
        latents: In the space of the diffusion, shape ``(B, C, h, w)``.
        pixels: In [0, 1], shape ``(B, C, H, W)``.
        device: Where the decoder runs, by default where the latents are.
    """
    decoded = as_float64(decoder_output(vae, codes_of(vae, latents).to(device, vae.dtype)))
    return decoder_log_prob(decoded, pixels.to(decoded), *decoder_meaning(vae)).flatten(1).sum(1)


def _row_seeds(generator: Generators, num: int, num_samples: int) -> list[int]:
    """A seed for each draw of each image: the first draws do not depend on how many draws or images follow."""
    each = one_for_each(torch.default_generator if generator is None else generator, num)
    drawn = (torch.randint(2**62, (num_samples,), generator=one, device=one.device) for one in each or [])
    return [seed for seeds in drawn for seed in seeds.tolist()]


def _source(generators: list[torch.Generator], device: Any) -> Callable[..., Tensor]:
    def draw(shape: tuple[int, ...] | None = None) -> Tensor:
        """Standard normal numbers of a shape for each generator; without a shape, one uniform number."""
        rand, size = (torch.rand, ()) if shape is None else (torch.randn, shape)
        return torch.stack([rand(size, generator=each, dtype=torch.float64) for each in generators]).to(device)

    return draw


def _summary(
    values: dict[str, Tensor], errors: dict[str, Tensor], importance: bool, dims: int, num_pixels: int
) -> LikelihoodOutput:
    """The output for terms and errors of every draw, each (B, K)."""
    terms = {name: value.mean(1) for name, value in values.items()}
    total = torch.stack(list(values.values())).sum(0)
    num_samples = total.shape[1]
    effective = None
    if importance:
        log_weights = torch.log_softmax(total, dim=1)
        effective = torch.exp(-torch.logsumexp(2 * log_weights, dim=1))
        value = torch.logsumexp(total, dim=1) - math.log(num_samples)
        terms["importance_gain"] = value - total.mean(1)
        # the delta method: relative standard error of the mean weight
        error = ((num_samples / effective - 1) / max(num_samples - 1, 1)).clamp(min=0).sqrt()
    else:
        value = total.mean(1)
        error = total.std(1) / num_samples**0.5 if num_samples > 1 else value
    if num_samples == 1:  # the spread over draws is unknown
        unknown = torch.zeros_like(value) if "steps" in errors else torch.full_like(value, torch.nan)
        error = errors["levels"][:, 0] if "levels" in errors else unknown
    converged = True
    if "steps" in errors:
        steps, probes = errors["steps"].mean(1), errors["probes"].square().sum(1).sqrt() / num_samples
        flow_error = (steps.square() + probes.square()).sqrt()
        error = (error.square() + flow_error.square()).sqrt()
        converged = bool((flow_error <= _LARGE_ERROR * dims).all())
        if not converged:
            logger.warning(
                "The flow's log-density is uncertain by more than %g nats a latent dimension for %d of %d images, by "
                "%.2g at most, %.2g of it from the steps and %.2g from the probes: raise num_steps or num_probes.",
                *(_LARGE_ERROR, int((flow_error > _LARGE_ERROR * dims).sum()), len(value)),
                *(largest.max().item() / dims for largest in (flow_error, steps, probes)),
            )
    return LikelihoodOutput(value, -value / (num_pixels * math.log(2)), terms, error, converged, effective)
