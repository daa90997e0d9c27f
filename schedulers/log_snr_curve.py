r"""Log-SNR curves of variance-preserving diffusion, and the coefficients that follow from them.

The forward process is :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` with
:math:`\alpha_t^2 = \operatorname{sigmoid}(\lambda_t)` and :math:`\sigma_t^2 = \operatorname{sigmoid}(-\lambda_t)`
(Kingma et al. 2021, section 3; Luo 2022, "Learning Diffusion Noise Parameters"). The log-SNR :math:`\lambda_t` falls
strictly with the timestep, and everything a scheduler needs follows from it. A curve is a table of its values at
equally spaced timesteps, straight in between, whatever it comes from:

``"betas"``
    The beta schedule of a stock scheduler, exactly: its ``alphas_cumprod`` at every integer timestep.
``"linear"``, ``"cosine"``
    :math:`\lambda_t` linear in :math:`t`, or :math:`-2 \log \tan` of an angle linear in :math:`t` (Nichol & Dhariwal
    2021), between the two ends of ``log_snr_range``.
a list of numbers
    Any other curve, such as a learned one.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, HeunDiscreteScheduler
from torch import Tensor

__all__ = ["LogSnrCurve", "alpha_sigma", "ancestral_coefficients", "prediction_coefficients"]


class LogSnrCurve:
    r"""A strictly falling log-SNR :math:`\lambda_t` on timesteps [0, T), 0 nearest the data, as a table.

    Args:
        table: Log-SNR at equally spaced timesteps from 0 to ``num_train_timesteps - 1``, at least two.
        num_train_timesteps: T. Behind ``T - 1`` the last segment goes on.

    Raises:
        ValueError: If the table is no sequence of at least two finite numbers that fall strictly.

    Example:
        >>> LogSnrCurve([10.0, -10.0], 1001)(torch.tensor([0.0, 250.5, 1000.0])).tolist()
        [10.0, 4.99, -10.0]
    """

    def __init__(self, table: Sequence[float] | np.ndarray, num_train_timesteps: int):
        values = np.asarray(table, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or not (np.diff(values) < 0).all():
            raise ValueError(
                "log_snr must be at least two finite numbers that fall strictly from one to the next, "
                f"got {np.array2string(values, threshold=6)}"
            )
        self._values = np.append(values, 2 * values[-1] - values[-2])
        self._spacing = (num_train_timesteps - 1) / (len(values) - 1)
        self._knots = self._spacing * np.arange(len(self._values))
        self._tensor = torch.from_numpy(self._values)

    @classmethod
    def of_config(cls, config: Any) -> LogSnrCurve:
        """The curve that a scheduler's configuration names; raises a ``ValueError`` if it names none."""
        num: Any = config.num_train_timesteps
        kind = config.log_snr
        if isinstance(num, bool) or not isinstance(num, int) or num < 2:
            raise ValueError(f"num_train_timesteps must be an integer of at least 2, got {num!r}")
        if not isinstance(kind, str):
            return cls(kind, num)
        if kind == "betas":
            return cls(_log_snr_of_betas(config), num)
        if kind not in ("linear", "cosine"):
            raise ValueError(f"log_snr must be one of ('betas', 'linear', 'cosine') or a table, got {kind!r}")
        ends = tuple(config.log_snr_range)
        if len(ends) != 2 or not math.inf > ends[0] > ends[1] > -math.inf:
            raise ValueError(f"log_snr_range must be the log-SNR at data and a lower one at noise, got {ends!r}")
        high, low = ends
        if kind == "linear":
            return cls([high, low], num)
        first, last = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
        return cls(-2 * np.log(np.tan(np.linspace(first, last, num))), num)

    @classmethod
    def of_scheduler(cls, scheduler: Any) -> LogSnrCurve:
        """The curve of a variance-preserving scheduler of ours, or of diffusers by its ``alphas_cumprod``."""
        if hasattr(scheduler, "curve"):  # which knows more digits than single precision near 1 holds
            return scheduler.curve
        return cls(_log_snr(scheduler.alphas_cumprod), len(scheduler.alphas_cumprod))

    @property
    def ends(self) -> tuple[float, float]:
        """Log-SNR at timestep 0 and at ``num_train_timesteps - 1``."""
        return float(self._values[0]), float(self._values[-2])

    @property
    def last(self) -> float:
        """The last timestep, T - 1."""
        return float(self._knots[-2])

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Log-SNR at timesteps of any shape, float64 (on MPS float32), on their device."""
        lower, weight = self._segment(timesteps)
        return torch.lerp(self._tensor[lower], self._tensor[lower + 1], weight)

    def slope(self, timesteps: Tensor) -> Tensor:
        """Derivative of the log-SNR by the timestep, of the same shape, float64; at a knot, that behind it."""
        lower, _ = self._segment(timesteps)
        return (self._tensor[lower + 1] - self._tensor[lower]) / self._spacing

    def _segment(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the knot below and how far the next is reached."""
        if self._tensor.device != timesteps.device:
            has_double = timesteps.device.type != "mps"
            self._tensor = self._tensor.to(timesteps.device, torch.float64 if has_double else torch.float32)
        position = timesteps.to(self._tensor.dtype) / self._spacing
        lower = position.floor().clamp(0, len(self._values) - 2).long()
        return lower, position - lower

    def at(self, timesteps: Any) -> Any:
        """Log-SNR at timesteps that the host holds, numpy in and numpy out."""
        return np.interp(timesteps, self._knots, self._values)

    def timestep(self, log_snr: Any) -> Any:
        """The timesteps at which the curve has given values: the inverse of :meth:`at`, limited to its ends."""
        return np.interp(log_snr, self._values[::-1], self._knots[::-1])


