r"""Score-based sampling: a predictor from noise level to noise level, a Langevin corrector at each.

The corrector leaves the density of a noise level where it is and repairs what the predictor left wrong (Song et al.
2021, section 4.2; Luo 2022, "Score-based Generative Models"):

.. math:: x \leftarrow x + \delta_t \hat s(x) + \sqrt{2 \delta_t} z, \qquad \delta_t = 2 (r \sigma_t)^2, \quad
    \hat s = -\hat\epsilon / \sigma_t .

This is the step of Song et al., without their factor :math:`1 - \beta_i` of nearly one, for a signal-to-noise ratio
:math:`r` with the norms of noise and score at their
expected values, :math:`\sqrt D` and :math:`\sqrt D / \sigma_t`: a sample's step then depends neither on its own draw
nor on its neighbours. Without a predictor the sample is only rescaled from level to level, which is annealed Langevin
dynamics (Song & Ermon 2019).

This file travels inside checkpoints: it imports torch, numpy, diffusers and its siblings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import SchedulerMixin  # by this name in this file pipelines know that it can be loaded
from diffusers.configuration_utils import register_to_config

from .log_snr_curve import LogSnrCurve, alpha_sigma, ancestral_coefficients, prediction_coefficients
from .variance_preserving_scheduler import LinearStep, VariancePreservingScheduler

__all__ = ["PredictorCorrectorScheduler"]

_PREDICTORS = ("ancestral", "euler_maruyama", "none")


class PredictorCorrectorScheduler(VariancePreservingScheduler, SchedulerMixin):
    r"""Langevin corrector steps at every noise level, then a predictor step to the next.

    ``timesteps`` has each timestep of the grid once for every corrector step and once for the predictor. Defaults are
    those of ``DDPMScheduler``, except that nothing is clipped unless ``clip_sample`` is set.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, log_snr,
        log_snr_range, prediction_type, timestep_spacing, steps_offset, clip_sample, clip_sample_range:
            As in :class:`~mechdiffusers.schedulers.VDMScheduler`.
        predictor (`str`, defaults to `"ancestral"`):
            ``"ancestral"``, ``"euler_maruyama"`` of the reverse stochastic differential equation, or ``"none"``,
            annealed Langevin dynamics, whose samples keep the noise of the last timestep.
        num_corrector_steps (`int`, defaults to 1):
            Corrector steps at each timestep.
        corrector_snr (`float`, defaults to 0.16):
            Signal-to-noise ratio r of a corrector step, in (0, 1). The density it keeps is off by O(r^2).

    Raises:
        ValueError: If an argument is none of those.

    Example:
        >>> scheduler = PredictorCorrectorScheduler(timestep_spacing="trailing")
        >>> scheduler.set_timesteps(2)
        >>> scheduler.timesteps.tolist()
        [999.0, 999.0, 499.0, 499.0]

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix G
        | https://arxiv.org/abs/2011.13456
        | Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019), algorithm 1
        | https://arxiv.org/abs/1907.05600
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
        predictor: str = "ancestral",
        num_corrector_steps: int = 1,
        corrector_snr: float = 0.16,
    ):
        self._start_on(LogSnrCurve.of_config(self.config))
        if predictor not in _PREDICTORS:
            raise ValueError(f"predictor must be one of {_PREDICTORS}, got {predictor!r}")
        least = 1 if predictor == "none" else 0
        whole = isinstance(num_corrector_steps, int) and not isinstance(num_corrector_steps, bool)
        if not whole or num_corrector_steps < least:
            raise ValueError(
                f"num_corrector_steps must be an integer of at least {least} with predictor={predictor!r}, "
                f"got {num_corrector_steps!r}"
            )
        if not 0 < corrector_snr < 1:
            raise ValueError(
                f"corrector_snr must lie inside (0, 1), where Langevin steps are stable, got {corrector_snr!r}"
            )
        self.order = num_corrector_steps + (predictor != "none")  # evaluations a timestep, as in stock

    def _plan(self, grid: np.ndarray) -> list[Any]:
        log_snr_t = self.curve.at(grid)
        log_snr_s = np.append(log_snr_t[1:], np.inf)
        plan: list[LinearStep] = []
        for time, now, then in zip(grid.tolist(), log_snr_t, log_snr_s, strict=True):
            alpha, sigma = (float(scale) for scale in alpha_sigma(now))
            x0_coefficients, _ = prediction_coefficients(self.config.prediction_type, alpha, sigma)
            # the score is -(x - alpha x0) / sigma^2
            drift = 2 * self.config.corrector_snr**2
            correction = (1 - drift, drift * alpha, (2 * drift) ** 0.5 * sigma)
            steps = [correction] * self.config.num_corrector_steps
            if self.config.predictor == "none":  # nothing but a rescaling of x / alpha, which costs no evaluation
                scale = alpha_sigma(then)[0] / alpha
                steps[-1] = tuple(scale * coefficient for coefficient in correction)
            else:
                steps.append(_PREDICT[self.config.predictor](now, then))
            plan += [LinearStep(time, x0_coefficients, *(float(number) for number in step)) for step in steps]
        return plan


def _euler_maruyama(log_snr_t: float, log_snr_s: float) -> tuple[float, float, float]:
    r"""An Euler-Maruyama step of :math:`dx = [-\tfrac12 \beta x - \beta s] dt + \sqrt\beta dw`, backwards."""
    (alpha_t, sigma_t), (alpha_s, _) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    beta = 2 * np.log(alpha_s / alpha_t)  # its integral over the step: d log alpha = -beta / 2 dt
    drift = beta / sigma_t**2
    # the last step is free of noise (Song et al. 2021, appendix G)
    return 1 + beta / 2 - drift, drift * alpha_t, np.sqrt(beta) if np.isfinite(log_snr_s) else 0.0


def _ancestral(log_snr_t: float, log_snr_s: float) -> tuple[float, float, float]:
    r"""A draw from :math:`q(x_s \mid x_t, x_0)`."""
    of_sample, of_x0, variance = ancestral_coefficients(log_snr_t, log_snr_s)
    return of_sample, of_x0, np.sqrt(variance)


_PREDICT: dict[str, Any] = {"ancestral": _ancestral, "euler_maruyama": _euler_maruyama}
