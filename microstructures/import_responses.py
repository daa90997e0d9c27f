"""A dataset to train on, from designs in files and a table of what another solver or a measurement said of them.

mechdiffusers import --designs my/images --responses my/responses.csv --units MPa --output_dir data/mine
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, disable_progress_bars
from torch import Tensor

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.build_dataset.columns import dataset_of, grey_levels
from mechdiffusers.microstructures.dataset_folder import write_dataset_folder
from mechdiffusers.microstructures.read_designs import read_designs, without_suffix
from mechdiffusers.microstructures.response_table import ResponseTable, read_response_table

__all__ = ["add_arguments", "dataset_from_responses", "match_names", "run"]

logger = logging.getLogger(__name__)


def dataset_from_responses(designs: np.ndarray | Tensor, response: np.ndarray | Tensor, spec: ResponseSpec) -> Dataset:
    """A dataset of designs and their responses, wherever these are from.

    Args:
        designs: Shape ``(B, H, W)``, multiples of 1/255 in [0, 1]: 0 the soft phase, 1 the stiff one; row 0 at the top.
        response: Shape ``(B, L, S)``, in the units of ``spec``; NaN where unknown.
        spec: Of the responses.

    Returns:
        A row a design, in their order, with the columns of :func:`.build_dataset`.

    Raises:
        ValueError: If the designs or responses are not as described, or a load case is unknown at a strain for all.

    Example:
        >>> spec = ResponseSpec("stiffness", ["C11", "C22"], [[0.0], [0.0]], units="GPa", signed=False)
        >>> dataset = dataset_from_responses(np.eye(4)[None].repeat(3, 0), np.ones((3, 2, 1)), spec)
        >>> dataset.column_names
        ['image', 'response', 'converged']
    """
    if not isinstance(spec, ResponseSpec):
        raise ValueError(f"spec must be a ResponseSpec, got {type(spec).__name__}")
    levels = grey_levels(designs)
    try:
        given = response.detach().cpu().numpy() if isinstance(response, Tensor) else response
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"response must be an array of numbers, got {type(response).__name__}") from None
    if values.shape != (len(levels), *spec.shape):
        raise ValueError(f"response must have shape {(len(levels), *spec.shape)} for the designs, got {values.shape}")
    with np.errstate(over="ignore"):
        if np.isinf(values.astype(np.float32)).any():
            raise ValueError(
                f"response must be finite in single precision, or NaN where unknown, got {np.nanmax(np.abs(values)):g}"
            )
    if not spec.signed and (values < 0).any():
        raise ValueError(f"response must not be negative, since spec is unsigned, got {np.nanmin(values):g}")
    if (unknown := np.isnan(values).all(0)).any():
        case, strain = np.argwhere(unknown)[0].tolist()
        raise ValueError(
            f"response must be known of some design at every strain, got none for {spec.load_cases[case]!r} at "
            f"{spec.strains[case][strain]:g}"
        )
    return dataset_of(levels, values, {}, spec)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--designs", type=Path, required=True, help="folder of images, or an image stack or array")
    parser.add_argument(
        "--responses",
        type=Path,
        required=True,
        help="CSV file: design,load_case,strain,QUANTITY with a row a point, or file_name,ENTRY,... a row a design",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--units", required=True, help="of the responses, such as MPa; 1 where they have none")
    parser.add_argument("--signed", action="store_true", help="the responses may be negative")
    parser.add_argument("--quantity", help="name of the quantity, for a file with a row a design")
    parser.add_argument(
        "--strains",
        nargs="+",
        metavar="STRAIN",
        help="common strains of all curves, as 0.02 0.04, or of each load case, as pull=0.02,0.04 shear=0.1,0.2; "
        "needed where the curves have different ones",
    )
    parser.add_argument("--num_heldout", type=int, help="designs kept from training; a tenth of them by default")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the held-out designs")


def run(arguments: argparse.Namespace) -> None:
    """Imports designs and responses; a ``ValueError`` says what does not fit, before anything is written."""
    if arguments.output_dir.exists():
        raise ValueError(f"output_dir must not exist yet, got {arguments.output_dir}: remove it, or name another one")
    disable_progress_bars()  # of datasets
    table = read_response_table(arguments.responses, signed=arguments.signed)
    quantity = _checked_quantity(arguments.quantity, table)
    files = read_designs(arguments.designs)
    rows = match_names(files.names, table)
    strains = _common_strains(table, arguments.strains)
    spec = ResponseSpec(quantity, table.load_cases, strains, units=arguments.units, signed=arguments.signed)
    response = np.stack([table.at(name, spec.load_cases, spec.strains) for name in rows])
    dataset = dataset_from_responses(files.designs, response, spec)
    num_heldout = max(1, len(dataset) // 10) if arguments.num_heldout is None else arguments.num_heldout
    if not 0 < num_heldout < len(dataset):
        raise ValueError(f"num_heldout must lie between 0 and the {len(dataset)} designs, got {num_heldout}")
    if arguments.seed < 0:
        raise ValueError(f"seed must be at least 0, got {arguments.seed}")
    heldout, train = np.split(np.random.default_rng(arguments.seed).permutation(len(dataset)), [num_heldout])
    splits = {"train": dataset.select(np.sort(train)), "heldout": dataset.select(np.sort(heldout))}
    write_dataset_folder(arguments.output_dir, splits)
    unknown = int(np.isnan(response).any(-1).sum())
    each = "single values" if spec.is_scalar else f"load cases at {spec.shape[1]} strains"
    logger.info(
        "%s: %d designs to train on and %d held out, of %d x %d pixels, %d %s, %d of %d with gaps",
        *(arguments.output_dir, len(train), len(heldout), *files.levels.shape[1:], spec.shape[0], each),
        *(unknown, response[..., 0].size),
    )


def match_names(files: Sequence[str], table: ResponseTable) -> list[str]:
    """The name that a table has for each file.

    Args:
        files: Names of designs as :func:`.read_designs` gives them.
        table: It may name a design by its path in the folder or by its file name, with any suffix or none, and an item
            of a single stack by its number.

    Raises:
        ValueError: If a design has no row or several names, or a row no design.
    """
    known: dict[str, list[int]] = {}
    alone = len({_path_and_item(file)[0] for file in files}) == 1
    for index, file in enumerate(files):
        for alias in _aliases(file, alone):
            known.setdefault(alias, []).append(index)
    found: dict[int, str] = {}
    for name in table.curves:
        fits = known.get(name) or known.get(name.rpartition(".")[0], [])
        if len(fits) != 1:
            what = (
                f"which fits {files[fits[0]]} and {files[fits[1]]}"
                if fits
                else f"which none of the designs {files[0]!r} to {files[-1]!r} has"
            )
            raise ValueError(f"responses must name one design each, got {name!r} in {table.where(name)}, {what}")
        if (other := found.setdefault(fits[0], name)) != name:
            raise ValueError(
                f"responses must have one name for a design, got {name!r} in {table.where(name)} and {other!r} in "
                f"{table.where(other)} for {files[fits[0]]}"
            )
    if missing := [file for index, file in enumerate(files) if index not in found]:
        raise ValueError(
            f"responses must have a row for every design, got none in {table.path.name} for {missing[0]} and "
            f"{len(missing) - 1} others: move these files elsewhere, or add rows with empty values"
        )
    return [found[index] for index in range(len(files))]


def _aliases(file: str, alone: bool) -> set[str]:
    """What a table may call a file."""
    path, item = _path_and_item(file)
    names = {path, Path(path).name}
    names |= {without_suffix(name) for name in names}
    return {name + item for name in names} | ({item[1:]} if alone and item else set())


def _path_and_item(file: str) -> tuple[str, str]:
    """The path of a file, and which item of it is meant, as ``#3``; other names may have that sign too."""
    path, sign, item = file.rpartition("#")
    return (path, sign + item) if without_suffix(path) != path else (file, "")


