"""``metrics.json`` of a run: the newest figures of all stages, for its card and for whoever compares runs."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from mechdiffusers.atomic_file import atomic_write

__all__ = ["peak_memory", "read_metrics", "update_metrics"]


def update_metrics(output_dir: Path, name: str, metrics: dict[str, float]) -> None:
    """Writes figures of a stage as ``STAGE/NAME``, beside those that are there, or in their place.

    Args:
        output_dir: Folder of the run.
        name: Stage.
        metrics: Figures by name.
    """
    path = output_dir / "metrics.json"
    known = _read(path)
    known |= {f"{name}/{key}": value for key, value in metrics.items()}
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def read_metrics(output_dir: Path, name: str) -> dict[str, float]:
    """The figures of a stage by name; none where there are none yet.

    Args:
        output_dir: Folder of the run.
        name: Stage.
    """
    known, prefix = _read(output_dir / "metrics.json"), f"{name}/"
    return {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}


def _read(path: Path) -> dict[str, float]:
    return json.loads(path.read_text()) if path.exists() else {}


def peak_memory() -> float:
    """The most memory that the process has held, GiB: the GPU's where it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kibibytes / 2**20
