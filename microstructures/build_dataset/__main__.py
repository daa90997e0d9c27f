"""The command line of :func:`build_dataset`, for random composites.

python -m mechdiffusers.microstructures.build_dataset --output_dir data/my-composites --num_train 1000
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
from transformers import HfArgumentParser

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.build_dataset import build_dataset
from mechdiffusers.microstructures.dataset_folder import write_dataset_card
from mechdiffusers.microstructures.random_composites import random_composites

_DESCRIPTION = (
    "Builds heldout.parquet and train.parquet, random composites with their responses. The same command, given again "
    "after an interruption, goes on where it was. The defaults are those of data/composites-32."
)


@dataclass
class BuildConfig:
    """Settings of a dataset of random composites."""

    output_dir: str = field(metadata={"help": "Folder to write; what is unfinished lies there in .unfinished-*."})
    num_train: int = field(default=6_000, metadata={"help": "Designs in train.parquet."})
    num_heldout: int = field(default=512, metadata={"help": "Designs in heldout.parquet, the first ones of the seed."})
    size: int = field(default=32, metadata={"help": "Pixels along each side."})
    seed: int = field(default=0, metadata={"help": "Seed of random_composites."})
    load_cases: list[str] = field(
        default_factory=lambda: ["uniaxial_extension", "uniaxial_extension_x", "shear"],
        metadata={"help": "Names of load cases of mechanics.simulate."},
    )
    strains: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.15, 0.2, 0.25, 0.3], metadata={"help": "Magnitudes of nominal strain."}
    )
    quantity: Literal["stress", "energy"] = field(default="stress", metadata={"help": "Which response to store."})
    units: str | None = field(default=None, metadata={"help": "Of the response, in words."})
    element_order: int = field(default=2, metadata={"help": "1 or 2."})
    young_soft: float = field(default=1.0, metadata={"help": "Young's modulus of the soft phase."})
    young_stiff: float = field(default=100.0, metadata={"help": "Young's modulus of the stiff phase."})
    poisson: float = field(default=0.3, metadata={"help": "Poisson's ratio."})
    device: str | None = field(default=None, metadata={"help": "Such as cuda; the CPU's cores if unset."})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    datasets.disable_progress_bars()
    parser = HfArgumentParser(
        BuildConfig,
        prog="python -m mechdiffusers.microstructures.build_dataset",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    (config,) = parser.parse_args_into_dataclasses(args=args, look_for_args_file=False)
    try:
        build(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def build(config: BuildConfig) -> None:
    """Writes both files, and the README with which ``datasets.load_dataset`` opens the folder.

    Raises:
        ValueError: If a setting is unfit, or a file holds another dataset.
    """
    for name in ("num_train", "num_heldout"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
    # the held-out designs come first: they stay the same when the number of training designs is changed
    designs, parameters = random_composites(config.num_heldout + config.num_train, size=config.size, seed=config.seed)
    for name, rows in (("heldout", slice(config.num_heldout)), ("train", slice(config.num_heldout, None))):
        built = build_dataset(
            designs[rows],
            config.load_cases,
            config.strains,
            parameters={column: values[rows] for column, values in parameters.items()},
            quantity=config.quantity,
            units=config.units,
            element_order=config.element_order,
            young_soft=config.young_soft,
            young_stiff=config.young_stiff,
            poisson=config.poisson,
            output=Path(config.output_dir) / f"{name}.parquet",
            device=config.device,
        )
    folder = Path(config.output_dir)
    write_dataset_card(folder, ResponseSpec.of(built), ["train", "heldout"], folder.absolute().name)


if __name__ == "__main__":
    main()
