"""A design and its response as they lie in a row of a dataset, checked and brought to one form."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.training.config import TrainingConfig

__all__ = ["checked_samples"]


def checked_samples(
    rows: Iterable[Any],
    config: TrainingConfig,
    spec: ResponseSpec | None,
    shape: torch.Size | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and responses of rows, each checked.

    Args:
        rows: Mappings with the image and, with a specification, ``response``.
        config: Settings of the run.
        spec: Of the responses; ``None`` where there are none.
        shape: What all images must have, ``(1, H, W)``; that of the first if ``None``.

    Yields:
        An image, uint8 ``(1, H, W)``, and its response, float32 ``(L, S)``, NaN where unknown; ``(0, 0)`` without a
        specification.

    Raises:
        ValueError: If an image or a response is unfit, see :func:`~mechdiffusers.training.data.load_designs`.
    """
    index = -1
    for index, row in enumerate(rows):
        value = row[config.image_column]
        where = f"image {index} of {config.dataset!r}"
        if isinstance(value, dict):  # a file, not decoded yet
            where += f" ({Path(value['path']).name})" if value["path"] else ""
            image = _grey_levels(_decoded(value, where), where)
        else:
            image = _grey_levels(_array(value, where), where)
        shape = shape or image.shape
        if image.shape != shape:
            raise ValueError(
                f"all images must have one size, {tuple(shape[1:])} as the first, "
                f"got {where} with {tuple(image.shape[1:])}"
            )
        if config.decoder_likelihood == "bernoulli" and not ((image == 0) | (image == 255)).all():
            raise ValueError(
                f"images must be binary (black and white) for decoder_likelihood='bernoulli', got {where} with grey "
                f"levels; 'discretized_logistic' is for those"
            )
        yield image, _response(row, spec, f"that of {where}")
    if index < 0:
        raise ValueError(f"dataset must have rows, got none from {config.dataset!r}")


def _response(row: dict[str, Any], spec: ResponseSpec | None, where: str) -> Tensor:
    """The response of a row, float32 (L, S), NaN where unknown."""
    if spec is None:
        return torch.empty(0, 0)
    response = np.asarray(row["response"], dtype=np.float32)
    if response.shape != spec.shape:
        raise ValueError(
            f"responses must have the shape of their strains, {spec.shape}, got {where} with {response.shape}"
        )
    if np.isinf(response).any():
        raise ValueError(f"responses must be finite, or NaN where unknown, got {where} with infinite values")
    return torch.from_numpy(response)


def _decoded(file: dict[str, Any], where: str) -> np.ndarray:
    """The grey levels (H, W) of an image file that datasets has not decoded."""
    try:
        with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"]) as image:
            image.load()
    except OSError as error:
        raise ValueError(f"images must be files that can be read, got {where}: {error}") from error
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise ValueError(f"images must have 8 bits or 1, got {where} of mode {image.mode!r}")
    channels = np.asarray(image.convert("RGBA"))
    if (channels[..., 3] != 255).any():
        raise ValueError(f"images must be opaque, got {where} with transparent pixels")
    if (channels[..., :3] != channels[..., :1]).any():
        raise ValueError(f"images must be grey or binary, got {where} in colour")
    return channels[..., 0]


def _array(value: Any, where: str) -> np.ndarray:
    """An image that a dataset stores as numbers, as an array."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"images must be rectangular, got {where}: {error}") from error


def _grey_levels(pixels: np.ndarray, where: str) -> Tensor:
    """An image (H, W), or with one channel, as uint8 grey levels (1, H, W)."""
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
        pixels = pixels.reshape(pixels.shape[1:] if pixels.shape[0] == 1 else pixels.shape[:2])
    if pixels.ndim != 2 or pixels.dtype.kind not in "buif":
        raise ValueError(f"images must be (H, W) numbers, got {where} with shape {pixels.shape} of {pixels.dtype}")
    if pixels.dtype.kind in "bf":
        pixels = pixels.astype(np.float64) * 255
    if not ((pixels >= 0) & (pixels <= 255)).all():  # also false for NaN
        raise ValueError(
            f"images must be booleans, floats in [0, 1] without NaN, or integers in 0 to 255, got {where} with "
            f"values outside"
        )
    return torch.from_numpy(np.rint(pixels).astype(np.uint8))[None]
