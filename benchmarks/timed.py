"""Time and memory of a command, such as a training.

For example, everything being installed::

    python benchmarks/timed.py --output benchmarks/quick.json make quick
"""

import argparse
import resource
import subprocess
import time
from pathlib import Path

from record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("timed", nargs=argparse.REMAINDER, help="the command and its arguments")
    arguments = parser.parse_args()
    start = time.perf_counter()
    subprocess.run(arguments.timed, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process, on Linux
    record({"minutes": seconds / 60, "peak_memory_gb": peak / 1e9}, arguments.output)


if __name__ == "__main__":
    main()
