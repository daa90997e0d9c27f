"""A report on designs for targets, by what another solver or a measurement said of them.

mechdiffusers verify --designs runs/mine --responses results.csv --targets targets.csv
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mechdiffusers.evaluation.inverse_design.exchange import read_exported
from mechdiffusers.evaluation.inverse_design.retrieval import load_splits
from mechdiffusers.evaluation.inverse_design.targets import read_targets
from mechdiffusers.evaluation.inverse_design.verify import verify
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.import_responses import match_names
from mechdiffusers.microstructures.read_designs import without_suffix
from mechdiffusers.microstructures.response_table import read_response_table

__all__ = ["add_arguments", "run"]

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--designs",
        type=Path,
        required=True,
        help="folder that mechdiffusers design --export wrote, or one of images named TARGET-00, TARGET-01 and so on",
    )
    parser.add_argument(
        "--responses",
        type=Path,
        required=True,
        help="CSV file: design,load_case,strain,QUANTITY with a row a point, or file_name,ENTRY,... a row a design",
    )
    parser.add_argument("--targets", type=Path, required=True, help="CSV file that the designs were made for")
    parser.add_argument(
        "--dataset",
        type=Path,
        help="folder of train.parquet and heldout.parquet: retrieval, novelty, reach; by default the one of the export",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/verify"), help="of the report; by default runs/verify"
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the report; a ``ValueError`` says what does not fit."""
    exported = read_exported(arguments.designs)
    folder = exported.dataset if arguments.dataset is None else arguments.dataset
    stored = load_splits(folder)
    if exported.spec is None and folder is None:
        raise ValueError(
            "dataset must be given for designs that --export did not write: it says what the responses are, got "
            f"{arguments.designs} alone"
        )
    spec = exported.spec or ResponseSpec.of(stored["dataset"])
    names, targets = read_targets(arguments.targets, spec)
    order = _by_target(exported.names, names)
    table = read_response_table(arguments.responses, signed=spec.signed)
    if table.quantity not in (spec.quantity, None) or not set(table.load_cases) <= set(spec.load_cases):
        raise ValueError(
            f"responses must be of the quantity {spec.quantity!r} in the load cases {list(spec.load_cases)}, got "
            f"{table.quantity!r} in {table.load_cases} of {table.path.name}"
        )
    rows = match_names(exported.names, table)
    response = np.stack([table.at(rows[index], spec.load_cases, spec.strains) for index in order])
    for load_case, strains, found in zip(spec.load_cases, spec.strains, response.swapaxes(0, 1), strict=True):
        at = [x for cases in table.curves.values() for x, y in cases.get(load_case, {}).items() if not math.isnan(y)]
        if at and np.isnan(found).all():
            raise ValueError(
                f"responses must be known at one of the strains {list(strains)} of {load_case!r}, or on both sides of "
                f"it, got strains from {min(at):g} to {max(at):g} in {table.path.name}"
            )
    designs = exported.designs[order]
    binary = bool(((designs == 0) | (designs == 1)).all())
    report = verify(designs, targets, spec, simulator=lambda _: response, names=names, binary=binary, **stored)
    report.save(arguments.output_dir, names)
    logger.info("%s", report.table(names))
    logger.info("pictures and verification.csv are in %s", arguments.output_dir)


def _by_target(designs: Sequence[str], targets: Sequence[str]) -> list[int]:
    """The designs by target, each target's in the order of their names."""
    of: dict[str, list[tuple[int, int]]] = {target: [] for target in targets}
    for index, design in enumerate(designs):
        target, _, number = without_suffix(Path(design).name).rpartition("-")
        if target not in of or not number.isdecimal():
            raise ValueError(
                f"designs must be named after targets, as {targets[0]}-00, got {design!r} for {list(targets)}"
            )
        of[target].append((int(number), index))
    counts = {target: len(numbered) for target, numbered in of.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"designs must be equally many for each target, got {counts}")
    return [index for numbered in of.values() for _, index in sorted(numbered)]
