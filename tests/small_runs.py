"""A training small enough for a test, in this process or as the command line, and what it leaves."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from mechdiffusers.training import TrainingConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[1] / "training" / "train.py"

SMALL = {
    "num_train_designs": 48,
    "num_heldout_designs": 16,
    "resolution": 8,
    "latent_channels": 2,
    "autoencoder_block_out_channels": [4, 8],
    "autoencoder_steps": 6,
    "autoencoder_batch_size": 16,
    "autoencoder_warmup_steps": 2,
    "denoiser_block_out_channels": [8, 8],
    "denoiser_layers_per_block": 1,
    "denoiser_steps": 6,
    "denoiser_batch_size": 16,
    "denoiser_warmup_steps": 2,
    "token_dim": 8,
    "logging_steps": 3,
    "validation_steps": 6,
    "checkpointing_steps": 4,
    "validation_inference_steps": 2,
    "num_validation_images": 4,
}


def small(folder: Path, **settings: object) -> TrainingConfig:
    return TrainingConfig(output_dir=str(folder), **{**SMALL, **settings})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    pipeline = folder / "pipeline"
    return {
        f"{name}.{key}": value
        for name in ("vae", "unet", "response_encoder")
        for key, value in load_file(pipeline / name / "diffusion_pytorch_model.safetensors").items()
    }


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], **tolerance or {"rtol": 0, "atol": 0}, msg=key)


def command_line(folder: Path, **settings: object) -> list[str]:
    """Arguments of the script for a small run; the settings stand in a file beside the run's folder."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**SMALL, "output_dir": str(folder), **settings}))
    return [str(SCRIPT), "--config", str(file)]


def start(arguments: list[str], **options: object) -> subprocess.Popen:
    """A process of this Python that runs a script, its messages in ``stderr``, every step shown in its bars."""
    environment = {**os.environ, "TQDM_MININTERVAL": "0"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finish(process: subprocess.Popen) -> str:
    """Waits for a process that has to succeed; returns its messages."""
    messages = process.communicate()[1]
    assert process.returncode == 0, messages
    return messages


def loss_curve(folder: Path, stage: str) -> dict[int, float]:
    """The logged loss of each step."""
    curve = {}
    for file in (folder / "logs" / stage).rglob("events*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "loss" in events.Tags()["scalars"]:
            curve.update({event.step: event.value for event in events.Scalars("loss")})
    return curve
