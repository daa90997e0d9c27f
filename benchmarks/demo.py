"""How near do the designs of the main job come, and how long does it take, everything being installed?

    python benchmarks/demo.py

Runs ``make demo`` and reads the report that it leaves.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np
from record import record

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/demo.json"))
    arguments = parser.parse_args()
    subprocess.run(["make", ".venv/installed"], cwd=ROOT, check=True)
    start = time.perf_counter()
    subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    minutes = (time.perf_counter() - start) / 60
    report = json.loads((ROOT / "runs" / "demo" / "verification.json").read_text())
    errors: dict[str, list[float]] = {}
    for row in report["designs"]:
        errors.setdefault(row["target"], []).append(row["error"])
    targets = {
        name: {
            "designs": len(found),
            "best_percent": 100 * min(found),
            "mean_percent": 100 * float(np.mean(found)),
            "nearest_training_design_percent": 100 * nearest[0],
        }
        for (name, found), nearest in zip(errors.items(), report["retrieval"]["error"], strict=True)
    }
    record({"targets": targets, "minutes": minutes}, arguments.output)


if __name__ == "__main__":
    main()
