"""Published Mechanical MNIST files as a dataset to train on: train.parquet and, of the last rows, heldout.parquet.

python -m mechdiffusers.microstructures.mechanical_mnist --folder path/to/mechanical_mnist \
    --load_case uniaxial_extension --output_dir path/to/dataset
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.build_dataset.columns import dataset_of
from mechdiffusers.microstructures.dataset_folder import write_dataset_folder
from mechdiffusers.microstructures.mechanical_mnist.reader import DISPLACEMENTS, load_mechanical_mnist

__all__ = ["with_usable_energies", "write_splits"]

#: Displacements whose energies, stored with 5 decimals, have too few digits: 0.001 and 0.01. Steps 1 to 3 with the 0.
_NUM_UNUSABLE = 2


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(
        prog="python -m mechdiffusers.microstructures.mechanical_mnist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=os.environ.get("MECHANICAL_MNIST_DIR"),
        help="of the published files; by default the one that MECHANICAL_MNIST_DIR names",
    )
    parser.add_argument(
        "--load_case",
        choices=tuple(DISPLACEMENTS),
        help="of the energies; no published file says it, the name of the folder may",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--num_heldout", type=int, default=500, help="rows in heldout.parquet, the last ones")
    arguments = parser.parse_args(args)
    if arguments.folder is None:
        parser.error("--folder or MECHANICAL_MNIST_DIR must name the folder of the published files, got neither")
    try:
        write_splits(arguments.folder, arguments.output_dir, arguments.num_heldout, arguments.load_case)
    except ValueError as error:
        sys.exit(f"error: {error}")


def write_splits(folder: Path, output_dir: Path, num_heldout: int = 500, load_case: str | None = None) -> None:
    """Writes the last rows as ``heldout.parquet`` and the others as ``train.parquet``.

    Args:
        folder: See :func:`load_mechanical_mnist`.
        output_dir: Made, with everything at once.
        num_heldout: Rows in ``heldout.parquet``.
        load_case: See :func:`load_mechanical_mnist`.

    Raises:
        ValueError: If ``folder`` is not as described, ``output_dir`` exists, or one of the files would have no rows.
    """
    if output_dir.exists():
        raise ValueError(f"output_dir must not exist yet, got {output_dir}")
    dataset = with_usable_energies(load_mechanical_mnist(folder, load_case))
    if not 0 < num_heldout < len(dataset):
        raise ValueError(f"num_heldout must lie between 0 and the {len(dataset)} rows, got {num_heldout}")
    num_train = len(dataset) - num_heldout
    splits = {"train": range(num_train), "heldout": range(num_train, len(dataset))}
    write_dataset_folder(output_dir, {name: dataset.select(rows) for name, rows in splits.items()})


def with_usable_energies(dataset: Dataset) -> Dataset:
    """The same designs with energies of as many digits as a model needs, at displacements from 0.1.

    Args:
        dataset: Of :func:`load_mechanical_mnist`.

    Returns:
        Responses of shape (1, 10), of shear and compression (1, 8).
    """
    spec = ResponseSpec.of(dataset)
    rows = dataset.with_format("numpy")[:]
    usable = replace(spec, strains=[case[_NUM_UNUSABLE:] for case in spec.strains])
    return dataset_of(np.asarray(rows["image"]), rows["response"][..., _NUM_UNUSABLE:], {}, usable)


if __name__ == "__main__":
    main()
