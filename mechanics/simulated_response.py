"""The response that a meaning speaks of, simulated: what datasets store and verifications compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mechdiffusers.mechanics.simulate import simulate

__all__ = ["simulated_response"]


def simulated_response(
    designs: np.ndarray, meaning: Mapping[str, Any], device: str | torch.device | None = None, progress: bool = False
) -> np.ndarray:
    """Simulates designs as the meaning of a response says.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1].
        meaning: As :func:`mechdiffusers.response_meaning` reads it from a dataset.
        device: Where to compute; by default on the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The response, shape ``(B, L, S)``, float64, NaN where not solved.

    Example:
        >>> stiff = simulated_response(np.ones((1, 8, 8)), meaning)  # doctest: +SKIP
    """
    material = meaning["material"]
    result = simulate(
        designs,
        meaning["load_cases"],
        meaning["strains"],
        element_order=meaning["element_order"],
        young_soft=material["young_soft"],
        young_stiff=material["young_stiff"],
        poisson=material["poisson"],
        pixel_size=meaning["pixel_size"],
        device=device,
        progress=progress,
    )
    return getattr(result, meaning["quantity"])
