r"""Random two-phase composites: thresholded, periodic, anisotropic Gaussian random fields.

White noise on the pixel grid is filtered in Fourier space to the power spectrum

.. math:: S(k) = \exp\left(-\frac{|k'|^2}{2 \ell^2}\right), \qquad
          k' = \left(\sqrt{r}\, k_\parallel,\ k_\perp / \sqrt{r}\right),

with :math:`k` in cycles per cell, bandwidth :math:`\ell` and :math:`k` split along and across the direction
:math:`\theta`. The ratio of the correlation lengths along and across :math:`\theta` is the anisotropy :math:`r`; the
area of a feature does not depend on it. The pixels where the field is largest are the stiff phase, as many as the
volume fraction asks for. The field is periodic because the discrete Fourier transform is.

References:
    | Random Heterogeneous Materials (Torquato, 2002), chapter 8, on level cuts of random fields
    | https://doi.org/10.1007/978-1-4757-6355-8
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["random_composites"]

#: Designs filtered at once: bounds the memory of the Fourier transforms to a few tens of megabytes.
_CHUNK = 1024


def random_composites(
    num: int,
    size: int = 32,
    seed: int = 0,
    *,
    volume_fraction: Sequence[float] = (0.2, 0.8),
    bandwidth: Sequence[float] = (1.5, 4.0),
    anisotropy: Sequence[float] = (1.0, 4.0),
    direction: Sequence[float] = (0.0, math.pi),
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    r"""Draws binary composites; design ``i`` of a seed is the same whatever ``num`` is.

    Args:
        num: Number of designs, at least 1.
        size: Pixels along each side, at least 4.
        seed: Non-negative integer; with the index of a design it determines the design.
        volume_fraction: Range of the stiff phase's share of the area, uniform, within (0, 1).
        bandwidth: Range of :math:`\ell` in cycles per cell, uniform, positive.
        anisotropy: Range of :math:`r`, log-uniform, positive.
        direction: Range of :math:`\theta` in radians from the x-axis, uniform.

    Returns:
        designs: float32, shape ``(num, size, size)``, 0 the soft and 1 the stiff phase, row 0 at the top.
        parameters: ``volume_fraction``, ``bandwidth``, ``anisotropy`` and ``direction`` of each design, float64,
        shape ``(num,)`` each. The designs meet their volume fraction to half a pixel.

    Raises:
        ValueError: If ``num``, ``size`` or ``seed`` is too small, or a range is not two finite, ordered numbers
            within its bounds.

    Example:
        >>> designs, parameters = random_composites(3, size=16, seed=7)
        >>> designs.shape, sorted(parameters)
        ((3, 16, 16), ['anisotropy', 'bandwidth', 'direction', 'volume_fraction'])
    """
    for name, value, least in (("num", num, 1), ("size", size, 4), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    low, high = np.array(
        [
            _checked_range("volume_fraction", volume_fraction, 0.0, 1.0),
            _checked_range("bandwidth", bandwidth, 0.0, math.inf),
            np.log(_checked_range("anisotropy", anisotropy, 0.0, math.inf)),
            _checked_range("direction", direction, -math.inf, math.inf),
        ]
    ).T

    designs = np.empty((num, size, size), dtype=np.float32)
    drawn = np.empty((num, 4))
    for start in range(0, num, _CHUNK):
        stop = min(start + _CHUNK, num)
        noise = np.empty((stop - start, size, size))
        for i in range(start, stop):
            rng = np.random.default_rng([seed, i])
            drawn[i] = rng.uniform(low, high)
            noise[i - start] = rng.standard_normal((size, size))
        drawn[start:stop, 2] = np.exp(drawn[start:stop, 2])
        designs[start:stop] = _level_cut(_filtered(noise, *drawn[start:stop, 1:].T), drawn[start:stop, 0])
    names = ("volume_fraction", "bandwidth", "anisotropy", "direction")
    return designs, dict(zip(names, drawn.T.copy(), strict=True))


def _checked_range(name: str, bounds: Sequence[float], above: float, below: float) -> tuple[float, float]:
    """The two ends of a range, if they are finite, ordered and strictly between ``above`` and ``below``."""
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers (low, high), got {bounds!r}") from None
    if not above < low <= high < below:  # also false for NaN
        raise ValueError(f"{name} must be ordered and lie inside ({above:g}, {below:g}), got {bounds!r}")
    return low, high


def _filtered(noise: np.ndarray, bandwidth: np.ndarray, anisotropy: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """White noise ``(B, N, N)`` filtered to the power spectrum of this module, unit-free, shape ``(B, N, N)``."""
    size = noise.shape[-1]
    cycles = np.fft.fftfreq(size, 1 / size)
    up, right = -cycles[:, None], cycles[None, :]  # rows run downwards, angles are measured with y upwards
    cos, sin = np.cos(direction)[:, None, None], np.sin(direction)[:, None, None]
    along, across = cos * right + sin * up, cos * up - sin * right
    ratio = anisotropy[:, None, None]
    squared = ratio * along**2 + across**2 / ratio
    amplitude = np.exp(-squared / (4 * bandwidth[:, None, None] ** 2))  # the square root of the power
    return np.fft.ifft2(np.fft.fft2(noise) * amplitude).real


def _level_cut(field: np.ndarray, volume_fraction: np.ndarray) -> np.ndarray:
    """1 on the pixels where ``field`` (B, N, N) is largest, ``round(volume_fraction * N * N)`` of them."""
    flat = field.reshape(len(field), -1)
    ranks = np.argsort(np.argsort(flat, axis=1, kind="stable"), axis=1)
    stiff = np.rint(volume_fraction * flat.shape[1])[:, None]
    return (ranks >= flat.shape[1] - stiff).astype(np.float32).reshape(field.shape)
