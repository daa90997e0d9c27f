r"""The log-density of latents under a latent diffusion, which is the prior of its autoencoder.

:math:`\log p_\theta(z)` is one of three models', which are never mixed: the continuous-time process (bounded below by
one integral over the log-SNR; Kingma et al. 2021, equation 17), the scheduler's own ancestral chain (bounded below by a
sum over its steps; Luo 2022, equation 58), or the probability flow (a value; see its own file). The first two end in a
last draw :math:`p(z \mid z_0) = N(\hat x_0(z_0), \sigma_0^2 / \alpha_0^2)`, at the noise that is
left at timestep 0.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["LatentPrior", "ancestral_terms", "continuous_terms", "noise_divergence"]

#: The priors each method of a likelihood can take, its own first.
_PRIORS = {
    "elbo": ("continuous", "ancestral", "standard_normal"),
    "iwae": ("ancestral", "flow", "standard_normal"),
    "ode": ("flow",),
}
_NUM_STEPS = {"continuous": 16, "flow": 8}
_FIXED = ("fixed_small", "fixed_small_log", "fixed_large")
#: The variances of each scheduler with an ancestral chain; another may have the option too, left over from these.
_VARIANCE_TYPES = {"DDPMScheduler": _FIXED, "VDMScheduler": (*_FIXED, "optimal")}

#: Draws standard normal numbers, or uniform ones, of a shape for each row, float64.
Draw = Callable[..., Tensor]


def continuous_terms(diffusion: Any, latents: Tensor, num_levels: int, draw: Draw) -> tuple[dict[str, Tensor], Tensor]:
    r"""One draw of the continuous-time bound on the log-density of latents.

    .. math:: \log p_\theta(z) \ge E[\log p(z \mid z_0)] - KL(q(z_1 \mid z) \| N(0, I))
        - \tfrac12 \int E\|\epsilon - \hat\epsilon\|^2 d\lambda

    (Kingma et al. 2021, equations 11 and 17). The draws of a latent are equally spaced behind a random offset (the
    low-discrepancy sampler of their appendix I.1), in two independent halves, whose distance tells the error. As
    :math:`\epsilon - \hat\epsilon = \alpha (v - \hat v)`, the part of :math:`\|v\|^2` is integrated in closed form, and
    only :math:`\alpha^2 (\|\hat v\|^2 - 2 v \cdot \hat v)`, which the network has a say in, is drawn: without it the
    bound is that of a standard normal prior. The log-SNRs have a density proportional to :math:`\alpha^2`.

    Args:
        diffusion: Denoiser and noise schedule.
        latents: Shape ``(B, *)``, float64.
        num_levels: Number of log-SNRs for each; the halves are as equal as can be.
        draw: Source of random numbers.

    Returns:
        The terms ``"last_step"``, ``"diffusion"`` and ``"noise_prior"``, and the standard error of their sum: right in
        the mean square over latents, rough for a single one, NaN for one level.

    References:
        | Variational Diffusion Models (Kingma et al., 2021)
        | https://arxiv.org/abs/2107.00630
    """
    ends = torch.tensor(diffusion.ends, dtype=torch.float64, device=latents.device)
    high, low = softplus(ends)  # alpha^2 = sigmoid, whose integral this is
    halves = []
    for num in (num_levels // 2, num_levels - num_levels // 2) if num_levels > 1 else (1,):
        offset = draw()
        drawn = torch.zeros_like(offset)
        for level in range(num):
            integral = high + (low - high) * (level + offset) / num
            log_snr = integral + torch.log(-torch.expm1(-integral))
            alpha, sigma = diffusion.alpha_sigma(log_snr, latents)
            noise = draw(latents.shape[1:])
            velocity = diffusion.velocity(alpha * latents + sigma * noise, log_snr)
            error = _mean_velocity_error(velocity, alpha * noise - sigma * latents, latents, log_snr)
            drawn = drawn + error - _mean_velocity(latents, log_snr)
        halves.append(-(high - low) / 2 * drawn / num)
    share = torch.stack(halves, dim=1)
    signal = torch.sigmoid(ends)[:, None]
    # of alpha^2 times the mean of |v|^2, by the log-SNR
    antiderivative = latents[0].numel() * (softplus(ends)[:, None] - signal) + signal * _squared_norm(latents)
    first = ends[:1].expand(len(latents))
    alpha, sigma = diffusion.alpha_sigma(first, latents)
    noise = draw(latents.shape[1:])
    velocity = diffusion.velocity(alpha * latents + sigma * noise, first)
    error = _mean_velocity_error(velocity, alpha * noise - sigma * latents, latents, first)
    terms = {  # Kingma et al. 2021, equation 11
        "last_step": _last_step(error, latents, ends[0]),
        "diffusion": share.mean(1) - (antiderivative[0] - antiderivative[1]) / 2,  # equation 17
        "noise_prior": -noise_divergence(latents, ends[1]),
    }
    # the standard error of the mean of two
    error = (share[:, 0] - share[:, -1]).abs() / 2 if num_levels > 1 else torch.full_like(share[:, 0], torch.nan)
    return terms, error


def ancestral_terms(
    diffusion: Any, latents: Tensor, timesteps: Tensor, velocity_error: Tensor, draw: Draw, sampled: bool = False
) -> dict[str, Tensor]:
    r"""One draw of the bound on the log-density of latents under an ancestral chain, or of its whole path's log-weight.

    The path :math:`z_T, \dots, z_0` is drawn from :math:`q(\cdot \mid z)`, noise first. Its log-weight is
    :math:`\log p(z \mid z_0) + \sum \log p(z_s \mid z_t) / q(z_s \mid z_t, z) + \log p(z_T) / q(z_T \mid z)`, whose
    exponential has the mean :math:`p_\theta(z)` exactly. In the bound each ratio's mean, minus a Kullback-Leibler
    divergence of Gaussians, takes its place (Kingma et al. 2021, equations 11 and 12; Luo 2022, equation 58).

    Args:
        diffusion: Denoiser and noise schedule.
        latents: Shape ``(B, *)``, float64.
        timesteps: The chain's, falling; behind the last the latents are drawn.
        velocity_error: Mean square error of the velocity, an entry, that the chain's variance allows for at each of
            them, shape ``(N,)``: 0 is ``DDPMScheduler``'s ``"fixed_small"``, 1 its ``"fixed_large"``, and what
            ``VDMScheduler`` holds is ``"optimal"``.
        draw: Source of random numbers.
        sampled: Whether to take the ratios as drawn instead of their means.

    Returns:
        The terms ``"last_step"``, ``"diffusion"`` and ``"noise_prior"``.
    """
    levels = diffusion.log_snr(timesteps.to(latents.device))
    dims = latents[0].numel()
    alpha, sigma = diffusion.alpha_sigma(levels[:1], latents)
    noise = draw(latents.shape[1:])
    z = alpha * latents + sigma * noise
    if sampled:
        noise_prior = (_squared_norm(noise) - _squared_norm(z)) / 2 + dims * sigma.log().flatten()
    else:
        noise_prior = -noise_divergence(latents, levels[0])
    ratios = torch.zeros_like(noise_prior)
    for level_t, level_s, allowed in zip(levels, [*levels[1:], None], velocity_error.tolist(), strict=True):
        alpha_t, sigma_t = diffusion.alpha_sigma(level_t[None], latents)
        velocity = diffusion.velocity(z, level_t.expand(len(z)))
        noise = (z - alpha_t * latents) / sigma_t
        true_velocity = alpha_t * noise - sigma_t * latents
        if sampled:
            error = _squared_norm(velocity - true_velocity)
        else:
            error = _mean_velocity_error(velocity, true_velocity, latents, level_t)
        if level_s is None:
            break
        alpha_s, sigma_s = diffusion.alpha_sigma(level_s[None], latents)
        # q(z_s | z_t, z): Kingma et al. 2021, equations 23 to 25; Luo 2022, equation 84
        c = -torch.expm1(level_t - level_s)
        pull = alpha_s * c
        variance = sigma_s.square().squeeze() * c  # Kingma et al. 2021, equation 32
        model_variance = variance + (pull * sigma_t).square().squeeze() * allowed
        draws = draw(latents.shape[1:])
        if sampled:
            # from the mean of q(z_s | z_t, z) to that of p(z_s | z_t): Kingma et al. 2021, equations 9 and 27; Luo
            # 2022, equation 94
            shift = pull * (alpha_t * z - sigma_t * velocity - latents)
            excess = _squared_norm(variance.sqrt() * draws - shift) / model_variance - _squared_norm(draws)
        else:
            # with the logarithm below, the divergence of two Gaussians: Luo 2022, equation 86; where their variances
            # are equal, equations 99 and 110 and Kingma et al. 2021, equation 13
            excess = (dims * variance + (pull * sigma_t).square().squeeze() * error) / model_variance - dims
        ratios = ratios - (dims * torch.log(model_variance / variance) + excess) / 2
        z = alpha_s / alpha_t * (1 - c) * z + pull * latents + variance.sqrt() * draws
    return {"last_step": _last_step(error, latents, levels[-1]), "diffusion": ratios, "noise_prior": noise_prior}


def noise_divergence(latents: Tensor, log_snr: Tensor) -> Tensor:
    r""":math:`KL(q(z_T \mid z) \| N(0, I))` of latents ``(B, *)`` at the last log-SNR, shape ``(B,)``, in nats.

    The prior matching term of Luo 2022, equation 58.
    """
    alpha_squared, sigma_squared = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
    dims = latents[0].numel()
    return (alpha_squared * _squared_norm(latents) + dims * (sigma_squared - 1 - sigma_squared.log())) / 2


def _last_step(velocity_error: Tensor, latents: Tensor, log_snr: Tensor) -> Tensor:
    r""":math:`\log p(z \mid z_0)`: the error of :math:`\hat x_0` is :math:`\sigma_0` times that of the velocity."""
    alpha_squared = torch.sigmoid(log_snr)
    return -(alpha_squared * velocity_error + latents[0].numel() * (math.log(2 * math.pi) - log_snr)) / 2


def _mean_velocity_error(velocity: Tensor, true_velocity: Tensor, latents: Tensor, log_snr: Tensor) -> Tensor:
    r""":math:`\|v - \hat v\|^2`, where :math:`\|v\|^2` is replaced by its mean: as large on average, less noisy."""
    return (velocity * (velocity - 2 * true_velocity)).flatten(1).sum(1) + _mean_velocity(latents, log_snr)


def _mean_velocity(latents: Tensor, log_snr: Tensor) -> Tensor:
    r"""Mean over the noise of :math:`\|v\|^2 = \|\alpha \epsilon - \sigma z\|^2`."""
    return torch.sigmoid(log_snr) * latents[0].numel() + torch.sigmoid(-log_snr) * _squared_norm(latents)


def _squared_norm(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


class LatentPrior(DiffusionPipeline):
    """The part of a latent diffusion pipeline that says how likely latents are."""

    def _prior_terms(
        self, method: str, prior: str | None, num_steps: int | None, num_probes: int, tolerance: float | None
    ) -> Callable[[Any, Tensor, Draw], dict[str, Tensor]]:
        """What gives the terms of the latents' log-density; those that begin with an underscore are errors."""
        prior = _checked_prior(method, prior)
        steps = num_steps or _NUM_STEPS.get(prior, 0)
        dims = math.prod(self._latent_shape)
        if tolerance is not None and prior != "flow":
            raise ValueError(
                f"tolerance must be None for the {prior!r} prior, which solves no equation, got {tolerance!r}"
            )
        if prior == "standard_normal":
            if num_steps is not None:
                raise ValueError(f"num_steps must be None for the 'standard_normal' prior, got {num_steps!r}")
            scale = self.vae.config.scaling_factor

            def standard_normal(diffusion: Any, latents: Tensor, draw: Draw) -> dict[str, Tensor]:
                codes = latents / scale + self._shift
                constant = math.log(2 * math.pi) + 2 * math.log(abs(scale))
                return {"prior": -(_squared_norm(codes) + dims * constant) / 2}

            return standard_normal
        if prior == "continuous":

            def continuous(diffusion: Any, latents: Tensor, draw: Draw) -> dict[str, Tensor]:
                terms, error = continuous_terms(diffusion, latents, steps, draw)
                return {**terms, "_level_error": error}

            return continuous
        if prior == "ancestral":
            timesteps, velocity_error = self._chain(num_steps)
            sampled = method == "iwae"
            return lambda diffusion, latents, draw: ancestral_terms(
                diffusion, latents, timesteps, velocity_error, draw, sampled
            )
        self._check_solver(steps, tolerance)
        is_exact = num_probes >= dims
        if num_probes < 2 and not is_exact:
            raise ValueError(f"num_probes must be an integer of at least 2, got {num_probes!r}")
        if method == "iwae" and not is_exact:
            raise ValueError(
                f"num_probes must be at least the {dims} entries of a latent for 'iwae' with the 'flow' prior, since "
                f"an estimated trace would lift it above the log-likelihood, got {num_probes}; or take "
                "prior='ancestral'"
            )

        def flow(diffusion: Any, latents: Tensor, draw: Draw) -> dict[str, Tensor]:
            probes = None if is_exact else draw((num_probes, dims)).sign()
            value = self._flow_log_density(diffusion, latents, probes, steps, tolerance)
            return {
                "noise_log_density": value.noise_log_density,
                "volume_change": value.volume_change,
                "_discretization_error": value.discretization_error,
                "_probe_error": value.probe_error,
            }

        return flow

    def _chain(self, num_steps: int | None) -> tuple[Tensor, Tensor]:
        """The timesteps of the scheduler's ancestral chain, and the error of the velocity that it allows for there."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        variance_type = config.get("variance_type")
        if variance_type not in _VARIANCE_TYPES.get(name, ()):
            raise ValueError(
                "scheduler must have an ancestral chain for the 'ancestral' prior, as VDMScheduler has, and "
                f"DDPMScheduler with a variance_type of {_FIXED}, got {name} with {variance_type!r}; possible are "
                "method='elbo' with prior='continuous' and method='ode'"
            )
        last = len(self.scheduler.alphas_cumprod) - 1
        if num_steps is None:
            timesteps = torch.arange(last, -1, -1)
        else:
            self.scheduler.set_timesteps(num_steps)
            timesteps = self.scheduler.timesteps.cpu()
        # the fixed variances are the optimal ones of a latent that is known, and of a standard normal one
        table = config.velocity_error if variance_type == "optimal" else [float(variance_type == "fixed_large")] * 2
        errors = np.interp(timesteps.numpy(), np.linspace(0, last, len(table)), table)
        return timesteps, torch.from_numpy(errors)


def _checked_prior(method: str, prior: str | None) -> str:
    if method not in _PRIORS:
        raise ValueError(f"method must be one of {tuple(_PRIORS)}, got {method!r}")
    if prior is None:
        return _PRIORS[method][0]
    if prior not in _PRIORS[method]:
        possible = [name for name, priors in _PRIORS.items() if prior in priors]
        raise ValueError(
            f"prior must be one of {_PRIORS[method]} for method {method!r}, got {prior!r}, which is for {possible}"
        )
    return prior
