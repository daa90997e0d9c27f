"""How a benchmark records what it measured: figures, command, versions and machine, as JSON."""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mechdiffusers.atomic_file import atomic_write

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "numpy", "mechdiffusers")


def record(figures: dict[str, Any], path: Path) -> None:
    """Writes figures with their circumstances, under a temporary name first, and prints them.

    Args:
        figures: What was measured, by name, as plain numbers, strings, lists and dictionaries.
        path: File to write, ending in ``.json``.
    """
    # where a folder lies on this machine is nobody's business
    arguments = " ".join(Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:])
    content = {
        "figures": figures,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {arguments}".strip(),
        "commit": commit_of(Path(__file__).parent),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
        "torch_threads": torch.get_num_threads(),
    }
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def commit_of(folder: Path) -> str | None:
    """Of the repository of a folder, ``-dirty`` where files differ from it; ``None`` where there is none."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
