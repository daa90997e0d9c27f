"""What the levels of images mean: two phases, or grey.

It is decided once for a whole set of images, never image by image. Booleans are black and white. Two levels are two
phases, whatever their values: 0 and 1 of a label map, 0 and 255, 0 and 65535. Three to eight levels are more than two
phases, which nothing here can do: they are refused, and never read as three nearly black greys. More levels are grey.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["Convention", "Pixels", "convention_of"]

logger = logging.getLogger(__name__)

#: Up to so many levels are phases.
_MOST_PHASES = 8
#: Levels whose range is less than this share of what the type holds say nothing of grey.
_SLIVER = 1 / 8
#: How far from black or white a lossy format moves a pixel of a black-and-white image.
_LOSS = 64


@dataclass(frozen=True)
class Pixels:
    """One image as a file holds it."""

    values: np.ndarray  #: shape (H, W); booleans, integers or floats
    where: str  #: the name of the file, for messages
    is_lossy: bool = False  #: whether the format changes levels, as JPEG does

    @property
    def full(self) -> int:
        """The level of white: 1 for floats and booleans, 65535 for 16 bits, else 255."""
        if self.values.dtype.kind in "bf":
            return 1
        return 65535 if self.values.dtype.itemsize == 2 else 255


@dataclass(frozen=True)
class Convention:
    """How levels become designs."""

    threshold: float | None  #: levels above it are the stiff phase; ``None`` for grey
    levels: frozenset[float] | None  #: those of two phases; ``None`` where any level will do
    full: int  #: the level of white

    def apply(self, image: Pixels) -> np.ndarray:
        """The image as bool, two phases, or as uint8, grey, shape ``(H, W)``.

        Raises:
            ValueError: If the image has other levels than the set that the convention is of.
        """
        values = image.values
        if values.dtype.kind == "b":
            return values if self.threshold is not None else values * np.uint8(255)
        if image.full != self.full:
            raise ValueError(
                f"images must have one kind of levels, up to {self.full}, got {image.where} with levels up to "
                f"{image.full}"
            )
        _check_range(image)
        if self.threshold is None:
            return np.rint(values * (255 / self.full)).astype(np.uint8)
        if self.levels is not None and (other := set(np.unique(values).tolist()) - self.levels):
            raise ValueError(
                f"images must all have the levels {sorted(self.levels)} of two phases, got {image.where} with "
                f"{sorted(other)[0]:g}"
            )
        return values > self.threshold


def convention_of(images: Iterable[Pixels]) -> Convention:
    """How the levels of a set of images are to be read.

    Args:
        images: The set.

    Returns:
        The convention, for these images and others of their kind.

    Raises:
        ValueError: If the images have several kinds of levels, more than two phases, one level alone, or so little of
            the range that they are nearly black throughout; the message names the image and the remedy.
    """
    levels: set[float] = set()
    first: Pixels | None = None
    is_lossy = near_ends = True
    last = None
    for image in images:
        last = image
        if image.values.dtype.kind == "b":
            continue
        _check_range(image)
        first = first or image
        if image.full != first.full:
            raise ValueError(
                f"images must have one kind of levels, got {first.where} with levels up to {first.full} and "
                f"{image.where} with levels up to {image.full}: convert one of them"
            )
        is_lossy &= image.is_lossy
        found = np.unique(image.values)
        near_ends &= bool(((found <= _LOSS) | (found >= first.full - _LOSS)).all())
        levels |= {*found[: 2 * _MOST_PHASES].tolist(), found[-1].item()}
    if first is None:
        if last is None:
            raise ValueError("images must be at least one, got none")
        return Convention(0.5, None, 1)
    low, high = min(levels), max(levels)
    known = f"{first.where} and the others" if last is not first else first.where
    if len(levels) == 1:
        raise ValueError(f"images must show two phases or grey levels, got the one level {low:g} throughout in {known}")
    if is_lossy and near_ends and first.full == 255 and high - low > 255 - 2 * _LOSS:
        logger.info("%s: black and white, apart from what the lossy format changed", known)
        return Convention(127.5, None, first.full)
    if len(levels) == 2:
        if low != 0 or high not in (1, first.full):
            logger.info("%s: level %g is read as the soft phase, level %g as the stiff one", known, low, high)
        return Convention((low + high) / 2, frozenset(levels), first.full)
    if len(levels) <= _MOST_PHASES:
        raise ValueError(
            f"images must have two phases or grey levels, got the {len(levels)} levels "
            f"{', '.join(f'{level:g}' for level in sorted(levels))} in {known}, which are as many phases: merge phases "
            f"first, as np.isin(image, [{', '.join(f'{level:g}' for level in sorted(levels)[1:])}]) does"
        )
    if high - low < _SLIVER * first.full:
        raise ValueError(
            f"images must use the range from 0 to {first.full}, got levels from {low:g} to {high:g} alone in {known}: "
            "stretch them first, or threshold them into two phases"
        )
    if first.full == 65535:
        logger.info("%s: levels of 16 bits are rounded to 8", known)
    return Convention(None, None, first.full)


def _check_range(image: Pixels) -> None:
    """Raises a ``ValueError`` if a level lies outside what its type says, or is no number."""
    values = image.values
    if not ((values >= 0) & (values <= image.full)).all():  # also false for NaN
        remedy = ": divide by their greatest value" if values.dtype.kind == "f" else ": convert them to 8 or 16 bits"
        raise ValueError(
            f"images must be booleans, floats in [0, 1] without NaN, or integers from 0 to {image.full}, got "
            f"{image.where} with values outside{remedy}"
        )
