"""Neighbours of a binary design: sets of pixels at the interface that change phase, chosen by what a predictor says.

The pixels are chosen as in matching pursuit, though each with the coefficient one: one after the other, the pixel whose
own change of the prediction takes most of what is left to the target. The interface grows no longer than is allowed:
without that, designs grow rough, which they are not likely to be.

References:
    | Matching pursuits with time-frequency dictionaries (Mallat & Zhang, 1993)
    | https://doi.org/10.1109/78.258082
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from mechdiffusers.evaluation.inverse_design.response import as_array

__all__ = ["Predictor", "interface_length", "lengthening", "sets_of_flips"]

#: Predictor of responses ``(B, L, S)`` for designs ``(B, H, W)``, as ``pipe.predict_response``.
Predictor = Callable[[np.ndarray], "np.ndarray | Tensor"]

#: Pixels whose own change is predicted, and sets of them that are predicted together.
_PIXELS, _SETS = 128, 48
#: The most pixels of a set, and the share of the pixels that it may choose from, for the sets to differ.
_LARGEST, _SHARE = 8, 0.4


def sets_of_flips(
    design: np.ndarray,
    expected: np.ndarray,
    wanted: np.ndarray,
    scale: np.ndarray,
    max_length: int,
    predict: Predictor,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Neighbours of a design: in each, a set of pixels changes phase, and the interface is at most ``max_length``.

    The difference in each load case counts by the inverse of its ``scale``, shape ``(L,)``.
    """
    pixels = np.flatnonzero(lengthening(design) < lengthening(np.zeros_like(design)))  # some neighbour is another
    if not len(pixels):
        return []
    pixels = rng.choice(pixels, min(_PIXELS, len(pixels)), replace=False)
    flipped = np.repeat(design.reshape(1, -1), len(pixels), axis=0)
    flipped[np.arange(len(pixels)), pixels] = 1 - flipped[np.arange(len(pixels)), pixels]
    given = ~np.isnan(wanted)
    weight = np.where(given, 1 / scale[:, None], 0.0)
    before = as_array(predict(design[None]))
    effect = ((as_array(predict(flipped.reshape(-1, *design.shape))) - before) * weight).reshape(len(pixels), -1)
    left = np.repeat((np.where(given, wanted - expected, 0.0) * weight).reshape(1, -1), _SETS, axis=0)

    # all sets at once: shape (sets, pixels); adding pixel j to set i changes |left|^2 by |effect|^2 - 2 left . effect
    free, sizes = rng.random((_SETS, len(pixels))) < _SHARE, rng.integers(1, _LARGEST + 1, _SETS)
    found = np.repeat(design[None], _SETS, axis=0)
    flat, allowance = found.reshape(_SETS, -1), np.full(_SETS, max_length - interface_length(design))
    for step in range(_LARGEST):
        longer = lengthening(found).reshape(_SETS, -1)[:, pixels]
        gain = np.where(free & (longer <= allowance[:, None]), (effect**2).sum(1) - 2 * left @ effect.T, np.inf)
        rows = np.flatnonzero((gain.min(1) < 0) & (step < sizes))
        pixel = gain.argmin(1)[rows]
        free[rows, pixel] = False
        flat[rows, pixels[pixel]] = 1 - flat[rows, pixels[pixel]]
        allowance[rows] -= longer[rows, pixel]
        left[rows] -= effect[pixel]
    return [each for each in np.unique(found, axis=0) if (each != design).any()]


def interface_length(design: np.ndarray) -> int:
    """Sides that pixels of different phases share."""
    return int((design[1:] != design[:-1]).sum() + (design[:, 1:] != design[:, :-1]).sum())


def lengthening(designs: np.ndarray) -> np.ndarray:
    """How much longer the interface of designs ``(..., H, W)`` is where that pixel alone changes, same shape."""
    padded = np.pad(designs, [(0, 0)] * (designs.ndim - 2) + [(1, 1), (1, 1)], constant_values=np.nan)
    around = (
        padded[..., :-2, 1:-1],
        padded[..., 2:, 1:-1],
        padded[..., 1:-1, :-2],
        padded[..., 1:-1, 2:],
    )
    return np.sum([(near == designs).astype(int) - (near == 1 - designs) for near in around], axis=0)
