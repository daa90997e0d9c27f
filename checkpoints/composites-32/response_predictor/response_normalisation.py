r"""Responses as a network sees them: normalised on a logarithmic scale.

What counts of a response is its relative error in each load case, and responses of two-phase designs range over more
than a decade. So an entry :math:`y` is normalised on a logarithmic scale, but one that has a place for zero and below,
as a target may lie there: :math:`(\operatorname{asinh}(y / s) - m) / d`, with :math:`s` near the least of the training
data, and :math:`m` and :math:`d` the mean and the standard deviation of the first term.

This file travels inside checkpoints: it imports torch and numpy alone.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NormalisedResponse", "response_normalisation"]


def response_normalisation(response: Tensor) -> dict[str, list[list[float]]]:
    """What responses are normalised by, measured on training data.

    Args:
        response: Shape ``(B, L, S)``, NaN where unknown.

    Returns:
        ``scale``, ``mean`` and ``std``, the arguments of the networks that see or predict responses. An
        entry that is the same for all designs has ``std`` 1.

    Raises:
        ValueError: If an entry is unknown of all designs.
    """
    values = response.double().numpy()
    if unknown := np.argwhere(np.isnan(values).all(0)).tolist():
        raise ValueError(
            f"response must be known of some design in every entry, got none in load case {unknown[0][0]} at strain "
            f"{unknown[0][1]}"
        )
    magnitudes = np.where(values == 0, np.nan, np.abs(values))
    with_some = ~np.isnan(magnitudes).all(0)
    scale = np.ones(values.shape[1:])
    scale[with_some] = np.nanquantile(magnitudes[:, with_some], 0.01, axis=0)
    logarithms = np.arcsinh(values / scale)
    mean, std = np.nanmean(logarithms, 0), np.nanstd(logarithms, 0)
    std[std <= 1e-6 * np.abs(mean)] = 1
    return {"scale": scale.tolist(), "mean": mean.tolist(), "std": std.tolist()}


class NormalisedResponse:
    """The part of a network that knows what the entries of a response are and what they are normalised by.

    Its configuration holds ``meaning``, ``scale``, ``mean`` and ``std``.
    """

    config: Any

    @property
    def response_shape(self) -> tuple[int, int]:
        """(L, S), the shape of a response; (0, 0) for a network that knows none."""
        if self.config.meaning is None:
            return (0, 0)
        strains = self.config.meaning["strains"]
        return (len(strains), len(strains[0]) if strains else 0)

    def normalise(self, response: Tensor) -> Tensor:
        """Normalises responses ``(B, L, S)``, NaN where open; float32, as units may need more digits than weights."""
        scale, mean, std = self._normalisation(response.device)
        return (torch.asinh(response.float() / scale) - mean) / std

    def denormalise(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        scale, mean, std = self._normalisation(values.device)
        return torch.sinh(values.float() * std + mean) * scale

    def _normalisation(self, device: torch.device) -> list[Tensor]:
        return [torch.tensor(self.config[name], device=device) for name in ("scale", "mean", "std")]

    def _check_normalisation(self) -> None:
        """Raises a ``ValueError`` unless ``meaning``, ``scale``, ``mean`` and ``std`` fit together."""
        meaning = self.config.meaning
        if not {"load_cases", "strains"} <= meaning.keys():
            raise ValueError(f"meaning must have 'load_cases' and 'strains', got {sorted(meaning)}")
        entries = {name: self.config[name] for name in ("scale", "mean", "std")}
        shapes = {np.array(values, dtype=float).shape for values in (meaning["strains"], *entries.values())}
        if shapes != {self.response_shape} or len(meaning["load_cases"]) != self.response_shape[0]:
            raise ValueError(
                f"scale, mean and std must be {self.response_shape[0]} lists of {self.response_shape[1]} numbers, as "
                f"the strains of the load cases {meaning['load_cases']} are, got {entries}"
            )
        for name in ("scale", "std"):
            if not (np.array(entries[name]) > 0).all():
                raise ValueError(f"{name} must be positive everywhere, got {entries[name]!r}")