def alpha_sigma(log_snr: Any) -> tuple[Any, Any]:
    r""":math:`\alpha` and :math:`\sigma` of log-SNRs: tensors, numpy arrays or floats, ``inf`` for clean data."""
    if isinstance(log_snr, Tensor):
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    return 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))


def prediction_coefficients(prediction_type: str, alpha: Any, sigma: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    r"""The clean sample and the noise as linear functions of the noisy sample and the network's output.

    All four parametrisations say the same (Luo 2022, "Three Equivalent Interpretations"; for the velocity
    :math:`\alpha \epsilon - \sigma x_0`, Salimans & Ho 2022, section 4).

    Args:
        prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"score"``.
        alpha: :math:`\alpha_t`, any shape.
        sigma: :math:`\sigma_t`, likewise.

    Returns:
        Two pairs :math:`(a, b)`: of :math:`\hat x_0 = a x_t + b \, \text{output}`, and of :math:`\hat\epsilon`.
    """
    if prediction_type == "epsilon":
        return (1 / alpha, -sigma / alpha), (0.0, 1.0)
    if prediction_type == "v_prediction":
        return (alpha, -sigma), (sigma, alpha)
    if prediction_type == "sample":
        return (0.0, 1.0), (1 / sigma, -alpha / sigma)
    return (1 / alpha, sigma**2 / alpha), (0.0, -sigma)


def ancestral_coefficients(log_snr_t: Any, log_snr_s: Any) -> tuple[Any, Any, Any]:
    r"""Of :math:`q(x_s \mid x_t, x_0)`, s the less noisy time (Kingma et al. 2021, equations 23 to 25; Luo 2022, 84).

    Args:
        log_snr_t: Log-SNR at the noisier time, any shape, numpy or a tensor.
        log_snr_s: Log-SNR at the less noisy time, likewise; ``inf`` for clean data.

    Returns:
        What the noisy sample and the clean one are multiplied by in the mean, and the variance.
    """
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    # expm1 keeps the digits when the two times are close, where 1 - exp(...) has none left
    c = -(torch if isinstance(log_snr_t, Tensor) else np).expm1(log_snr_t - log_snr_s)
    return alpha_s / alpha_t * (1 - c), alpha_s * c, sigma_s**2 * c


def _log_snr_of_betas(config: Any) -> np.ndarray:
    """Log-SNR at every integer timestep, from the very ``alphas_cumprod`` that a stock scheduler has."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    options = {name: getattr(config, name) for name in names}
    try:
        if config.beta_schedule == "exp" and config.trained_betas is None:  # DDPMScheduler does not have it
            alphas_cumprod = HeunDiscreteScheduler(**options).alphas_cumprod
        else:
            stock = DDPMScheduler(**options, rescale_betas_zero_snr=config.rescale_betas_zero_snr)
            alphas_cumprod = stock.alphas_cumprod
    except NotImplementedError as error:
        raise ValueError(
            f"beta_schedule must be one that diffusers has, such as 'linear', got {config.beta_schedule!r}"
        ) from error
    if len(alphas_cumprod) != config.num_train_timesteps:
        raise ValueError(f"trained_betas must be {config.num_train_timesteps} numbers, got {len(alphas_cumprod)}")
    return _log_snr(alphas_cumprod)


def _log_snr(alphas_cumprod: Tensor) -> np.ndarray:
    table = alphas_cumprod.cpu().double().numpy().copy()
    if table[-1] == 0:  # rescaled to no signal at all, whose logarithm a curve cannot hold
        table[-1] = min(2**-24, table[-2] / 2)
    with np.errstate(divide="ignore"):
        return np.log(table) - np.log1p(-table)
