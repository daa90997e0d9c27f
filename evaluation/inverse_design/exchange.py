"""Designs on their way to another solver, and its results on their way back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.mechanics import ResponseSpec, export_designs
from mechdiffusers.microstructures import read_designs

__all__ = ["ExportedDesigns", "design_names", "read_exported", "write_export"]

#: What says that a folder is an export.
_INDEX = "export.json"


@dataclass(frozen=True)
class ExportedDesigns:
    """Designs for targets, and what is known of the responses that another solver is to give."""

    designs: np.ndarray  #: shape (B, H, W), in [0, 1]
    names: list[str]  #: of the files, B of them
    spec: ResponseSpec | None  #: ``None`` for a folder that is no export of ours
    dataset: Path | None  #: the folder of the training data, where it was named


def design_names(targets: Sequence[str], num_designs: int) -> list[str]:
    """Names of designs, ``TARGET-00`` and so on, in the order of the targets."""
    return [f"{target}-{index:02d}" for target in targets for index in range(num_designs)]


def write_export(
    folder: Path, designs: np.ndarray, names: Sequence[str], spec: ResponseSpec, dataset: Path | None
) -> None:
    """Writes designs as pictures, arrays and, if they are binary, meshes, with what ``mechdiffusers verify`` needs.

    Args:
        folder: Made if need be.
        designs: Shape ``(B, H, W)``, in [0, 1].
        names: Of the designs.
        spec: Of the responses that another solver is to give.
        dataset: Folder of the training data, for the retrieval baseline.

    Raises:
        ValueError: If a file cannot be written, or the names are not fit for files.
    """
    (folder / _INDEX).unlink(missing_ok=True)  # it comes last: without it this is no export
    is_binary = bool(((designs == 0) | (designs == 1)).all())
    for form in ("png", "npy", *(("inp", "vtu", "msh") if is_binary else ())):
        export_designs(designs, folder / form, names=names, formats=(form,))
    where = None if dataset is None else str(dataset.absolute())
    index = {"names": list(names), "spec": spec.to_dict(), "dataset": where}
    with atomic_write(folder / "designs.npy") as unfinished:
        np.save(unfinished, designs)
    with atomic_write(folder / _INDEX) as unfinished:
        unfinished.write_text(json.dumps(index, indent=1) + "\n")


def read_exported(folder: Path) -> ExportedDesigns:
    """Reads what :func:`write_export` wrote, or any folder of designs.

    Raises:
        ValueError: If the folder holds no designs.
    """
    if not (folder / _INDEX).exists():
        files = read_designs(folder)
        return ExportedDesigns(files.designs, files.names, None, None)
    try:
        index = json.loads((folder / _INDEX).read_text())
        designs = np.load(folder / "designs.npy")
        names, spec, dataset = index["names"], ResponseSpec.from_dict(index["spec"]), index["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"designs must be a folder that --export wrote, got {folder}: {error}") from error
    return ExportedDesigns(designs, names, spec, None if dataset is None else Path(dataset))
