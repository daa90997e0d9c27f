"""Builds a dataset of designs with their responses."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.microstructures.build_dataset.columns import dataset_of, grey_levels
from mechdiffusers.microstructures.build_dataset.parts import compute_by_parts

__all__ = ["build_dataset"]

logger = logging.getLogger(__name__)

_OWN_COLUMNS = ("image", "response", "converged")
_UNITS = {"stress": "unit of young_soft", "energy": "unit of young_soft x unit of pixel_size^2, per unit thickness"}


def build_dataset(
    designs: Tensor | np.ndarray,
    load_cases: Sequence[str] = ("uniaxial_extension",),
    strains: Any = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    quantity: Literal["stress", "energy"] = "stress",
    units: str | None = None,
    element_order: int = 2,
    young_soft: float = 1.0,
    young_stiff: float = 100.0,
    poisson: float = 0.3,
    pixel_size: float = 1.0,
    output: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Dataset:
    """Simulates designs and stores them with their responses and the specification of these.

    With ``output``, what is done is kept beside it, in ``.unfinished-NAME``: the same call, made again after a kill,
    goes on from there and writes the file that it would have written undisturbed, to the byte (on one device and with
    the same packages). Made again after that, it reads the file.

    Args:
        designs: Shape ``(B, H, W)``, multiples of 1/255 in [0, 1]: 0 the soft phase, 1 the stiff one; row 0 at the top.
        load_cases: Names of load cases, see :func:`mechdiffusers.mechanics.simulate`.
        strains: Magnitudes of nominal strain, shape ``(S,)`` or ``(L, S)``.
        parameters: Further columns, shape ``(B,)`` each, such as the second result of :func:`random_composites`.
        quantity: Which response to store.
        units: Of the response, in words; by default in terms of those of ``young_soft`` and ``pixel_size``.
        element_order: 1 or 2.
        young_soft: Young's modulus where a design is 0.
        young_stiff: Young's modulus where a design is 1.
        poisson: Poisson's ratio.
        pixel_size: Length of a pixel's side.
        output: Parquet file to write, or ``None`` for a dataset in memory alone.
        device: Where to compute, the CPU by default: there in ``torch.get_num_threads()`` processes, see the note.
        progress: Whether to show a progress bar.

    Returns:
        A row a design, in their order, in memory: ``image`` (PNG, of 1 bit a pixel if all designs are binary, else of
        8), ``response`` (L, S) float32, ``converged`` (L,) bool and the parameters. A design that is not solved is
        kept: NaN from that strain on and flagged. :meth:`.ResponseSpec.of` reads their specification.

    Raises:
        ValueError: If an argument is not as described, or ``output`` holds another dataset.

    Note:
        The processes are workers of a :class:`torch.utils.data.DataLoader`: as with those, a script for macOS or
        Windows calls this under ``if __name__ == "__main__":``.

    Example:
        >>> designs, parameters = random_composites(100)
        >>> dataset = build_dataset(designs, ("uniaxial_extension", "shear"), [0.1, 0.2], parameters=parameters)
        >>> dataset.with_format("numpy")["response"][:].shape
        (100, 2, 2)
    """
    levels = grey_levels(designs)
    columns = _checked_parameters(parameters or {}, len(levels))
    if quantity not in _UNITS:
        raise ValueError(f"quantity must be one of {list(_UNITS)}, got {quantity!r}")
    if units is not None and not isinstance(units, str):
        raise ValueError(f"units must be words or None, got {units!r}")
    try:
        torch.device(device or "cpu")
    except RuntimeError:
        raise ValueError(f"device must be one of torch, such as 'cpu' or 'cuda', got {device!r}") from None
    # a single pixel, to have the arguments checked and the strains spelt out before anything is written
    strain = simulate(
        np.ones((1, 1, 1)),
        load_cases,
        strains,
        element_order=element_order,
        young_soft=young_soft,
        young_stiff=young_stiff,
        poisson=poisson,
        pixel_size=pixel_size,
        device=device,
    ).strain
    solver = {
        "element_order": element_order,
        "young_soft": young_soft,
        "young_stiff": young_stiff,
        "poisson": poisson,
        "pixel_size": pixel_size,
    }
    spec = ResponseSpec(quantity, load_cases, strain, units=units or _UNITS[quantity], signed=False, solver=solver)

    def responses(folder: Path) -> np.ndarray:
        response = compute_by_parts(levels, spec, folder, device, progress)
        if lost := int(np.isnan(response).any(-1).sum()):
            logger.warning("%d of %d paths are not solved to their end: NaN", lost, response[..., 0].size)
        return response

    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            return dataset_of(levels, responses(Path(folder)), columns, spec)
    path = Path(output)
    parts = path.with_name(f".unfinished-{path.name}")
    if path.exists():
        dataset = _read(path, levels, columns, spec)
    else:
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output must be a file that can be written, got {path}: {error}") from error
        dataset = dataset_of(levels, responses(parts), columns, spec)
        dataset.to_parquet(parts / path.name)
        os.replace(parts / path.name, path)
    shutil.rmtree(parts, ignore_errors=True)
    return dataset


def _checked_parameters(parameters: Mapping[str, Any], num: int) -> dict[str, np.ndarray]:
    """The further columns as float64 arrays ``(num,)``."""
    columns = {}
    for name, values in parameters.items():
        if name in _OWN_COLUMNS:
            raise ValueError(f"parameters must have names other than those of the dataset's own columns, got {name!r}")
        try:
            columns[name] = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"parameters must be numbers, got {name!r} of {type(values).__name__}") from None
        if columns[name].shape != (num,):
            raise ValueError(
                f"parameters must have one value for each of {num} designs, got {name!r} of shape {columns[name].shape}"
            )
    return columns


def _read(path: Path, levels: np.ndarray, columns: Mapping[str, np.ndarray], spec: ResponseSpec) -> Dataset:
    """The finished dataset of these designs with this specification."""
    try:
        dataset = Dataset(pq.read_table(path))
        same = ResponseSpec.of(dataset).difference(spec) is None and set(dataset.column_names) == {
            *_OWN_COLUMNS,
            *columns,
        }
        same = same and np.array_equal([np.asarray(image) for image in dataset["image"]], levels)
        same = same and all(np.array_equal(dataset[name], columns[name], equal_nan=True) for name in columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"output must be new or a dataset of responses, got {path}: {error}") from error
    if not same:
        raise ValueError(
            f"output must be new or hold this very dataset, got {path} with other designs, parameters or responses of "
            "another specification: choose another output"
        )
    return dataset
