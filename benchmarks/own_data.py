"""How near do designs come that a user's own data and solver lead to, and how long does it take?

    python benchmarks/own_data.py

Runs all code of docs/own_data.md word for word in a temporary folder and reads the reports that it leaves. The errors
are means over the targets of the page, in per cent. ``random`` is the best of 8 random composites for each target.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import record

from documents import run_page
from mechdiffusers import random_composites, verify
from mechdiffusers.mechanics import ResponseSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/own_data.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/own_data.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_page("docs/own_data.md", Path(folder))
        figures = {"minutes": (time.perf_counter() - start) / 60}
        own = Path(folder) / "runs" / "own"
        reports = {name: json.loads((own / name / "verification.json").read_text()) for name in ("report", "refined")}
        figures |= {name: errors(report) for name, report in reports.items()}
        figures["random_best_percent"] = random_best(reports["report"], folder)
        shutil.copyfile(own / "report" / "by_hand.png", arguments.figure)
    record(figures, arguments.output)


def errors(report: dict) -> dict[str, object]:
    """Errors of a report, per cent."""
    found = np.array([row["error"] for row in report["designs"]], dtype=float).reshape(len(report["targets"]), -1)
    best, nearest = found.min(1), np.array(report["retrieval"]["error"], dtype=float)[:, 0]
    names = list(dict.fromkeys(row["target"] for row in report["designs"]))
    return {
        "targets": len(found),
        "designs_a_target": found.shape[1],
        "best_percent": 100 * best.mean(),
        "mean_percent": 100 * found.mean(),
        "retrieval_percent": 100 * nearest.mean(),
        "of_each_target": {
            name: {"best_percent": 100 * one, "retrieval_percent": 100 * other}
            for name, one, other in zip(names, best.tolist(), nearest.tolist(), strict=True)
        },
    }


def random_best(report: dict, folder: str) -> float:
    """The error of the best of 8 random composites, the mean over the targets, per cent."""
    sys.path.insert(0, folder)
    from other_solver import response  # the page's own

    targets = np.array(report["targets"], dtype=float)
    designs, _ = random_composites(8 * len(targets), size=32, seed=11)
    found = verify(designs, targets, ResponseSpec.from_dict(report["spec"]), simulator=response)
    return 100 * float(found.error.reshape(len(targets), 8).min(1).mean())


if __name__ == "__main__":
    main()
