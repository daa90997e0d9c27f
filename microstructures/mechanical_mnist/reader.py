"""Reader of the published Mechanical MNIST files, uniaxial extension.

A folder holds ``mnist_img.txt.zip`` or ``mnist_img.txt``, one flattened 28 x 28 bitmap a line from 0 to 255, and
``summary_psi.txt``, the change in strain energy at 13 displacements of the top edge. A pixel of value v has Young's
modulus 1 + 99 v / 255, so that a design is v / 255; see :mod:`mechdiffusers.mechanics.materials` for the law.

References:
    | Mechanical MNIST: a benchmark dataset for mechanical metamodels (Lejeune, 2020)
    | https://doi.org/10.1016/j.eml.2020.100659
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from datasets import Dataset

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.build_dataset.columns import dataset_of

__all__ = ["load_mechanical_mnist"]

#: Displacements of the top edge in pixels, without the unloaded state.
_DISPLACEMENTS = (0.001, 0.01, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 12, 14)
_SIZE = 28


def load_mechanical_mnist(folder: str | Path) -> Dataset:
    """Reads designs and energies of published files.

    Args:
        folder: Where ``summary_psi.txt`` and ``mnist_img.txt.zip`` or ``mnist_img.txt`` lie.

    Returns:
        A row a bitmap, with the columns of :func:`build_dataset`: 8-bit images and responses (1, 12), the total strain
        energy. :meth:`.ResponseSpec.of` says at which strains. Energies have 5 decimals: those of the first two
        strains carry hardly a digit. The published meshes are of triangles of order 2, finer than the bitmap.

    Raises:
        ValueError: If a file is missing or does not hold what is described.
    """
    folder = Path(folder)
    bitmaps = _read(folder, "mnist_img.txt", _SIZE**2)
    energies = _read(folder, "summary_psi.txt", len(_DISPLACEMENTS) + 1)
    if len(bitmaps) != len(energies):
        raise ValueError(f"folder must hold as many bitmaps as energies, got {len(bitmaps)} and {len(energies)}")
    if (bitmaps != np.clip(np.rint(bitmaps), 0, 255)).any():
        raise ValueError("folder must hold bitmaps of integers from 0 to 255, got others")
    spec = ResponseSpec(
        "energy",
        ["uniaxial_extension"],
        [[displacement / _SIZE for displacement in _DISPLACEMENTS]],
        units="Young's modulus of a black pixel x pixel^2, per unit thickness",
        signed=False,
        solver={"element_order": 2, "young_soft": 1.0, "young_stiff": 100.0, "poisson": 0.3, "pixel_size": 1.0},
    )
    images = bitmaps.astype(np.uint8).reshape(-1, _SIZE, _SIZE)
    dataset = dataset_of(images, (energies[:, 1:] - energies[:, :1])[:, None], {}, spec)
    dataset.info.license = "CC BY-SA 3.0"
    dataset.info.homepage = "https://github.com/elejeune11/Mechanical-MNIST"
    dataset.info.citation = "E. Lejeune, Mechanical MNIST, Extreme Mechanics Letters 36 (2020) 100659"
    return dataset


def _read(folder: Path, name: str, columns: int) -> np.ndarray:
    """The table of a text file or of its zipped form."""
    plain, zipped = folder / name, folder / f"{name}.zip"
    try:
        if plain.exists():
            text = plain.read_text()
        else:
            with zipfile.ZipFile(zipped) as archive:
                text = archive.read(name).decode()
        table = np.loadtxt(io.StringIO(text), ndmin=2)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"folder must hold a readable table {name} or {name}.zip, got {folder}: {error}") from error
    if table.shape[1] != columns:
        raise ValueError(f"folder must hold {columns} numbers a line in {name}, got {table.shape[1]}")
    return table
