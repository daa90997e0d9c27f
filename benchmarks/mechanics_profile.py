"""Where the time of `simulate` goes, beside what the machine reaches in large matrix products and in reading memory.

    python benchmarks/mechanics_profile.py --order 2

One core, 32 x 32 random composites of contrast 100, to 0.3 in six steps; processor time, so that other processes count
little. Operations are counted from the sizes of the matrices; a multiplication and an addition are two. The limit of a
solution is reading the factor twice, of the others their operations at the rate of a large matrix product of the same
precision.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record

from mechdiffusers.mechanics.load_cases import LOAD_CASES
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.mechanics.nested_dissection import Factor
from mechdiffusers.mechanics.newton import Cell
from mechdiffusers.mechanics.path_following import RESPONSE_TOLERANCE, follow
from mechdiffusers.microstructures import random_composites

SIZE = 32
POINTWISE = 60  # operations at a point of quadrature, of the law, the energy and the stress, a logarithm counted as one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--num", type=int, default=4, help="designs, in one batch")
    parser.add_argument("--case", default="uniaxial_extension", choices=sorted(LOAD_CASES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    cell = Cell(
        SIZE, SIZE, arguments.order, LOAD_CASES[arguments.case], CompressibleNeoHookean(0.3), torch.device("cpu")
    )
    modulus = 1 + 99 * torch.from_numpy(random_composites(arguments.num, size=SIZE)[0]).double()
    factor = tangent_factor(cell, modulus)
    parts: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "calls_a_design": 0.0})
    for holder, name in (
        (cell, "evaluate"),
        (cell.elements, "stiffness"),
        (cell.solver, "factorise"),
        (cell.solver, "solve"),
    ):
        setattr(holder, name, timed(getattr(holder, name), parts[name], arguments.num))
    start = time.thread_time()
    for _ in follow(cell, modulus, torch.linspace(0.05, 0.3, 6, dtype=torch.float64), RESPONSE_TOLERANCE):
        pass
    total = time.thread_time() - start

    single, double, reading = product_rate(torch.float32), product_rate(torch.float64), reading_rate()
    operations = counted(cell, factor)
    limits = {name: count / single for name, count in operations.items()}
    limits["evaluate"] = operations["evaluate"] / double
    limits["solve"] = 2 * factor_bytes(factor) / reading
    for name, part in parts.items():
        each = part["seconds"] / (part["calls_a_design"] * arguments.num)
        part["share_percent"] = 100 * part["seconds"] / total
        part["milliseconds_a_call_and_design"] = 1e3 * each
        part["million_operations"] = operations[name] / 1e6
        part["times_the_limit"] = each / limits[name]
    record(
        {
            "designs_a_second_of_processor_time": arguments.num / total,
            "parts": parts,
            "rest_percent": 100 * (1 - sum(part["seconds"] for part in parts.values()) / total),
            "large_products_gflops": {"float32": single / 1e9, "float64": double / 1e9},
            "reading_gb_a_second": reading / 1e9,
            "factor_mb_a_design": factor_bytes(factor) / 1e6,
            "case": arguments.case,
            "order": arguments.order,
            "num": arguments.num,
        },
        arguments.output or Path(f"benchmarks/mechanics_profile_order_{arguments.order}.json"),
    )


def timed(function: Callable[..., Any], part: dict[str, float], num: int) -> Callable[..., Any]:
    """The function, adding its time and the designs it was called for to ``part``."""

    def wrapped(first: Any, second: Any = None, *rest: Any) -> Any:
        start = time.thread_time()
        result = function(first, *(() if second is None else (second,)), *rest)
        part["seconds"] += time.thread_time() - start
        batched = second if isinstance(second, torch.Tensor) else first
        part["calls_a_design"] += len(batched) / num
        return result

    return wrapped


def tangent_factor(cell: Cell, modulus: torch.Tensor) -> Factor:
    """The factor of one unloaded design, which also warms up."""
    state = cell.elements.state(torch.zeros_like(cell.affine)[None])
    return cell.solver.factorise(cell.elements.stiffness(state, modulus[:1], torch.float32))


def counted(cell: Cell, factor: Factor) -> dict[str, float]:
    """Operations for one design."""
    eliminated = [(inverse.shape[1], *coupling.shape[2:]) for inverse, coupling in factor.levels]
    root = factor.root.shape[-1]
    nodes, points, pixels = (cell.elements.order + 1) ** 2, (cell.elements.order + 1) ** 2, SIZE**2
    patches = cell.elements.patches
    features = pixels / (patches.height * patches.width) * (1 + 11 * points)
    return {
        "evaluate": pixels * points * (2 * 8 * nodes + POINTWISE),
        "stiffness": 2 * features * (2 * len(patches.nodes)) ** 2 * patches.height * patches.width,
        "factorise": sum(n * (2 * s**3 / 3 + 2 * s**2 * m + 2 * s * m**2) for n, s, m in eliminated) + root**3 / 3,
        "solve": sum(4 * n * s * (s + m) for n, s, m in eliminated) + 2 * root**2,
    }


def factor_bytes(factor: Factor) -> float:
    return (
        sum(4 * (inverse.numel() + coupling.numel()) for inverse, coupling in factor.levels) + 4 * factor.root.numel()
    )


def product_rate(dtype: torch.dtype, size: int = 1000) -> float:
    """Operations a second in the best of a few large matrix products."""
    matrix = torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: matrix @ matrix) for _ in range(10))


def reading_rate(numbers: int = 2_000_000) -> float:
    """Bytes a second in sums over what does not fit into a core's own cache."""
    field = torch.randn(numbers)
    return 4 * numbers / min(seconds(field.sum) for _ in range(20))


def seconds(function: Callable[[], Any]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
