"""Trains a latent diffusion model of microstructures, from designs to a portable checkpoint.

    accelerate launch training/train.py --config training/configs/quick.yaml --output_dir runs/quick

The run's folder holds, when it is done: ``pipeline/``, the checkpoint that plain diffusers loads; ``validation/``,
grids of held-out designs and of samples; ``logs/``, for TensorBoard; ``checkpoints/``, what an interrupted run goes on
from; ``config.yaml``, every setting.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
import yaml
from accelerate import PartialState
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.training.autoencoder import encode_all, measure_latents, train_autoencoder
from mechdiffusers.training.config import TrainingConfig, parse_config
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.denoiser import train_denoiser
from mechdiffusers.training.loop import stage_accelerator
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

__all__ = ["train"]

logger = logging.getLogger(__name__)

#: Settings that a run may change when it goes on: they do not change what is trained.
_MAY_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "validation_steps",
    "validation_scheduler",
    "validation_inference_steps",
    "checkpointing_steps",
}


def train(config: TrainingConfig) -> LatentDDPMPipeline:
    """Trains both stages and saves the pipeline in ``output_dir/pipeline``.

    Args:
        config: Settings of the run.

    Returns:
        The trained pipeline, on the CPU.

    Raises:
        ValueError: If a setting or the data are unfit, ``output_dir`` cannot be written, or it holds a run already
            and ``resume_from_checkpoint`` is not set.
    """
    output_dir = _claim(config)
    designs = load_designs(config)

    accelerator = stage_accelerator(config, "autoencoder")
    autoencoder = train_autoencoder(accelerator, config, designs)
    vae, scale = autoencoder.vae, autoencoder.decoder_scale

    latents = output_dir / "checkpoints" / "latents.safetensors"
    if accelerator.is_main_process and not latents.exists():
        moments = {
            "train": encode_all(vae, designs.train, accelerator.device, designs.num_train),
            "heldout": encode_all(vae, TensorDataset(designs.heldout), accelerator.device, len(designs.heldout)),
        }
        unfinished = latents.with_name(f".unfinished-{latents.name}")
        save_file(moments, unfinished)
        os.replace(unfinished, latents)
    accelerator.wait_for_everyone()
    cached = load_file(latents)
    measure_latents(vae, cached["train"])

    accelerator = stage_accelerator(config, "denoiser")
    pipe = train_denoiser(
        accelerator, config, vae, None if scale is None else scale.item(), cached["train"], cached["heldout"]
    )
    if accelerator.is_main_process:
        pipe.save_pretrained(output_dir / "pipeline")
        logger.info("the pipeline is in %s", output_dir / "pipeline")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return pipe


def _claim(config: TrainingConfig) -> Path:
    """Makes the run's folder and writes the settings into it, unless it holds a run that this one does not continue."""
    output_dir = Path(config.output_dir)
    if (output_dir / "checkpoints").exists() and config.resume_from_checkpoint is None:
        raise ValueError(
            f"output_dir must be new, got {output_dir}, which holds a run: choose another one, or go on with that run "
            "by --resume_from_checkpoint latest"
        )
    process = PartialState()
    if (output_dir / "config.yaml").exists() and config.resume_from_checkpoint is not None:
        _check_same_run(config, output_dir / "config.yaml")
    process.wait_for_everyone()  # all have read the old settings before they are written again
    if not process.is_main_process:
        return output_dir
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        unfinished = output_dir / ".unfinished-config.yaml"
        unfinished.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
        os.replace(unfinished, output_dir / "config.yaml")
    except OSError as error:
        raise ValueError(f"output_dir must be a folder that can be written, got {output_dir}: {error}") from error
    return output_dir


def _check_same_run(config: TrainingConfig, path: Path) -> None:
    """Raises a ``ValueError`` that shows the difference if the run in a folder had other settings."""
    stored = yaml.safe_load(path.read_text())
    differences = [
        f"{name} was {stored.get(name)!r}, is {value!r}"
        for name, value in asdict(config).items()
        if name not in _MAY_CHANGE and stored.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"resume_from_checkpoint must go on with the same settings, got others than {path}: "
            f"{'; '.join(differences)}; give them back or choose another output_dir"
        )


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_warning()
    torch.set_float32_matmul_precision("high")
    try:
        train(parse_config())
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
