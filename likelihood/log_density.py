"""The log-density of latents by an integral over the log-SNR, by a chain and by a flow: the parts of priors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mechdiffusers.likelihood.latent_diffusion import ContinuousDiffusion, alpha_sigma_like, log_snr_of_angle
from mechdiffusers.likelihood.runge_kutta import solve
from mechdiffusers.schedulers.log_snr_curve import alpha_sigma, ancestral_coefficients

__all__ = ["Draw", "LogDensity", "ancestral_terms", "continuous_terms", "flow_log_density", "noise_divergence"]

Draw = Callable[..., Tensor]  #: Draws normal numbers of a shape for each row, or one uniform number, float64.


class LogDensity(NamedTuple):
    """The terms of the log-density of latents, or of a lower bound of it, and their errors; each of shape ``(B,)``."""

    terms: dict[str, Tensor]
    errors: dict[str, Tensor]


def continuous_terms(
    diffusion: ContinuousDiffusion, latents: Tensor, num_levels: int, draw: Draw
) -> tuple[dict[str, Tensor], Tensor]:
    r"""One draw of the continuous-time bound on the log-density of latents.

    .. math:: \log p_\theta(z) \ge E[\log p(z \mid z_0)] - KL(q(z_1 \mid z) \| N(0, I))
        - \tfrac12 \int E\|\epsilon - \hat\epsilon\|^2 d\lambda

    (Kingma et al. 2021, equations 11 and 17). The log-SNRs of a latent have a random offset and equal spacing (the
    low-discrepancy sampler of their appendix I.1), in two independent halves, whose distance gives the error. Their
    density is proportional to :math:`\alpha^2`. Because :math:`\epsilon - \hat\epsilon = \alpha (v - \hat v)`, the part
    of :math:`\|v\|^2` has a closed form. Only :math:`\alpha^2 (\|\hat v\|^2 - 2 v \cdot \hat v)` is drawn; without it
    the bound is that of a standard normal prior.

    Args:
        diffusion: Denoiser and noise schedule.
        latents: Shape ``(B, *)``, float64.
        num_levels: Number of log-SNRs for each.
        draw: Source of random numbers.

    Returns:
        The terms ``"last_step"``, ``"diffusion"`` and ``"noise_prior"``, and the standard error of their sum: right in
        the mean square over latents, rough for a single one, NaN for one level.

    References:
        | Variational Diffusion Models (Kingma et al., 2021)
        | https://arxiv.org/abs/2107.00630
    """
    ends = torch.tensor(diffusion.curve.ends, dtype=torch.float64, device=latents.device)
    high, low = softplus(ends)  # the integral of alpha^2 = sigmoid
    halves = []
    for num in (num_levels // 2, num_levels - num_levels // 2) if num_levels > 1 else (1,):
        offset = draw()
        drawn = torch.zeros_like(offset)
        for level in range(num):
            integral = high + (low - high) * (level + offset) / num
            log_snr = integral + torch.log(-torch.expm1(-integral))
            drawn = drawn + _drawn_velocity_error(diffusion, latents, log_snr, draw) - _mean_velocity(latents, log_snr)
        halves.append(-(high - low) / 2 * drawn / num)
    share = torch.stack(halves, dim=1)
    signal = torch.sigmoid(ends)[:, None]
    # of alpha^2 times the mean of |v|^2, by the log-SNR
    antiderivative = latents[0].numel() * (softplus(ends)[:, None] - signal) + signal * squared_norm(latents)
    error = _drawn_velocity_error(diffusion, latents, ends[:1].expand(len(latents)), draw)
    terms = {  # Kingma et al. 2021, equation 11
        "last_step": _last_step(error, latents, ends[0]),
        "diffusion": share.mean(1) - (antiderivative[0] - antiderivative[1]) / 2,  # equation 17
        "noise_prior": -noise_divergence(latents, ends[1]),
    }
    # the standard error of the mean of two
    error = (share[:, 0] - share[:, -1]).abs() / 2 if num_levels > 1 else torch.full_like(share[:, 0], torch.nan)
    return terms, error


def ancestral_terms(
    diffusion: ContinuousDiffusion,
    latents: Tensor,
    timesteps: Tensor,
    velocity_error: Tensor,
    draw: Draw,
    sampled: bool = False,
) -> dict[str, Tensor]:
    r"""One draw of the bound on the log-density of latents under an ancestral chain, or of its whole path's log-weight.

    The path :math:`z_T, \dots, z_0` is drawn from :math:`q(\cdot \mid z)`, noise first. Its log-weight is
    :math:`\log p(z \mid z_0) + \sum \log p(z_s \mid z_t) / q(z_s \mid z_t, z) + \log p(z_T) / q(z_T \mid z)`; the mean
    of its exponential is exactly :math:`p_\theta(z)`. The bound takes the mean of each ratio instead, minus a
    Kullback-Leibler divergence of Gaussians (Kingma et al. 2021, equations 11 and 12; Luo 2022, equation 58).

    Args:
        diffusion: As in :func:`continuous_terms`, like ``latents``, ``draw`` and the terms that are returned.
        latents: Shape ``(B, *)``, float64.
        timesteps: Timesteps of the chain, falling, shape ``(N,)``; the last step gives the latents.
        velocity_error: Mean square error of the velocity, per entry, in the chain's variance at each timestep, shape
            ``(N,)``: 0 for ``"fixed_small"``, 1 for ``"fixed_large"``, the scheduler's table for ``"optimal"``.
        draw: Source of random numbers.
        sampled: Whether to take the ratios as drawn instead of their means.
    """
    levels = diffusion.log_snr(timesteps.to(latents.device))
    dims = latents[0].numel()
    alpha, sigma = alpha_sigma(levels[0])
    noise = draw(latents.shape[1:])
    z = alpha * latents + sigma * noise
    if sampled:
        noise_prior = (squared_norm(noise) - squared_norm(z)) / 2 + dims * sigma.log()
    else:
        noise_prior = -noise_divergence(latents, levels[0])
    ratios = torch.zeros_like(noise_prior)
    for level_t, level_s, allowed in zip(levels, [*levels[1:], None], velocity_error.tolist(), strict=True):
        alpha_t, sigma_t = alpha_sigma(level_t)
        velocity = diffusion.velocity(z, level_t.expand(len(z)))
        noise = (z - alpha_t * latents) / sigma_t
        true_velocity = alpha_t * noise - sigma_t * latents
        if sampled:
            error = squared_norm(velocity - true_velocity)
        else:
            error = _mean_velocity_error(velocity, true_velocity, latents, level_t)
        if level_s is None:
            break
        of_noisy, of_clean, variance = ancestral_coefficients(level_t, level_s)
        model_variance = variance + (of_clean * sigma_t).square() * allowed
        draws = draw(latents.shape[1:])
        if sampled:
            # from the mean of q(z_s | z_t, z) to that of p(z_s | z_t): Kingma et al. 2021, equations 9 and 27; Luo
            # 2022, equation 94
            shift = of_clean * (alpha_t * z - sigma_t * velocity - latents)
            excess = squared_norm(variance.sqrt() * draws - shift) / model_variance - squared_norm(draws)
        else:
            # with the logarithm below, the divergence of two Gaussians: Luo 2022, equation 86; where their variances
            # are equal, equations 99 and 110 and Kingma et al. 2021, equation 13
            excess = (dims * variance + (of_clean * sigma_t).square() * error) / model_variance - dims
        ratios = ratios - (dims * torch.log(model_variance / variance) + excess) / 2
        z = of_noisy * z + of_clean * latents + variance.sqrt() * draws
    return {"last_step": _last_step(error, latents, levels[-1]), "diffusion": ratios, "noise_prior": noise_prior}


def noise_divergence(latents: Tensor, log_snr: Tensor) -> Tensor:
    r""":math:`KL(q(z_T \mid z) \| N(0, I))` of latents at a log-SNR, ``(B,)``, in nats: Luo 2022, equation 58."""
    alpha_squared, sigma_squared = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
    dims = latents[0].numel()
    return (alpha_squared * squared_norm(latents) + dims * (sigma_squared - 1 - sigma_squared.log())) / 2


def _last_step(velocity_error: Tensor, latents: Tensor, log_snr: Tensor) -> Tensor:
    r""":math:`\log p(z \mid z_0)`: the error of :math:`\hat x_0` is :math:`\sigma_0` times that of the velocity."""
    alpha_squared = torch.sigmoid(log_snr)
    return -(alpha_squared * velocity_error + latents[0].numel() * (math.log(2 * math.pi) - log_snr)) / 2


def _mean_velocity_error(velocity: Tensor, true_velocity: Tensor, latents: Tensor, log_snr: Tensor) -> Tensor:
    r""":math:`\|v - \hat v\|^2`, where :math:`\|v\|^2` is replaced by its mean: as large on average, less noisy."""
    return (velocity * (velocity - 2 * true_velocity)).flatten(1).sum(1) + _mean_velocity(latents, log_snr)


def _drawn_velocity_error(diffusion: ContinuousDiffusion, latents: Tensor, log_snr: Tensor, draw: Draw) -> Tensor:
    """The mean velocity error at log-SNRs ``(B,)``, with drawn noise."""
    alpha, sigma = alpha_sigma_like(log_snr, latents)
    noise = draw(latents.shape[1:])
    velocity = diffusion.velocity(alpha * latents + sigma * noise, log_snr)
    return _mean_velocity_error(velocity, alpha * noise - sigma * latents, latents, log_snr)


def _mean_velocity(latents: Tensor, log_snr: Tensor) -> Tensor:
    r"""Mean over the noise of :math:`\|v\|^2 = \|\alpha \epsilon - \sigma z\|^2`."""
    return torch.sigmoid(log_snr) * latents[0].numel() + torch.sigmoid(-log_snr) * squared_norm(latents)


def squared_norm(x: Tensor) -> Tensor:
    """Of the entries of each row, shape ``(B,)``."""
    return x.square().flatten(1).sum(1)


def flow_log_density(
    diffusion: ContinuousDiffusion,
    latents: Tensor,
    probes: Tensor | None,
    num_steps: int = 8,
    tolerance: float | None = None,
) -> LogDensity:
    r"""Log-density of latents under the probability flow.

    Args:
        diffusion: Denoiser and noise schedule.
        latents: Shape ``(B, *)``, of D entries each.
        probes: Vectors :math:`e` of random signs, shape ``(B, P, D)``, at least two a sample: the divergence is
            estimated by the mean of :math:`e^T (\nabla \hat v) e` (Hutchinson 1989). ``None`` for the exact trace, at
            the cost of D probes.
        num_steps: Steps in the angle, as in :func:`~mechdiffusers.likelihood.runge_kutta.solve`, but even.
        tolerance: Likewise.

    Returns:
        The terms ``"noise_log_density"``, of the noise that the latents flow to, and ``"volume_change"``, which the
        divergence and the scale :math:`z = x / \alpha` add. The errors ``"steps"``, the distance to the value of half
        the steps or of ten times the tolerance, and ``"probes"``, the standard error of the estimated divergence.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix D.2
        | https://arxiv.org/abs/2011.13456
        | FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019)
        | https://arxiv.org/abs/1810.01367
    """
    dims = latents[0].numel()
    is_exact = probes is None
    directions = torch.eye(dims, dtype=torch.float64, device=latents.device)[None] if probes is None else probes
    alpha = math.cos(diffusion.angles[0])
    x = alpha * latents.double()

    def log_density(probes: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
        """Of the noise, (B,), and the change by each probe, (B, P), or by the exact trace, (B, 1)."""

        def slope(state: Tensor, angle: Tensor) -> Tensor:
            velocity, divergence = _divergence(diffusion, state[:, :dims].reshape(x.shape), angle, probes)
            if is_exact:
                divergence = divergence.sum(1, keepdim=True)
            # the divergence per dimension: one tolerance suits it and the entries
            return torch.cat([velocity.flatten(1), divergence / dims], dim=1)

        start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1 if is_exact else probes.shape[1])], dim=1)
        steps, allowed = (num_steps // 2, tolerance and 10 * tolerance) if coarse else (num_steps, tolerance)
        end = solve(slope, start, diffusion.angles, steps, allowed)
        return -(end[:, :dims].square() + math.log(2 * math.pi)).sum(1) / 2, dims * end[:, dims:]

    noise, change = log_density(directions, coarse=False)
    # two probes are enough to see what the steps change
    coarse_noise, coarse_change = log_density(directions if is_exact else directions[:, :2], coarse=True)
    probe_error = torch.zeros_like(noise) if is_exact else change.std(1) / change.shape[1] ** 0.5
    fine = noise + change[:, : coarse_change.shape[1]].mean(1)
    terms = {"noise_log_density": noise, "volume_change": change.mean(1) + dims * math.log(alpha)}
    return LogDensity(terms, {"steps": (fine - coarse_noise - coarse_change.mean(1)).abs(), "probes": probe_error})


def _divergence(diffusion: ContinuousDiffusion, x: Tensor, angle: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity, and the quadratic form of its Jacobian with each probe, (B, P)."""
    with torch.enable_grad():
        variable = x.detach().requires_grad_()
        velocity = diffusion.velocity(variable, log_snr_of_angle(angle))
        forms = []
        for i in range(probes.shape[1]):
            probe = probes[:, i].expand(len(x), -1).reshape(x.shape)
            (product,) = torch.autograd.grad(velocity, variable, probe, retain_graph=i + 1 < probes.shape[1])
            forms.append((product * probe).flatten(1).sum(1))
    return velocity.detach(), torch.stack(forms, dim=1)
