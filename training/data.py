"""Designs to train on: generated, from a folder of images, a parquet file or the Hub, checked before use.

Every source becomes uint8 images (N, 1, H, W), grey levels 0 to 255, of one size; a stream becomes the same one by one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HFDataset
from datasets import Image as ImageFeature
from datasets import IterableDataset, load_dataset
from mechdiffusers.microstructures import random_composites
from mechdiffusers.training.config import TrainingConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from tqdm.auto import tqdm

__all__ = ["Designs", "load_designs"]

_IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".webp"}
#: Images that a stream is shuffled over.
_SHUFFLE_BUFFER = 2048


@dataclass(frozen=True)
class Designs:
    """Designs for training and designs kept from it.

    Attributes:
        train: Yields tuples of one uint8 image ``(1, H, W)``; a stream repeats itself without end.
        heldout: uint8 images, shape ``(N, 1, H, W)``.
        num_train: Number of different training designs.
    """

    train: Dataset
    heldout: Tensor
    num_train: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the designs, in pixels."""
        return self.heldout.shape[-2], self.heldout.shape[-1]


def load_designs(config: TrainingConfig) -> Designs:
    """The training and held-out designs that a configuration asks for.

    Args:
        config: Settings of the run.

    Returns:
        The designs. Of a source other than the generator, the held-out ones are drawn by the seed (a stream's first).

    Raises:
        ValueError: If the source is missing, empty or mixed, a column is unknown, an image cannot be read, has another
            size than the first, holds NaN or values that its decoder likelihood does not cover, or there are too few.
    """
    if config.dataset == "random_composites":
        assert config.num_train_designs is not None  # TrainingConfig has checked it
        total = config.num_train_designs + config.num_heldout_designs
        # the held-out designs come first: they stay the same when the number of training designs is changed
        generated, _ = random_composites(total, size=config.resolution, seed=config.seed)
        return _split(torch.from_numpy(generated).to(torch.uint8)[:, None] * 255, config, np.arange(total))

    rows = _rows(config)
    images = _checked_images(rows, config)
    if isinstance(rows, IterableDataset):
        heldout = list(islice(images, config.num_heldout_designs))
        if len(heldout) < config.num_heldout_designs:
            raise ValueError(
                f"dataset must have more than the {config.num_heldout_designs} designs to hold out, "
                f"got {len(heldout)} from {config.dataset!r}"
            )
        train = rows.skip(config.num_heldout_designs).take(config.num_train_designs)
        stream = train.shuffle(seed=config.seed, buffer_size=_SHUFFLE_BUFFER)
        assert config.num_train_designs is not None  # TrainingConfig has checked it
        return Designs(_Stream(stream, config, heldout[0].shape), torch.stack(heldout), config.num_train_designs)
    everything = torch.stack(list(tqdm(images, total=len(rows), desc="reading designs", unit="design")))
    return _split(everything, config, np.random.default_rng(config.seed).permutation(len(everything)))


def _split(images: Tensor, config: TrainingConfig, order: np.ndarray) -> Designs:
    """The first images of an order as the held-out, the others as the training designs."""
    wanted = config.num_heldout_designs + (config.num_train_designs or 1)
    if len(images) < wanted:
        raise ValueError(
            f"dataset must have at least {wanted} designs ({config.num_heldout_designs} of them held out), "
            f"got {len(images)} from {config.dataset!r}"
        )
    end = None if config.num_train_designs is None else wanted
    heldout, train = order[: config.num_heldout_designs], order[config.num_heldout_designs : end]
    return Designs(TensorDataset(images[train]), images[heldout], len(train))


class _Stream(TorchIterableDataset):
    """A dataset of the Hub, read as it is needed and without end."""

    def __init__(self, rows: IterableDataset, config: TrainingConfig, shape: torch.Size):
        self._rows, self._config, self._shape = rows, config, shape

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        for epoch in count():
            self._rows.set_epoch(epoch)  # each has its own order
            for image in _checked_images(self._rows, self._config, self._shape):
                yield (image,)


def _rows(config: TrainingConfig) -> Any:
    """The rows of a folder, a parquet file or a Hub dataset, their image column alone."""
    path = Path(config.dataset)
    if path.is_dir():
        rows = _folder(path, config)
    else:
        is_file = path.suffix == ".parquet"
        if is_file and not path.is_file():
            raise ValueError(f"dataset must exist, got the parquet file {path}, which does not")
        source = {"path": "parquet", "data_files": str(path)} if is_file else {"path": config.dataset}
        split = "train" if is_file else config.dataset_split
        try:
            rows = load_dataset(**source, split=split, streaming=config.streaming)
        except Exception as error:  # datasets raises many kinds, all of them meaning that there is no such data
            raise ValueError(
                f"dataset must be 'random_composites', a folder of images, a parquet file or a dataset on the Hub with "
                f"the split {split!r}, got {config.dataset!r}: {error}"
            ) from error
    columns = rows.column_names or list(next(iter(rows), {}))
    if config.image_column not in columns:
        raise ValueError(f"image_column must be one of {columns} of {config.dataset!r}, got {config.image_column!r}")
    rows = rows.select_columns([config.image_column])
    if isinstance((rows.features or {}).get(config.image_column), ImageFeature):  # read by us, to name what is unfit
        rows = rows.cast_column(config.image_column, ImageFeature(decode=False))
    return rows


def _folder(path: Path, config: TrainingConfig) -> Any:
    """The images of a folder, as rows."""
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    if not files:
        raise ValueError(f"dataset must be a folder of images, got {path}, which is empty")
    if others := [file.name for file in files if file.suffix.lower() not in _IMAGE_SUFFIXES]:
        raise ValueError(
            f"dataset must be a folder of images alone ({', '.join(sorted(_IMAGE_SUFFIXES))}), "
            f"got {path} with {others[0]!r} and {len(others) - 1} others"
        )
    rows = HFDataset.from_dict({config.image_column: [str(file) for file in files]})
    rows = rows.cast_column(config.image_column, ImageFeature())
    return rows.to_iterable_dataset() if config.streaming else rows


def _checked_images(rows: Iterable[Any], config: TrainingConfig, shape: torch.Size | None = None) -> Iterator[Tensor]:
    """The images of rows as uint8 (1, H, W), each checked; all have the shape of the first, or the one given."""
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
        yield image
    if index < 0:
        raise ValueError(f"dataset must have rows, got none from {config.dataset!r}")


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
