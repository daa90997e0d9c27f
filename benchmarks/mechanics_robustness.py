"""Share of random composites that are solved, by load case; runs in parts and goes on where it was stopped.

    python benchmarks/mechanics_robustness.py --num 2000 --order 1

32 x 32, extensions and shears to 0.3, compressions to 0.1, contrast 100, or another by `--contrast`. What is not solved
is flagged by NaN; that flags and NaN agree is checked here too.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from record import record

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.mechanics import simulate
from mechdiffusers.mechanics.load_cases import LOAD_CASES
from mechdiffusers.microstructures import random_composites

CASES = [*LOAD_CASES, *(f"{name}_x" for name in LOAD_CASES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--contrast", type=float, default=100.0)
    parser.add_argument("--part", type=int, default=100, help="designs between two saves")
    parser.add_argument("--parts", type=int, help="stop after so many parts")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    name = f"mechanics_robustness_order_{arguments.order}_contrast_{arguments.contrast:g}"
    output = arguments.output or Path(f"benchmarks/{name}.json")
    state = Path(f"runs/{name}.json")

    designs, _ = random_composites(arguments.num)
    failed = json.loads(state.read_text()) if state.exists() else []  # for each design done, the load cases not solved
    for _ in range(arguments.parts or arguments.num):
        part = designs[len(failed) :][: arguments.part]
        if not len(part):
            break
        result = simulate(part, CASES, element_order=arguments.order, young_stiff=arguments.contrast, progress=True)
        if not np.array_equal(result.converged, np.isfinite(result.stress).all(-1)):
            raise AssertionError("a flag and NaN disagree")
        failed += [[case for case, solved in zip(CASES, row, strict=True) if not solved] for row in result.converged]
        with atomic_write(state) as unfinished:
            unfinished.write_text(json.dumps(failed))
    solved = {case: 100 * sum(case not in row for row in failed) / len(failed) for case in CASES}
    record(
        {
            "designs": len(failed),
            "solved_percent": solved,
            "not_solved": {str(index): row for index, row in enumerate(failed) if row},
            "order": arguments.order,
            "contrast": arguments.contrast,
        },
        output,
    )


if __name__ == "__main__":
    main()
