"""The folder of a run: one at a time works in it, gone on with only by the same, or begun from another's checkpoint."""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import yaml

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.training.accelerators import precision_of
from mechdiffusers.training.checkpoints import BestWeights, damage_of, newest_intact
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.metrics import read_metrics, update_metrics

__all__ = ["claim", "copy_start"]

logger = logging.getLogger(__name__)

#: Settings that a run may change when it goes on: they do not change what is trained.
_MAY_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "validation_steps",
    "validation_scheduler",
    "validation_inference_steps",
    "num_validation_images",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "gradient_checkpointing",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
}
#: What besides a new run may change which starts from a denoiser's checkpoint, whose optimiser goes on with its rates.
_OF_THE_WAY_ON = {"denoiser_steps", "denoiser_warmup_steps", "lr_scheduler", "max_grad_norm", "ema_decay"}
#: What only the predictor depends on, besides all that is called after it.
_OF_THE_PREDICTOR = {"random_reflections"}
#: What only the denoiser depends on, besides all that is called after it.
_OF_THE_DENOISER = {
    "prediction_type",
    "beta_schedule",
    "learned_noise_schedule",
    "loss_weighting",
    "snr_gamma",
    "noise_offset",
    "response_column",
    "response_dropout",
    "response_masking",
    "token_dim",
}


@contextmanager
def claim(config: TrainingConfig) -> Iterator[list[Path]]:
    """Makes the folder of a run, keeps others from it and writes the settings; called by the main process.

    Args:
        config: Settings of the run.

    Yields:
        What :func:`copy_start` copies of another run. The folder is no other's until the context or the process ends.

    Raises:
        ValueError: If the folder holds a run that this one does not continue, another run is at work in it, it cannot
            be written, or ``resume_from_checkpoint`` is no checkpoint of a run with the same settings.
    """
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    if resume != "latest" and (output_dir / "checkpoints").exists():
        raise ValueError(
            f"output_dir must be new, got {output_dir}, which holds a run: choose another one, or go on with that run "
            "by --resume_from_checkpoint latest"
        )
    start: list[Path] = []
    if resume == "latest":
        if (output_dir / "checkpoints").exists():  # until then nothing was trained by the settings
            _check_same_run(config, output_dir / "config.yaml", set())
    elif resume is not None:
        start = _checked_start(Path(resume), config)
    with ExitStack() as held:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((output_dir / ".lock").open("w"))
            _keep_others_out(lock, output_dir)
            with atomic_write(output_dir / "config.yaml") as unfinished:
                unfinished.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
        except OSError as error:
            raise ValueError(f"output_dir must be a folder that can be written, got {output_dir}: {error}") from error
        yield start


def _keep_others_out(lock: IO[str], output_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it however the process ends
    except BlockingIOError as error:
        raise ValueError(f"output_dir must be a folder that no other run is at work in, got {output_dir}") from error
    except OSError as error:
        logger.warning("%s lies on a file system without locks (%s): start no second run in it", output_dir, error)


def _checked_start(checkpoint: Path, config: TrainingConfig) -> list[Path]:
    """A checkpoint of another run, checked, and what it stands on."""
    stage, _, step = checkpoint.name.rpartition("-")
    if not (stage in ("autoencoder", "denoiser") and step.isdigit() and checkpoint.is_dir()):
        raise ValueError(
            "resume_from_checkpoint must be 'latest' or a folder such as RUN/checkpoints/denoiser-00001000, "
            f"got {str(checkpoint)!r}"
        )
    if (damage := damage_of(checkpoint)) is not None:
        raise ValueError(f"resume_from_checkpoint must be a whole checkpoint, got {checkpoint}, torn ({damage})")
    others = checkpoint.parent
    later = ("predictor_",) if stage == "denoiser" else ("denoiser_", "predictor_")
    anew = {field.name for field in fields(config) if field.name.startswith(later)}
    anew |= _OF_THE_PREDICTOR | (_OF_THE_WAY_ON if stage == "denoiser" else _OF_THE_DENOISER)
    _check_same_run(config, others.parent / "config.yaml", anew)
    start = [checkpoint]
    if stage == "denoiser":
        if config.denoiser_steps <= int(step):
            raise ValueError(
                f"denoiser_steps must be above those of resume_from_checkpoint, got {config.denoiser_steps} for "
                f"{checkpoint}"
            )
        autoencoder, latents = newest_intact(others, "autoencoder"), others / "latents.safetensors"
        if autoencoder is None or not latents.exists():
            raise ValueError(f"resume_from_checkpoint must lie beside its autoencoder and latents, got {checkpoint}")
        start += [autoencoder, latents, *others.glob("best-autoencoder.safetensors")]
    best = BestWeights(others, stage)
    return [*start, best.path] if best.were_kept_by(int(step)) else start  # later ones are of the other run


def copy_start(start: list[Path], output_dir: Path) -> None:
    """Copies what a run starts from, and what the other run's autoencoder has reached.

    Args:
        start: As :func:`claim` yields it; nothing is copied where there is none.
        output_dir: Folder of the new run.

    Raises:
        ValueError: If it cannot be copied; the folder may be claimed again.
    """
    if not start:
        return
    other_dir = start[0].parent.parent
    unfinished = output_dir / ".unfinished-checkpoints"
    try:
        (output_dir / "validation").mkdir(exist_ok=True)
        for picture in (other_dir / "validation").glob("autoencoder-*.png"):
            shutil.copyfile(picture, output_dir / "validation" / picture.name)
        update_metrics(output_dir, "autoencoder", read_metrics(other_dir, "autoencoder"))
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for source in start:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, unfinished / source.name)
        unfinished.rename(output_dir / "checkpoints")  # the last: with them the folder is taken
    except OSError as error:
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint that can be copied to {output_dir}, got {start[0]}: {error}"
        ) from error


def _check_same_run(config: TrainingConfig, path: Path, anew: set[str]) -> None:
    """Raises a ``ValueError`` that shows the difference if the run in a folder had other settings, but for new ones."""
    decide = {"validation_steps"} if config.load_best_model_at_end else set()  # which weights are kept
    may_change = (_MAY_CHANGE - decide) | anew
    try:
        stored: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"resume_from_checkpoint must go on with a run, got {path}, unreadable: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"resume_from_checkpoint must go on with a run, got {path}, which holds no settings")
    stored["mixed_precision"] = precision_of(stored.get("mixed_precision"))  # left unset in files of before
    differences = [
        f"{name} was {stored.get(name)!r}, is {value!r}"
        for name, value in asdict(config).items()
        if name not in may_change and stored.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"resume_from_checkpoint must go on with the same settings, got others than {path}: "
            f"{'; '.join(differences)}; give them back or choose another output_dir"
        )
