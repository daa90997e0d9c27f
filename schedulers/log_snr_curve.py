r"""Log-SNR curves of variance-preserving diffusion, and what every scheduler that stands on one has in common.

The forward process is :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` with
:math:`\alpha_t^2 = \operatorname{sigmoid}(\lambda_t)` and :math:`\sigma_t^2 = \operatorname{sigmoid}(-\lambda_t)`
(Kingma et al. 2021, section 3; Luo 2022, "Learning Diffusion Noise Parameters"). The log-SNR :math:`\lambda_t` falls
strictly with the timestep, and everything a scheduler needs follows from it. A curve is a table of its values at
equally spaced timesteps, straight in between, whatever it comes from:

``"betas"``
    The beta schedule of a stock scheduler, exactly: its ``alphas_cumprod`` at every integer timestep.
``"linear"``, ``"cosine"``
    :math:`\lambda_t` linear in :math:`t` (Kingma et al. 2021, appendix), or :math:`-2 \log \tan` of an angle linear in
    :math:`t` (Nichol & Dhariwal 2021), between the two ends of ``log_snr_range``.
a list of numbers
    Any other curve, such as a learned one.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, HeunDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

__all__ = ["NOISE_SCHEDULE", "LogSnrCurve", "VariancePreservingScheduler", "alpha_sigma", "predictions"]

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "score")
_SPACINGS = ("leading", "linspace", "trailing", "log_snr")
#: What one solver's configuration hands on to the next, even where it stands at the defaults of its class.
NOISE_SCHEDULE = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
}
#: Options of one class of ours that its siblings pass on without a use for them.
_SOLVER_OPTIONS = {
    *("variance_type", "velocity_error"),
    *("solver", "final_sigmas_type", "s_churn", "optimized_steps"),
    *("predictor", "num_corrector_steps", "corrector_snr"),
}


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
                f"got {_short(table)}"
            )
        self._values = np.append(values, 2 * values[-1] - values[-2])
        self._spacing = (num_train_timesteps - 1) / (len(values) - 1)
        self._knots = self._spacing * np.arange(len(self._values))
        self._tensor = torch.from_numpy(self._values)

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Log-SNR at timesteps of any shape, float64, on their device."""
        lower, weight = self._segment(timesteps)
        return torch.lerp(self._tensor[lower], self._tensor[lower + 1], weight)

    def slope(self, timesteps: Tensor) -> Tensor:
        """Derivative of the log-SNR by the timestep, of the same shape, float64; at a knot, that behind it."""
        lower, _ = self._segment(timesteps)
        return (self._tensor[lower + 1] - self._tensor[lower]) / self._spacing

    def _segment(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the knot below and how far the next is reached."""
        if self._tensor.device != timesteps.device:
            self._tensor = self._tensor.to(timesteps.device)
        position = timesteps.to(torch.float64) / self._spacing
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


def predictions(prediction_type: str, alpha: Any, sigma: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
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


class VariancePreservingScheduler(SchedulerMixin, ConfigMixin):
    """What the schedulers on a log-SNR curve share: the forward process, the grid of timesteps, the place in it.

    A scheduler plans its evaluations in :meth:`_plan`: one timestep and one row of plain numbers for each, so that a
    step reads them by its place in ``timesteps`` and never waits for a device.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, and the noise schedule is taken over even where it stands at the other class's defaults.

        Clipping, a default of ``DDPMScheduler`` that is wrong for latents, is never taken over from a stock scheduler:
        ask for it by ``clip_sample=True``.

        Args:
            config: Configuration of a variance-preserving scheduler of ours or of diffusers.
            return_unused_kwargs: As in diffusers.
            **kwargs: What is to differ from ``config``.

        Returns:
            The scheduler.
        """
        if not isinstance(config, Mapping):
            return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        defaults = set(config.get("_use_default_values", ())) - NOISE_SCHEDULE
        config = {key: value for key, value in config.items() if key not in defaults and key != "_use_default_values"}
        if "log_snr" not in config:
            config.pop("clip_sample", None)
        of_siblings = {key: config.pop(key) for key in _SOLVER_OPTIONS - cls._get_init_keys(cls) if key in config}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).register_to_config(**of_siblings)
        return made

    def _start_from_config(self) -> None:
        """Checks the common arguments and builds the curve; the first thing a constructor does."""
        config = self.config
        _check_one_of("prediction_type", config.prediction_type, _PREDICTION_TYPES)
        _check_one_of("timestep_spacing", config.timestep_spacing, _SPACINGS)
        self.curve = _curve(config)
        alphas_squared = alpha_sigma(self.curve.at(np.arange(config.num_train_timesteps)))[0] ** 2
        #: (T,), as in stock schedulers: what a pipeline compares to see whether a scheduler suits its denoiser.
        self.alphas_cumprod = torch.from_numpy(alphas_squared).float()
        if not isinstance(config.log_snr, str) or config.log_snr != "betas":
            # the betas between its integer timesteps, by which a stock scheduler's from_config knows the curve
            betas = -np.expm1(np.diff(np.log(alphas_squared), prepend=0.0))
            self.register_to_config(trained_betas=betas.tolist(), rescale_betas_zero_snr=False)
        # what stands at a default of ours, where another class has another
        defaults = set(config.get("_use_default_values", ())) - NOISE_SCHEDULE - {"log_snr", "clip_sample"}
        self.register_to_config(_use_default_values=sorted(defaults))
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(config.num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._times: list[float] = []
        self._rows: list[Any] = []
        self._next = 0

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: a variance-preserving process needs no scaling."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r""":math:`\alpha_t x_0 + \sigma_t \epsilon`, at timesteps that may be fractional.

        Args:
            original_samples: Clean samples, shape ``(B, *)``.
            noise: Standard normal noise, shape ``(B, *)``.
            timesteps: Timesteps in [0, T), shape ``(B,)`` or ``()``.

        Returns:
            Noisy samples, shape ``(B, *)``.

        Raises:
            ValueError: If the shapes differ or a timestep lies outside [0, T).
        """
        alpha, sigma = self._alpha_sigma_like(original_samples, noise, timesteps)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""The velocity :math:`\alpha_t \epsilon - \sigma_t x_0`; arguments and errors as in :meth:`add_noise`."""
        alpha, sigma = self._alpha_sigma_like(sample, noise, timesteps)
        return alpha * noise - sigma * sample

    def _alpha_sigma_like(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        if noise.shape != sample.shape:
            raise ValueError(f"noise must have the samples' shape {tuple(sample.shape)}, got {tuple(noise.shape)}")
        if timesteps.ndim > 1 or (timesteps.ndim == 1 and len(timesteps) not in (1, len(sample))):
            raise ValueError(
                f"timesteps must be one or {len(sample)}, one a sample, got shape {tuple(timesteps.shape)}"
            )
        self._check_range(timesteps)
        shape = (-1,) + (1,) * (sample.ndim - 1)
        scales = alpha_sigma(self.curve(timesteps.to(sample.device)))
        return tuple(scale.to(sample.dtype).reshape(shape) for scale in scales)

    def _check_range(self, timesteps: Tensor) -> None:
        # on another device the comparison would make the host wait
        if timesteps.device.type == "cpu" and not ((timesteps >= 0) & (timesteps < len(self))).all():
            raise ValueError(f"timesteps must lie in [0, {len(self)}), got {_short(timesteps.tolist())}")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lays the grid of timesteps, from noise to data; the last step goes to clean data.

        Args:
            num_inference_steps: Number of timesteps, spaced as ``timestep_spacing`` says.
            device: Device of ``self.timesteps``.
            timesteps: The timesteps themselves, falling, in [0, T), instead of their number.

        Raises:
            ValueError: If not exactly one of both is given, or it is out of range or order.
        """
        self._lay(self._grid(num_inference_steps, timesteps), device)

    def _lay(self, grid: np.ndarray, device: str | torch.device | None) -> None:
        rows = self._plan(grid)
        if not rows:
            raise ValueError(f"timesteps must leave a step to go before the end of the way, got {grid.tolist()}")
        self.num_inference_steps, self._rows = len(grid), rows
        self._times = [row[0] for row in self._rows]
        self.timesteps = torch.tensor(self._times, dtype=torch.float32, device=device)
        self._next = 0

    def _plan(self, grid: np.ndarray) -> list[Any]:
        """For each evaluation of the network its timestep, a float32 number, and what the step needs."""
        raise NotImplementedError

    def _grid(self, num_inference_steps: int | None, timesteps: Sequence[float] | None) -> np.ndarray:
        """Falling timesteps (N,), rounded to float32 as the network will see them, in float64."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps or timesteps must be given, not both, got {num_inference_steps!r} and "
                f"{_short(timesteps)}"
            )
        if timesteps is not None:
            grid = np.asarray(timesteps, dtype=np.float32).astype(np.float64)
            in_order = grid.ndim == 1 and len(grid) and (np.diff(grid) < 0).all()
            if not (in_order and grid[-1] >= 0 and grid[0] < len(self)):
                raise ValueError(f"timesteps must fall strictly and lie in [0, {len(self)}), got {_short(timesteps)}")
            return grid
        num, last = num_inference_steps, len(self) - 1
        if isinstance(num, bool) or not isinstance(num, (int, np.integer)) or num < 1:
            raise ValueError(f"num_inference_steps must be an integer of at least 1, got {num!r}")
        spacing = self.config.timestep_spacing
        if spacing == "log_snr":
            low, high = self.curve.at([last, 0])
            grid = self.curve.timestep(np.linspace(low, high, num)) if num > 1 else np.array([last])
        elif num > len(self):
            raise ValueError(f"num_inference_steps must be at most {len(self)} in {spacing!r} spacing, got {num}")
        elif spacing == "linspace":
            grid = np.linspace(0, last, num).round()[::-1]
        elif spacing == "leading":
            grid = np.arange(num)[::-1] * (len(self) // num) + self.config.steps_offset
        else:
            grid = np.round(len(self) - len(self) / num * np.arange(num)) - 1
        grid = np.clip(grid, 0, last).astype(np.float32).astype(np.float64)
        return np.unique(grid)[::-1]  # an offset may move two timesteps to the last one

    def _place(self, timestep: float | Tensor, model_output: Tensor, sample: Tensor) -> int:
        """The place of a timestep in ``self.timesteps``."""
        if not self._times:
            raise ValueError("set_timesteps must be called before step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the sample's shape {tuple(sample.shape)}, got {tuple(model_output.shape)}"
            )
        if isinstance(timestep, Tensor):
            # an element of self.timesteps tells its place by where it lies in memory: the host need not read it
            place = int(timestep.storage_offset())
            same = timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
            if same and place < len(self._times):
                return place
        value = float(np.float32(float(timestep)))
        if self._next < len(self._times) and self._times[self._next] == value:
            return self._next
        if value not in self._times:
            raise ValueError(f"timestep must be one of those of set_timesteps, {_short(self._times)}, got {value:g}")
        return self._times.index(value)

    def _clean(self, sample: Tensor, model_output: Tensor, coefficients: tuple[float, float]) -> Tensor:
        """The predicted clean sample, clipped if so configured."""
        clean = coefficients[0] * sample + coefficients[1] * model_output
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return clean


def _curve(config: Any) -> LogSnrCurve:
    num: Any = config.num_train_timesteps
    kind = config.log_snr
    if isinstance(num, bool) or not isinstance(num, int) or num < 2:
        raise ValueError(f"num_train_timesteps must be an integer of at least 2, got {num!r}")
    if not isinstance(kind, str):
        return LogSnrCurve(kind, num)
    if kind == "betas":
        return LogSnrCurve(_log_snr_of_betas(config), num)
    _check_one_of("log_snr", kind, ("betas", "linear", "cosine"))
    ends = tuple(config.log_snr_range)
    if len(ends) != 2 or not math.inf > ends[0] > ends[1] > -math.inf:
        raise ValueError(f"log_snr_range must be the log-SNR at data and a lower one at noise, got {ends!r}")
    high, low = ends
    if kind == "linear":
        return LogSnrCurve([high, low], num)
    first, last = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    return LogSnrCurve(-2 * np.log(np.tan(np.linspace(first, last, num))), num)


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
    alphas_cumprod = alphas_cumprod.double().numpy()
    if alphas_cumprod[-1] == 0:  # rescaled to no signal at all, whose logarithm a curve cannot hold
        alphas_cumprod[-1] = min(2**-24, alphas_cumprod[-2] / 2)
    with np.errstate(divide="ignore"):
        return np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)


def _check_one_of(name: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {tuple(accepted)}, got {value!r}")


def _short(values: Any) -> str:
    """Values for an error message, the middle of many left out."""
    if isinstance(values, (list, tuple, np.ndarray)) and len(values) > 6:
        return f"[{', '.join(f'{v}' for v in values[:3])}, ..., {', '.join(f'{v}' for v in values[-2:])}]"
    return repr(values)
