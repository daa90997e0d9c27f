r"""Statistics of sets of designs: do samples look like the data, on average over the set?

The two-point correlation :math:`S_2(r)` of a design is the probability that two points a lag :math:`r` apart are both
stiff: the number of such pairs of pixels over the number of all pairs at that lag. The fast Fourier transform counts
them at all lags at once. A periodic design has pairs across its edges; a crop of a larger image has only the pairs
inside it, and is padded with zeros. :math:`S_2(0)` is the volume fraction.

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
def two_point_correlation(designs: np.ndarray, *, periodic: bool = True) -> np.ndarray: ...
@overload
def two_point_correlation(designs: Tensor, *, periodic: bool = True) -> Tensor: ...
def two_point_correlation(designs: np.ndarray | Tensor, *, periodic: bool = True) -> np.ndarray | Tensor:
    r"""Two-point correlation of the stiff phase of each design.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1], an array or a tensor.
        periodic: Whether the designs continue across their edges. ``False`` is for crops of a larger image.

    Returns:
        :math:`S_2` at every lag, of the same kind, float64, lag zero at ``[0, 0]`` and lag ``(-y, -x)`` at
        ``[-y, -x]``: shape ``(B, H, W)`` if periodic, ``(B, 2 H - 1, 2 W - 1)`` if not. Of a tensor, differentiable.

    Raises:
        ValueError: If ``designs`` is not a stack of designs in [0, 1].

    Example:
        >>> float(two_point_correlation(np.ones((1, 4, 4)))[0, 1, 2])
        1.0
        >>> two_point_correlation(np.ones((1, 4, 4)), periodic=False).shape
        (1, 7, 7)
    """
    stack = _checked("designs", designs)
    correlation = _num_stiff_pairs(stack, periodic) / _num_pairs(stack, periodic)
    return correlation if isinstance(designs, Tensor) else correlation.numpy()


@overload
def two_point_error(samples: np.ndarray, reference: np.ndarray, *, periodic: bool = True) -> float: ...
@overload
def two_point_error(samples: Tensor, reference: Tensor, *, periodic: bool = True) -> Tensor: ...
def two_point_error(
    samples: np.ndarray | Tensor, reference: np.ndarray | Tensor, *, periodic: bool = True
) -> float | Tensor:
    r"""L2 norm over all lags of the difference of two sets' mean two-point correlations.

    :math:`\left(\sum_r n_r (\bar S_2(r) - \bar S_2^*(r))^2 / \sum_r n_r\right)^{1/2}` with the number :math:`n_r` of
    pairs of pixels at a lag: a root mean square, so that it does not depend on the number of pixels. Periodic designs
    have as many pairs at all lags. In a crop the longest lag has one pair.

    Args:
        samples: Shape ``(B, H, W)``, in [0, 1].
        reference: Shape ``(B', H, W)``, in [0, 1], of the same kind.
        periodic: Whether the designs continue across their edges. ``False`` is for crops of a larger image.

    Returns:
        The error, in [0, 1]; of tensors a differentiable tensor, shape ``()``.

    Raises:
        ValueError: If a set is no stack of designs in [0, 1], or the designs have different sizes.

    Example:
        >>> two_point_error(np.ones((1, 4, 4)), np.zeros((2, 4, 4)), periodic=False)
        1.0
    """
    ours, theirs = _checked("samples", samples), _checked("reference", reference)
    if ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(
            f"samples must have the reference's size {tuple(theirs.shape[1:])}, got {tuple(ours.shape[1:])}"
        )
    num_pairs = _num_pairs(ours, periodic)
    means = [(_num_stiff_pairs(designs, periodic) / num_pairs).mean(0) for designs in (ours, theirs)]
    square = ((means[0] - means[1]).square() * num_pairs / num_pairs.sum()).sum()
    error = square.sqrt() if square > 0 else square  # equal sets have a gradient too: zero, at their least
    return error if isinstance(samples, Tensor) else error.item()


def distance_of_means(samples: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference of two sets' means.

    Of periodic two-point correlations it is :func:`two_point_error`.

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
    return float(wasserstein_distance(ours.mean((1, 2)).numpy(), theirs.mean((1, 2)).numpy()))


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


def _num_stiff_pairs(designs: Tensor, periodic: bool) -> Tensor:
    """How many pairs of pixels at each lag are both stiff, shape ``(B, *lags)``."""
    height, width = designs.shape[1:]
    lags = (height, width) if periodic else (2 * height - 1, 2 * width - 1)
    spectrum = torch.fft.rfft2(designs, s=lags)
    return torch.fft.irfft2(spectrum.real.square() + spectrum.imag.square(), s=lags)


def _num_pairs(designs: Tensor, periodic: bool) -> Tensor:
    """How many pairs of pixels there are at each lag, shape ``(*lags)``."""
    return _num_stiff_pairs(torch.ones_like(designs[:1]), periodic)[0].round()


def _checked(name: str, designs: np.ndarray | Tensor) -> Tensor:
    # copied: torch takes no array whose strides are negative
    stack = designs.double() if isinstance(designs, Tensor) else torch.from_numpy(np.array(designs, dtype=np.float64))
    if stack.ndim != 3 or 0 in stack.shape:
        raise ValueError(f"{name} must be a stack of designs, shape (B, H, W), got shape {tuple(stack.shape)}")
    if not ((stack >= 0) & (stack <= 1)).all():  # also false for NaN
        raise ValueError(f"{name} must lie in [0, 1] and hold no NaN")
    return stack