def _checked_quantity(given: str | None, table: ResponseTable) -> str:
    """The quantity, which one of the command and the table must name."""
    if table.quantity is None and given is None:
        raise ValueError(
            f"quantity must be given for a file with a row a design, as --quantity stiffness, got {table.path.name}"
        )
    if None not in (table.quantity, given) and table.quantity != given:
        raise ValueError(
            f"quantity must be that of {table.path.name}, {table.quantity!r}, or be left out, got {given!r}"
        )
    return table.quantity or given or ""


def _common_strains(table: ResponseTable, given: Sequence[str] | None) -> list[list[float]]:
    """The strains of each load case: those given, or those that all curves have."""
    cases = table.load_cases
    by_case: dict[str, dict[tuple[float, ...], str]] = {case: {} for case in cases}
    for name, curves in table.curves.items():
        for case, points in curves.items():
            by_case[case].setdefault(tuple(sorted(points)), name)
    single = [case for case in cases if set(by_case[case]) == {(0.0,)}]
    if 0 < len(single) < len(cases):
        curve = next(case for case in cases if case not in single)
        raise ValueError(
            f"responses must be curves throughout or single values throughout, got strains for {curve!r} and none for "
            f"{single[0]!r} in {table.path.name}: a dataset has one of the two"
        )
    if given is not None:
        if single:
            raise ValueError(f"strains must be left out for a quantity without a curve, got {list(given)}")
        return _given_strains(given, cases)
    for case, strains in by_case.items():
        if len(strains) > 1:
            (one, first), (other, second) = list(strains.items())[:2]
            low, high = max(each[0] for each in strains), min(each[-1] for each in strains)
            raise ValueError(
                f"strains must be given, since curves of {case!r} have different ones: {len(one)} points to "
                f"{one[-1]:g} for {first!r}, {len(other)} to {other[-1]:g} for {second!r} ({table.where(second)}); all "
                f"reach from {low:g} to {high:g}"
            )
    found = [list(next(iter(strains))) for strains in by_case.values()]
    if len({len(strains) for strains in found}) > 1:
        raise ValueError(
            "strains must be given, since load cases have different numbers of them: "
            + ", ".join(f"{case} {len(strains)}" for case, strains in zip(cases, found, strict=True))
        )
    return found


def _given_strains(given: Sequence[str], cases: Sequence[str]) -> list[list[float]]:
    """The strains of each load case, as the command names them."""
    by_case = {case: numbers.split(",") for case, sign, numbers in (text.rpartition("=") for text in given) if sign}
    try:
        if not by_case:
            return [[float(text) for text in given]] * len(cases)
        if len(by_case) == len(given) and by_case.keys() == set(cases):
            return [[float(text) for text in by_case[case]] for case in cases]
    except ValueError:
        pass
    raise ValueError(
        f"strains must be numbers, as 0.02 0.04, or those of each of the load cases {list(cases)} once, as "
        f"{cases[0]}=0.02,0.04, got {' '.join(given)!r}"
    )
