"""Strain energies beside the published ones of Mechanical MNIST, at orders 1 and 2.

    python benchmarks/mechanics_truth.py --data path/to/mechanical_mnist --rows 200

The error of a row is the L2 norm, over the published steps 4 to 13 (0.1 to 14 pixels; before that 5 decimals leave no
digits), of the difference over that of the published energies.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from record import record

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.microstructures import load_mechanical_mnist
from mechdiffusers.microstructures.build_dataset.columns import designs_of

FIRST = 2  # of the strains whose energies have digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MECHANICAL_MNIST_DIR", "mechanical_mnist")))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/mechanics_truth.json"))
    arguments = parser.parse_args()

    dataset = load_mechanical_mnist(arguments.data, "uniaxial_extension")
    strains = ResponseSpec.of(dataset).strains[0]
    rows = dataset.with_format("numpy")[: arguments.rows]
    designs = designs_of(rows["image"])
    published = rows["response"][:, 0, FIRST:].astype(np.float64)
    figures: dict[str, object] = {"rows": len(published)}
    for order in (1, 2):
        start = time.perf_counter()
        result = simulate(designs, ["uniaxial_extension"], strains, element_order=order, progress=True)
        energy = result.energy[:, 0, FIRST:]
        error = np.linalg.norm(energy - published, axis=1) / np.linalg.norm(published, axis=1)
        figures[f"order {order}"] = {
            "mean_nrmse_percent": 100 * error.mean(),
            "median_nrmse_percent": 100 * float(np.median(error)),
            "worst_nrmse_percent": 100 * error.max(),
            "mean_bias_at_the_last_step_percent": 100 * (energy / published - 1)[:, -1].mean(),
            "converged": int(result.converged.sum()),
            "seconds_a_design": (time.perf_counter() - start) / len(published),
        }
    record(figures, arguments.output)


if __name__ == "__main__":
    main()
