"""Error of one element a pixel on binary composites, against a refined mesh of order 2.

    python benchmarks/mechanics_refinement.py --num 16

16 x 16 random composites of contrast 100, where a pixel is refined into n x n elements. Published is the error of the
stress at the last of six strains, in per cent, over the designs that can be followed to that strain
on both meshes, by order and n.
"""

import argparse
from pathlib import Path

import numpy as np
from record import record

from mechdiffusers.mechanics import simulate
from mechdiffusers.microstructures import random_composites

CASES = ["uniaxial_extension", "uniaxial_extension_x", "shear"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--reference", type=int, default=4, help="elements along a pixel of the reference, of order 2")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/mechanics_refinement.json"))
    arguments = parser.parse_args()

    designs, _ = random_composites(arguments.num, size=arguments.size)

    def stress(order: int, refinement: int) -> np.ndarray:
        fine = designs.repeat(refinement, axis=1).repeat(refinement, axis=2)
        return simulate(fine, CASES, element_order=order, progress=True).stress[..., -1]

    reference = stress(2, arguments.reference)
    figures: dict[str, object] = {"designs": arguments.num, "size": arguments.size, "reference": arguments.reference}
    for order, refinement in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
        error = 100 * (stress(order, refinement) / reference - 1)
        figures[f"order {order}, {refinement} x {refinement} elements a pixel"] = {
            case: {
                "designs": int(np.isfinite(values).sum()),
                "mean_percent": np.nanmean(values),
                "standard_deviation_percent": np.nanstd(values),
                "worst_percent": np.nanmax(values),
            }
            for case, values in zip(CASES, error.T, strict=True)
        }
    record(figures, arguments.output)


if __name__ == "__main__":
    main()
