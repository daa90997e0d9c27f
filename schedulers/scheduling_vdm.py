r"""Ancestral sampling on a log-SNR curve, fixed or learned.

From :math:`x_t` to a less noisy :math:`x_s` the variational diffusion model draws from

.. math:: p(x_s \mid x_t) = q(x_s \mid x_t, x_0 = \hat x_0(x_t)) = N\left(\tfrac{\alpha_s}{\alpha_t}(1 - c) x_t
    + \alpha_s c \hat x_0, \; \sigma_s^2 c\right), \quad c = -\operatorname{expm1}(\lambda_t - \lambda_s)

(Kingma et al. 2021, section 3.3, appendix A.4; Luo 2022, "Variational Diffusion Models"). The true reverse transition
is wider, as :math:`x_0` is not known; of all isotropic Gaussians about that mean the nearest has the variance
:math:`\sigma_s^2 c + (\alpha_s c)^2 E\|x_0 - \hat x_0\|^2 / D` (Bao et al. 2022, theorem 1 for the exact denoiser). The
error of the velocity, :math:`\|x_0 - \hat x_0\| / \sigma_t`, changes least along the curve, so that is what a table in
the configuration holds.

This file travels inside checkpoints: it imports torch, numpy, diffusers and its siblings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import SchedulerMixin  # by this name in this file pipelines know that it can be loaded
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .log_snr_curve import LogSnrCurve, alpha_sigma, ancestral_coefficients, prediction_coefficients
from .variance_preserving_scheduler import LinearStep, VariancePreservingScheduler

__all__ = ["VDMScheduler"]

_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "optimal")


class VDMScheduler(VariancePreservingScheduler, SchedulerMixin):
    r"""Ancestral sampling of a variational diffusion model in continuous time.

    With a stock beta schedule and stock spacing it takes the steps of ``DDPMScheduler``, except that the last one never
    adds noise, which ``"fixed_large"`` does there unless it ends at timestep 0; timesteps may be fractional.
    Defaults are those of ``DDPMScheduler``, except that nothing is clipped unless ``clip_sample`` is set.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            T; timesteps are in [0, T), 0 nearest the data.
        beta_start (`float`, defaults to 0.0001), beta_end (`float`, defaults to 0.02), beta_schedule (`str`, defaults
            to `"linear"`), trained_betas (`list[float]`, *optional*), rescale_betas_zero_snr (`bool`, defaults to
            `False`):
            The stock beta schedule that ``log_snr="betas"`` stands for.
        log_snr (`str` or `list[float]`, defaults to `"betas"`):
            The curve: ``"betas"``, ``"linear"``, ``"cosine"``, or a table of log-SNR at equally spaced timesteps from 0
            to T - 1.
        log_snr_range (`tuple[float, float]`, defaults to `(13.3, -5.0)`):
            Log-SNR at the data's end and at the noise's of a ``"linear"`` or ``"cosine"`` curve.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the network predicts: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"score"``.
        timestep_spacing (`str`, defaults to `"leading"`):
            ``"leading"``, ``"linspace"`` or ``"trailing"`` as in stock schedulers, or ``"log_snr"``: equal steps of
            log-SNR.
        steps_offset (`int`, defaults to 0):
            Added to the timesteps in ``"leading"`` spacing.
        clip_sample (`bool`, defaults to `False`), clip_sample_range (`float`, defaults to 1.0):
            Whether, and to what magnitude, the predicted clean sample is clipped.
        variance_type (`str`, defaults to `"fixed_small"`):
            ``"fixed_small"`` (also ``"fixed_small_log"``, which is the same): :math:`\sigma_s^2 c` above;
            ``"fixed_large"``: :math:`1 - \alpha_t^2 / \alpha_s^2`, the optimal one of a velocity error of 1;
            ``"optimal"``: the analytic one above.
        velocity_error (`list[float]`, *optional*):
            :math:`E\|v - \hat v\|^2 / D` at equally spaced timesteps from 0 to T - 1, for ``"optimal"``; see
            :func:`mechdiffusers.schedulers.estimate_velocity_error`.

    Raises:
        ValueError: If an argument is none of those.

    Example:
        >>> scheduler = VDMScheduler(log_snr="cosine", prediction_type="v_prediction", timestep_spacing="log_snr")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.round().tolist()
        [999.0, 351.0, 17.0, 0.0]

    References:
        | Variational Diffusion Models (Kingma et al., 2021)
        | https://arxiv.org/abs/2107.00630
        | Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance (Bao et al., 2022)
        | https://arxiv.org/abs/2201.06503
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
        variance_type: str = "fixed_small",
        velocity_error: Sequence[float] | None = None,
    ):
        self._start_on(LogSnrCurve.of_config(self.config))
        if variance_type not in _VARIANCE_TYPES:
            raise ValueError(f"variance_type must be one of {_VARIANCE_TYPES}, got {variance_type!r}")
        if isinstance(velocity_error, Tensor):
            velocity_error = velocity_error.detach().cpu().numpy()
        errors = None if velocity_error is None else np.asarray(velocity_error, dtype=np.float64)
        if errors is not None and (errors.ndim != 1 or len(errors) < 2 or not (errors >= 0).all()):
            raise ValueError(f"velocity_error must be at least two non-negative numbers, got {velocity_error!r}")
        if errors is not None:
            self.register_to_config(velocity_error=errors.tolist())  # a tensor has no place in JSON
        if variance_type == "optimal" and errors is None:
            raise ValueError("velocity_error must be given for variance_type='optimal', got None")

    def _plan(self, grid: np.ndarray) -> list[Any]:
        log_snr_t = self.curve.at(grid)
        log_snr_s = np.append(log_snr_t[1:], np.inf)
        alpha_t, sigma_t = alpha_sigma(log_snr_t)
        of_sample, of_x0, variance = ancestral_coefficients(log_snr_t, log_snr_s)
        if self.config.variance_type == "optimal":
            errors = self.config.velocity_error
            error = np.interp(grid, np.linspace(0, len(self) - 1, len(errors)), errors)
        else:  # that of a clean sample that is known, or of a standard normal one (Ho et al. 2020, section 3.2)
            error = float(self.config.variance_type == "fixed_large")
        std = np.sqrt(variance + (of_x0 * sigma_t) ** 2 * error)
        std[-1] = 0  # the last step ends at the mean
        x0_coefficients, _ = prediction_coefficients(self.config.prediction_type, alpha_t, sigma_t)
        columns = np.broadcast_arrays(grid, *x0_coefficients, of_sample, of_x0, std)
        return [LinearStep(t, (a, b), *rest) for t, a, b, *rest in np.stack(columns, axis=1).tolist()]

    def loss_weights(self, timesteps: Tensor, weighting: str = "elbo", max_snr: float = 5.0) -> Tensor:
        r"""Weights of the squared error of the network's output, summed over a sample's entries.

        ``"elbo"``: at uniform timesteps in [0, T - 1] the mean weighted error is the diffusion part of the negative
        evidence lower bound in nats, :math:`\tfrac12 E_t[-\lambda'_t \|\epsilon - \hat\epsilon\|^2]` over a unit of
        time (Kingma et al. 2021, section 5.1). ``"min_snr"``: the error of :math:`x_0` is weighted by
        :math:`\min(e^{\lambda_t}, \text{max\_snr})` (Hang et al. 2023, section 3.4).

        Args:
            timesteps: Timesteps in [0, T), shape ``(B,)``.
            weighting: ``"elbo"`` or ``"min_snr"``.
            max_snr: Highest weight of ``"min_snr"``.

        Returns:
            Weights, float64, shape ``(B,)``.

        Raises:
            ValueError: If ``weighting`` is unknown or a timestep lies outside [0, T).

        References:
            | Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023)
            | https://arxiv.org/abs/2303.09556
        """
        if weighting not in ("elbo", "min_snr"):
            raise ValueError(f"weighting must be one of ('elbo', 'min_snr'), got {weighting!r}")
        self._check_range(timesteps)
        log_snr = self.curve(timesteps)
        snr = log_snr.exp()
        if weighting == "elbo":
            x0_weights = -0.5 * (len(self) - 1) * self.curve.slope(timesteps) * snr
        else:
            x0_weights = snr.clamp(max=max_snr)
        # the error of the output enters that of the clean sample by its coefficient
        alpha, sigma = alpha_sigma(log_snr)
        (_, of_output), _ = prediction_coefficients(self.config.prediction_type, alpha, sigma)
        return x0_weights * of_output**2
