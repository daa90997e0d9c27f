"""Reader of the published Mechanical MNIST files.

A folder holds one flattened 28 x 28 bitmap a line, from 0 to 255, and a table of the change in strain energy at the
displacements of a load case. A pixel of value v has Young's modulus 1 + 99 v / 255, so that a design is v / 255; see
:mod:`mechdiffusers.mechanics.materials` for the law. Bitmaps and energies have one of these pairs of names:

=================== ========================= =========================================
bitmaps             energies                  where
=================== ========================= =========================================
mnist_img_train.txt summary_psi_train_all.txt as published, 60,000 rows
mnist_img_test.txt  summary_psi_test_all.txt  as published, 10,000 rows
mnist_img.txt       summary_psi.txt           a part of them
=================== ========================= =========================================

A file lies in the folder, in the subfolder that it is published in (``MNIST_input_files``, ``FEA_psi_results``), or in
a zip archive named after the file or the subfolder. Training rows come before test rows.

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

__all__ = ["DISPLACEMENTS", "load_mechanical_mnist"]

_TO_14 = (0.001, 0.01, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 12, 14)
_TO_3_5 = (0.001, 0.01, 0.1, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
#: By load case, of opposite edges against each other, in pixels, without the unloaded state.
DISPLACEMENTS = {
    "uniaxial_extension": _TO_14,
    "equibiaxial_extension": _TO_14,
    "shear": _TO_3_5,
    "confined_compression": _TO_3_5,
}
_SIZE = 28
_NAMES = (
    ("mnist_img_train.txt", "summary_psi_train_all.txt"),
    ("mnist_img_test.txt", "summary_psi_test_all.txt"),
    ("mnist_img.txt", "summary_psi.txt"),
)


def load_mechanical_mnist(folder: str | Path, load_case: str | None = None) -> Dataset:
    """Reads designs and energies of published files.

    Args:
        folder: Where the files lie, see above.
        load_case: ``"uniaxial_extension"``, ``"equibiaxial_extension"``, ``"shear"`` or ``"confined_compression"``. No
            published file says it; by default the name of the folder does, as in ``mechanical_mnist_shear``.

    Returns:
        A row a bitmap, with the columns of :func:`build_dataset`: 8-bit images and responses (1, 12), of shear and
        compression (1, 10), the total strain energy. :meth:`.ResponseSpec.of` says at which strains. Energies have 5
        decimals: those of the first two strains carry hardly a digit. The published meshes are of triangles of order 2,
        finer than the bitmap.

    Raises:
        ValueError: If the load case is not known, or another one than the folder's name says, or a file is missing or
            does not hold what is described.

    Example:
        >>> dataset = load_mechanical_mnist("data/mechanical_mnist", "uniaxial_extension")  # doctest: +SKIP
        >>> dataset.num_rows  # doctest: +SKIP
        8000
    """
    folder = Path(folder)
    load_case = _checked_load_case(load_case, folder)
    pairs = [pair for names in _NAMES if (pair := _pair(folder, *names, load_case)) is not None]
    if not pairs:
        names = ", ".join(energies for _, energies in _NAMES)
        raise ValueError(f"folder must hold one of {names}, as it is or zipped, got {folder} without")
    spec = ResponseSpec(
        "energy",
        [load_case],
        [[displacement / _SIZE for displacement in DISPLACEMENTS[load_case]]],
        units="Young's modulus of a black pixel x pixel^2, per unit thickness",
        signed=False,
        solver={"element_order": 2, "young_soft": 1.0, "young_stiff": 100.0, "poisson": 0.3, "pixel_size": 1.0},
    )
    images, responses = (np.concatenate(part) for part in zip(*pairs, strict=True))
    dataset = dataset_of(images, responses, {}, spec)
    dataset.info.license = "CC BY-SA 3.0"
    dataset.info.homepage = "https://github.com/elejeune11/Mechanical-MNIST"
    dataset.info.citation = "E. Lejeune, Mechanical MNIST, Extreme Mechanics Letters 36 (2020) 100659"
    return dataset


def _checked_load_case(load_case: str | None, folder: Path) -> str:
    """The load case that is given or that the name of the folder says."""
    name = folder.resolve().name.lower().replace("-", "_").replace(" ", "_")
    said = [case for case in DISPLACEMENTS if case in name]
    if load_case is None and len(said) == 1:
        return said[0]
    if load_case not in DISPLACEMENTS:
        raise ValueError(
            f"load_case must be one of {', '.join(DISPLACEMENTS)}, as neither the published files nor the name of the "
            f"folder {folder} say which, got {load_case!r}"
        )
    if said and load_case not in said:
        raise ValueError(f"load_case must be that of the folder's name, {' or '.join(said)}, got {load_case!r}")
    return load_case


def _pair(folder: Path, bitmaps_name: str, energies_name: str, load_case: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The images (B, 28, 28) and responses (B, 1, S) of two files; ``None`` if there are no such energies."""
    energies = _table(folder, "FEA_psi_results", energies_name)
    if energies is None:
        return None
    if energies.shape[1] != len(DISPLACEMENTS[load_case]) + 1:
        expected = ", ".join(f"{len(values) + 1} for {case}" for case, values in DISPLACEMENTS.items())
        raise ValueError(
            f"folder must hold as many numbers a line in {energies_name} as the load case has, {expected}, got "
            f"{energies.shape[1]} for {load_case}"
        )
    bitmaps = _table(folder, "MNIST_input_files", bitmaps_name)
    if bitmaps is None or bitmaps.shape != (len(energies), _SIZE**2):
        got = "none" if bitmaps is None else f"{len(bitmaps)} lines of {bitmaps.shape[1]}"
        raise ValueError(
            f"folder must hold {bitmaps_name}, as it is or zipped, with a line of {_SIZE**2} numbers for each of the "
            f"{len(energies)} of {energies_name}, got {got} in {folder}"
        )
    if (bitmaps != np.clip(np.rint(bitmaps), 0, 255)).any():
        raise ValueError(f"folder must hold bitmaps of integers from 0 to 255, got others in {bitmaps_name}")
    return bitmaps.astype(np.uint8).reshape(-1, _SIZE, _SIZE), (energies[:, 1:] - energies[:, :1])[:, None]


def _table(folder: Path, published_in: str, name: str) -> np.ndarray | None:
    """The table of a text file, as it is or zipped; ``None`` if there is no such file."""
    try:
        text = _text(folder, published_in, name)
        return None if text is None else np.loadtxt(io.StringIO(text), ndmin=2)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"folder must hold a readable table {name}, got {folder}: {error}") from error


def _text(folder: Path, published_in: str, name: str) -> str | None:
    for place in (folder, folder / published_in):
        if (place / name).is_file():
            return (place / name).read_text()
    for path in (folder / f"{name}.zip", folder / published_in / f"{name}.zip", folder / f"{published_in}.zip"):
        if path.is_file():
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if Path(member).name == name:
                        return archive.read(member).decode()
    return None
