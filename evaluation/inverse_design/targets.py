"""Targets as a table of curves: a CSV file with a row a point.

=========  ====================================================================================
column     what
=========  ====================================================================================
target     name of the target that the point belongs to
load_case  one of the load cases of the checkpoint
strain     magnitude of nominal strain
stress     the stress there, or ``energy``, as the checkpoint has it and in its units; empty where unspecified
=========  ====================================================================================

A curve may have its points at other strains than the checkpoint: it is interpolated linearly between them. It is
unspecified before the first, behind the last and on both sides of an empty one, and in a load case without points.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mechdiffusers.atomic_file import atomic_write

__all__ = ["read_targets", "write_targets"]


def read_targets(path: str | os.PathLike[str], meaning: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """Reads targets of a response that means what is given.

    Args:
        path: A CSV file, see this module's text.
        meaning: What the response means, such as ``pipe.response_encoder.config.meaning``.

    Returns:
        The names, in the order of the file, and the targets, shape ``(T, L, S)``, NaN where unspecified.

    Raises:
        ValueError: If the file cannot be read, its columns or load cases are others than those of the meaning, a number
            is none or negative, a strain comes twice, or a target is unspecified at all strains of the meaning.

    Example:
        >>> names, targets = read_targets("examples/targets.csv", meaning)  # doctest: +SKIP
    """
    columns = ["target", "load_case", "strain", meaning["quantity"]]
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"targets must be a CSV file that can be read, got {path}: {error}") from error
    (_, header), *rows = lines or [(1, [])]
    if header != columns or not rows:
        raise ValueError(f"targets must have the columns {','.join(columns)} and at least one point, got {header}")
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for number, row in rows:
        where = f"row {number} of {Path(path).name}"
        if len(row) != len(columns):
            raise ValueError(f"targets must have {len(columns)} cells in a row, got {row} in {where}")
        if row[1] not in meaning["load_cases"]:
            raise ValueError(f"targets must have load cases out of {list(meaning['load_cases'])}, got {row} in {where}")
        strain = _number(row[2], where)
        value = math.nan if row[3].lower() in ("", "nan") else _number(row[3], where)
        points = curves.setdefault(row[0], {}).setdefault(row[1], {})
        if strain in points:
            raise ValueError(f"targets must have each strain of a curve once, got {row[2]!r} again in {where}")
        points[strain] = value

    strains = np.asarray(meaning["strains"], dtype=np.float64)
    targets = np.full((len(curves), *strains.shape), math.nan)
    for target, (name, cases) in zip(targets, curves.items(), strict=True):
        for load_case, points in cases.items():
            case = list(meaning["load_cases"]).index(load_case)
            target[case] = _interpolated(strains[case], points)
            if np.isnan(target[case]).all() and not all(math.isnan(value) for value in points.values()):
                raise ValueError(
                    f"targets must be given at one at least of the strains {strains[case].tolist()}, or on both sides "
                    f"of it, got none for {load_case} of {name!r}"
                )
        if np.isnan(target).all():
            raise ValueError(f"targets must be given in one load case at least, got none of {name!r}")
    return list(curves), targets


def write_targets(path: str | os.PathLike[str], targets: Mapping[str, np.ndarray], meaning: Mapping[str, Any]) -> None:
    """Writes targets as :func:`read_targets` reads them, to six digits.

    Args:
        path: The CSV file; its folder is made if need be.
        targets: Curves by the name of the target, shape ``(L, S)`` each; unspecified points (NaN) are left out.
        meaning: What the curves mean, as :func:`mechdiffusers.response_meaning` has it.

    Raises:
        ValueError: If a target has another shape than the meaning's strains.

    Example:
        >>> write_targets("targets.csv", {"soft": stored_responses(dataset)[0]}, meaning)  # doctest: +SKIP
    """
    strains = np.asarray(meaning["strains"])
    for name, target in targets.items():
        if np.shape(target) != strains.shape:
            raise ValueError(
                f"targets must have the shape {strains.shape} of the strains, got {np.shape(target)} for {name!r}"
            )
    with atomic_write(Path(path)) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["target", "load_case", "strain", meaning["quantity"]])
        for name, target in targets.items():
            for case, strains, values in zip(meaning["load_cases"], meaning["strains"], target, strict=True):
                points = [point for point in zip(strains, values, strict=True) if not math.isnan(point[1])]
                table.writerows([name, case, f"{strain:.6g}", f"{value:.6g}"] for strain, value in points)


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:  # also for NaN
        raise ValueError(
            f"targets must have strains and values that are finite and not negative, got {text!r} in {where}"
        )
    return number


def _interpolated(strains: np.ndarray, points: Mapping[float, float]) -> np.ndarray:
    """A curve at ``strains``, NaN where it is unspecified."""
    at = np.array(sorted(points))
    values = np.array([points[strain] for strain in at])
    curve = np.interp(strains, at, values, left=math.nan, right=math.nan)
    # a point that coincides with a strain, up to the last digit of a decimal number, stands for itself
    nearest = np.abs(strains[:, None] - at).argmin(1)
    return np.where(np.isclose(strains, at[nearest], rtol=1e-6, atol=0), values[nearest], curve)
