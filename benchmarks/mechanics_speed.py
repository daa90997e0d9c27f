"""Designs a second of `simulate`, beside torch-fem and Newton with SciPy's sparse LU, timed in turn in one run.

    python benchmarks/mechanics_speed.py --order 1

32 x 32 random composites of contrast 100, uniaxial extension to 0.3 in six steps. torch-fem solves one mesh of many
designs, with all threads; where its Newton fails it halves its steps by itself. SciPy's LU uses one core, so that two
processes share the designs. All iterate until the same share of the forces is out of balance. The memory is that of
`simulate` alone, for 256 designs at the first strain, with what its processes share counted for each; more strains add
no more than their results.
"""

import argparse
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from other_solvers import SciPyNewton, extend_with_torch_fem
from record import record
from torch import Tensor

from mechdiffusers.mechanics import simulate
from mechdiffusers.microstructures import random_composites

STRAINS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--num", type=int, default=48, help="designs of a round")
    parser.add_argument("--num_scipy", type=int, default=4, help="designs of a round for SciPy")
    parser.add_argument("--num_torch_fem", type=int, default=4, help="designs of a round for torch-fem, in one mesh")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--torch_fem_rounds", type=int, default=1, help="rounds that torch-fem, the slowest, takes part in"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    order = arguments.order

    designs = torch.from_numpy(random_composites(arguments.num, size=SIZE)[0]).double()
    others = {"SciPy": designs[: arguments.num_scipy], "torch-fem": designs[: arguments.num_torch_fem]}
    simulate(random_composites(256, size=SIZE)[0], strains=STRAINS[:1], element_order=order)
    own, of_a_worker = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = 1024 * (own + torch.get_num_threads() * of_a_worker)  # before the others have taken any
    seconds: dict[str, list[float]] = {"ours": [], "SciPy": [], "torch-fem": []}
    stresses: dict[str, Tensor] = {}
    with ProcessPoolExecutor(os.cpu_count(), initializer=prepare, initargs=(order,)) as pool:
        list(pool.map(extend_with_scipy, others["SciPy"]))  # imports and first calls are not timed
        simulate(designs[:1], strains=STRAINS[:1], element_order=order)
        for turn in range(arguments.rounds):
            start = time.perf_counter()
            stresses["ours"] = simulate(designs, strains=STRAINS, element_order=order).stress[:, 0]
            seconds["ours"].append((time.perf_counter() - start) / len(designs))
            start = time.perf_counter()
            stresses["SciPy"] = torch.tensor(list(pool.map(extend_with_scipy, others["SciPy"])), dtype=torch.float64)
            seconds["SciPy"].append((time.perf_counter() - start) / len(others["SciPy"]))
            if turn < arguments.torch_fem_rounds:
                start = time.perf_counter()
                stresses["torch-fem"] = extend_with_torch_fem(others["torch-fem"], order, STRAINS)[1]
                seconds["torch-fem"].append((time.perf_counter() - start) / len(others["torch-fem"]))
    disagreement = {
        name: float((stresses[name] / stresses["ours"][: len(few)] - 1).abs().max()) for name, few in others.items()
    }
    record(
        {
            "designs_a_second": {name: 1 / statistics.median(values) for name, values in seconds.items()},
            "ratio": {
                name: statistics.median(b / a for a, b in zip(seconds["ours"], values, strict=False))
                for name, values in seconds.items()
                if name != "ours"
            },
            "seconds_a_design": seconds,
            "largest_relative_difference_in_stress": disagreement,
            "peak_memory_gb_of_256_designs": peak / 1e9,
            "order": order,
            "num": {"ours": arguments.num, **{name: len(few) for name, few in others.items()}},
        },
        arguments.output or Path(f"benchmarks/mechanics_speed_order_{order}.json"),
    )


def prepare(order: int) -> None:
    """Makes the solver of a process, which keeps to one core."""
    global solver
    torch.set_num_threads(1)
    solver = SciPyNewton(SIZE, order)


def extend_with_scipy(design: Tensor) -> list[float]:
    return solver.extended(design, STRAINS)


if __name__ == "__main__":
    main()
