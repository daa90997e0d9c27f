"""Responses as a table: a CSV file with a row a point, or with a row a design.

With a row a point, the columns are ``design,load_case,strain,stress``. The first column is ``target`` in a file of
targets. The name of the last column is the quantity, and its empty cells are unknown. The strain is empty for a
quantity without a curve.

With a row a design, the columns are ``file_name,C11,C22,...`` or ``design,C11,C22,...``: each is an entry of a quantity
without a curve, and empty cells are unknown.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["ResponseTable", "read_response_table"]


@dataclass(frozen=True)
class ResponseTable:
    """Curves as they stand in a file, at whatever strains each has."""

    path: Path
    quantity: str | None  #: the name of the last column; ``None`` for a row a design, which names entries alone
    #: values by strain, by load case, by name: in the order of the file, NaN where unknown, strain 0 without a curve
    curves: Mapping[str, Mapping[str, Mapping[float, float]]]
    rows: Mapping[str, int]  #: the line of the file on which each name comes first

    @property
    def load_cases(self) -> list[str]:
        """All of them, in the order of the file."""
        return list(dict.fromkeys(case for cases in self.curves.values() for case in cases))

    def where(self, name: str) -> str:
        """The place of a name in the file, for messages."""
        return f"row {self.rows[name]} of {self.path.name}"

    def at(self, name: str, load_cases: Sequence[str], strains: Sequence[Sequence[float]]) -> np.ndarray:
        """The response of one name at given strains, interpolated linearly, never extrapolated.

        Returns:
            Shape ``(L, S)``, float64. NaN before the first point, behind the last, beside an unknown one, and in a load
            case without points.
        """
        response = np.full(np.shape(strains), math.nan)
        for case, wanted in enumerate(np.asarray(strains, dtype=np.float64)):
            if points := self.curves[name].get(load_cases[case]):
                response[case] = _interpolated(wanted, points)
        return response


def read_response_table(
    path: str | os.PathLike[str], *, first_column: str = "design", signed: bool = True, argument: str = "responses"
) -> ResponseTable:
    """Reads a table of responses.

    Args:
        path: A CSV file in UTF-8, with commas between cells and points in numbers, see this module's text.
        first_column: Name of the column of names.
        signed: Whether values may be negative.
        argument: Whose fault is named in messages.

    Raises:
        ValueError: If the file cannot be read, has other columns, a cell is no number, a row is double, or a value is
            negative where none may be; the message says in which row.

    Example:
        >>> read_response_table("results.csv").load_cases  # doctest: +SKIP
        ['uniaxial_extension', 'shear']
    """
    path = Path(path)
    lines = _lines(path, argument)
    _, header = next(lines, (1, []))
    by_point = [first_column, "load_case", "strain"]
    doubled = [name for name in header if header.count(name) > 1]
    is_by_point = header[:3] == by_point and len(header) == 4
    of_points = {"load_case", "strain"} & set(header)
    fit = is_by_point or (header[:1] in (["file_name"], [first_column]) and len(header) > 1 and not of_points)
    if not fit or "" in header or doubled:
        raise ValueError(
            f"{argument} must have the columns {','.join(by_point)} and the quantity's name, or {first_column} and the "
            f"names of entries, each once, got {','.join(header)!r} in row 1 of {path.name}"
        )
    curves: dict[str, dict[str, dict[float, float]]] = {}
    rows: dict[str, int] = {}
    without_strain: dict[str, bool] = {}
    for number, row in lines:
        where = f"row {number} of {path.name}"
        if len(row) != len(header):
            raise ValueError(
                f"{argument} must have {len(header)} cells in a row, and points in numbers, got {row} in {where}"
            )
        if not row[0]:
            raise ValueError(f"{argument} must have a {header[0]} in every row, got none in {where}")
        if not is_by_point and row[0] in curves:
            raise ValueError(f"{argument} must have each design once, got {row[0]!r} again in {where}")
        entries = [(case, "", cell) for case, cell in zip(header[1:], row[1:], strict=True)]
        if is_by_point:
            entries = [(row[1], row[2], row[3])]
        cases = curves.setdefault(row[0], {})
        rows.setdefault(row[0], number)
        for case, at, cell in entries:
            if not case:
                raise ValueError(f"{argument} must have a load_case in every row, got none in {where}")
            if without_strain.setdefault(case, not at) != (not at):
                raise ValueError(
                    f"{argument} must have a strain at every point of a curve, and at none of a quantity without a "
                    f"curve, got {at or 'none'!r} in {where}"
                )
            strain = 0.0 if not at else _number(at, f"strain {at!r} in {where}", argument)
            value = math.nan if cell.lower() in ("", "nan") else _number(cell, f"{cell!r} in {where}", argument)
            if value < 0 and not signed:
                raise ValueError(
                    f"{argument} must not be negative unless the specification is signed, got {cell!r} in {where}"
                )
            points = cases.setdefault(case, {})
            if strain in points:
                raise ValueError(
                    f"{argument} must have each strain of a curve once, got {at or 'no strain'!r} again in {where}"
                )
            points[strain] = value
    if not curves:
        raise ValueError(f"{argument} must have at least one row besides the header, got none in {path.name}")
    return ResponseTable(path, header[3] if is_by_point else None, curves, rows)


def _lines(path: Path, argument: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not empty, with its number."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{argument} must be a CSV file that can be read, got {path}: {error}") from error
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(
            f"{argument} must be UTF-8 without a byte-order mark, got one in row 1 of {path.name}: save it as UTF-8 "
            "without one, in Excel as 'CSV (comma delimited)' and not as 'CSV UTF-8'"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{argument} must be in UTF-8, got another encoding in row {number} of {path.name}: save it as UTF-8"
        ) from error
    first = text.split("\n", 1)[0]
    if ";" in first or "\t" in first:
        raise ValueError(
            f"{argument} must have commas between cells and points in numbers, got {first.strip()!r} in row 1 of "
            f"{path.name}: export it with a comma as the separator"
        )
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, [cell.strip() for cell in row]
    except csv.Error as error:
        raise ValueError(
            f"{argument} must be a CSV file that can be read, got row {reader.line_num} of {path.name}: {error}"
        ) from error


def _number(text: str, where: str, argument: str) -> float:
    """A finite number, with the remedy where it is nearly one."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and "_" not in text:  # which Python's own numbers may have
        return number
    remedy = ""
    if "," in text:
        remedy = ": write numbers with a point"
    elif text[:1].isdigit() and not text.lower().startswith(("inf", "nan")):
        remedy = ": write the number alone, without units"
    raise ValueError(f"{argument} must have finite numbers, got {where}{remedy}")


def _interpolated(strains: np.ndarray, points: Mapping[float, float]) -> np.ndarray:
    """A curve at ``strains``, NaN where it is unspecified."""
    at = np.array(sorted(points))
    values = np.array([points[strain] for strain in at])
    curve = np.interp(strains, at, values, left=math.nan, right=math.nan)
    # a point that coincides with a strain, up to the last digit of a decimal number, stands for itself
    nearest = np.abs(strains[:, None] - at).argmin(1)
    return np.where(np.isclose(strains, at[nearest], rtol=1e-6, atol=0), values[nearest], curve)
