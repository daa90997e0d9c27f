"""Targets as a table of curves: a CSV file with a row a point.

=========  ====================================================================================
column     what
=========  ====================================================================================
target     name of the target that the point belongs to
load_case  one of the load cases of the checkpoint
strain     strain of the point; empty for a quantity without a curve
stress     the stress there, or whatever quantity the checkpoint has, in its units; empty where unspecified
=========  ====================================================================================

A quantity without a curve may have a row a target too, see :mod:`mechdiffusers.microstructures.response_table`. A curve
may have its points at other strains than the checkpoint: it is interpolated linearly between them. It is unspecified
before the first, behind the last and on both sides of an empty one, and in a load case without points.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.response_table import read_response_table

__all__ = ["read_targets", "write_targets"]


def read_targets(path: str | os.PathLike[str], spec: ResponseSpec) -> tuple[list[str], np.ndarray]:
    """Reads targets of a response.

    Args:
        path: A CSV file, see this module's text.
        spec: Of the response, such as ``ResponseSpec.of(pipe)``.

    Returns:
        The names, in the order of the file, and the targets, shape ``(T, L, S)``, NaN where unspecified.

    Raises:
        ValueError: If the file cannot be read, its columns or load cases are others than those of ``spec``, a number
            is none, or negative where none may be, a strain comes twice, or a target is unspecified at all strains of
            ``spec``.

    Example:
        >>> names, targets = read_targets("examples/targets.csv", ResponseSpec.of(pipe))  # doctest: +SKIP
    """
    table = read_response_table(path, first_column="target", signed=spec.signed, argument="targets")
    if table.quantity not in (spec.quantity, None):
        raise ValueError(
            f"targets must have the columns target,load_case,strain,{spec.quantity}, got {table.quantity!r} as the "
            f"last in row 1 of {table.path.name}"
        )
    targets = []
    for name, cases in table.curves.items():
        target = table.at(name, spec.load_cases, spec.strains)
        for load_case, points in cases.items():
            if load_case not in spec.load_cases:
                raise ValueError(
                    f"targets must have load cases out of {list(spec.load_cases)}, got {load_case!r} of {name!r}, "
                    f"which begins in {table.where(name)}"
                )
            case = spec.load_cases.index(load_case)
            if np.isnan(target[case]).all() and not all(math.isnan(value) for value in points.values()):
                raise ValueError(
                    f"targets must be given at one at least of the strains {list(spec.strains[case])}, or on both "
                    f"sides of it, got none for {load_case} of {name!r}"
                )
        if np.isnan(target).all():
            raise ValueError(f"targets must be given in one load case at least, got none of {name!r}")
        targets.append(target)
    return list(table.curves), np.stack(targets)


def write_targets(path: str | os.PathLike[str], targets: Mapping[str, np.ndarray], spec: ResponseSpec) -> None:
    """Writes targets as :func:`read_targets` reads them, to six digits.

    Args:
        path: The CSV file; its folder is made if need be.
        targets: Curves by the name of the target, shape ``(L, S)`` each; unspecified points (NaN) are left out.
        spec: Of the curves.

    Raises:
        ValueError: If a target has another shape than the strains of ``spec``.

    Example:
        >>> write_targets("targets.csv", {"soft": stored_responses(dataset)[0]}, spec)  # doctest: +SKIP
    """
    for name, target in targets.items():
        if np.shape(target) != spec.shape:
            raise ValueError(
                f"targets must have the shape {spec.shape} of the strains, got {np.shape(target)} for {name!r}"
            )
    with atomic_write(Path(path)) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["target", "load_case", "strain", spec.quantity])
        for name, target in targets.items():
            for case, strains, values in zip(spec.load_cases, spec.strains, target, strict=True):
                points = [point for point in zip(strains, values, strict=True) if not math.isnan(point[1])]
                table.writerows(
                    [name, case, "" if spec.is_scalar else f"{strain:.6g}", f"{value:.6g}"] for strain, value in points
                )
