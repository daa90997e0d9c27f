"""Computes responses part by part, in worker processes on a CPU, so that a killed build goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.build_dataset.columns import designs_of

__all__ = ["compute_by_parts"]

#: Designs of a part. On a CPU it is what a kill can lose: half a minute on binary composites of 32 x 32 pixels.
_CPU_PART = 16
_GPU_PART = 512


def compute_by_parts(
    levels: np.ndarray, spec: ResponseSpec, folder: Path, device: str | torch.device | None, progress: bool
) -> np.ndarray:
    """Responses of designs; those of a part are read from its file in ``folder`` or, if that is missing, computed.

    On a CPU every part is the work of one thread of one process, ``torch.get_num_threads()`` of them at a time, so that
    what comes out does not depend on their number. Processes, because small products in several threads wait for each
    other in the interpreter.

    Args:
        levels: Designs as :func:`grey_levels` gives them, shape ``(B, H, W)``.
        spec: Of the responses.
        folder: Where to keep the parts.
        device: Where to compute; ``None`` is the CPU.
        progress: Whether to show a progress bar.

    Returns:
        float64, shape ``(B, L, S)``, NaN where not solved.
    """
    on_cpu = torch.device(device or "cpu").type == "cpu"
    size = _CPU_PART if on_cpu else _GPU_PART
    parts = [levels[start : start + size] for start in range(0, len(levels), size)]
    paths = [folder / f"{_fingerprint(part, spec)}.npy" for part in parts]
    missing = {path: part for path, part in zip(paths, parts, strict=True) if not path.exists()}
    if missing:
        workers = min(torch.get_num_threads(), len(missing)) if on_cpu else 0
        work = DataLoader(_Parts(missing, spec, device), batch_size=None, num_workers=workers, in_order=False)
        done = len(levels) - sum(map(len, missing.values()))
        with tqdm(total=len(levels), initial=done, desc="simulate", unit="design", disable=not progress) as bar:
            for num in work:
                bar.update(num)
    return np.concatenate([np.load(path) for path in paths])


class _Parts(Dataset[int]):
    """Parts to compute; taking one writes its file and gives the number of its designs."""

    def __init__(self, parts: Mapping[Path, np.ndarray], spec: ResponseSpec, device: str | torch.device | None):
        self._parts, self._simulate = list(parts.items()), spec.simulator(device=device)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> int:
        path, levels = self._parts[index]
        response = self._simulate(designs_of(levels))
        # the worker of a killed build may be at the same part, for as long as that takes
        with atomic_write(path, shared=True) as unfinished:
            np.save(unfinished, response)
        return len(levels)


def _fingerprint(levels: np.ndarray, spec: ResponseSpec) -> str:
    """Of everything that responses are computed from: it names their file, so that no build takes those of another."""
    recipe = {name: value for name, value in spec.to_dict().items() if name != "units"}  # words change no number
    versions = {name: version(name) for name in ("mechdiffusers", "torch")}
    start = json.dumps([recipe, versions, levels.shape, str(levels.dtype)])
    return hashlib.sha256(start.encode() + levels.tobytes()).hexdigest()
