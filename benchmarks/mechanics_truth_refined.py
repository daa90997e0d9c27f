"""The rows of Mechanical MNIST that differ most at order 2, with 1 and with 2 x 2 elements a pixel.

    python benchmarks/mechanics_truth_refined.py --data path/to/mechanical_mnist

Recorded is the difference of the strain energy to the published one in per cent, by displacement, 0.5 to 14 pixels; at
0.1, 5 decimals leave three digits.
A converged mesh would not change it; displacement elements that are too coarse, here or there, have too much energy.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from record import record

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.microstructures import load_mechanical_mnist
from mechdiffusers.microstructures.build_dataset.columns import designs_of

FIRST = 3  # of the strains whose energies have digits enough for a difference in per cent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MECHANICAL_MNIST_DIR", "mechanical_mnist")))
    parser.add_argument("--rows", type=int, nargs="+", default=[92, 76, 45], help="the worst of the first 200")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/mechanics_truth_refined.json"))
    arguments = parser.parse_args()

    dataset = load_mechanical_mnist(arguments.data, "uniaxial_extension")
    strains = ResponseSpec.of(dataset).strains[0][FIRST:]
    rows = dataset.with_format("numpy")[arguments.rows]
    published = rows["response"][:, 0, FIRST:].astype(np.float64)
    figures: dict[str, object] = {}
    for refinement in (1, 2):
        fine = designs_of(rows["image"]).repeat(refinement, axis=1).repeat(refinement, axis=2)
        energy = simulate(fine, ["uniaxial_extension"], strains, pixel_size=1 / refinement).energy[:, 0]
        difference = 100 * (energy / published - 1)
        figures[f"{refinement} x {refinement} elements a pixel"] = {
            f"row {row}": values.tolist() for row, values in zip(arguments.rows, difference, strict=True)
        }
    record(figures, arguments.output)


if __name__ == "__main__":
    main()
