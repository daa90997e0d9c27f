"""The folder of a run: taken once, gone on with only by the same run, or begun from another run's checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from mechdiffusers.training.atomic_file import atomic_write
from mechdiffusers.training.checkpoints import damage_of, newest_intact
from mechdiffusers.training.config import TrainingConfig

__all__ = ["claim"]

#: Settings that a run may change when it goes on: they do not change what is trained.
_MAY_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "dry_run",
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


def claim(config: TrainingConfig) -> Path:
    """Makes the folder of a run and writes its settings; called by the main process.

    Args:
        config: Settings of the run.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds a run that this one does not continue, cannot be written, or
            ``resume_from_checkpoint`` is no checkpoint of a run with the same settings.
    """
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    if resume != "latest" and (output_dir / "checkpoints").exists():
        raise ValueError(
            f"output_dir must be new, got {output_dir}, which holds a run: choose another one, or go on with that run "
            "by --resume_from_checkpoint latest"
        )
    try:
        if resume == "latest":
            if (output_dir / "checkpoints").exists():  # until then nothing was trained by the settings
                _check_same_run(config, output_dir / "config.yaml", _MAY_CHANGE)
        elif resume is not None:
            _begin_from(Path(resume), config)
        output_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(output_dir / "config.yaml") as unfinished:
            unfinished.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    except OSError as error:
        raise ValueError(f"output_dir must be a folder that can be written, got {output_dir}: {error}") from error
    return output_dir


def _begin_from(checkpoint: Path, config: TrainingConfig) -> None:
    """Copies a checkpoint of another run, and what it stands on, into a new run's folder."""
    stage, _, step = checkpoint.name.rpartition("-")
    if not (stage in ("autoencoder", "denoiser") and step.isdigit() and checkpoint.is_dir()):
        raise ValueError(
            "resume_from_checkpoint must be 'latest' or a folder such as RUN/checkpoints/denoiser-00001000, "
            f"got {str(checkpoint)!r}"
        )
    if (damage := damage_of(checkpoint)) is not None:
        raise ValueError(f"resume_from_checkpoint must be a whole checkpoint, got {checkpoint}, torn ({damage})")
    others = checkpoint.parent
    of_the_denoiser = {field.name for field in fields(config) if field.name.startswith("denoiser_")} | _OF_THE_DENOISER
    anew = _OF_THE_WAY_ON if stage == "denoiser" else of_the_denoiser
    _check_same_run(config, others.parent / "config.yaml", _MAY_CHANGE | anew)
    needed = [checkpoint, *others.glob("best-autoencoder.safetensors")]
    if stage == "denoiser":
        autoencoder, latents = newest_intact(others, "autoencoder"), others / "latents.safetensors"
        if autoencoder is None or not latents.exists():
            raise ValueError(f"resume_from_checkpoint must lie beside its autoencoder and latents, got {checkpoint}")
        needed += [autoencoder, latents, *others.glob("best-denoiser.safetensors")]
    folder = Path(config.output_dir) / "checkpoints"
    unfinished = folder.with_name(".unfinished-checkpoints")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for source in needed:
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, unfinished / source.name)
    unfinished.rename(folder)
    for source in (others.parent / "metrics.json", *(others.parent / "validation").glob("*.png")):
        if source.exists():  # what the stages before the checkpoint have reached
            target = folder.parent / source.relative_to(others.parent)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)


def _check_same_run(config: TrainingConfig, path: Path, may_change: set[str]) -> None:
    """Raises a ``ValueError`` that shows the difference if the run in a folder had other settings."""
    try:
        stored: Mapping[str, Any] = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"resume_from_checkpoint must go on with a run, got {path}, unreadable: {error}") from error
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
