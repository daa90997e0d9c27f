"""What the pages say and what the benchmarks recorded."""

import json
import os
import re
import subprocess
import sys
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


def run_page(page: str, folder: Path) -> list[str]:
    """Runs all code of a page in a folder, as its reader would at the root of the repository.

    A Python block that comes after "Save this as `NAME`" is saved, not run. Every other block is one process.

    Returns:
        What each block that ran has printed, to both streams.
    """
    for name in ("training", "examples", "checkpoints", "data"):
        (folder / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    outputs, after = [], 0
    text = (ROOT / page).read_text()
    for block in re.finditer(r"^```(python|bash)\n(.*?)^```$", text, re.M | re.S):
        language, code = block.groups()
        saved = re.search(r"Save this as `([\w.]+)`", text[after : block.start()])
        after = block.end()
        if saved:
            (folder / saved[1]).write_text(code)
            continue
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{code}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
        outputs.append(done.stdout + done.stderr)
    return outputs
