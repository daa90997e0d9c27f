"""A training small enough for a test, in this process or as the command line, and what it leaves."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import random_composites
from mechdiffusers.microstructures.build_dataset.columns import dataset_of, grey_levels
from mechdiffusers.training import TrainingConfig

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
    "predictor_block_out_channels": [8, 8],
    "predictor_steps": 6,
    "predictor_batch_size": 16,
    "predictor_warmup_steps": 2,
    "token_dim": 8,
    "logging_steps": 3,
    "validation_steps": 6,
    "checkpointing_steps": 4,
    "validation_inference_steps": 2,
    "num_validation_images": 4,
}


def small(folder: Path, **settings: object) -> TrainingConfig:
    return TrainingConfig(output_dir=str(folder), **{**SMALL, **settings})


SPEC = ResponseSpec(
    "stress",
    ["uniaxial_extension", "shear"],
    [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]],
    units="modulus of the soft phase",
    signed=False,
    solver={"element_order": 1},
)


def responses_of(designs: np.ndarray) -> np.ndarray:
    """In the place of finite elements: volume fraction and connection, growing with the strain; NaN here and there."""
    fraction, connected = designs.mean((1, 2)), (designs[:, 1:] * designs[:, :-1]).mean((1, 2))
    response = np.exp(4 * np.stack([fraction, connected], axis=1))[..., None] * np.array([0.1, 0.2, 0.3])
    response[::5, 1, 2] = np.nan
    response[3::20] = np.nan
    return response.astype(np.float32)


def write_dataset(folder: Path, num_train: int = 48, num_heldout: int = 16, column: str = "response") -> Path:
    """A folder of the splits of a dataset of 8 x 8 designs with responses."""
    designs, _ = random_composites(num_train + num_heldout, size=8)
    folder.mkdir(parents=True)
    for split, rows in (("heldout", designs[:num_heldout]), ("train", designs[num_heldout:])):
        dataset = dataset_of(grey_levels(rows), responses_of(rows), {}, SPEC)
        if column != "response":
            dataset = dataset.rename_column("response", column)
        dataset.to_parquet(folder / f"{split}.parquet")
    return folder


def conditional(dataset: Path) -> dict[str, object]:
    """Settings of a small run in which all is drawn or learned that may be."""
    return {
        "dataset": str(dataset),
        "response_column": "response",
        "response_dropout": 0.2,
        "response_masking": 0.5,
        "random_half_turn": True,
        "random_reflections": True,
        "learned_noise_schedule": True,
        "num_train_designs": None,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    pipeline = folder / "pipeline"
    return {
        f"{name}.{key}": value
        for name in ("vae", "unet", "response_encoder", "response_predictor")
        if (pipeline / name).is_dir()
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
