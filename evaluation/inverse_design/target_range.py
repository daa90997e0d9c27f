r"""Does a target lie within what the training data can reach? A generator answers impossible wishes too.

Two things can be wrong with a target, and each has its score:

- *Nothing comes near it*: the :func:`.response_error` of the nearest training design, which is large where the curves
  are too stiff, too soft or contradict each other.
- *No curve has its shape*: the Mahalanobis distance :math:`\left((y - m)^T (C + \tau^2 I)^{-1} (y - m)\right)^{1/2}`
  of the logarithms :math:`y` of its entries, with mean :math:`m` and covariance :math:`C` of the training data. These
  fill few of the directions of response space, so that a kink or a falling curve shows, however near its values are.
  :math:`\tau` is the relative precision of a target: what lies within it is no contradiction. Of responses that are
  zero or negative somewhere, :math:`y` are the entries over their root mean square in the place of logarithms.

Each score becomes a p-value by its rank among those of held-out designs: the fraction of these that are as far out.
It is exact for whatever distribution the responses have. Twice the smaller one is the p-value of the target
(Bonferroni): of targets that are drawn as the held-out designs are, at most a fraction p has one of p or less.
Unspecified entries of a target are left out of all of it: what counts are the designs that are solved at the others.

References:
    | Testing for Outliers with Conformal p-values (Bates et al., 2023), on p-values by rank
    | https://arxiv.org/abs/2104.08279
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from mechdiffusers.evaluation.inverse_design.response import as_array, response_error

__all__ = ["OutOfRangeWarning", "RangeCheck", "TargetRange"]


class OutOfRangeWarning(UserWarning):
    """A target lies outside what the training data can reach."""


@dataclass
class RangeCheck:
    """How far out T targets lie."""

    p_value: np.ndarray  #: twice the smaller p-value of the two scores, at most 1, shape (T,); NaN if nothing tells it
    nearest_error: np.ndarray  #: error of the nearest training design's stored response, shape (T,)
    shape_distance: np.ndarray  #: Mahalanobis distance of the logarithms, or of the entries, shape (T,)
    out_of_range: np.ndarray  #: whether the p-value is below the level, bool, shape (T,)


class TargetRange:
    r"""What training data can reach, calibrated on held-out designs.

    Args:
        training_responses: Shape ``(N, L, S)``, NaN where not solved.
        heldout_responses: Shape ``(M, L, S)``, of designs that are not among the training data, likewise. A p-value is
            at least ``2 / (M + 1)``.
        tolerance: :math:`\tau`, the relative precision of targets.
        signed: Whether the response may be negative, as its specification says.

    Raises:
        ValueError: If the responses are not of one shape or too few.

    Example:
        >>> reach = TargetRange(stored_responses(train), stored_responses(heldout))  # doctest: +SKIP
        >>> reach.check(targets).p_value  # doctest: +SKIP
    """

    def __init__(
        self,
        training_responses: np.ndarray | Tensor,
        heldout_responses: np.ndarray | Tensor,
        tolerance: float = 0.01,
        *,
        signed: bool = False,
    ):
        self._training = _known("training_responses", training_responses)
        self._heldout = _known("heldout_responses", heldout_responses)
        if self._training.shape[1:] != self._heldout.shape[1:]:
            raise ValueError(
                f"heldout_responses must be of the load cases and strains of the training responses, "
                f"{self._training.shape[1:]}, got {self._heldout.shape}"
            )
        _check_number("tolerance", tolerance)
        if not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance must be a positive number, got {tolerance!r}")
        self._tolerance, self._signed = tolerance, signed
        self._positive = not (self._training <= 0).any()
        known = np.isfinite(self._training)
        square = np.where(known, self._training, 0.0) ** 2
        self._size = np.sqrt(square.sum(0) / known.sum(0).clip(1))
        self._size[self._size == 0] = 1

    def check(
        self, targets: np.ndarray | Tensor, *, level: float = 0.01, names: Sequence[str] | None = None
    ) -> RangeCheck:
        """Scores targets, and warns of those that lie outside.

        Args:
            targets: Shape ``(T, L, S)``, NaN where unspecified.
            level: p-value below which a target lies outside; at most so many of the targets within are called outside
                too.
            names: Of the targets, for the warning; their numbers by default.

        Returns:
            The p-values and the scores behind them.

        Raises:
            ValueError: If the targets have another shape, or are unspecified everywhere or infinite, if
                ``level`` is not in [0, 1], or the names are not one for each target.

        Warns:
            OutOfRangeWarning: If a p-value is below ``level``, or cannot be, there being too few held-out designs.
        """
        wanted = as_array(targets, "targets")
        if wanted.ndim != 3 or wanted.shape[1:] != self._training.shape[1:]:
            raise ValueError(
                f"targets must have shape (T, {', '.join(map(str, self._training.shape[1:]))}), got {wanted.shape}"
            )
        if np.isnan(wanted).all((1, 2)).any() or np.isinf(wanted).any():
            raise ValueError("targets must be finite where given, and given somewhere in each")
        _check_number("level", level)
        if not 0 <= level <= 1:
            raise ValueError(f"level must lie in [0, 1], got {level!r}")
        names = [str(index) for index in range(len(wanted))] if names is None else names
        if isinstance(names, str) or not isinstance(names, Iterable) or len(names := list(names)) != len(wanted):
            raise ValueError(f"names must be {len(wanted)}, one for each target, got {names!r}")
        scores = np.full((2, len(wanted)), math.nan)
        p_values = np.full(len(wanted), math.nan)
        given = ~np.isnan(wanted)
        fewest = len(self._heldout)
        for mask in np.unique(given, axis=0):  # targets with the same unspecified entries share their calibration
            alike = (given == mask).all((1, 2))
            training, heldout = (
                np.where(mask, values, math.nan)[np.isfinite(values[:, mask]).all(1)]
                for values in (self._training, self._heldout)
            )
            num = len(heldout) if len(training) > 1 else 0
            fewest = min(fewest, num)
            if not num:
                continue
            scores[:, alike], calibration = (self._scores(each, training) for each in (wanted[alike], heldout))
            as_far = (calibration[:, None, :] >= scores[:, alike, None]).sum(-1)
            p_values[alike] = np.minimum(1, 2 * (1 + as_far).min(0) / (1 + num))
        if 0 < level <= 2 / (1 + fewest):
            warnings.warn(
                f"targets cannot be told to lie outside what the training data can reach at the level {level:g}: that "
                f"takes {math.floor(2 / level)} held-out designs that are solved where a target is given, there are "
                f"{fewest}",
                OutOfRangeWarning,
                stacklevel=2,
            )
        outside = p_values < level
        if outside.any():
            which = "; ".join(f"{names[i]} (p = {p_values[i]:.2g})" for i in np.flatnonzero(outside).tolist())
            warnings.warn(
                f"outside what the training data can reach, so that designs will miss them: targets {which}",
                OutOfRangeWarning,
                stacklevel=2,
            )
        return RangeCheck(p_values, scores[0], scores[1], outside)

    def _entries(self, responses: np.ndarray) -> np.ndarray:
        """What the covariance is of, flat: logarithms where the training data have them."""
        flat = responses.reshape(len(responses), -1)
        if not self._positive:
            return flat / self._size.ravel()
        return np.log(np.maximum(flat, 1e-300))  # a target may be zero

    def _scores(self, targets: np.ndarray, training: np.ndarray) -> np.ndarray:
        """Both scores of targets with the same unspecified entries, shape ``(2, T)``."""
        nearest = np.array([response_error(training, target, signed=self._signed).min() for target in targets])
        given = ~np.isnan(targets[0]).ravel()
        entries = self._entries(training)[:, given]
        offset = self._entries(targets)[:, given] - entries.mean(0)
        covariance = np.atleast_2d(np.cov(entries.T)) + self._tolerance**2 * np.eye(entries.shape[1])
        lower = np.linalg.cholesky(covariance)
        return np.stack([nearest, np.linalg.norm(np.linalg.solve(lower, offset.T), axis=0)])


def _known(name: str, responses: np.ndarray | Tensor) -> np.ndarray:
    """Those of the responses that are solved somewhere, float64, NaN elsewhere."""
    values = as_array(responses, name)
    if values.ndim != 3:
        raise ValueError(f"{name} must have shape (N, L, S), got {values.shape}")
    values = np.where(np.isfinite(values), values, math.nan)
    values = values[np.isfinite(values).any((1, 2))]
    if len(values) < 2:
        raise ValueError(f"{name} must hold at least two solved designs, got {len(values)}")
    return values


def _check_number(name: str, value: Any) -> None:
    """Raises a ``ValueError`` unless the value is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
