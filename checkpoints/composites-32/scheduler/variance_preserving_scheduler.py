"""What the schedulers on a log-SNR curve have in common: the forward process, the grid of timesteps, the index in it.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["NOISE_SCHEDULE", "LinearStep", "StepOutput", "VariancePreservingScheduler", "at_least_single", "noise_like"]

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
#: What the timesteps and weights of ``optimized_steps`` were found for.
_OPTIMIZED_FOR = {"solver", "log_snr", "log_snr_range"} | NOISE_SCHEDULE - {"timestep_spacing", "steps_offset"}


@dataclass
class StepOutput(BaseOutput):
    """Output of a step.

    Args:
        prev_sample (`torch.Tensor`):
            What the network is to see next, shape ``(B, *)``: the sample at the next of the timesteps.
        pred_original_sample (`torch.Tensor`):
            The clean sample as predicted before the step, shape ``(B, *)``.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class LinearStep(NamedTuple):
    """A step that is linear in sample, predicted clean sample and noise: its coefficients, plain numbers."""

    timestep: float
    x0_coefficients: tuple[float, float]  # of the sample and of the network's output in the predicted clean sample
    sample_coefficient: float
    x0_coefficient: float
    noise_std: float

    @property
    def starts_step(self) -> bool:
        """Whether a loop may begin here."""
        return True


