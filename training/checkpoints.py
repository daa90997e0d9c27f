"""The state that an interrupted stage goes on from, never half-written, and torn ones told from whole ones.

A checkpoint is a folder ``STAGE-STEP``. It is written aside by all processes, as sharded models need, closed by a list
of its files with their digests, and renamed. A folder that a crash of the machine or a full disk has damaged does not
agree with its list; the one before it is taken then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.training.moving_average import MovingAverage
from mechdiffusers.training.sharding import is_sharded

__all__ = ["BestWeights", "damage_of", "load_newest", "newest_intact", "save"]

logger = logging.getLogger(__name__)

_FILE_LIST = "files.json"


def save(accelerator: Accelerator, average: MovingAverage, folder: Path, name: str, step: int, limit: int) -> None:
    """Writes a checkpoint aside and renames it, then removes the oldest ones of the stage.

    Args:
        accelerator: Holds the stage's module, optimiser and schedule.
        average: Averaged weights.
        folder: Where the run's checkpoints are.
        name: Stage.
        step: Steps done.
        limit: Number of checkpoints of the stage to keep.

    Raises:
        OSError: If it cannot be written, as on a full disk; nothing of it is left, and the earlier ones are intact.
    """
    final, unfinished = folder / f"{name}-{step:08d}", folder / f".unfinished-{name}"
    main = accelerator.is_main_process
    logger.info("%s step %d: writing a checkpoint", name, step)
    try:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        if main or is_sharded(accelerator):
            save_file(
                {str(i): weight.contiguous() for i, weight in enumerate(average.shadow_params)},
                unfinished / _average_file(accelerator),
                metadata={"optimization_step": str(average.optimization_step)},
            )
        accelerator.wait_for_everyone()
        if main:
            files = {str(path.relative_to(unfinished)): _digest(path) for path in _files(unfinished)}
            (unfinished / _FILE_LIST).write_text(json.dumps(files, indent=1))
            for path in _files(unfinished):  # on the disk before the name that says that it is whole
                with path.open("rb") as file:
                    os.fsync(file)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # each library has its kind
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"the checkpoint of {name} at step {step} could not be written to {folder}: {error}; "
            f"the earlier ones are intact, --resume_from_checkpoint latest goes on from them"
        ) from error
    if main:
        done = [checkpoint for checkpoint in _checkpoints(folder, name) if checkpoint.name <= final.name]
        for older in done[:-limit]:  # one of a later step is torn, and takes nobody's place
            shutil.rmtree(older)
    accelerator.wait_for_everyone()  # a process that ends earlier would have the others killed


def load_newest(accelerator: Accelerator, average: MovingAverage, folder: Path, name: str) -> int:
    """Loads the newest intact checkpoint of a stage, if there is one.

    Args:
        accelerator: Holds the stage's module, optimiser and schedule.
        average: Averaged weights.
        folder: Where the run's checkpoints are.
        name: Stage.

    Returns:
        The number of steps done.

    Raises:
        ValueError: If weights or optimiser were sharded among another number of processes, 1 for those that were not.
    """
    checkpoint = newest_intact(folder, name)
    if checkpoint is None:
        return 0
    shards = accelerator.num_processes if is_sharded(accelerator) else 1
    if (shards_before := len(list(checkpoint.glob("average-*")))) != shards:
        raise ValueError(
            f"resume_from_checkpoint must go on with as many shards as before, got {shards} for "
            f"{checkpoint} with {shards_before}"
        )
    accelerator.load_state(str(checkpoint))
    path = checkpoint / _average_file(accelerator)
    for i, weight in load_file(path).items():
        average.shadow_params[int(i)].copy_(weight)
    with safe_open(path, framework="pt") as file:
        average.optimization_step = int(file.metadata()["optimization_step"])
    step = int(checkpoint.name.rsplit("-", 1)[1])
    logger.info("%s goes on from step %d", name, step)
    return step


def newest_intact(folder: Path, name: str) -> Path | None:
    """The newest checkpoint of a stage that is whole; says which newer ones are not."""
    for checkpoint in reversed(_checkpoints(folder, name)):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is torn (%s): the one before it is taken", checkpoint, damage)
    return None


def damage_of(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that does not agree with its list, or what is wrong with the list."""
    try:
        files = json.loads((checkpoint / _FILE_LIST).read_text())
        return next((file for file, digest in files.items() if _digest(checkpoint / file) != digest), None)
    except (OSError, ValueError) as error:
        return str(error)


class BestWeights:
    """The averaged weights with the least loss on held-out designs so far.

    Args:
        folder: Where the run's checkpoints are.
        name: Stage.
    """

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"best-{name}.safetensors"

    def offer(self, module: nn.Module, loss: float, step: int) -> None:
        """Keeps a module's weights if their loss is the least."""
        if self.path.exists():
            least = float(self._metadata()["loss"])
            if not (loss < least or math.isnan(least)):  # also where it is NaN itself
                return
        weights = {key: value.contiguous() for key, value in module.state_dict().items()}
        with atomic_write(self.path) as unfinished:
            save_file(weights, unfinished, metadata={"loss": repr(loss), "step": str(step)})

    def load_into(self, module: nn.Module) -> int:
        """Gives a module the weights that were kept; returns their step."""
        module.load_state_dict(load_file(self.path))
        return int(self._metadata()["step"])

    def were_kept_by(self, step: int) -> bool:
        """Whether there are weights, of this step or one before it."""
        return self.path.exists() and int(self._metadata()["step"]) <= step

    def _metadata(self) -> dict[str, str]:
        with safe_open(self.path, framework="pt") as file:
            return file.metadata()


def _checkpoints(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _average_file(accelerator: Accelerator) -> str:
    return f"average-{accelerator.process_index if is_sharded(accelerator) else 0}.safetensors"
