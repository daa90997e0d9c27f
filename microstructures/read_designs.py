"""Reads designs from the files that this field has: images, stacks and arrays, one or a folder of them."""

from __future__ import annotations

import io
import logging
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from tqdm.auto import tqdm

from mechdiffusers.microstructures.levels import Pixels, convention_of

__all__ = ["DESIGN_SUFFIXES", "DesignFiles", "decode_image", "read_designs", "read_images", "stacked"]

logger = logging.getLogger(__name__)

_IMAGES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".webp"}
_ARRAYS = {".npy", ".npz"}
#: What designs may be read from.
DESIGN_SUFFIXES = _IMAGES | _ARRAYS
_LOSSY = {"JPEG", "WEBP"}
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class DesignFiles:
    """N designs of one size, in the order of their names."""

    levels: np.ndarray  #: shape (N, H, W): bool for two phases, uint8 for grey levels
    names: list[str]  #: paths in the folder; pages of a stack and items of an array as ``stack.tif#3``


def read_designs(path: str | os.PathLike[str]) -> DesignFiles:
    """Reads designs of one size from a file or a folder.

    Args:
        path: A PNG, BMP, JPEG, TIFF, GIF or WebP image of 1, 8 or 16 bits, in grey or in colours that are grey; a
            stack, every page of which is a design; an ``.npy`` or ``.npz`` file of booleans, integers or floats in
            [0, 1], shape ``(H, W)`` or ``(N, H, W)``; or a folder of these, with folders in it or not. Other files in a
            folder are named in a warning and passed over.

    Returns:
        The designs. What their levels mean is decided for all of them together, see
        :mod:`mechdiffusers.microstructures.levels`.

    Raises:
        ValueError: If there is nothing to read, a file cannot be read, is in colour or transparent, sizes differ, or
            the levels are neither those of two phases nor grey.

    Example:
        >>> files = read_designs("my/images")  # doctest: +SKIP
        >>> files.levels.shape, files.names[0]  # doctest: +SKIP
        ((500, 64, 64), 'soft/000.png')
    """
    images, names = read_images(path)
    return DesignFiles(stacked(images, names), names)


def read_images(path: str | os.PathLike[str]) -> tuple[list[np.ndarray], list[str]]:
    """Images of any sizes, read as :func:`read_designs` does: bool or uint8, shape ``(H, W)`` each, and their names."""
    images = list(_images(Path(path)))
    convention = convention_of(images)
    return [convention.apply(image) for image in images], [image.where for image in images]


def stacked(images: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Images as one array, if they have one size, else a ``ValueError`` that names the first other one."""
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            size, other = (" x ".join(map(str, each.shape)) for each in (images[0], image))
            raise ValueError(
                f"designs must have one size, {size} as {names[0]}, got {name} with {other}: train.py can crop them "
                "with crop_size"
            )
    return np.stack(images)


def _images(path: Path) -> Iterator[Pixels]:
    """All images of a file or a folder, whatever their sizes."""
    if path.is_file():
        files = [path]
        if path.suffix.lower() not in DESIGN_SUFFIXES:
            raise ValueError(_unreadable(path))
        root = path.parent
    elif path.is_dir():
        everything = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        files = [file for file in everything if file.suffix.lower() in DESIGN_SUFFIXES]
        others = [str(file.relative_to(path)) for file in everything if file.suffix.lower() not in DESIGN_SUFFIXES]
        if not files:
            got = f"{others[0]} and {len(others) - 1} others" if others else "nothing"
            raise ValueError(f"designs must be in a folder of {_accepted()} files, got {got} in {path}")
        if others:
            logger.warning("passed over in %s: %s", path, ", ".join(others[:5]) + (" ..." if len(others) > 5 else ""))
        root = path
    else:
        raise ValueError(f"designs must be a file or a folder that exists, got {path}")
    for file in tqdm(files, desc="reading designs", unit="file", disable=len(files) < 1000):
        name = file.relative_to(root).as_posix()
        yield from _array(file, name) if file.suffix.lower() in _ARRAYS else decode_image(file, name)


def decode_image(source: Path | bytes, name: str) -> list[Pixels]:
    """The pages of an image file.

    Args:
        source: The file, or what is in it.
        name: For messages, and the names of pages.

    Returns:
        One image a page.

    Raises:
        ValueError: If it cannot be read, or is in colour or transparent.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            is_lossy = image.format in _LOSSY
            pages = [_grey(page, name) for page in ImageSequence.Iterator(image)]
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"images must be files that can be read, got {name}: {error}") from error
    return [Pixels(page, _numbered(name, index, len(pages)), is_lossy) for index, page in enumerate(pages)]


def _grey(image: Image.Image, name: str) -> np.ndarray:
    """The levels of one page, if they are grey and opaque."""
    if image.mode in _GREY_MODES and "transparency" not in image.info:
        values = np.asarray(image)
        return values.astype(np.int64) if image.mode == "I" else values
    channels = np.asarray(image.convert("RGBA"))
    if (channels[..., 3] != 255).any():
        raise ValueError(f"images must be opaque, got {name} with transparent pixels")
    if (channels[..., :3] != channels[..., :1]).any():
        raise ValueError(f"images must be grey or black and white, got {name} in colour")
    return channels[..., 0]


def _array(path: Path, name: str) -> Iterator[Pixels]:
    """The designs of an array file."""
    try:
        content = np.load(path, allow_pickle=False)
        arrays = (
            {name: content} if isinstance(content, np.ndarray) else {f"{name}/{key}": content[key] for key in content}
        )
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"designs must be arrays of numbers in a file that can be read, got {name}: {error}"
        ) from error
    for where, array in arrays.items():
        if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "buif":
            raise ValueError(
                f"designs must be booleans, integers or floats of shape (H, W) or (N, H, W), got {where} with shape "
                f"{array.shape} of {array.dtype}"
            )
        items = array[None] if array.ndim == 2 else array
        for index, item in enumerate(items):
            yield Pixels(item, _numbered(where, index, len(items)))


def _numbered(name: str, index: int, num: int) -> str:
    """The name of an item of a file."""
    return name if num == 1 else f"{name}#{index}"


def _accepted() -> str:
    return ", ".join(sorted(DESIGN_SUFFIXES))


def _unreadable(path: Path) -> str:
    """What to do with a file of another kind."""
    remedy = ""
    if path.suffix.lower() in (".txt", ".csv", ".dat"):
        remedy = f": np.save('{path.stem}.npy', np.loadtxt('{path.name}')) makes an array of a table of numbers"
    return f"designs must be a {_accepted()} file or a folder of them, got {path.name}{remedy}"
