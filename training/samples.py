"""A design and its response as they lie in a row of a dataset, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.levels import Convention, Pixels
from mechdiffusers.microstructures.read_designs import decode_image
from mechdiffusers.training.config import TrainingConfig

__all__ = ["BINARY_ALONE", "checked_samples", "stored_samples"]

#: Why grey images are refused.
BINARY_ALONE = "images must be binary (black and white) for decoder_likelihood='bernoulli'"


def checked_samples(
    stored: Iterable[tuple[Pixels, Any]],
    config: TrainingConfig,
    spec: ResponseSpec | None,
    convention: Convention,
    shape: torch.Size | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and responses of rows, each checked.

    Args:
        stored: Images and responses, see :func:`stored_samples`.
        config: Settings of the run.
        spec: Of the responses; ``None`` where there are none.
        convention: Of the images, see :func:`~mechdiffusers.microstructures.levels.convention_of`.
        shape: What all images must have, ``(1, H, W)``; that of the first if ``None``.

    Yields:
        An image, uint8 ``(1, H, W)``, and its response, float32 ``(L, S)``, NaN where unknown; ``(0, 0)`` without a
        specification.

    Raises:
        ValueError: If an image or a response is unfit, see :func:`~mechdiffusers.training.data.load_designs`.
    """
    for pixels, response in stored:
        levels = convention.apply(pixels)
        if levels.dtype != bool and config.decoder_likelihood == "bernoulli":
            raise ValueError(
                f"{BINARY_ALONE}, got {pixels.where} with grey levels; 'discretized_logistic' is for those"
            )
        image = torch.from_numpy(levels * np.uint8(255) if levels.dtype == bool else levels)[None]
        shape = shape or image.shape
        if image.shape != shape:
            raise ValueError(
                f"all images must have one size, {tuple(shape[1:])} as the first, "
                f"got {pixels.where} with {tuple(image.shape[1:])}"
            )
        yield image, _response(response, spec, f"that of {pixels.where}")


def stored_samples(rows: Iterable[Any], config: TrainingConfig) -> Iterator[tuple[Pixels, Any]]:
    """The images of rows, decoded but not yet read as designs, and their responses, ``None`` where there are none."""
    index = -1
    for index, row in enumerate(rows):
        value = row[config.image_column]
        where = f"image {index} of {config.dataset!r}"
        if isinstance(value, dict):  # a file, not decoded yet
            where += f" ({Path(value['path']).name})" if value["path"] else ""
            pages = decode_image(value["bytes"] or Path(value["path"]), where)
            if len(pages) > 1:
                raise ValueError(f"images of a dataset must have one page, got {where} with {len(pages)}")
            yield pages[0], row.get("response")
        else:
            yield Pixels(_array(value, where), where), row.get("response")
    if index < 0:
        raise ValueError(f"dataset must have rows, got none from {config.dataset!r}")


def _response(stored: Any, spec: ResponseSpec | None, where: str) -> Tensor:
    """The response that a row stores, float32 (L, S), NaN where unknown."""
    if spec is None:
        return torch.empty(0, 0)
    response = np.asarray(stored, dtype=np.float32)
    if response.shape != spec.shape:
        raise ValueError(
            f"responses must have the shape of their strains, {spec.shape}, got {where} with {response.shape}"
        )
    if np.isinf(response).any():
        raise ValueError(f"responses must be finite, or NaN where unknown, got {where} with infinite values")
    if not spec.signed and (response < 0).any():
        raise ValueError(
            f"responses must not be negative, since their specification is unsigned, got {where} with "
            f"{np.nanmin(response):g}"
        )
    return torch.from_numpy(response)


def _array(value: Any, where: str) -> np.ndarray:
    """An image that a dataset stores as numbers, shape (H, W), or with one channel."""
    try:
        pixels = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"images must be rectangular, got {where}: {error}") from error
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
        pixels = pixels.reshape(pixels.shape[1:] if pixels.shape[0] == 1 else pixels.shape[:2])
    if pixels.ndim != 2 or not pixels.size or pixels.dtype.kind not in "buif":
        raise ValueError(f"images must be (H, W) numbers, got {where} with shape {pixels.shape} of {pixels.dtype}")
    return pixels
