r"""Statistics of sets of designs: do samples look like the data, on average over the set?

The two-point correlation :math:`S_2(r)` of a design is the probability that two points a lag :math:`r` apart are both
stiff. On a periodic pixel grid it is the autocorrelation, which the fast Fourier transform gives at all lags at once;
:math:`S_2(0)` is the volume fraction.

References:
    | Random Heterogeneous Materials (Torquato, 2002), section 2.2
    | https://doi.org/10.1007/978-1-4757-6355-8
"""

from collections.abc import Callable
from typing import overload

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

__all__ = [
    "bootstrap_interval",
    "distance_of_means",
    "sliced_wasserstein_distance",
    "two_point_correlation",
    "two_point_error",
    "volume_fraction_distance",
]


@overload
def two_point_correlation(designs: np.ndarray) -> np.ndarray: ...
@overload
def two_point_correlation(designs: Tensor) -> Tensor: ...
def two_point_correlation(designs: np.ndarray | Tensor) -> np.ndarray | Tensor:
    r"""Two-point correlation of the stiff phase of each design, periodic.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1], an array or a tensor.

    Returns:
        :math:`S_2` at every lag, of the same kind, float64, shape ``(B, H, W)``; lag zero at ``[0, 0]``.

    Raises:
        ValueError: If ``designs`` is not a stack of designs in [0, 1].

    Example:
        >>> float(two_point_correlation(np.ones((1, 4, 4)))[0, 1, 2])
        1.0
    """
    array = _checked("designs", designs.cpu().numpy() if isinstance(designs, Tensor) else designs)
    correlation = np.fft.irfft2(np.abs(np.fft.rfft2(array)) ** 2, s=array.shape[1:]) / array[0].size
    return torch.from_numpy(correlation).to(designs.device) if isinstance(designs, Tensor) else correlation


def two_point_error(samples: np.ndarray, reference: np.ndarray) -> float:
    r"""L2 norm over all lags of the difference of two sets' mean two-point correlations.

    :math:`\left(\frac{1}{HW} \sum_r (\bar S_2(r) - \bar S_2^*(r))^2\right)^{1/2}`, a root mean square over lags, so
    that it does not depend on the number of pixels.

    Args:
        samples: Shape ``(B, H, W)``, in [0, 1].
        reference: Shape ``(B', H, W)``, in [0, 1].

    Returns:
        The error, in [0, 1].

    Raises:
        ValueError: If a set is no stack of designs in [0, 1], or the designs have different sizes.
    """
    ours, theirs = two_point_correlation(samples), two_point_correlation(reference)
    if ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"samples must have the reference's size {theirs.shape[1:]}, got {ours.shape[1:]}")
    return distance_of_means(ours, theirs)


def distance_of_means(samples: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference of two sets' means; of two-point correlations it is :func:`two_point_error`.

    Apart from it so that a bootstrap need not correlate the same designs again in every resample.

    Args:
        samples: Shape ``(B, *)``.
        reference: Shape ``(B', *)``.

    Returns:
        The distance.
    """
    return float(np.sqrt(np.mean((samples.mean(0) - reference.mean(0)) ** 2)))


def volume_fraction_distance(samples: np.ndarray, reference: np.ndarray) -> float:
    """Wasserstein-1 distance between the distributions of the volume fraction of two sets of designs.

    Args:
        samples: Shape ``(B, H, W)``, in [0, 1].
        reference: Shape ``(B', H, W)``, in [0, 1].

    Returns:
        The distance, a volume fraction.

    Raises:
        ValueError: If a set is no stack of designs in [0, 1].
    """
    ours, theirs = _checked("samples", samples), _checked("reference", reference)
    return float(wasserstein_distance(ours.mean((1, 2)), theirs.mean((1, 2))))


def sliced_wasserstein_distance(
    samples: np.ndarray, reference: np.ndarray, *, num_directions: int = 64, seed: int = 0
) -> float:
    r"""Mean over random directions of the Wasserstein-1 distance between two sets of points projected on them.

    Args:
        samples: Shape ``(B, D)``.
        reference: Shape ``(B', D)``.
        num_directions: Number of directions, uniform on the sphere.
        seed: Seed of the directions.

    Returns:
        The distance, in the units of the points.

    Raises:
        ValueError: If the sets are not of points of one dimension.

    References:
        | Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015), section 3
        | https://doi.org/10.1007/s10851-014-0506-3
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"samples and reference must have shapes (B, D) and (B', D), got {samples.shape} and {reference.shape}"
        )
    directions = np.random.default_rng(seed).standard_normal((num_directions, samples.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(np.mean([wasserstein_distance(samples @ along, reference @ along) for along in directions]))


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Basic bootstrap interval of a statistic of two sets, both resampled.

    :math:`[2 \hat\theta - q_{high}, 2 \hat\theta - q_{low}]` of the resampled statistic's quantiles. Resampling adds
    the sets' own noise to a distance once more; this interval takes the excess away, where the percentile interval
    would lie above the estimate itself.

    Args:
        statistic: Function of two sets.
        samples: First set, resampled along its first axis.
        reference: Second set, resampled likewise.
        num_resamples: Number of resamples.
        level: Coverage of the interval, in (0, 1).
        seed: Seed of the resampling.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: If ``level`` is not in (0, 1).

    References:
        | Bootstrap Methods and their Application (Davison & Hinkley, 1997), section 5.2
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie inside (0, 1), got {level!r}")
    rng = np.random.default_rng(seed)
    values = [
        statistic(
            samples[rng.integers(len(samples), size=len(samples))],
            reference[rng.integers(len(reference), size=len(reference))],
        )
        for _ in range(num_resamples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    estimate = statistic(samples, reference)
    return float(2 * estimate - high), float(2 * estimate - low)


def _checked(name: str, designs: np.ndarray) -> np.ndarray:
    designs = np.asarray(designs, dtype=np.float64)
    if designs.ndim != 3 or 0 in designs.shape:
        raise ValueError(f"{name} must be a stack of designs, shape (B, H, W), got shape {designs.shape}")
    if not ((designs >= 0) & (designs <= 1)).all():  # also false for NaN
        raise ValueError(f"{name} must lie in [0, 1] and hold no NaN")
    return designs
