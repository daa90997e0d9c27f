r"""How likely images are: the evidence lower bound of a latent diffusion model, and its importance-weighted sharpening.

.. math:: \log p(x) \ge E_q[\log p(x \mid z)] + H[q(z \mid x)] + E_q[\log p_\theta(z)],

all in the space of the latents that the diffusion works in (Luo 2022, equations 16 and 19, where the last two are one
divergence). The first two are the autoencoder's, in ``latent_likelihood.py``; :math:`\log p_\theta(z)` is in
``latent_prior.py``. Of the importance-weighted bound each draw has the weight that is in the logarithm of Luo's
equation 16, or of 29 for the whole path of an ancestral chain.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

__all__ = ["LikelihoodOutput", "VariationalLikelihood"]

logger = logging.getLogger(__name__)

#: Numbers in the largest tensor of a batch, whichever of pixels and latents it holds.
_ENTRIES_A_BATCH = 2**17
#: Nats a latent dimension above which a value is not to be relied on.
_LARGE_ERROR = 0.01


@dataclass
class LikelihoodOutput(BaseOutput):
    """Log-likelihoods, each with its error.

    Args:
        log_likelihood (`torch.Tensor`):
            Log-probability of each image or a lower bound of it, in nats, shape ``(B,)``, float64.
        bits_per_dim (`torch.Tensor`):
            The same as a cost in bits a pixel, shape ``(B,)``.
        terms (`dict[str, torch.Tensor]`):
            What it is the sum of, by name, in nats, each of shape ``(B,)``.
        error (`torch.Tensor`):
            Estimated error in nats, shape ``(B,)``: the standard error over the draws and the flow's own error. Of one
            draw only the noise levels' or the flow's is known; NaN where there is neither.
        is_lower_bound (`bool`):
            Whether the expected value is below the log-likelihood. A flow whose error exceeds 0.01 nats a latent
            dimension may lie above.
        effective_sample_size (`torch.Tensor`, *optional*):
            Of the importance weights, between 1 and ``num_samples``, shape ``(B,)``; for ``"iwae"``.
    """

    log_likelihood: Tensor
    bits_per_dim: Tensor
    terms: dict[str, Tensor]
    error: Tensor
    is_lower_bound: bool
    effective_sample_size: Tensor | None = None


class VariationalLikelihood(DiffusionPipeline):
    """The part of a latent diffusion pipeline that says how likely images are."""

    # the flow's divergence is a gradient, which there is none of in an inference_mode around the call
    @torch.inference_mode(False)
    @torch.no_grad()
    def log_likelihood(
        self,
        images: Any,
        method: str = "elbo",
        num_samples: int = 1,
        prior: str | None = None,
        num_steps: int | None = None,
        num_probes: int = 8,
        tolerance: float | None = None,
        response: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
        return_dict: bool = True,
    ) -> LikelihoodOutput | tuple:
        r"""Log-likelihood of images under the whole model, autoencoder and diffusion, each with its error.

        Args:
            images: Images of the checkpoint's size, see the class; of 0 and 1 alone for a Bernoulli decoder.
            method (`str`, defaults to `"elbo"`):
                ``"elbo"``: evidence lower bound. ``"iwae"``: its importance-weighted sharpening (Burda et al. 2016),
                which rises with ``num_samples`` to the log-likelihood. ``"ode"``: evidence lower bound of the
                autoencoder with the probability flow as its prior.
            num_samples (`int`, defaults to 1):
                Draws from the posterior for each image.
            prior (`str`, *optional*):
                Model of the latents. For ``"elbo"`` ``"continuous"`` (default), the continuous-time process, or
                ``"ancestral"``, the scheduler's own chain of ``DDPMScheduler`` or ``VDMScheduler``. For ``"iwae"``
                ``"ancestral"`` (default), by the weights of whole paths, or ``"flow"``, with an exact trace. For both
                ``"standard_normal"``, the autoencoder's own N(0, I) instead of the diffusion. ``"ode"`` has ``"flow"``.
            num_steps (`int`, *optional*):
                ``"continuous"``: noise levels for each draw, by default 16. ``"ancestral"``: steps of the chain, by
                default all of the scheduler's. ``"flow"``: Runge-Kutta steps of four evaluations each, by default 8.
            num_probes (`int`, defaults to 8):
                Probes of the flow's divergence; as many as a latent has entries, or more, make it exact.
            tolerance (`float`, *optional*):
                Error of a step of an adaptive method for ``"flow"``, instead of ``num_steps``.
            response (`torch.Tensor` or `np.ndarray`, *optional*):
                Condition, shape ``(B, L, S)``, NaN where open: the likelihood given these responses.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of all random numbers. A list has one for each image.
            batch_size (`int`, *optional*):
                Draws in memory at once; by default as many as suit the size of the images and the number of probes.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`LikelihoodOutput`] instead of a tuple of its fields.

        Returns:
            [`LikelihoodOutput`].

        Raises:
            ValueError: If the images have another size or range, or the decoder gives them no probability, the
                autoencoder is deterministic, the scheduler or the method cannot give the prior, or an argument is out
                of range.

        Example:
            >>> output = pipe.log_likelihood(designs, method="ode")  # doctest: +SKIP
            >>> output.bits_per_dim.mean(), output.error.max()  # doctest: +SKIP

        References:
            | Importance Weighted Autoencoders (Burda et al., 2016)
            | https://arxiv.org/abs/1509.00519
        """
        self._check_scheduler()
        pixels = self._prepare_images(images)
        self._check_mass(pixels)
        dims, num_pixels = math.prod(self._latent_shape), pixels[0].numel()
        counts = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "num_steps": num_steps,
            "num_probes": num_probes,
        }
        _check_counts(counts)
        evaluate = self._prior_terms(method, prior, num_steps, num_probes, tolerance)
        seeds = _row_seeds(generator, len(pixels), num_samples)
        tokens = self._response_tokens(response, len(pixels))
        device = self._execution_device

        rows = torch.arange(len(pixels)).repeat_interleave(num_samples)
        values: dict[str, Tensor] = {}
        # the flow keeps a draw's probes, each as large as a latent, along the whole way
        kept = num_probes if (method == "ode" or prior == "flow") and num_probes < dims else 1
        size = batch_size or max(1, _ENTRIES_A_BATCH // max(dims * kept, num_pixels))
        for chunk in self.progress_bar(torch.arange(len(rows)).split(size)):
            draw = _source([torch.Generator().manual_seed(seeds[row]) for row in chunk.tolist()], device)
            images_of = rows[chunk]
            of = pixels[images_of].to(device)
            mean, std = self._posterior(of)
            noise = draw(mean.shape[1:])
            latents = mean + std * noise  # Luo 2022, equation 20
            spread = noise.square().flatten(1).sum(1) if method == "iwae" else dims  # minus log q, as drawn or its mean
            terms = {  # Luo 2022, equation 19
                "reconstruction": self._log_prob_given(latents, of),
                "entropy": std.log().flatten(1).sum(1) + (dims * math.log(2 * math.pi) + spread) / 2,
                **evaluate(self._continuous_diffusion(tokens[images_of.to(device)]), latents, draw),
            }
            # one place for all: small tensors that stay between large ones that go leave the memory in pieces
            values = values or {name: torch.empty(len(rows), dtype=torch.float64) for name in terms}
            for name, value in terms.items():
                values[name][chunk] = value.cpu()
        self.maybe_free_model_hooks()
        values = {name: value.reshape(-1, num_samples) for name, value in values.items()}
        output = _summary(values, method, dims, num_pixels)
        return output if return_dict else output.to_tuple()


def _check_counts(counts: Mapping[str, int | None]) -> None:
    for name, count in counts.items():
        if count is None and name in ("batch_size", "num_steps"):
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")


def _row_seeds(generator: torch.Generator | list[torch.Generator] | None, num: int, num_samples: int) -> list[int]:
    """A seed for each draw of each image: the first draws do not depend on how many draws or images follow."""

    def seeds(source: torch.Generator | None, count: int) -> list[int]:
        device = "cpu" if source is None else source.device
        return torch.randint(2**62, (count,), generator=source, device=device).tolist()

    if isinstance(generator, list):
        if len(generator) != num:
            raise ValueError(f"generator must be one or a list of {num}, one an image, got {len(generator)}")
        return [seed for source in generator for seed in seeds(source, num_samples)]
    images = [torch.Generator().manual_seed(seed) for seed in seeds(generator, num)]
    return [seed for source in images for seed in seeds(source, num_samples)]


def _source(generators: list[torch.Generator], device: Any) -> Callable[..., Tensor]:
    def draw(shape: tuple[int, ...] | None = None) -> Tensor:
        """Standard normal numbers of a shape for each generator; without a shape, one uniform number."""
        if shape is None:
            values = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
        else:
            values = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in generators]
        return torch.stack(values).to(device)

    return draw


def _standard_error(values: Tensor) -> Tensor:
    """Of the mean over the second axis, NaN for a single value."""
    if values.shape[1] == 1:
        return torch.full_like(values[:, 0], torch.nan)
    return values.std(1) / values.shape[1] ** 0.5


def _summary(values: dict[str, Tensor], method: str, dims: int, num_pixels: int) -> LikelihoodOutput:
    """The output for terms and errors of every draw, each (B, K)."""
    errors = {name: values.pop(name) for name in list(values) if name.startswith("_")}
    terms = {name: value.mean(1) for name, value in values.items()}
    total = torch.stack(list(values.values())).sum(0)
    num_samples = total.shape[1]
    effective = None
    if method == "iwae":
        log_weights = torch.log_softmax(total, dim=1)
        effective = torch.exp(-torch.logsumexp(2 * log_weights, dim=1))
        value = torch.logsumexp(total, dim=1) - math.log(num_samples)
        terms["importance_gain"] = value - total.mean(1)
        # the delta method: relative standard error of the mean weight
        error = ((num_samples / effective - 1) / max(num_samples - 1, 1)).clamp(min=0).sqrt()
    else:
        value = total.mean(1)
        error = _standard_error(total)
    if num_samples == 1:  # the spread over draws is unknown, and so is the error unless something else tells of it
        known = torch.zeros_like(value) if "_discretization_error" in errors else torch.full_like(value, torch.nan)
        error = errors["_level_error"][:, 0] if "_level_error" in errors else known
    converged = True
    if "_discretization_error" in errors:
        discretization = errors["_discretization_error"].mean(1)
        probe = errors["_probe_error"].square().sum(1).sqrt() / num_samples
        flow_error = (discretization.square() + probe.square()).sqrt()
        error = (error.square() + flow_error.square()).sqrt()
        converged = bool((flow_error <= _LARGE_ERROR * dims).all())
        if not converged:
            logger.warning(
                "The flow's log-density is uncertain by more than %g nats a latent dimension for %d of %d images, by "
                "%.2g at most, %.2g of it from the steps and %.2g from the probes: raise num_steps or num_probes.",
                _LARGE_ERROR,
                int((flow_error > _LARGE_ERROR * dims).sum()),
                len(value),
                flow_error.max().item() / dims,
                discretization.max().item() / dims,
                probe.max().item() / dims,
            )
    return LikelihoodOutput(
        log_likelihood=value,
        bits_per_dim=-value / (num_pixels * math.log(2)),
        terms=terms,
        error=error,
        is_lower_bound=converged,
        effective_sample_size=effective,
    )
