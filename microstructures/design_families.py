"""Families of binary designs that the training data do not hold, to test scores of unusual designs on.

A test needs several families: a score may tell one of them from the training data and not another.
"""

from collections.abc import Callable, Mapping

import numpy as np

from mechdiffusers.microstructures.random_composites import random_composites

__all__ = ["DESIGN_FAMILIES"]


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
