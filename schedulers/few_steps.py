r"""Few steps for one's own model: the timesteps, and the weights of a multistep method, that suit it best.

A solver's error in few steps depends on where they lie (Sabour et al. 2024, "Align Your Steps"; Chen et al. 2024,
"GITS"). Here the end of the trajectory is compared with that of the same noise solved finely, and the squared distance
is made least over the timesteps by trust-region least squares, derivatives by differences: no gradient through the
network is needed, one iteration costs as many short solutions as there are timesteps. A multistep method's weights
enter each step linearly, so that for given timesteps the best ones follow by least squares, step by step along the fine
solution (in the spirit of Shaul et al. 2024, "Bespoke Non-Stationary Solvers").
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import least_squares
from torch import Tensor

from mechdiffusers.schedulers.scheduling_probability_flow import ProbabilityFlowScheduler

__all__ = ["optimize_steps"]

logger = logging.getLogger(__name__)

#: Of the logarithm of a step of log-SNR: large enough to rise above rounding in single precision.
_DIFFERENCE = 0.02
#: Of the fine solution: the fourth-order Runge-Kutta method in equal steps of log-SNR.
_FINE_STEPS = 50
#: Of a noisy sample (B, *) and a timestep (), what the network predicts (B, *).
Denoiser = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def optimize_steps(
    denoiser: Denoiser,
    scheduler: ProbabilityFlowScheduler,
    noise: Tensor,
    num_inference_steps: int,
    iterations: int = 5,
) -> ProbabilityFlowScheduler:
    r"""The scheduler with the best ``num_inference_steps`` timesteps for a denoiser in its configuration.

    Args:
        denoiser: Function of a noisy sample ``(B, *)`` and a timestep ``()``, with every condition fixed inside.
        scheduler: Its solver and noise schedule are kept; it ends at clean data, without churn or clipping.
        noise: Standard normal noise to solve from, shape ``(B, *)``; 16 samples of a latent model are enough.
        num_inference_steps: Number of timesteps of the grid, 2 or more.
        iterations: Largest number of trust-region steps.

    Returns:
        A scheduler that takes these steps whenever it is asked for so many.

    Raises:
        ValueError: If ``num_inference_steps`` is no integer of at least 2, or the scheduler is of another kind, churns,
            clips or does not end at clean data.

    Example:
        >>> pipe.scheduler = optimize_steps(denoiser, scheduler, noise, 8)  # doctest: +SKIP
        >>> pipe(num_inference_steps=8)  # doctest: +SKIP

    References:
        | Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (Sabour et al., 2024)
        | https://arxiv.org/abs/2404.14507
        | On the Trajectory Regularity of ODE-based Diffusion Sampling (Chen et al., 2024)
        | https://arxiv.org/abs/2405.11326
        | Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models (Shaul et al., 2024)
        | https://arxiv.org/abs/2403.01329
    """
    num = num_inference_steps
    if isinstance(num, bool) or not isinstance(num, int) or num < 2:
        raise ValueError(f"num_inference_steps must be an integer of at least 2, got {num!r}")
    config: Any = scheduler.config
    suits = isinstance(scheduler, ProbabilityFlowScheduler) and not (config.s_churn or config.clip_sample)
    if not suits or config.final_sigmas_type != "zero":
        raise ValueError(
            "scheduler must be a ProbabilityFlowScheduler with final_sigmas_type='zero' that neither churns nor clips, "
            f"got {type(scheduler).__name__} with {dict(config)}"
        )
    trial = ProbabilityFlowScheduler.from_config(config, optimized_steps=None)
    trajectory, end = _fine_solution(denoiser, trial, noise)
    first, last = trial.curve.at([len(trial) - 1, 0])

    def grid(shares: np.ndarray) -> list[float]:
        """Timesteps whose log-SNRs rise by the softmax of ``shares``, of which the last is the rest to timestep 0."""
        rises = np.exp(shares - shares.max())
        levels = first + (last - first) * np.append(0.0, np.cumsum(rises / rises.sum())[:-1])
        return trial.curve.timestep(levels).astype(np.float32).tolist()

    def error(shares: np.ndarray) -> np.ndarray:
        found, _ = _coarse_solution(denoiser, trial, noise, grid(shares), trajectory, end)
        return (found - end).flatten().cpu().double().numpy() / end.numel() ** 0.5

    def jacobian(shares: np.ndarray) -> np.ndarray:
        """By one-sided differences of a step that stands in no relation to the shares, which may be 0."""
        base, rows = error(shares), np.eye(len(shares))
        return np.stack([(error(shares + _DIFFERENCE * row) - base) / _DIFFERENCE for row in rows], axis=1)

    uniform, trailing = (_shares(trial, spacing, num) for spacing in ("log_snr", "trailing"))
    start = min((uniform, trailing, (uniform + trailing) / 2), key=lambda shares: float((error(shares) ** 2).sum()))
    solution = least_squares(error, start, jac=jacobian, max_nfev=iterations)
    best = grid(solution.x)
    _, weights = _coarse_solution(denoiser, trial, noise, best, trajectory, end)
    before, after = (float((error(shares) ** 2).sum() ** 0.5) for shares in (start, solution.x))
    logger.info("%d steps: root mean square distance to the fine solution %.4g, was %.4g", num, after, before)
    steps: dict[str, Any] = {"timesteps": best, **({"weights": weights} if weights else {})}
    return ProbabilityFlowScheduler.from_config(
        config, optimized_steps={**(config.optimized_steps or {}), str(num): steps}
    )


def _shares(scheduler: ProbabilityFlowScheduler, spacing: str, num: int) -> np.ndarray:
    """The parameters of a stock spacing's grid, moved to start at the noise's end."""
    spaced = ProbabilityFlowScheduler.from_config(scheduler.config, timestep_spacing=spacing, solver="euler")
    spaced.set_timesteps(num + 1 if spacing == "log_snr" else num)
    levels = scheduler.curve.at(spaced.timesteps.double().numpy())
    if spacing != "log_snr":
        levels = np.append(levels, scheduler.curve.at(0))
    return np.log(np.diff(levels))


def _fine_solution(
    denoiser: Denoiser, scheduler: ProbabilityFlowScheduler, noise: Tensor
) -> tuple[CubicHermiteSpline, Tensor]:
    """The trajectory of x / alpha by the log-SNR, shape (B, *), and the clean samples at its end."""
    fine = ProbabilityFlowScheduler.from_config(scheduler.config, solver="rk4", timestep_spacing="log_snr")
    fine.set_timesteps(_FINE_STEPS, device=noise.device)
    x, levels, states, slopes = noise, [], [], []
    for row, t in zip(fine._rows, fine.timesteps, strict=True):
        output = denoiser(x, t)
        if row.starts_step:
            level = float(fine.curve.at(row.timestep))
            slope = row.noise_coefficients[0] * x + row.noise_coefficients[1] * output
            levels.append(level)
            states.append((x / row.alpha).cpu().double().numpy())
            slopes.append(slope.cpu().double().numpy() * -np.exp(-level / 2) / 2)  # d varsigma / d lambda
        x = fine.step(output, t, x).prev_sample
    return CubicHermiteSpline(levels, np.stack(states), np.stack(slopes)), x


def _coarse_solution(
    denoiser: Denoiser,
    scheduler: ProbabilityFlowScheduler,
    noise: Tensor,
    timesteps: list[float],
    trajectory: CubicHermiteSpline,
    end: Tensor,
) -> tuple[Tensor, list[list[float]] | None]:
    """Clean samples by a solver at given timesteps and, for a multistep method, the best weights found along it."""
    scheduler.set_timesteps(timesteps=timesteps, device=noise.device)
    x = noise
    if scheduler.config.solver != "adams_bashforth":
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t), t, x, return_dict=False)[0]
        return x, None
    weights: list[list[float]] = []
    slopes: list[Tensor] = []
    levels = scheduler.curve.at(np.array(timesteps))
    for i, (row, t) in enumerate(zip(scheduler._rows, scheduler.timesteps, strict=True)):
        slopes = [*slopes[-3:], row.noise_coefficients[0] * x + row.noise_coefficients[1] * denoiser(x, t)]
        y = x / row.alpha
        is_last = i + 1 == len(timesteps)
        target = end if is_last else torch.from_numpy(trajectory(levels[i + 1])).to(x)
        basis = torch.stack([slope.flatten() for slope in slopes], dim=1).cpu().double()
        found = torch.linalg.lstsq(basis, (target - y).flatten().cpu().double()[:, None]).solution[:, 0]
        y = y + sum(weight * slope for weight, slope in zip(found.tolist(), slopes, strict=True))
        x = y if is_last else y * (1 + np.exp(-levels[i + 1])) ** -0.5
        weights.append(found.tolist())
    return x, weights
