r"""Does a score tell designs of other families from held-out ones?

Families of designs that a training set does not hold, and the receiver operating characteristic of a score between two
sets. Likelihood is no sure sign of a strange design: simple ones can be likelier than all that was trained on
(Nalisnick et al. 2019), so that a study needs several families and a simple score beside it.

References:
    | Do Deep Generative Models Know What They Don't Know? (Nalisnick et al., 2019)
    | https://arxiv.org/abs/1810.09136
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from mechdiffusers.evaluation.statistics import two_point_correlation
from mechdiffusers.microstructures import random_composites

__all__ = ["DESIGN_FAMILIES", "Roc", "StatisticsDistance", "receiver_operating_characteristic"]


def _laminates(num: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Parallel layers in any direction, 2 to 6 periods a cell, of any volume fraction from 0.2 to 0.8."""
    angle, periods, share, phase = (
        rng.uniform(low, high, num)[:, None, None] for low, high in ((0, np.pi), (2, 6), (0.2, 0.8), (0, 1))
    )
    row, column = np.mgrid[:size, :size] / size
    return ((np.cos(angle) * column + np.sin(angle) * row) * periods + phase) % 1 < share


def _checkerboards(num: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Squares of 2 to 8 pixels a side, shifted."""
    side, right, down = (rng.integers(low, high, num)[:, None, None] for low, high in ((2, 9), (0, 16), (0, 16)))
    row, column = np.mgrid[:size, :size]
    return ((row + down) // side + (column + right) // side) % 2


def _flipped(num: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random composites of which one pixel in fifty is flipped."""
    return np.abs(_composites(num, size, rng) - (rng.uniform(size=(num, size, size)) < 0.02))


def _composites(num: int, size: int, rng: np.random.Generator, **ranges: tuple[float, float]) -> np.ndarray:
    return random_composites(num, size, int(rng.integers(2**31)), **ranges)[0]


#: Of a number of designs, their size and a generator, designs (num, size, size) of a family.
DESIGN_FAMILIES: Mapping[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "laminates": _laminates,
    "checkerboards": _checkerboards,
    "inverted contrast": lambda num, size, rng: 1 - _composites(num, size, rng),
    "finer fields": lambda num, size, rng: _composites(num, size, rng, bandwidth=(5.0, 8.0)),
    "coarser fields": lambda num, size, rng: _composites(num, size, rng, bandwidth=(0.5, 1.2)),
    "stretched fields": lambda num, size, rng: _composites(num, size, rng, anisotropy=(8.0, 16.0)),
    "dilute fields": lambda num, size, rng: _composites(num, size, rng, volume_fraction=(0.03, 0.12)),
    "flipped pixels": _flipped,
    "noise": lambda num, size, rng: rng.uniform(size=(num, size, size)) < rng.uniform(0.2, 0.8, (num, 1, 1)),
}


class Roc(NamedTuple):
    """Receiver operating characteristic.

    Args:
        false_positives: Share of usual designs called strange, rising from 0 to 1.
        true_positives: Share of strange designs called so, at the same thresholds.
        area: Area under the curve: the probability that a strange design scores above a usual one, ties half.
    """

    false_positives: np.ndarray
    true_positives: np.ndarray
    area: float


def receiver_operating_characteristic(usual: np.ndarray, strange: np.ndarray) -> Roc:
    """How well a score that should be high for strange designs tells them from usual ones.

    Args:
        usual: Scores of usual designs, shape ``(N,)``.
        strange: Scores of strange ones, shape ``(M,)``.

    Returns:
        The curve and its area.

    Raises:
        ValueError: If a set is empty or holds no numbers in one row.

    Example:
        >>> receiver_operating_characteristic(np.array([0.0, 1.0]), np.array([0.5, 2.0])).area
        0.75
    """
    for name, scores in (("usual", usual), ("strange", strange)):
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"{name} must be finite scores, shape (N,), got shape {scores.shape}")
    thresholds = np.append(np.inf, np.unique(np.concatenate([usual, strange]))[::-1])
    false_positives, true_positives = (
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores) for scores in (usual, strange)
    )
    ranks = rankdata(np.concatenate([usual, strange]))[len(usual) :]
    area = (ranks.sum() - len(strange) * (len(strange) + 1) / 2) / (len(usual) * len(strange))
    return Roc(false_positives, true_positives, float(area))


class StatisticsDistance:
    """The simple score: Mahalanobis distance of a design's two-point correlation at short lags from known designs'.

    Args:
        designs: Known designs, shape ``(B, H, W)``, more than there are lags.
        reach: Lags up to so many pixels along each axis.
    """

    def __init__(self, designs: np.ndarray, reach: int = 3):
        self._reach = reach
        features = self._features(designs)
        self._mean = features.mean(0)
        spread = np.cov(features, rowvar=False)
        self._precision = np.linalg.pinv(spread, rcond=1e-8, hermitian=True)

    def __call__(self, designs: np.ndarray) -> np.ndarray:
        """Distances, shape ``(B,)``, of designs ``(B, H, W)``."""
        deviation = self._features(designs) - self._mean
        return np.sqrt(np.einsum("bi,ij,bj->b", deviation, self._precision, deviation).clip(min=0))

    def _features(self, designs: np.ndarray) -> np.ndarray:
        correlation = two_point_correlation(np.asarray(designs, dtype=np.float64))
        lags = range(-self._reach, self._reach + 1)
        half = [(y, x) for y in lags for x in lags if y > 0 or (y == 0 and x >= 0)]  # S2(-r) = S2(r)
        return np.stack([correlation[:, y, x] for y, x in half], axis=1)
