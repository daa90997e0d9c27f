"""How much longer does work take while another program uses one of two cores?

    python benchmarks/busy_neighbour.py --output benchmarks/busy_neighbour.json

Times a small simulation, a search of ``refine``, and the demo, in turn alone and beside a process that computes without
end on one core. It needs Linux and a machine that does nothing else; with more than two cores, ``taskset -c 0,1`` in
front leaves it two.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from record import record

from mechdiffusers import LatentDDPMPipeline, random_composites, refine, simulate
from mechdiffusers.evaluation.inverse_design import load_split, stored_designs, stored_responses
from mechdiffusers.mechanics import ResponseSpec

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of the two short tasks; the demo runs once")
    parser.add_argument("--num_designs", type=int, default=128, help="that the demo draws for each target")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "busy_neighbour.json")
    arguments = parser.parse_args()
    small, _ = random_composites(2, size=16)
    pipe = LatentDDPMPipeline.from_pretrained(ROOT / "checkpoints" / "composites-32")
    heldout = load_split(ROOT / "data" / "composites-32", "heldout").select(range(3))
    target, spec = stored_responses(heldout)[:1], ResponseSpec.of(pipe)
    starts, response = stored_designs(heldout)[1:], stored_responses(heldout)[1:]
    short = {
        "simulate, two designs of 16 x 16": lambda: simulate(small, ["uniaxial_extension"], element_order=1),
        "refine, a step of two designs": lambda: refine(
            starts, target, spec, pipe.predict_response, response=response, num_rounds=1, num_coarse_steps=0
        ),
    }
    figures = {name: ratio(task, arguments.repeats) for name, task in short.items()}
    figures["demo"] = ratio(lambda: demo(arguments.num_designs), 1)
    record(figures, arguments.output)


def ratio(task: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds alone and beside a busy process, one after the other."""
    task()  # loads what is loaded once
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(seconds(task))
        with busy_neighbour():
            beside.append(seconds(task))
    middle = [float(np.median(times)) for times in (alone, beside)]
    return {"alone_seconds": middle[0], "beside_seconds": middle[1], "times_as_long": middle[1] / middle[0]}


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that computes without end on one of our cores."""
    core = min(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def demo(num_designs: int) -> None:
    """What ``make demo`` runs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).with_name("mechdiffusers"), "design", ROOT / "examples" / "targets.csv"]
        options = ["--checkpoint", ROOT / "checkpoints" / "composites-32", "--dataset", ROOT / "data" / "composites-32"]
        rounds = ["--num_rounds", "3", "--num_designs", str(num_designs), "--output_dir", folder]
        subprocess.run([*command, *options, *rounds], check=True, capture_output=True)


if __name__ == "__main__":
    main()
