r"""The log-density of latents under a latent diffusion, which is the prior of its autoencoder.

Three models of :math:`\log p_\theta(z)` are never mixed: the continuous-time process has a lower bound, one integral
over the log-SNR (Kingma et al. 2021, equation 17); the scheduler's ancestral chain has one, a sum over its steps (Luo
2022, equation 58); the probability flow has a value. The first two end in a last draw
:math:`p(z \mid z_0) = N(\hat x_0(z_0), \sigma_0^2 / \alpha_0^2)`, at the noise that is left at timestep 0. A fourth
model, the standard normal, is what the autoencoder has without a diffusion.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.likelihood.latent_diffusion import ContinuousDiffusion
from mechdiffusers.likelihood.log_density import (
    Draw,
    LogDensity,
    ancestral_terms,
    continuous_terms,
    flow_log_density,
    squared_norm,
)
from mechdiffusers.likelihood.runge_kutta import check_solver
from mechdiffusers.pipelines.pipeline_latent_ddpm import check_count, codes_of

__all__ = ["AncestralPrior", "ContinuousPrior", "FlowPrior", "Prior", "StandardNormalPrior"]

_FIXED = ("fixed_small", "fixed_small_log", "fixed_large")
#: The variances of each scheduler with an ancestral chain; another may have the option too, left over from these.
_VARIANCE_TYPES = {"DDPMScheduler": _FIXED, "VDMScheduler": (*_FIXED, "optimal")}


class Prior:
    """A model of the latents; its options say how its log-density is computed."""

    def check(self, pipe: Any, importance: bool) -> None:
        """Raises a ``ValueError`` if it does not suit a pipeline, or an importance-weighted bound."""

    def numbers_in_memory(self, dims: int) -> int:
        """How many numbers a draw for a latent of ``dims`` entries keeps."""
        return dims

    def log_density(
        self, pipe: Any, diffusion: ContinuousDiffusion, latents: Tensor, draw: Draw, importance: bool
    ) -> LogDensity:
        """Terms of one draw for latents ``(B, C, h, w)``, and their errors; with ``importance``, of its log-weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class ContinuousPrior(Prior):
    """The continuous-time process, by its lower bound: an integral over ``num_levels`` noise levels for each draw.

    Raises a ``ValueError`` if ``num_levels`` is no integer of at least 1.
    """

    num_levels: int = 16

    def __post_init__(self) -> None:
        check_count("num_levels", self.num_levels)

    def check(self, pipe: Any, importance: bool) -> None:
        """Refuses an importance-weighted bound: the drawn integral would bias its weights."""
        if importance:
            accepted = "AncestralPrior, FlowPrior or StandardNormalPrior for iwae"
            got = "ContinuousPrior, whose estimate would lift it above the log-likelihood"
            raise ValueError(f"prior must be {accepted}, got {got}")

    def log_density(  # noqa: D102
        self, pipe: Any, diffusion: ContinuousDiffusion, latents: Tensor, draw: Draw, importance: bool
    ) -> LogDensity:
        terms, error = continuous_terms(diffusion, latents, self.num_levels, draw)
        return LogDensity(terms, {"levels": error})


