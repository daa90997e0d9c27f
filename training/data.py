"""Designs to train on: generated, from images, from parquet files or the Hub, with their responses, checked before use.

Every source becomes uint8 images (N, 1, H, W), grey levels 0 to 255, of one size, and responses (N, L, S), NaN where
unknown; a stream becomes the same one by one. Without a column of responses, these are of shape (N, 0, 0).
"""

from __future__ import annotations

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
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from tqdm.auto import tqdm

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import random_composites
from mechdiffusers.microstructures.crops import draw_crops, resize_by_area
from mechdiffusers.microstructures.levels import MOST_PHASES, Convention, Pixels, convention_of
from mechdiffusers.microstructures.read_designs import DESIGN_SUFFIXES, read_images, stacked
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.samples import BINARY_ALONE, checked_samples, stored_samples

__all__ = ["Designs", "load_designs"]

#: Images that a stream is shuffled over.
_SHUFFLE_BUFFER = 2048
#: Split that the held-out designs are taken from, where there is one.
_HELDOUT_SPLIT = "heldout"


@dataclass(frozen=True)
class Designs:
    """Designs for training and designs kept from it.

    Attributes:
        train: Yields pairs of a uint8 image ``(1, H, W)`` and its response ``(L, S)``, float32, NaN where unknown; a
            stream repeats itself without end.
        heldout: uint8 images, shape ``(N, 1, H, W)``.
        heldout_response: Their responses, shape ``(N, L, S)``.
        num_train: Number of different training designs.
        spec: Of the responses; ``None`` where there are none, and L and S are 0.
    """

    train: Dataset
    heldout: Tensor
    heldout_response: Tensor
    num_train: int
    spec: ResponseSpec | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the designs, in pixels."""
        return self.heldout.shape[-2], self.heldout.shape[-1]


def load_designs(config: TrainingConfig) -> Designs:
    """The training and held-out designs that a configuration asks for.

    Args:
        config: Settings of the run.

    Returns:
        The designs. The held-out ones are the first of the source's split ``heldout``; where it has none they are drawn
        by the seed (the generator's and a stream's are its first; crops come from a part that no training crop sees).

    Raises:
        ValueError: If the source is missing, empty or mixed, a column is unknown, an image cannot be read, has another
            size than the first, holds NaN or values that its decoder likelihood does not cover, the levels of all
            images are no two phases and not grey, an image is too small for crops, a response has no specification,
            another shape than it says or is infinite, or there are too few designs.
    """
    if config.dataset == "random_composites":
        assert config.num_train_designs is not None  # TrainingConfig has checked it
        total = config.num_train_designs + config.num_heldout_designs
        # the held-out designs come first: they stay the same when the number of training designs is changed
        generated, _ = random_composites(total, size=config.resolution, seed=config.seed)
        return _split(_without_responses(generated.astype(bool)), config, np.arange(total), None)

    path = Path(config.dataset)
    is_parquet = path.suffix == ".parquet" or any(path.glob("*.parquet"))
    if path.suffix.lower() in DESIGN_SUFFIXES or (path.exists() and not is_parquet):
        return _from_images(path, config)
    for name in ("crop_size", "resize"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} must be left out for {config.dataset!r}: it is for images in files")
    rows, heldout_rows = _rows(path, config)
    spec = None if config.response_column is None else _spec(rows, config)
    if heldout_rows is not None and spec is not None and (other := _spec(heldout_rows, config).difference(spec)):
        raise ValueError(f"all responses must have one specification, got heldout of {config.dataset!r} with {other}")
    if isinstance(rows, IterableDataset):
        assert config.num_train_designs is not None  # TrainingConfig has checked it
        first = list(_first(rows if heldout_rows is None else heldout_rows, config))
        convention = convention_of(pixels for pixels, _ in first)
        heldout = _heldout(first, config, spec, convention)
        others = rows.skip(config.num_heldout_designs) if heldout_rows is None else rows
        shuffled = others.take(config.num_train_designs).shuffle(seed=config.seed, buffer_size=_SHUFFLE_BUFFER)
        stream = _Stream(shuffled, config, spec, convention, heldout[0].shape[1:])
        return Designs(stream, *heldout, config.num_train_designs, spec)
    stored = list(tqdm(stored_samples(rows, config), total=len(rows), desc="reading designs", unit="design"))
    convention = convention_of(pixels for pixels, _ in stored)
    everything = _stacked(checked_samples(stored, config, spec, convention))
    if heldout_rows is None:
        return _split(everything, config, np.random.default_rng(config.seed).permutation(len(rows)), spec)
    _check_enough(len(rows), 0, config)
    first = list(_first(heldout_rows, config))
    levels = set().union(*(np.unique(pixels.values).tolist() for pixels, _ in first))
    if convention.threshold is None and len(levels) <= MOST_PHASES:
        raise ValueError(
            f"images must be of one kind, got grey levels to train on in {config.dataset!r} and the levels "
            f"{sorted(levels)} of phases in its held-out split"
        )
    heldout = _heldout(first, config, spec, convention, everything[0].shape[1:])
    images, responses = (part[: config.num_train_designs] for part in everything)
    return Designs(TensorDataset(images, responses), *heldout, len(images), spec)


def _first(rows: Any, config: TrainingConfig) -> Iterator[tuple[Pixels, Any]]:
    """The images and responses of the first rows, those to hold out."""
    return islice(stored_samples(rows, config), config.num_heldout_designs)


def _heldout(
    stored: Iterable[tuple[Pixels, Any]],
    config: TrainingConfig,
    spec: ResponseSpec | None,
    convention: Convention,
    shape: torch.Size | None = None,
) -> tuple[Tensor, Tensor]:
    """The designs to hold out and their responses, checked and as many as there are to be."""
    num = config.num_heldout_designs
    images, responses = _stacked(checked_samples(stored, config, spec, convention, shape))
    if len(images) < num:
        raise ValueError(
            f"dataset must have num_heldout_designs={num} designs to hold out, got {len(images)} from "
            f"{config.dataset!r}: --num_heldout_designs {len(images)} takes these"
        )
    return images, responses


def _split(
    samples: tuple[Tensor, Tensor], config: TrainingConfig, order: np.ndarray, spec: ResponseSpec | None
) -> Designs:
    """The first samples of an order as the held-out, the others as the training designs."""
    _check_enough(len(order), config.num_heldout_designs, config)
    heldout, train = np.split(order, [config.num_heldout_designs])
    train = train[: config.num_train_designs]
    images, responses = samples
    return Designs(
        TensorDataset(images[train], responses[train]), images[heldout], responses[heldout], len(train), spec
    )


def _check_enough(num: int, num_heldout: int, config: TrainingConfig) -> None:
    """Checks that a split has the designs to hold out of it and those to train on."""
    num_train = config.num_train_designs or 1
    if num < num_heldout + num_train:
        heldout = f"num_heldout_designs={num_heldout} and " if num_heldout else ""
        raise ValueError(
            f"dataset must have at least {num_heldout + num_train} designs ({heldout}{num_train} to train on), got "
            f"{num} from {config.dataset!r}"
        )


def _stacked(samples: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, responses = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(responses)


class _Stream(TorchIterableDataset):
    """A dataset of the Hub, read as it is needed and without end."""

    def __init__(self, rows: IterableDataset, config: TrainingConfig, *checks: Any):
        self._rows, self._config, self._checks = rows, config, checks

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in count():
            self._rows.set_epoch(epoch)  # each has its own order
            num = 0
            for sample in checked_samples(stored_samples(self._rows, self._config), self._config, *self._checks):
                yield sample
                num += 1
            if num != self._config.num_train_designs:  # only now it is known
                raise ValueError(
                    f"num_train_designs must be at most the number of training designs of {self._config.dataset!r}, "
                    f"{num}, got {self._config.num_train_designs}"
                )


def _from_images(path: Path, config: TrainingConfig) -> Designs:
    """Designs from image files, without responses: each image one, or crops of them."""
    if config.response_column is not None:
        raise ValueError(
            f"response_column must be left out for images alone, got {config.response_column!r} for {path}: "
            "mechdiffusers import makes a dataset of images and responses"
        )
    if config.streaming:
        raise ValueError(f"streaming must be false for images in files, which are read at once, got {path}")
    images, names = read_images(path)
    if images[0].dtype != bool and config.decoder_likelihood == "bernoulli":
        raise ValueError(f"{BINARY_ALONE}, got {path} with grey levels; 'discretized_logistic' is for those")
    if config.resize is not None:
        images = [resize_by_area(image, config.resize) for image in images]
        if min(image.min() for image in images) == max(image.max() for image in images):
            raise ValueError(
                f"resize must leave something of the designs, got {config.resize} for {path}, which makes all pixels "
                "equal: take more pixels"
            )
    if config.crop_size is None:
        samples = _without_responses(stacked(images, names))
        return _split(samples, config, np.random.default_rng(config.seed).permutation(len(images)), None)
    assert config.num_crops is not None  # TrainingConfig has checked it
    train, heldout = draw_crops(images, config.crop_size, config.num_crops, config.num_heldout_designs, config.seed)
    return Designs(TensorDataset(*_without_responses(train)), *_without_responses(heldout), len(train), None)


def _without_responses(designs: np.ndarray) -> tuple[Tensor, Tensor]:
    """Designs, bool or uint8, as uint8 images ``(N, 1, H, W)``, and no responses."""
    levels = designs.astype(np.uint8) * np.uint8(255 if designs.dtype == bool else 1)
    return torch.from_numpy(levels)[:, None], torch.empty(len(designs), 0, 0)


def _rows(path: Path, config: TrainingConfig) -> tuple[Any, Any]:
    """The rows to train on, and those of the split ``heldout`` or ``None``, with the columns that are asked for."""
    files = {file.stem: str(file) for file in sorted(path.glob("*.parquet"))}
    split = config.dataset_split
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"dataset must exist, got the parquet file {path}, which does not")
        files, split = {"train": str(path)}, "train"
    try:
        # load_dataset would give all files the features of one, and send a request to count its users
        local = {
            name: HFDataset.from_parquet(file, streaming=config.streaming)
            for name, file in files.items()
            if name in (split, _HELDOUT_SPLIT)
        }
        splits = local if files else load_dataset(config.dataset, streaming=config.streaming)
        rows, heldout = splits[split], None if split == _HELDOUT_SPLIT else splits.get(_HELDOUT_SPLIT)
    except Exception as error:  # datasets raises many kinds, all of them meaning that there is no such data
        raise ValueError(
            f"dataset must be 'random_composites', images or parquet files, a folder of either, or a dataset "
            f"on the Hub with the split {split!r}, got {config.dataset!r}: {error}"
        ) from error
    return _selected(rows, config), None if heldout is None else _selected(heldout, config)


def _selected(rows: Any, config: TrainingConfig) -> Any:
    """The columns of images and, where it is asked for, of responses alone; the latter as ``response``."""
    columns = rows.column_names or list(next(iter(rows), {}))
    wanted = {"image_column": config.image_column}
    if config.response_column is not None:
        wanted["response_column"] = config.response_column
    for setting, column in wanted.items():
        if column not in columns:
            raise ValueError(f"{setting} must be one of {columns} of {config.dataset!r}, got {column!r}")
    rows = rows.select_columns(list(wanted.values()))
    if config.response_column not in (None, "response"):
        rows = rows.rename_column(config.response_column, "response")
    if isinstance((rows.features or {}).get(config.image_column), ImageFeature):  # read by us, to name what is unfit
        rows = rows.cast_column(config.image_column, ImageFeature(decode=False))
    return rows


def _spec(rows: Any, config: TrainingConfig) -> ResponseSpec:
    """The specification of the responses of rows."""
    try:
        return ResponseSpec.of(rows)
    except ValueError as error:
        raise ValueError(
            f"response_column must hold responses with their specification, as build_dataset stores them, got "
            f"{config.response_column!r} of {config.dataset!r}: {error}"
        ) from error
