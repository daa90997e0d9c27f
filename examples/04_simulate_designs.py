"""Simulates ten random composites under three loads and draws the first of them.

    python examples/04_simulate_designs.py --output_dir runs/simulated

Leaves ``simulation.png``, a design with its deformed mesh and its curves, and ``path.gif``, the path of its extension.
"""

import argparse
import logging
from pathlib import Path

from mechdiffusers import random_composites, simulate
from mechdiffusers.mechanics.plots import save_path_animation, save_simulation_figure

LOAD_CASES = ("uniaxial_extension", "uniaxial_extension_x", "shear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/simulated"))
    parser.add_argument("--num", type=int, default=10)
    parser.add_argument("--size", type=int, default=32)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    designs, parameters = random_composites(arguments.num, size=arguments.size)
    result = simulate(designs, LOAD_CASES, return_fields=True, progress=True)
    for index, stress in enumerate(result.stress[..., -1]):
        curves = ", ".join(f"{name} {value:.3f}" for name, value in zip(LOAD_CASES, stress, strict=True))
        logging.info("design %d, %.0f %% stiff: %s", index, 100 * parameters["volume_fraction"][index], curves)
    save_simulation_figure(designs[0], result, arguments.output_dir / "simulation.png", load_cases=LOAD_CASES)
    save_path_animation(result, arguments.output_dir / "path.gif")


if __name__ == "__main__":
    main()