class VariancePreservingScheduler(SchedulerMixin, ConfigMixin):
    """What the schedulers on a log-SNR curve share: the forward process, the grid of timesteps, the index in it.

    A scheduler plans its evaluations in :meth:`_plan`: one row of plain numbers for each, the timestep first, so that a
    step reads them by its index in ``timesteps`` and never waits for a device.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, and the noise schedule is taken over even where it stands at the other class's defaults.

        Clipping, a default of ``DDPMScheduler`` that is wrong for latents, is never taken over from a stock scheduler:
        ask for it by ``clip_sample=True``. Steps that were optimised for another curve, solver or prediction are left.

        Args:
            config: Configuration of a variance-preserving scheduler of ours or of diffusers.
            return_unused_kwargs: As in diffusers.
            **kwargs: What is to differ from ``config``.

        Returns:
            The scheduler.
        """
        if not isinstance(config, Mapping):
            return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        given, defaults = config, set(config.get("_use_default_values", ())) - NOISE_SCHEDULE
        config = {key: value for key, value in config.items() if key not in defaults and key != "_use_default_values"}
        if "log_snr" not in config:
            config.pop("clip_sample", None)
            if config.get("variance_type") is None:  # as the stock DPM-Solvers have it
                config.pop("variance_type", None)
        named = _OPTIMIZED_FOR & kwargs.keys()
        if not all(np.array_equal(np.asarray(kwargs[key]), np.asarray(given.get(key))) for key in named):
            config.pop("optimized_steps", None)
        of_siblings = {key: config.pop(key) for key in _SOLVER_OPTIONS - cls._get_init_keys(cls) if key in config}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).register_to_config(**of_siblings)
        return made

    def _start_on(self, curve: Any) -> None:
        """Checks the common arguments and takes the curve; the first thing a constructor does."""
        config = self.config
        _check_one_of("prediction_type", config.prediction_type, _PREDICTION_TYPES)
        _check_one_of("timestep_spacing", config.timestep_spacing, _SPACINGS)
        if config.clip_sample_range is None or not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {config.clip_sample_range!r}")
        self.curve = curve
        alphas_squared = 1 / (1 + np.exp(-curve.at(np.arange(config.num_train_timesteps))))
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
        self._rows: list[Any] = []
        self._next_index = 0

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
            ValueError: If the shapes differ or a timestep on the CPU lies outside [0, T); on another device, where the
                host would have to wait, it is not looked at.
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
        log_snr = self.curve(timesteps.to(sample.device))
        return tuple(torch.sigmoid(sign * log_snr).sqrt().to(sample.dtype).reshape(shape) for sign in (1, -1))

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
        self._set_grid(self._make_grid(num_inference_steps, timesteps), device)

    def _set_grid(self, grid: np.ndarray, device: str | torch.device | None) -> None:
        rows = self._plan(grid)
        if not rows:
            raise ValueError(f"timesteps must leave a step to go before the trajectory's end, got {grid.tolist()}")
        self.num_inference_steps, self._rows, self._next_index = len(grid), rows, 0
        self.timesteps = self._laid = torch.tensor([row.timestep for row in rows], dtype=torch.float32, device=device)

    def _plan(self, grid: np.ndarray) -> list[Any]:
        """For each evaluation of the network its timestep, a float32 number, and what else the step needs, by name."""
        raise NotImplementedError

    def _make_grid(self, num_inference_steps: int | None, timesteps: Sequence[float] | None) -> np.ndarray:
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

    def _index(self, timestep: float | Tensor, model_output: Tensor, sample: Tensor) -> int:
        """Index of the timestep in ``self.timesteps``."""
        if not self._rows:
            raise ValueError("set_timesteps must be called before step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the sample's shape {tuple(sample.shape)}, got {tuple(model_output.shape)}"
            )
        # an element of the timesteps laid tells its index by where it lies in memory: the host need not read it
        laid_at = self._laid.untyped_storage().data_ptr()
        if isinstance(timestep, Tensor) and timestep.untyped_storage().data_ptr() == laid_at:
            return int(timestep.storage_offset())
        value = float(np.float32(float(timestep)))
        places = [index for index, row in enumerate(self._rows) if row.timestep == value]
        if not places:
            times = [row.timestep for row in self._rows]
            raise ValueError(f"timestep must be one of those of set_timesteps, {_short(times)}, got {value:g}")
        if self._next_index in places:
            return self._next_index
        return next((index for index in places if self._rows[index].starts_step), places[0])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Takes the :class:`LinearStep` that is planned at a timestep.

        Args:
            model_output: Output of the network, shape ``(B, *)``.
            timestep: One of ``self.timesteps``.
            sample: Sample at that timestep, shape ``(B, *)``.
            generator: Source of the noise; a list has one for each sample.
            return_dict: Whether to return a [`StepOutput`] instead of a tuple.

        Returns:
            [`StepOutput`], or a tuple of its two fields.

        Raises:
            ValueError: If the timestep is not one of ``self.timesteps`` or the shapes differ.
        """
        index = self._index(timestep, model_output, sample)
        self._next_index = index + 1
        step: LinearStep = self._rows[index]
        wide_sample, wide_output = at_least_single(sample, model_output)
        clean = self._clean(wide_sample, wide_output, step.x0_coefficients)
        prev_sample = step.sample_coefficient * wide_sample + step.x0_coefficient * clean
        if step.noise_std > 0:
            prev_sample = prev_sample + step.noise_std * noise_like(sample, generator)
        prev_sample, clean = prev_sample.to(sample.dtype), clean.to(sample.dtype)
        return StepOutput(prev_sample, clean) if return_dict else (prev_sample, clean)

    def _clean(self, sample: Tensor, model_output: Tensor, coefficients: tuple[float, float]) -> Tensor:
        """The predicted clean sample, clipped if so configured."""
        clean = coefficients[0] * sample + coefficients[1] * model_output
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return clean


def _check_one_of(name: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {tuple(accepted)}, got {value!r}")


def _short(values: Any) -> str:
    """Values for an error message, the middle of many left out."""
    if isinstance(values, (list, tuple, np.ndarray)) and len(values) > 6:
        return f"[{', '.join(f'{v}' for v in values[:3])}, ..., {', '.join(f'{v}' for v in values[-2:])}]"
    return repr(values)


def noise_like(sample: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Standard normal noise for samples ``(B, *)``, of one generator or of one for each sample."""
    if isinstance(generator, list) and len(generator) != len(sample):
        raise ValueError(f"generator must be one or a list of {len(sample)}, one a sample, got {len(generator)}")
    return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)


def at_least_single(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Near pure noise coefficients reach thousands and cancel: half precision would leave nothing."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
