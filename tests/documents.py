"""What the pages say and what the benchmarks recorded."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def recorded(name: str) -> dict:
    """The figures of a benchmark."""
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["figures"]


def words(page: str) -> str:
    """The text of a page, wherever its lines are broken."""
    return " ".join((ROOT / page).read_text().split())


def with_error(value: float, error: float, digits: int) -> str:
    """A figure with its standard error, as pages write it."""
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", "−")
