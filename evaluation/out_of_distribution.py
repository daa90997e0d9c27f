r"""Does a score tell designs of other families from held-out ones?

Here are the receiver operating characteristic of a score between two sets of designs, and a simple score. The families
are :data:`mechdiffusers.microstructures.DESIGN_FAMILIES`. Likelihood is no sure sign of a strange design: simple ones
can be likelier than all that was trained on (Nalisnick et al. 2019). So a study needs several families and a simple
score.

References:
    | Do Deep Generative Models Know What They Don't Know? (Nalisnick et al., 2019)
    | https://arxiv.org/abs/1810.09136
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from mechdiffusers.evaluation.statistics import two_point_correlation

__all__ = ["Roc", "StatisticsDistance", "receiver_operating_characteristic"]


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
