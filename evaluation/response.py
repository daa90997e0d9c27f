r"""How far responses are from a target, and which known designs come nearest: the baseline of inverse design.

The error of a response :math:`y` is the mean over load cases of

.. math:: \|y - y^*\|_2 / \|y^*\|_2,

the norms along that case's strains, so that a soft load case counts as much as a stiff one. What the target :math:`y^*`
leaves open (NaN) is left out, and with it a load case of which nothing is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor

from mechdiffusers.microstructures import response_meaning
from mechdiffusers.microstructures.build_dataset.columns import designs_of

__all__ = [
    "NearestDesigns",
    "as_array",
    "load_split",
    "nearest_training_designs",
    "response_error",
    "stored_designs",
    "stored_responses",
]


@overload
def response_error(response: np.ndarray, target: np.ndarray) -> np.ndarray: ...
@overload
def response_error(response: Tensor, target: Tensor) -> Tensor: ...
def response_error(response: np.ndarray | Tensor, target: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Relative error of responses, differentiable.

    Args:
        response: Shape ``(B, L, S)``, NaN where not solved.
        target: Shape ``(B, L, S)``, or ``(L, S)`` for one target of all; NaN where open.

    Returns:
        Shape ``(B,)``, float64, of the kind of ``response``; NaN where an entry that the target gives is not solved.

    Raises:
        ValueError: If the shapes do not fit, or a target is infinite, open everywhere or zero in a whole load case.

    Example:
        >>> float(response_error(np.full((1, 2, 3), 1.1), np.ones((2, 3)))[0])
        0.1000000000000000...
    """
    found, wanted = (
        (values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))).to(torch.float64)
        for values in (response, target)
    )
    if found.ndim != 3 or wanted.shape not in (found.shape, found.shape[1:]):
        raise ValueError(
            "target must have the shape (B, L, S) or (L, S) of the response (B, L, S), got "
            f"{tuple(wanted.shape)} for {tuple(found.shape)}"
        )
    given = ~wanted.isnan()
    size = torch.linalg.vector_norm(torch.where(given, wanted, 0.0), dim=-1)
    cases = given.any(-1)
    if not cases.any(-1).all() or wanted.isinf().any() or (cases & (size == 0)).any():
        raise ValueError("target must be finite, given somewhere, and not zero all along a load case")
    distance = torch.linalg.vector_norm(torch.where(given, found - wanted, 0.0), dim=-1)
    relative = torch.where(cases, distance / torch.where(cases, size, 1.0), 0.0)
    error = relative.sum(-1) / cases.sum(-1)
    return error if isinstance(response, Tensor) else error.numpy()


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
        targets: Shape ``(T, L, S)``, NaN where open.
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
    errors = np.array([response_error(stored, target) for target in wanted]).reshape(len(wanted), len(stored))
    fewest = int(np.isfinite(errors).sum(1).min(initial=len(stored)))
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= fewest:
        raise ValueError(f"k must be an integer from 1 to the {fewest} solved rows of the dataset, got {k!r}")
    index = np.argsort(errors, axis=1, kind="stable")[:, :k]  # NaN comes last
    rows, inverse = np.unique(index, return_inverse=True)
    designs = stored_designs(dataset.select(rows))[inverse.reshape(index.shape)]
    return NearestDesigns(designs, stored[index], np.take_along_axis(errors, index, 1), index)


def as_array(values: np.ndarray | Tensor, name: str = "values") -> np.ndarray:
    """Numbers on the CPU, float64, without what a tensor knows of its gradient; ``name`` is whose error it would be."""
    try:
        if isinstance(values, Tensor) and not values.is_complex():  # which may be of a kind that numpy has not
            return values.detach().to("cpu", torch.float64).numpy()
        return np.asarray(values).astype(np.float64, casting="same_kind" if np.iscomplexobj(values) else "unsafe")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"{name} must be a tensor, an array or lists of real numbers, as long as each other, got "
            f"{type(values).__name__}"
        ) from None


def load_split(folder: Path, split: str) -> Dataset:
    """The split ``"train"`` or ``"heldout"`` of a folder of both; a ``ValueError`` if its file is missing."""
    file = folder / f"{split}.parquet"
    if not file.exists():
        raise ValueError(f"dataset must be a folder of train.parquet and heldout.parquet, got no {file}")
    return Dataset(pq.read_table(file))


def stored_responses(dataset: Any) -> np.ndarray:
    """The responses of a dataset, in the units that its meaning says.

    Args:
        dataset: A dataset of :func:`mechdiffusers.build_dataset`, one split.

    Returns:
        Shape ``(N, L, S)``, float64, NaN where a design was not solved.

    Raises:
        ValueError: If the dataset has no responses, or they came without their meaning.

    Example:
        >>> targets = stored_responses(heldout)[:4]  # doctest: +SKIP
    """
    response_meaning(dataset)
    return np.asarray(dataset.select_columns(["response"]).with_format("numpy")[:]["response"], dtype=np.float64)


def stored_designs(dataset: Any) -> np.ndarray:
    """The designs of a dataset.

    Args:
        dataset: A dataset of :func:`mechdiffusers.build_dataset`, one split.

    Returns:
        Shape ``(N, H, W)``, float32, in [0, 1]: 0 is the soft phase, 1 the stiff one.

    Example:
        >>> verify(stored_designs(heldout)[:4], targets, meaning)  # doctest: +SKIP
    """
    levels = np.asarray(dataset.select_columns(["image"]).with_format("numpy")[:]["image"])
    return designs_of(levels).astype(np.float32)
