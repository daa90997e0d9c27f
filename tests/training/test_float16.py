"""Training in float16: losses are scaled, steps whose gradients overflow are skipped, and nothing else notices.

Accelerate computes in float16 on accelerators alone. Here the casts and the scaler of PyTorch, which know CPUs too, are
switched on by hand; all else is as on a GPU.
"""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import nn

from mechdiffusers.training import accelerators
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.train import train
from small_runs import assert_same_weights, loss_curve, small


def half_accelerator(config, name, init_scale=2.0**22):
    """Its first scale is too large for a few steps, as on a GPU 2^16 is for larger networks."""
    accelerator = accelerators.stage_accelerator(config, name)
    if config.mixed_precision == "fp16":
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale), True
    return accelerator


@pytest.fixture(autouse=True)
def float16(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("mechdiffusers.training.stages.stage_accelerator", half_accelerator)


def descend(folder, monkeypatch, **settings: object) -> tuple[list[float], list[float]]:
    """Twelve steps for a line with gradient (4, 4), which overflows until the scale, first 2^16, is 2^13.

    Returns:
        The slope before each step, and the norm of the gradient at each that the optimiser takes.
    """
    norms, slopes, step = [], [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(nn.utils.get_total_norm(gradients).item())
        return step(self, *args, **kwargs)

    def loss(module, batch, randomness):
        slopes.append(module.weight.item())
        return 4 * module(batch[0]).float().mean(), {}

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = small(folder, mixed_precision="fp16", denoiser_steps=12, **settings)
    data = torch.utils.data.TensorDataset(torch.ones(48, 1))
    accelerator = half_accelerator(config, "denoiser", init_scale=2.0**16)
    run_stage(accelerator, config, "denoiser", nn.Linear(1, 1), data, loss, lambda *_: {"loss": 0.0})
    return slopes, norms


@pytest.mark.parametrize("max_grad_norm", [0.5, 100.0])
def test_gradients_are_clipped_by_their_own_norm_not_that_of_scaled_ones(tmp_path, monkeypatch, max_grad_norm):
    _, norms = descend(tmp_path, monkeypatch, max_grad_norm=max_grad_norm)
    assert norms == pytest.approx([min(max_grad_norm, 4 * 2**0.5)] * 9, rel=1e-4)


def test_a_skipped_step_leaves_weights_average_and_learning_rate_as_they_are(tmp_path, monkeypatch):
    slopes, _ = descend(tmp_path, monkeypatch, denoiser_warmup_steps=0)
    assert slopes[:4] == [slopes[0]] * 4
    assert len(set(slopes[3:])) == 9
    last = tmp_path / "checkpoints" / "denoiser-00000012"
    assert torch.load(last / "scaler.pt")["scale"] == 2**13
    assert torch.load(last / "scheduler.bin")["last_epoch"] == 9
    with safe_open(last / "average-0.safetensors", framework="pt") as file:
        assert file.metadata()["optimization_step"] == "9"


def test_a_run_in_float16_rounds_and_goes_on_with_its_scale(tmp_path):
    settings = {"denoiser_steps": 12, "logging_steps": 1}
    train(small(tmp_path / "whole", mixed_precision="no", **settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings["mixed_precision"] = "fp16"
    run = tmp_path / "half"
    train(small(run, checkpoints_total_limit=3, **settings))
    # later ones are of other weights, as steps were skipped
    expected, first = (loss_curve(folder, "autoencoder")[1] for folder in (tmp_path / "whole", run))
    assert first == pytest.approx(expected, rel=2e-3)
    assert first != pytest.approx(expected, rel=1e-6)

    shutil.copytree(run, tmp_path / "again")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"denoiser-{step:08d}")
    shutil.rmtree(tmp_path / "again" / "pipeline")
    assert torch.load(tmp_path / "again" / "checkpoints" / "denoiser-00000004" / "scaler.pt")["scale"] < 2**22
    assert 6 <= torch.load(run / "checkpoints" / "denoiser-00000012" / "scheduler.bin")["last_epoch"] < 12
    train(small(tmp_path / "again", checkpoints_total_limit=3, resume_from_checkpoint="latest", **settings))
    assert_same_weights(tmp_path / "again", run)
