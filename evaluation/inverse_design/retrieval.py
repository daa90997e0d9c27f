"""Designs that are known already: what a dataset stores, and which of it comes nearest to targets.

Retrieval is the baseline of inverse design. It compares stored responses, so that nothing is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from torch import Tensor

from mechdiffusers.evaluation.inverse_design.response import as_array, response_error
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.build_dataset.columns import designs_of

__all__ = [
    "NearestDesigns",
    "load_split",
    "load_splits",
    "nearest_training_designs",
    "stored_designs",
    "stored_responses",
]


@dataclass
class NearestDesigns:
    """The k stored designs nearest to each of T targets, nearest first."""

    designs: np.ndarray  #: shape (T, k, H, W)
    response: np.ndarray  #: their stored responses, shape (T, k, L, S)
    error: np.ndarray  #: of the stored responses, shape (T, k)
    index: np.ndarray  #: rows of the dataset, shape (T, k)


def nearest_training_designs(targets: np.ndarray | Tensor, dataset: Any, k: int = 8) -> NearestDesigns:
    """Retrieves the designs of a dataset whose stored responses are nearest to targets; nothing is simulated.

    Args:
        targets: Shape ``(T, L, S)``, NaN where unspecified.
        dataset: A dataset of :func:`mechdiffusers.build_dataset`; a row without a solved response is never near.
        k: How many designs for each target.

    Returns:
        The designs, nearest by :func:`response_error`.

    Raises:
        ValueError: If ``k`` exceeds the solved rows, or the targets have another shape than the stored responses.

    Example:
        >>> nearest_training_designs(targets, dataset, k=8).error.mean(0)  # doctest: +SKIP
    """
    stored = stored_responses(dataset)
    wanted = as_array(targets, "targets")
    if wanted.ndim != 3 or wanted.shape[1:] != stored.shape[1:]:
        raise ValueError(f"targets must have shape (T, {stored.shape[1]}, {stored.shape[2]}), got {wanted.shape}")
    signed = ResponseSpec.of(dataset).signed
    errors = np.array([response_error(stored, target, signed=signed) for target in wanted])
    errors = errors.reshape(len(wanted), len(stored))
    fewest = int(np.isfinite(errors).sum(1).min(initial=len(stored)))
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= fewest:
        raise ValueError(f"k must be an integer from 1 to the {fewest} solved rows of the dataset, got {k!r}")
    index = np.argsort(errors, axis=1, kind="stable")[:, :k]  # NaN comes last
    rows, inverse = np.unique(index, return_inverse=True)
    designs = stored_designs(dataset.select(rows))[inverse.reshape(index.shape)]
    return NearestDesigns(designs, stored[index], np.take_along_axis(errors, index, 1), index)


def load_split(folder: Path, split: str) -> Dataset:
    """The split ``"train"`` or ``"heldout"`` of a folder of both; a ``ValueError`` if its file is missing."""
    file = folder / f"{split}.parquet"
    if not file.exists():
        raise ValueError(f"dataset must be a folder of train.parquet and heldout.parquet, got no {file}")
    return Dataset(pq.read_table(file))


def load_splits(folder: Path | None) -> dict[str, Dataset]:
    """Both splits as :func:`.verify` takes them, ``dataset`` and ``heldout``; none without a folder."""
    if folder is None:
        return {}
    return {"dataset": load_split(folder, "train"), "heldout": load_split(folder, "heldout")}


def stored_responses(dataset: Any) -> np.ndarray:
    """The responses of a dataset, in the units of its specification.

    Args:
        dataset: A dataset of :func:`mechdiffusers.build_dataset`, one split.

    Returns:
        Shape ``(N, L, S)``, float64, NaN where a design was not solved.

    Raises:
        ValueError: If the dataset has no responses, or they came without their specification.

    Example:
        >>> targets = stored_responses(heldout)[:4]  # doctest: +SKIP
    """
    ResponseSpec.of(dataset)
    return np.asarray(dataset.select_columns(["response"]).with_format("numpy")[:]["response"], dtype=np.float64)


def stored_designs(dataset: Any) -> np.ndarray:
    """The designs of a dataset.

    Args:
        dataset: A dataset of :func:`mechdiffusers.build_dataset`, one split.

    Returns:
        Shape ``(N, H, W)``, float32, in [0, 1]: 0 is the soft phase, 1 the stiff one.

    Example:
        >>> verify(stored_designs(heldout)[:4], targets, spec)  # doctest: +SKIP
    """
    levels = np.asarray(dataset.select_columns(["image"]).with_format("numpy")[:]["image"])
    return designs_of(levels).astype(np.float32)
