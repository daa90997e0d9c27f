r"""What a row of a dataset of responses holds, and how their specification travels with them.

========== ============================ ==============================================================
column     type                         what
========== ============================ ==============================================================
image      PNG of one channel           the design, row 0 at the top: black the soft phase, white the stiff one
response   float32, shape (L, S)        L load cases, S strains; NaN from where a design is not solved
converged  bool, shape (L,)             whether all strains of a load case are solved
...        float64                      what else is known of a design, such as its volume fraction
========== ============================ ==============================================================

The specification of the responses is JSON in the ``id`` of the feature of their column. Of all places that a dataset
has for metadata, ``datasets`` carries that one through parquet files, streams, ``map``, concatenation and the Hub.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import numpy as np
from datasets import Array2D, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.levels import MOST_PHASES, says_nothing_of_grey

__all__ = ["dataset_of", "designs_of", "grey_levels"]


def grey_levels(designs: Tensor | np.ndarray) -> np.ndarray:
    """Designs as an image file holds them.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1]: 0 and 1 alone, or grey, more than eight multiples of 1/255.

    Returns:
        Bool of the same shape if all values are 0 or 1, else uint8.

    Raises:
        ValueError: If the designs are not as described.
    """
    values = designs.detach().cpu().numpy() if isinstance(designs, Tensor) else designs
    if not isinstance(values, np.ndarray) or values.ndim != 3 or not values.size or values.dtype.kind not in "buif":
        what = getattr(values, "shape", type(values).__name__)
        raise ValueError(f"designs must be a tensor or array of numbers, shape (B, H, W), none of them 0, got {what}")
    if not ((values >= 0) & (values <= 1)).all():  # also false for NaN
        raise ValueError("designs must lie in [0, 1] everywhere, got values outside or NaN")
    if ((values == 0) | (values == 1)).all():
        return values.astype(bool)
    levels = np.rint(values * 255.0)
    if np.abs(values * 255.0 - levels).max() > 1e-3:
        raise ValueError(
            "designs must be multiples of 1/255, so that the stored 8-bit images are what is simulated, got values in "
            "between: np.rint(255 * designs) / 255 rounds them"
        )
    known = np.unique(levels)
    if len(known) <= MOST_PHASES or says_nothing_of_grey(known[0], known[-1], 255):
        raise ValueError(
            f"designs must be 0 and 1 alone, or have more than {MOST_PHASES} grey levels over the range, got "
            f"{len(known)} from {known[0] / 255:g} to {known[-1] / 255:g}, which training takes for phases or for an "
            "image that was not stretched"
        )
    return levels.astype(np.uint8)


def designs_of(levels: np.ndarray) -> np.ndarray:
    """The designs in [0, 1], float64, that :func:`grey_levels` gave bool or uint8 for."""
    return levels.astype(np.float64) / (1 if levels.dtype == bool else 255)


def dataset_of(
    levels: np.ndarray, response: np.ndarray, parameters: Mapping[str, np.ndarray], spec: ResponseSpec
) -> Dataset:
    """The dataset, in memory.

    Args:
        levels: The designs, bool or uint8, shape ``(B, H, W)``.
        response: Shape ``(B, L, S)``, NaN where not solved.
        parameters: Further columns, shape ``(B,)`` each.
        spec: Of the responses.
    """
    shape = response.shape[1:]
    features = {
        "image": ImageFeature(),
        "response": Array2D(shape, "float32", id=json.dumps(spec.to_dict())),
        "converged": List(Value("bool"), length=shape[0]),
        **{name: Value("float64") for name in parameters},
    }
    columns = {
        "image": [{"bytes": _png(image), "path": None} for image in levels],
        "response": response.astype(np.float32),
        "converged": ~np.isnan(response).any(-1),
        **parameters,
    }
    return Dataset.from_dict(columns, features=Features(features))


def _png(image: np.ndarray) -> bytes:
    """A PNG file of 1 bit a pixel for bool, of 8 for uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
