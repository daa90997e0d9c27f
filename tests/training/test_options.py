"""What the options of a training do."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from mechdiffusers.training import parse_config
from mechdiffusers.training.accelerators import stage_accelerator
from mechdiffusers.training.autoencoder import LikelihoodAutoencoder
from mechdiffusers.training.denoiser import LatentDenoiser, denoising_loss
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.randomness import StepRandomness
from mechdiffusers.training.rehearsal import rehearse
from mechdiffusers.training.train import train
from safetensors.torch import load_file
from small_runs import command_line, loss_curve, small
from torch import nn


class Shifted(nn.Module):
    """Predicts noise, latents and velocity of latents that are off by 1: the truth plus what that makes of it."""

    def __init__(self, scheduler: DDPMScheduler, latents: torch.Tensor):
        super().__init__()
        self.scheduler, self.latents = scheduler, latents

    def forward(self, noisy, timesteps, response):
        alpha_squared = self.scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        wrong = self.latents + 1
        noise = (noisy - alpha * wrong) / sigma
        return {"sample": wrong, "epsilon": noise, "v_prediction": alpha * noise - sigma * wrong}[
            self.scheduler.config.prediction_type
        ]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_one_error_of_the_latents_alike_whatever_is_predicted(prediction_type):
    """Latents off by 1 everywhere cost min(SNR, gamma), averaged over the times drawn."""
    gamma, num = 5.0, 500
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    latents = torch.randn(num, 1, 2, 2, generator=torch.manual_seed(0), dtype=torch.float64)
    moments = torch.cat([latents, torch.full_like(latents, -100.0)], dim=1)  # posteriors of no width
    loss_function = denoising_loss(scheduler, 0.0, 1.0, gamma)
    loss, _ = loss_function(Shifted(scheduler, latents), (moments,), StepRandomness(("test",)))
    again = StepRandomness(("test",))
    again.normal(*latents.shape), again.normal(*latents.shape)
    alpha_squared = scheduler.alphas_cumprod.double()[again.integers(1000, num)]
    snr = alpha_squared / (1 - alpha_squared)
    assert loss.item() == pytest.approx(snr.clamp(max=gamma).mean().item(), rel=1e-4)


def test_offset_noise_is_common_to_the_pixels_of_a_channel():
    """The noise that the network should predict has covariance offset^2 between two pixels of a channel."""
    offset, num, seen = 0.7, 20_000, []
    scheduler = DDPMScheduler(clip_sample=False)

    class Listener(nn.Module):
        def forward(self, noisy, timesteps, response):
            sigma = (1 - scheduler.alphas_cumprod.double()[timesteps]).sqrt()
            seen.append(noisy / sigma[:, None, None, None])  # latents are 0: what is left is the noise
            return torch.zeros_like(noisy)

    moments = torch.cat([torch.zeros(num, 2, 1, 2), torch.full((num, 2, 1, 2), -100.0)], dim=1).double()
    denoising_loss(scheduler, 0.0, 1.0, None, offset)(Listener(), (moments,), StepRandomness(("test",)))
    covariance = torch.cov(seen[0].flatten(1).T)
    same = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    expected = torch.eye(4) + offset**2 * same
    torch.testing.assert_close(covariance.float(), expected, atol=6 * 1.49 * math.sqrt(2 / num), rtol=0)


@pytest.mark.parametrize("network", [LikelihoodAutoencoder, LatentDenoiser], ids=lambda network: network.__name__)
def test_gradient_checkpointing_gives_the_same_gradients_from_less_that_is_kept(network):
    kept, gradients = {}, {}
    for wanted in (False, True):
        torch.manual_seed(0)
        module = network(small(Path("unused"), gradient_checkpointing=wanted), (8, 8)).train()
        inputs = torch.rand(4, 1, 8, 8), torch.randn(4, 2, 4, 4)
        if network is LatentDenoiser:
            inputs = torch.randn(4, 2, 8, 8), torch.tensor([1, 10, 100, 900]), torch.empty(4, 0, 0)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = module(*inputs)
            kept[wanted] = sum(sizes)
            (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        gradients[wanted] = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert kept[True] < 0.7 * kept[False]
    torch.testing.assert_close(gradients[True], gradients[False])


def test_batches_that_are_summed_train_as_the_batch_that_they_make(tmp_path):
    """Same designs, same noise, same steps: only the order of the sums differs."""
    train(small(tmp_path / "whole", logging_steps=1))
    halves = {"gradient_accumulation_steps": 2, "autoencoder_batch_size": 8, "denoiser_batch_size": 8}
    train(small(tmp_path / "halves", logging_steps=1, **halves))
    for stage in ("autoencoder", "denoiser"):
        expected, curve = loss_curve(tmp_path / "whole", stage), loss_curve(tmp_path / "halves", stage)
        assert list(curve.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_the_averaged_weights_are_those_of_the_recursion(tmp_path):
    """Decay 1 - (1 + t)^(-3/4), at most ema_decay, from the first weights on (diffusers' EMAModel counts t from 0)."""
    config, seen = small(tmp_path, ema_decay=0.7, denoiser_steps=12, denoiser_learning_rate=0.1), []

    def loss(module, batch, randomness):
        seen.append(module.weight.item())
        return (module(batch[0]) - 1).square().mean(), {}

    data = torch.utils.data.TensorDataset(torch.rand(48, 1, generator=torch.manual_seed(0)))
    accelerator = stage_accelerator(config, "denoiser")
    averaged = run_stage(accelerator, config, "denoiser", nn.Linear(1, 1), data, loss, lambda *_: {"loss": 0.0})
    last = load_file(tmp_path / "checkpoints" / "denoiser-00000012" / "model.safetensors")["weight"].item()
    expected = seen[1]
    for t, weight in enumerate([*seen[2:], last], start=1):
        decay = min(0.7, 1 - (1 + t) ** -0.75)
        expected = decay * expected + (1 - decay) * weight
    assert averaged.weight.item() == pytest.approx(expected, rel=1e-5)
    assert averaged.weight.item() != pytest.approx(last, rel=1e-3)


@pytest.mark.slow
def test_compiled_networks_train_as_others_do(tmp_path, monkeypatch):
    """Traced and differentiated by the compiler; what generates machine code takes minutes and is left out."""
    compile_module, compiled = nn.Module.compile, []

    def compile_traced(module):
        compiled.append(type(module))
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    for name, wanted in (("with", True), ("without", False)):
        train(small(tmp_path / name, torch_compile=wanted, logging_steps=1))
    assert compiled == [LikelihoodAutoencoder, LatentDenoiser]
    for stage in ("autoencoder", "denoiser"):
        expected, curve = loss_curve(tmp_path / "without", stage), loss_curve(tmp_path / "with", stage)
        assert list(curve.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_rounding_to_tf32_is_off_when_it_is_not_wanted(tmp_path, monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        for wanted, precision in ((True, "high"), (False, "highest")):
            train(small(tmp_path / precision, allow_tf32=wanted, autoencoder_steps=1, denoiser_steps=1))
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.cudnn.allow_tf32 == wanted
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(tmp_path):
    config = small(tmp_path / "run", denoiser_steps=60_000, dry_run=True)
    designs, autoencoder, denoiser = rehearse(config).splitlines()
    assert designs == "48 training designs of 8 x 8 pixels, 16 held out"
    assert autoencoder.startswith("autoencoder: 0.0")
    seconds, minutes = (float(denoiser.split(unit)[0].split()[-1]) for unit in (" s a step", " minutes"))
    assert minutes == pytest.approx(60_000 * seconds / 60, rel=0.05, abs=1)
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_its_newest_figures(tmp_path):
    train(small(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["denoiser/step"] == 6
    bound = metrics["autoencoder/reconstruction_nats"] - metrics["autoencoder/kl_nats"]
    assert metrics["autoencoder/elbo_nats"] == pytest.approx(bound)
    assert metrics["autoencoder/elbo_bits_per_dim"] == pytest.approx(-bound / (8 * 8 * math.log(2)))
    assert 0 < metrics["denoiser/two_point_error"] < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "trackio"}, "report_to must ask for what is installed, got 'trackio': pip install trackio"),
        ({"report_to": "wandb"}, "report_to must ask for what is installed, got 'wandb': pip install wandb first"),
        ({"use_8bit_adam": True}, "use_8bit_adam must ask for what is installed, got True: pip install bitsandbytes"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be 'no' or 'bf16' without an accelerator"),
        ({"dry_run": True, "resume_from_checkpoint": "latest"}, "dry_run must be left out with resume_from_checkpoint"),
        ({"hub_model_id": "me/x"}, "hub_model_id must be left out without push_to_hub, got 'me/x'"),
        ({"hub_private": True}, "hub_private must be left out without push_to_hub, got True"),
        ({"snr_gamma": -1.0}, "snr_gamma must be positive, got -1.0"),
        ({"noise_offset": -0.1}, "noise_offset must be at least 0, got -0.1"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit must be positive, got 0"),
    ],
)
def test_options_that_cannot_be_had_are_refused_at_once(settings, message, monkeypatch):
    monkeypatch.setattr("mechdiffusers.training.config.find_spec", lambda name: None if name != "tensorboard" else name)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^{message}"):
        small(Path("unused"), **settings)


@pytest.mark.parametrize("argument", ["--token=hf_secret", "--hub_token", "--hub-token"])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(argument):
    with pytest.raises(ValueError, match="^a token must not stand on the command line") as refused:
        parse_config(["--output_dir", "runs/x", argument, "hf_secret"])
    assert "hf_secret" not in str(refused.value)


@pytest.mark.slow
def test_the_script_rehearses(tmp_path):
    arguments = [*command_line(tmp_path / "run"), "--dry_run", "true"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a dry run; the real one would be:\n48 training designs" in done.stderr
    assert not (tmp_path / "run").exists()
