r"""The probability-flow ordinary differential equation by explicit Runge-Kutta and Adams methods, both ways.

With :math:`y = x / \alpha` and :math:`\varsigma = \sigma / \alpha` the equation whose solutions have the diffusion's
densities reads

.. math:: \frac{dy}{d\varsigma} = \hat\epsilon(\alpha y), \qquad
    \frac{d \log p(y)}{d\varsigma} = -\nabla_y \cdot \hat\epsilon

(Song et al. 2021, section 4.3, in the variables of Karras et al. 2022, section 3; Luo 2022, "Score-based Generative
Models"). An Euler step of it is a step of DDIM without clipping, to the next timestep and at last to clean data
(``set_alpha_to_one``). A Runge-Kutta method is data, a ``Tableau``; a new one costs three
lines. The Adams-Bashforth method integrates the polynomial in :math:`\lambda = -2 \log \varsigma` through the slopes of
the last steps instead (Zhang & Chen 2023, on polynomial extrapolation), one evaluation a step.

This file travels inside checkpoints: it imports torch, numpy, diffusers and its siblings alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin  # by this name in this file pipelines know that it can be loaded
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .log_snr_curve import LogSnrCurve, alpha_sigma, prediction_coefficients
from .probability_flow_tableaux import TABLEAUX, Tableau, adams_weights, noise_level
from .variance_preserving_scheduler import StepOutput, VariancePreservingScheduler, at_least_single, noise_like

__all__ = ["ProbabilityFlowScheduler", "ProbabilityFlowSchedulerOutput"]

_ADAMS = "adams_bashforth"
_ADAMS_ORDER = 4


@dataclass
class ProbabilityFlowSchedulerOutput(StepOutput):
    """Output of a step; inside a step ``prev_sample`` is its next stage.

    Args:
        prev_sample, pred_original_sample:
            As in the other schedulers.
        log_density_change (`torch.Tensor`, *optional*):
            Log-density of the last whole step's sample less that of the first, shape ``(B,)``, float64, in nats; if
            divergences were given.
    """

    log_density_change: Tensor | None = None


class _Evaluation(NamedTuple):
    """What a step needs to know of one evaluation of the network, in plain numbers."""

    timestep: float
    starts_step: bool
    memory: int  # number of the slopes just before it that it builds on
    x0_coefficients: tuple[float, float]  # coefficients of the sample and of the network's output
    noise_coefficients: tuple[float, float]
    alpha: float
    sigma: float
    keep: float  # the sample at the start of the step enters what comes next by this
    weights: tuple[float, ...]  # and the slopes, this one last, by these
    churn: float  # standard deviation of the noise added to what comes next
    divergence_weights: tuple[float, ...] | None  # of the change of log-density over the step that ends here
    log_alpha_change: float  # over that step; NaN where it ends at clean data


class ProbabilityFlowScheduler(VariancePreservingScheduler, SchedulerMixin):
    r"""Solves the probability-flow equation from noise to data, or from data to noise.

    As in the stock Heun scheduler, ``timesteps`` has an entry for each evaluation of the network. The grid is that of
    ``timestep_spacing`` unless the configuration or the caller gives one: ``"log_snr"`` suits ``"adams_bashforth"``
    best, and ``"rk4"`` from about 30 evaluations on. Defaults are those of ``DDPMScheduler``, except that
    nothing is clipped unless ``clip_sample`` is set.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, log_snr,
        log_snr_range, prediction_type, timestep_spacing, steps_offset, clip_sample, clip_sample_range:
            As in :class:`~mechdiffusers.schedulers.VDMScheduler`.
        solver (`str`, defaults to `"heun"`):
            ``"euler"``, ``"heun"`` or ``"rk4"``, of order 1, 2 and 4, with as many evaluations a step, or
            ``"adams_bashforth"``, with one: of order 4 where the flow is almost straight over the first three steps,
            which have fewer slopes, as it is from a log-SNR of about -10 on; of order 2 otherwise.
        final_sigmas_type (`str`, defaults to `"zero"`):
            ``"zero"``: an Euler step from the last timestep to clean data ends the trajectory, as in stock schedulers.
            ``"sigma_min"``: it ends at timestep 0, whose noise is left in, so that the trajectory can be gone back.
        s_churn (`float`, defaults to 0.0):
            Stochastic churn: noise is added before each step but the first, to
            :math:`1 + \min(\text{s\_churn} / N, \sqrt 2 - 1)` times the noise level: that of Karras et al. without
            bounds to where (S_tmin, S_tmax) and with S_noise = 1. For Runge-Kutta methods alone.
        optimized_steps (`dict[str, dict]`, *optional*):
            Number of timesteps, as a string, to what :func:`mechdiffusers.schedulers.optimize_steps` found for it:
            ``"timesteps"``, which replace ``timestep_spacing`` at that number on the way to clean data, and for
            ``"adams_bashforth"`` ``"weights"``, which replace the method's own.

    Raises:
        ValueError: If an argument is none of those.

    Example:
        >>> scheduler = ProbabilityFlowScheduler(solver="heun", timestep_spacing="trailing")
        >>> scheduler.set_timesteps(3)
        >>> scheduler.timesteps.tolist()
        [999.0, 666.0, 666.0, 332.0, 332.0]

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), algorithms 1 and 2
        | https://arxiv.org/abs/2206.00364
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023)
        | https://arxiv.org/abs/2204.13902
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        log_snr: str | Sequence[float] = "betas",
        log_snr_range: tuple[float, float] = (13.3, -5.0),
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        solver: str = "heun",
        final_sigmas_type: str = "zero",
        s_churn: float = 0.0,
        optimized_steps: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self._start_on(LogSnrCurve.of_config(self.config))
        if solver not in (*TABLEAUX, _ADAMS):
            raise ValueError(f"solver must be one of {(*TABLEAUX, _ADAMS)}, got {solver!r}")
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type must be one of ('zero', 'sigma_min'), got {final_sigmas_type!r}")
        if not 0 <= s_churn < math.inf:
            raise ValueError(f"s_churn must be a non-negative number, got {s_churn!r}")
        if s_churn > 0 and solver == _ADAMS:
            raise ValueError(
                f"s_churn must be 0 with solver={_ADAMS!r}, which needs the slopes of one trajectory, got {s_churn!r}"
            )
        self.order = 1 if solver == _ADAMS else len(TABLEAUX[solver].stages)  # evaluations a step, as in stock
        for number, steps in (optimized_steps or {}).items():
            grid, weights = self._make_grid(None, steps.get("timesteps")), steps.get("weights")
            lengths = [min(step + 1, _ADAMS_ORDER) for step in range(len(grid))]
            fits = weights is None or (solver == _ADAMS and [len(row) for row in weights] == lengths)
            if number != str(len(grid)) or not fits:
                raise ValueError(
                    f"optimized_steps must have {number} timesteps under {number!r} and, for {_ADAMS!r} alone, as many "
                    f"rows of 1, 2, 3, 4, 4, ... weights, or be None, got {steps!r}"
                )
        self._inverse = False
        self._weights: Sequence[Sequence[float]] | None = None
        self._slopes: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._log_density_change: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        inverse: bool = False,
    ) -> None:
        """Lays the grid of timesteps.

        Args:
            num_inference_steps: Number of timesteps of the grid; each method evaluates the network once a stage.
            device: Device of ``self.timesteps``.
            timesteps: The grid itself, falling, in [0, T), instead of its number.
            inverse: Whether to go from data, taken to be at timestep 0, to the noise of the first timestep.

        Raises:
            ValueError: If not exactly one of number and grid is given, or it is out of range or order.
        """
        to_clean = self.config.final_sigmas_type == "zero" and not inverse
        optimized = (self.config.optimized_steps or {}).get(str(num_inference_steps), {}) if to_clean else {}
        if timesteps is None and optimized:
            num_inference_steps, timesteps = None, optimized["timesteps"]
            self._weights = optimized.get("weights")
        else:
            self._weights = None
        self._inverse = inverse
        self._first = 0
        self._set_grid(self._make_grid(num_inference_steps, timesteps), device)

    def _plan(self, grid: np.ndarray, first: int = 0) -> list[Any]:
        """As in the base class; a multistep method knows no slope from before the step ``first``."""
        self._planned = grid
        to_clean = self.config.final_sigmas_type == "zero" and not self._inverse
        if not to_clean and grid[-1] > 0:
            grid = np.append(grid, 0.0)
        if self._inverse:
            grid = grid[::-1]
        ratio = 1 + min(self.config.s_churn / len(grid), math.sqrt(2) - 1)
        starts = self._churned(grid, ratio) if ratio > 1 and not self._inverse else grid
        levels = [float(self.curve.at(time)) for time in grid] + ([math.inf] if to_clean else [])
        plan: list[_Evaluation] = []
        for step, (start, end) in enumerate(zip(starts, levels[1:], strict=False)):
            next_level = float(self.curve.at(starts[step + 1])) if step + 1 < len(grid) else end
            if self._weights and not first:
                weights = self._weights[step]
                plan.append(self._evaluation(start, start, weights, (end, next_level)))
            elif math.isfinite(end) and self.config.solver == _ADAMS:
                oldest = min(step, max(step + 1 - _ADAMS_ORDER, first))
                weights = adams_weights(self.curve.at(starts[oldest : step + 1]), float(self.curve.at(start)), end)
                plan.append(self._evaluation(start, start, weights, (end, next_level)))
            else:
                method = TABLEAUX[self.config.solver if math.isfinite(end) else "euler"]
                plan += self._runge_kutta(start, method, end, next_level)
        return plan

    def _churned(self, grid: np.ndarray, ratio: float) -> np.ndarray:
        """Timesteps at which the noise is ``ratio`` times as high, for all but the first."""
        raised = self.curve.timestep(self.curve.at(grid) - 2 * math.log(ratio))
        return np.append(grid[:1], np.clip(raised[1:], None, grid[0]).astype(np.float32).astype(np.float64))

    def _runge_kutta(self, start: float, method: Tableau, end: float, next_level: float) -> list[_Evaluation]:
        """The stages of a step from a timestep to the log-SNR ``end``, and on to that of the next by adding noise."""
        start_noise = noise_level(self.curve.at(start))
        length = noise_level(end) - start_noise
        # the first stage lies on the grid, where rounding must not move it
        times = [start] + [
            float(np.float32(self.curve.timestep(-2 * math.log(start_noise + length * sum(stage)))))
            for stage in method.stages[1:]
        ]
        plan = []
        for stage, time in enumerate(times):
            ends_step = stage + 1 == len(times)
            weights = [length * weight for weight in (method.weights if ends_step else method.stages[stage + 1])]
            target = (end, next_level) if ends_step else (float(self.curve.at(times[stage + 1])),) * 2
            plan.append(self._evaluation(time, start, weights, target, stage, ends_step))
        return plan

    def _evaluation(
        self,
        time: float,
        start: float,
        weights: Sequence[float],
        target: tuple[float, float],
        stage: int = 0,
        ends_step: bool = True,
    ) -> _Evaluation:
        """One evaluation.

        Args:
            time: Timestep at which the network is evaluated.
            start: Timestep at which the step starts.
            weights: Weights of the slopes before it that it builds on, and of its own, in the change of y.
            target: Log-SNR that the slopes lead to, and the lower one that churn raises it to.
            stage: Its number within the step.
            ends_step: Whether the step ends here.

        Returns:
            Its row of the plan.
        """
        alpha, sigma = (float(scale) for scale in alpha_sigma(self.curve.at(time)))
        x0_coefficients, noise_coefficients = prediction_coefficients(self.config.prediction_type, alpha, sigma)
        reached, raised = target
        alpha_start, alpha_next = (float(alpha_sigma(level)[0]) for level in (self.curve.at(start), raised))
        churn = alpha_next * math.sqrt(max(noise_level(raised) ** 2 - noise_level(reached) ** 2, 0.0))
        return _Evaluation(
            timestep=time,
            starts_step=stage == 0,
            memory=len(weights) - 1,
            x0_coefficients=x0_coefficients,
            noise_coefficients=noise_coefficients,
            alpha=alpha,
            sigma=sigma,
            keep=alpha_next / alpha_start,
            weights=tuple(float(alpha_next * weight) for weight in weights),
            churn=churn,
            divergence_weights=tuple(float(weight) for weight in weights) if ends_step else None,
            log_alpha_change=math.log(alpha_next / alpha_start) if math.isfinite(reached) else math.nan,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        divergence: Tensor | None = None,
    ) -> ProbabilityFlowSchedulerOutput | tuple[Tensor, Tensor]:
        """Goes on to the next stage or, after a step's last stage, to the next timestep.

        Args:
            model_output: Output of the network, shape ``(B, *)``.
            timestep: One of ``self.timesteps``, in their order within a step.
            sample: What the network saw, shape ``(B, *)``.
            generator: Source of the churn's noise; a list has one for each sample.
            return_dict: Whether to return a [`ProbabilityFlowSchedulerOutput`] instead of a tuple.
            divergence: Divergence of the network's output by its input, shape ``(B,)``, exact or an unbiased estimate,
                at every evaluation or none.

        Returns:
            [`ProbabilityFlowSchedulerOutput`], or a tuple of its first two fields.

        Raises:
            ValueError: If the timestep is not one of ``self.timesteps`` or out of order, the shapes differ, or
                divergences come with clipping, churn or a step to clean data, which have no density, or are missing
                at some evaluation.
        """
        index = self._index(timestep, model_output, sample)
        if index == 0 or index != self._next_index:
            self._begin_at(index)
        self._next_index = index + 1
        now: _Evaluation = self._rows[index]
        dtype = sample.dtype
        sample, model_output = at_least_single(sample, model_output)
        if now.starts_step:
            self._start = sample

        clean = self._clean(sample, model_output, now.x0_coefficients)
        if self.config.clip_sample:
            noise = (sample - now.alpha * clean) / now.sigma
        else:
            noise = now.noise_coefficients[0] * sample + now.noise_coefficients[1] * model_output
        self._slopes = [*self._slopes[len(self._slopes) - now.memory :], noise]
        next_sample = now.keep * self._start
        for weight, slope in zip(now.weights, self._slopes, strict=True):
            if weight != 0:
                next_sample = next_sample + weight * slope
        if now.churn > 0:
            next_sample = next_sample + now.churn * noise_like(sample, generator)
        if divergence is not None or self._divergences or self._log_density_change is not None:
            self._accumulate(now, index, sample, divergence)
        next_sample, clean = next_sample.to(dtype), clean.to(dtype)
        if not return_dict:
            return (next_sample, clean)
        return ProbabilityFlowSchedulerOutput(next_sample, clean, self._log_density_change)

    def _begin_at(self, index: int) -> None:
        """Forgets what came before: the loop starts here, at the first entry or, as from an image, at a later one."""
        row: _Evaluation = self._rows[index]
        if not row.starts_step:
            raise ValueError(f"timestep must follow the order of set_timesteps, got {row.timestep:g} out of order")
        if self.config.solver == _ADAMS and self._first != index:
            self._rows = self._plan(self._planned, first=index)
        self._first = index
        self._slopes, self._divergences, self._log_density_change = [], [], None

    def _accumulate(self, now: _Evaluation, index: int, sample: Tensor, divergence: Tensor | None) -> None:
        """Adds the change of the log-density over a step once all its divergences are there."""
        begins = index == self._first
        missed = not begins and self._log_density_change is None
        if divergence is None or divergence.shape != sample.shape[:1] or missed:
            got = None if divergence is None else tuple(divergence.shape)
            raise ValueError(f"divergence must have shape ({len(sample)},) at every evaluation or none, got {got}")
        if self.config.clip_sample or self.config.s_churn > 0 or math.isnan(now.log_alpha_change):
            raise ValueError(
                "divergence must be left out with clipping, churn or a step to clean data, which have no density: "
                "set clip_sample=False, s_churn=0 and final_sigmas_type='sigma_min'"
            )
        dims = sample[0].numel()
        if begins:
            self._log_density_change = sample.new_zeros(len(sample), dtype=torch.float64)
        # the divergence by y of the noise: x = alpha y
        own = now.alpha * (now.noise_coefficients[0] * dims + now.noise_coefficients[1] * divergence.double())
        self._divergences = [*self._divergences[len(self._divergences) - now.memory :], own]
        if now.divergence_weights is not None and self._log_density_change is not None:
            along = sum(w * value for w, value in zip(now.divergence_weights, self._divergences, strict=True))
            self._log_density_change = self._log_density_change - dims * now.log_alpha_change - along
