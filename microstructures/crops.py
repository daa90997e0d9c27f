"""Training data from a few large images: crops, some of them from a part that training never sees, and resizing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ["draw_crops", "resize_by_area"]

#: Share of the longer side of an image that held-out crops come from, unless a crop needs more.
_HELDOUT_SHARE = 0.2


def draw_crops(
    images: Sequence[np.ndarray], size: int, num_train: int, num_heldout: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Square crops to train on, and held-out ones from a strip at the end of each image, which no other crop overlaps.

    Args:
        images: Each of shape ``(H, W)``; the longer side at least ``2 * size``, the shorter one ``size``.
        size: Pixels along each side of a crop.
        num_train: Crops to train on.
        num_heldout: Held-out crops.
        seed: Of all positions; the first crops do not depend on how many follow.

    Returns:
        Crops to train on, shape ``(num_train, size, size)``, and held-out ones, likewise.

    Raises:
        ValueError: If an image is too small.

    Example:
        >>> train, heldout = draw_crops([np.eye(128)], 32, 1000, 100, seed=0)
        >>> train.shape, heldout.shape
        ((1000, 32, 32), (100, 32, 32))
    """
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for image in images:
        wide = image if image.shape[1] >= image.shape[0] else image.T  # split along the longer side
        height, width = wide.shape
        if width < 2 * size or height < size:
            raise ValueError(
                f"crop_size must leave room for held-out crops beside the others: at most {min(width // 2, height)} "
                f"for an image of {image.shape[0]} x {image.shape[1]} pixels, got {size}"
            )
        strip = min(max(size, round(_HELDOUT_SHARE * width)), width - size)
        for part, piece in zip(parts, (wide[:, :-strip], wide[:, -strip:]), strict=True):
            part.append(piece if wide is image else piece.T)
    train, heldout = (
        _random_crops(part, size, num, np.random.default_rng([seed, index]))
        for index, (part, num) in enumerate(zip(parts, (num_train, num_heldout), strict=True))
    )
    return train, heldout


def _random_crops(images: Sequence[np.ndarray], size: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """Crops at positions that are equally likely in all images together."""
    heights, widths = np.array([image.shape for image in images]).T - size + 1
    ends = np.cumsum(heights * widths)
    crops = []
    for place in rng.integers(ends[-1], size=num).tolist():
        index = int(np.searchsorted(ends, place, side="right"))
        row, column = divmod(place - int(ends[index]) + int(heights[index] * widths[index]), int(widths[index]))
        crops.append(images[index][row : row + size, column : column + size])
    return np.stack(crops)


def resize_by_area(image: np.ndarray, side: int) -> np.ndarray:
    """Reduces an image so that its shorter side has ``side`` pixels: each is the mean of the area that it covers.

    Args:
        image: Shape ``(H, W)``, bool or uint8. Two phases stay two: a pixel is stiff if more than half of its area is.
        side: Pixels along the shorter side, at most as many as it has.

    Raises:
        ValueError: If ``side`` would enlarge the image.

    Example:
        >>> resize_by_area(np.eye(4, dtype=bool), 2)
        array([[False, False],
               [False, False]])
    """
    shorter = min(image.shape)
    if side > shorter:
        raise ValueError(f"resize must be at most the {shorter} pixels of the shorter side of an image, got {side}")
    height, width = (round(length * side / shorter) for length in image.shape)
    reduced = Image.fromarray(image.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    values = np.asarray(reduced)
    return values > 0.5 if image.dtype == bool else np.rint(values).astype(np.uint8)