@dataclass(frozen=True)
class AncestralPrior(Prior):
    """The ancestral chain of ``DDPMScheduler`` or ``VDMScheduler``, by its lower bound or by weights of whole paths.

    It has ``num_steps`` steps, by default all of the scheduler's. Raises a ``ValueError`` if they are below 1.
    """

    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps)

    def check(self, pipe: Any, importance: bool) -> None:
        """Refuses a scheduler without an ancestral chain, and more steps than its timesteps."""
        self._chain(pipe.scheduler)

    def log_density(  # noqa: D102
        self, pipe: Any, diffusion: ContinuousDiffusion, latents: Tensor, draw: Draw, importance: bool
    ) -> LogDensity:
        return LogDensity(ancestral_terms(diffusion, latents, *self._chain(pipe.scheduler), draw, importance), {})

    def _chain(self, scheduler: Any) -> tuple[Tensor, Tensor]:
        """The timesteps of the scheduler's ancestral chain, and the velocity error in its variance at each."""
        kinds, config = [cls.__name__ for cls in type(scheduler).__mro__], scheduler.config
        variance_type = config.get("variance_type")
        if variance_type not in next((_VARIANCE_TYPES[kind] for kind in kinds if kind in _VARIANCE_TYPES), ()):
            suited = f"as VDMScheduler has, and DDPMScheduler with a variance_type of {_FIXED}"
            got = f"{kinds[0]} with {variance_type!r}; ContinuousPrior and FlowPrior need none"
            raise ValueError(f"scheduler must have an ancestral chain for AncestralPrior, {suited}, got {got}")
        last = len(scheduler.alphas_cumprod) - 1
        if self.num_steps is None:
            timesteps = torch.arange(last, -1, -1)
        else:
            scheduler = copy.deepcopy(scheduler)  # whose steps may be in use
            try:
                scheduler.set_timesteps(self.num_steps)
            except ValueError as error:
                raise ValueError(
                    f"num_steps must be one that the scheduler takes, got {self.num_steps}: {error}"
                ) from error
            timesteps = scheduler.timesteps.cpu()
        # the fixed variances are optimal for a known latent, 0, and for a standard normal one, 1
        table = config.velocity_error if variance_type == "optimal" else [float(variance_type == "fixed_large")] * 2
        errors = np.interp(timesteps.numpy(), np.linspace(0, last, len(table)), table)
        return timesteps, torch.from_numpy(errors)


@dataclass(frozen=True)
class FlowPrior(Prior):
    """The probability flow, by a value with an error.

    Args:
        num_steps: As in :func:`~mechdiffusers.likelihood.runge_kutta.solve`, like ``tolerance``.
        num_probes: Probes of the flow's divergence, at least 2; as many as a latent has entries make it exact.
        tolerance: Error of a step of the adaptive method, instead of ``num_steps``.

    Raises a ``ValueError`` if one of them is out of range.
    """

    num_steps: int = 8
    num_probes: int = 8
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_solver(self.num_steps, self.tolerance)
        check_count("num_probes", self.num_probes)

    def check(self, pipe: Any, importance: bool) -> None:
        """Refuses a single probe, and an estimated trace for an importance-weighted bound."""
        dims = math.prod(pipe.latent_shape)
        if self.num_probes < 2 and self.num_probes < dims:
            raise ValueError(f"num_probes must be an integer of at least 2, got {self.num_probes!r}")
        if importance and self.num_probes < dims:
            accepted = f"at least the {dims} entries of a latent for iwae with FlowPrior"
            reason = "since an estimated trace would lift it above the log-likelihood"
            raise ValueError(f"num_probes must be {accepted}, {reason}, got {self.num_probes}; or take AncestralPrior")

    def numbers_in_memory(self, dims: int) -> int:
        """The flow keeps all probes of a draw, each as large as a latent."""
        return dims * self.num_probes if self.num_probes < dims else dims

    def log_density(  # noqa: D102
        self, pipe: Any, diffusion: ContinuousDiffusion, latents: Tensor, draw: Draw, importance: bool
    ) -> LogDensity:
        dims = latents[0].numel()
        probes = None if self.num_probes >= dims else draw((self.num_probes, dims)).sign()
        return flow_log_density(diffusion, latents, probes, self.num_steps, self.tolerance)


@dataclass(frozen=True)
class StandardNormalPrior(Prior):
    """The autoencoder's own N(0, I) of its codes, instead of the diffusion."""

    def log_density(  # noqa: D102
        self, pipe: Any, diffusion: ContinuousDiffusion, latents: Tensor, draw: Draw, importance: bool
    ) -> LogDensity:
        constant = math.log(2 * math.pi) + 2 * math.log(abs(pipe.vae.config.scaling_factor))
        norms = squared_norm(codes_of(pipe.vae, latents))
        return LogDensity({"prior": -(norms + latents[0].numel() * constant) / 2}, {})
