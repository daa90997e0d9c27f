"""What the levels of images mean: two phases, or grey.

It is decided once for a whole set of images, never image by image. Booleans are black and white. Two levels are two
phases, whatever their values and their type: 0 and 1 of a label map, 0 and 255, -1 and 1. Three to eight levels are
more than two phases. They are refused, since nothing here has more than two, and never read as three nearly black
greys. More levels are grey. JPEG files of black and white images have levels near both: these are two phases again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["MOST_PHASES", "Convention", "Pixels", "convention_of", "says_nothing_of_grey"]

logger = logging.getLogger(__name__)

#: Up to so many levels are phases.
MOST_PHASES = 8
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
        """The level of white: 1 for floats and booleans, the greatest of 8 and 16 bits, 255 for other integers."""
        if self.values.dtype.kind in "bf":
            return 1
        return int(np.iinfo(self.values.dtype).max) if self.values.dtype.itemsize <= 2 else 255

    @property
    def is_black_and_white(self) -> bool:
        """Whether all pixels are 0 or 255, or near them in a lossy format."""
        if self.values.dtype.kind == "b":
            return True
        loss = _LOSS if self.is_lossy else 0
        return self.full == 255 and bool(((self.values <= loss) | (self.values >= 255 - loss)).all())


@dataclass(frozen=True)
class Convention:
    """How levels become designs."""

    threshold: float | None  #: levels above it are the stiff phase; ``None`` for grey
    levels: frozenset[float] | None  #: those of two phases; ``None`` for grey, and for black and white in lossy formats
    full: int  #: the level of white

    def apply(self, image: Pixels) -> np.ndarray:
        """The image as bool, two phases, or as uint8, grey, shape ``(H, W)``.

        Raises:
            ValueError: If the image has other levels than the set that the convention is of.
        """
        values = image.values
        if values.dtype.kind == "b":
            return values if self.threshold is not None else values * np.uint8(255)
        if self.threshold is None:
            if image.full != self.full:
                raise ValueError(
                    f"images must have one kind of levels, up to {self.full}, got {image.where} with levels up to "
                    f"{image.full}"
                )
            _check_range(image)
            return np.rint(values * (255 / self.full)).astype(np.uint8)
        if self.levels is None:
            if not image.is_black_and_white:
                raise ValueError(
                    f"images must be black and white as the others are, got {image.where} with grey levels"
                )
        elif other := sorted(set(np.unique(values).tolist()) - self.levels):
            raise ValueError(
                f"images must all have the levels {sorted(self.levels)} of two phases, got {image.where} with "
                f"{other[0]:g}"
            )
        return values > self.threshold


def says_nothing_of_grey(low: float, high: float, full: int) -> bool:
    """Whether levels from ``low`` to ``high`` use so little of the range to ``full`` that they are no grey levels."""
    return high - low < _SLIVER * full


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
    where: dict[float, str] = {}  # each level, and the first image that has it
    most, richest = 0, ""  # levels of the image that has the most
    booleans: set[bool] = set()
    kinds: dict[int, str] = {}
    outside: Pixels | None = None
    first: Pixels | None = None
    last: Pixels | None = None
    is_lossy, is_black_and_white = False, True
    for image in images:
        first, last = first or image, image
        found = np.unique(image.values)
        if image.values.dtype.kind == "b":
            booleans |= set(found.tolist())
            continue
        if not np.isfinite(found).all():
            _check_range(image)
        if not 0 <= found[0] <= found[-1] <= image.full:
            outside = outside or image
        kinds.setdefault(image.full, image.where)
        is_lossy |= image.is_lossy
        is_black_and_white &= image.is_black_and_white
        if len(found) > most:
            most, richest = len(found), image.where
        for level in (*found[: 2 * MOST_PHASES].tolist(), found[-1].item()):
            where.setdefault(level, image.where)
    if first is None or last is None:
        raise ValueError("images must be at least one, got none")
    known = first.where + ("" if last is first else " and the others")
    shown = booleans | {level > 0 for level in where}
    if len(where) <= 1 and len(shown) == 1:
        level = next(iter(where)) if where else int(shown.pop())
        raise ValueError(
            f"images must show two phases or grey levels, got the one level {level:g} throughout in {known}: check "
            "how they were exported"
        )
    if not where:
        return Convention(0.5, frozenset({0, 1}), 1)
    full, low, high = next(iter(kinds)), min(where), max(where)
    if is_lossy and is_black_and_white and (booleans or high - low > 255 - 2 * _LOSS):
        logger.info("%s: black and white, apart from what the lossy format changed", known)
        return Convention(127.5, None, full)
    if len(where) == 1:  # beside booleans
        low, high = 0, high or full
    if len(where) <= 2:
        if low != 0 or high not in (1, full):
            logger.info("%s: level %g is read as the soft phase, level %g as the stiff one", known, low, high)
        return Convention((low + high) / 2, frozenset({low, high}), full)
    if len(where) <= MOST_PHASES and (outside is None or all(float(level).is_integer() for level in where)):
        raise ValueError(_too_many_phases(where, most, richest))
    if len(kinds) > 1:
        (white, name), (other, other_name) = list(kinds.items())[:2]
        raise ValueError(
            f"images must have one kind of levels, got {name} with levels up to {white} and {other_name} with levels "
            f"up to {other}: convert one of them"
        )
    if outside is not None:
        _check_range(outside)
    if says_nothing_of_grey(low, high, full):
        raise ValueError(
            f"images must use the range from 0 to {full}, got levels from {low:g} to {high:g} alone in {known}: "
            "stretch them first, or threshold them into two phases"
        )
    if full > 255:
        logger.info("%s: levels of 16 bits, 0 to %d, are rounded to 8", known, full)
    return Convention(None, None, full)


def _too_many_phases(where: dict[float, str], most: int, richest: str) -> str:
    """Why three to eight levels are refused, and what to do."""
    levels = [f"{level:g}" for level in sorted(where)]
    if most <= 2:  # no image has more than two: some are written in another way
        of_file: dict[str, list[str]] = {}
        for level in sorted(where):
            of_file.setdefault(where[level], []).append(f"{level:g}")
        got = ", ".join(f"{' and '.join(found)} first in {name}" for name, found in list(of_file.items())[:3])
        return (
            f"images must all have the same two levels, got the {len(levels)} levels {got}: write all files with 0 for "
            "the soft phase and 1 for the stiff one"
        )
    known = richest if most == len(levels) else f"{richest} and others"
    return (
        f"images must have two phases or grey levels, got the {len(levels)} levels {', '.join(levels)} in {known}, "
        f"that is {len(levels)} phases: merge phases first, for example by np.isin(image, [{', '.join(levels[1:])}])"
    )


def _check_range(image: Pixels) -> None:
    """Raises a ``ValueError`` if a grey level lies outside what its type says, or is no number."""
    values = image.values
    if ((values >= 0) & (values <= image.full)).all():  # false for NaN
        return
    if values.dtype.kind != "f":
        remedy = "convert them to 8 or 16 bits"
    else:
        remedy = "divide by the level of white" if np.isfinite(values).all() else "fill the gaps"
    raise ValueError(
        f"images must be booleans, floats in [0, 1] without NaN, or integers from 0 to {image.full}, got "
        f"{image.where} with values from {values.min():g} to {values.max():g}: {remedy}"
    )
