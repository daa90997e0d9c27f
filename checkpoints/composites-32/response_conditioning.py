r"""What a user asks of a conditional denoiser: a response, and how strongly samples are guided towards it.

Classifier-free guidance goes from the prediction without a response, :math:`u`, beyond the one with it, :math:`c`:
:math:`g = u + w (c - u)`. It may act during a part of the steps alone, and its result may be brought back to the spread
of :math:`c`. The names and their meaning are those of diffusers' ``ClassifierFreeGuidance``.

This file travels inside checkpoints: it imports torch and numpy alone.

References:
    | Classifier-Free Diffusion Guidance (Ho & Salimans, 2021)
    | https://arxiv.org/abs/2207.12598
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Guidance", "check_meaning", "check_number", "difference_of_meanings", "prepare_response"]


@dataclass(frozen=True)
class Guidance:
    r"""Classifier-free guidance during a part of the steps.

    Args:
        scale: :math:`w`; 1 is no guidance, 0 no response.
        rescale: :math:`\phi` in [0, 1], how much of the result's spread over a sample is brought back to that of the
            conditional prediction.
        start: Fraction of the steps after which guidance starts.
        stop: Fraction of the steps after which it stops; outside, the conditional prediction stands alone.

    Raises:
        ValueError: If a number is outside its range.

    Example:
        >>> Guidance(scale=2.0, stop=0.8).acts_at(39, 50)
        True

    References:
        | Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models
          (Kynkäänniemi et al., 2024), on the interval
        | https://arxiv.org/abs/2404.07724
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), section 3.4, on rescaling
        | https://arxiv.org/abs/2305.08891
    """

    scale: float = 1.0
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(f"guidance_{field.name}", getattr(self, field.name))
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"guidance_scale must be a non-negative number, got {self.scale!r}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale must lie in [0, 1], got {self.rescale!r}")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(
                f"guidance_start and guidance_stop must be ordered and lie in [0, 1], got {self.start!r} and "
                f"{self.stop!r}"
            )

    def acts_at(self, step: int, num_steps: int) -> bool:
        """Whether step ``step`` of ``num_steps`` needs the prediction without a response."""
        return self.scale != 1 and int(self.start * num_steps) <= step < int(self.stop * num_steps)

    def __call__(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The guided prediction, of the shape ``(B, *)`` of both predictions."""
        guided = unconditional + self.scale * (conditional - unconditional)
        if not self.rescale:
            return guided
        entries = tuple(range(1, guided.ndim))
        spread = conditional.std(entries, keepdim=True) / guided.std(entries, keepdim=True)
        return torch.lerp(guided, guided * spread, self.rescale)


def check_number(name: str, value: Any) -> None:
    """Raises a ``ValueError`` unless the value is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_meaning(name: str, meaning: Mapping[str, Any], encoder: Any) -> None:
    """Raises a ``ValueError`` unless a meaning, named in the message, is what a response encoder was trained for."""
    if encoder.config.meaning is None:
        raise ValueError(f"{name} must be None: this checkpoint was trained without responses")
    if not isinstance(meaning, Mapping):
        raise ValueError(
            f"{name} must be a dictionary as mechdiffusers.response_meaning reads it from a dataset, got {meaning!r}"
        )
    if (other := difference_of_meanings(meaning, encoder.config.meaning)) is not None:
        raise ValueError(f"{name} must agree with what response_encoder was trained for, got {other}")


def difference_of_meanings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first entry in which two meanings differ, in words, ``None`` if there is none."""
    one, other = _as_saved(found), _as_saved(wanted)
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            return f"another {key}: {one.get(key)}, not {other.get(key)}"
    return None


def _as_saved(value: Any) -> Any:
    """A meaning as a file holds it, where tuples and arrays are lists, but not to the last digit."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _as_saved(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_saved(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def prepare_response(response: Tensor | np.ndarray | None, batch_size: int, encoder: Any) -> Tensor:
    """A wanted response, checked against what a checkpoint's response encoder was trained for.

    Args:
        response: Shape ``(B, L, S)``, NaN where open; ``None`` is all open, ``batch_size`` times.
        batch_size: Number of responses, or 1 for as many as there are.
        encoder: The checkpoint's ``ResponseEncoder``.

    Returns:
        The response, float32, shape ``(B, L, S)``.

    Raises:
        ValueError: If the response does not fit the checkpoint.
    """
    expected = tuple(encoder.response_shape)
    if response is None:
        return torch.full((batch_size, *expected), math.nan)
    if expected == (0, 0):
        raise ValueError("response must be None: this checkpoint was trained without responses")
    try:
        # a copy, since torch takes no view that runs backwards
        wanted = torch.as_tensor(response if isinstance(response, Tensor) else np.array(response))
        if wanted.is_complex() or wanted.dtype == torch.bool:
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"response must be a tensor or array of numbers, got {type(response).__name__}") from None
    wanted, cases = wanted.float(), encoder.config.meaning["load_cases"]
    if wanted.ndim != 3 or tuple(wanted.shape[1:]) != expected:
        raise ValueError(
            f"response must have shape (B, {expected[0]}, {expected[1]}): the load cases {cases} at {expected[1]} "
            f"strains each; got shape {tuple(wanted.shape)}"
        )
    if batch_size not in (1, len(wanted)):
        raise ValueError(f"batch_size must be left out or be the {len(wanted)} responses, got {batch_size}")
    if not len(wanted) or wanted.isnan().flatten(1).all(1).any() or wanted.isinf().any():
        raise ValueError("response must be finite somewhere in each sample, NaN only where open, and never infinite")
    if (wanted < 0).any():
        sample, case, strain = (wanted < 0).nonzero()[0].tolist()
        raise ValueError(
            "response must be non-negative, since it belongs to magnitudes of strain, in compression too; got "
            f"{wanted[sample, case, strain].item():g} in sample {sample}, load case {cases[case]!r}"
        )
    if ((wanted == 0).any(-1) & ~(wanted > 0).any(-1)).any():
        raise ValueError("response must not be zero all along a load case: NaN leaves it open")
    return wanted
