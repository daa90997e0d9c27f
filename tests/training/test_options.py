"""What the options of a training do."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers.log_snr_curve import alpha_sigma
from mechdiffusers.training import parse_config
from mechdiffusers.training.accelerators import stage_accelerator
from mechdiffusers.training.autoencoder import LikelihoodAutoencoder
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.metrics import read_metrics
from mechdiffusers.training.randomness import StepRandomness
from mechdiffusers.training.rehearsal import rehearse
from mechdiffusers.training.train import train
from small_runs import command_line, finish, loss_curve, small, start


class Shifted(nn.Module):
    """Predicts noise, latents and velocity of latents that are off by 1: the truth plus what that makes of it."""

    def __init__(self, process, latents: torch.Tensor):
        super().__init__()
        self.process, self.latents = process, latents

    def forward(self, noisy, timesteps, encoder_hidden_states):
        alpha, sigma = (scale[:, None, None, None] for scale in alpha_sigma(self.process.curve(timesteps)))
        wrong = self.latents + 1
        noise = (noisy - alpha * wrong) / sigma
        outputs = {"sample": wrong, "epsilon": noise, "v_prediction": alpha * noise - sigma * wrong}
        return SimpleNamespace(sample=outputs[self.process.config.prediction_type])


def shifted_denoiser(num: int, **settings) -> tuple[LatentDenoiser, tuple[torch.Tensor, ...]]:
    denoiser = LatentDenoiser(small(Path("unused"), **settings), (2, 2))
    randomness = StepRandomness(("test",))
    latents, noise = (randomness.normal(num, 1, 2, 2).double() for _ in range(2))
    denoiser.unet = Shifted(denoiser.process, latents)
    return denoiser, (latents, noise, (torch.arange(num).double() + 0.5) / num, torch.empty(num, 0, 0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_one_error_of_the_latents_alike_whatever_is_predicted(prediction_type):
    """Latents off by 1 everywhere cost min(SNR, gamma)."""
    settings = {"prediction_type": prediction_type, "loss_weighting": "min_snr", "snr_gamma": 3.0}
    denoiser, batch = shifted_denoiser(50, **settings)
    snr = denoiser.process.curve(999 * batch[2]).exp()
    expected = snr.clamp(max=3).float()
    torch.testing.assert_close(denoiser(*batch)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_objective_of_likelihood_is_the_diffusion_part_of_the_bound(prediction_type, learned):
    """Latents off by 1 cost half the fall of the SNR, in nats an entry (Kingma et al. 2021, section 5.1)."""
    settings = {"prediction_type": prediction_type, "loss_weighting": "elbo", "learned_noise_schedule": learned}
    denoiser, batch = shifted_denoiser(20_000, **settings)
    errors, nats, _ = denoiser(*batch)
    torch.testing.assert_close(errors, nats / 4)
    first, last = denoiser.process.curve(torch.tensor([0.0, 999.0], dtype=torch.float64)).exp()
    assert nats.double().mean().item() == pytest.approx(4 * (first - last).item() / 2, rel=2e-3)


def test_a_learned_curve_moves_towards_less_variance_and_nothing_else_moves_it():
    """The denoiser's error is large at the clean end alone: the curve spends more of its time there."""

    class WrongWhereClean(nn.Module):
        def forward(self, noisy, timesteps, encoder_hidden_states):
            return SimpleNamespace(sample=noisy * (timesteps < 300)[:, None, None, None])

    denoiser = LatentDenoiser(small(Path("unused"), learned_noise_schedule=True, prediction_type="epsilon"), (2, 2))
    denoiser.unet = WrongWhereClean()
    curve = denoiser.noise_schedule
    before = curve(torch.tensor(0.3)).item()
    ends = curve(torch.tensor([0.0, 1.0])).tolist()
    optimizer = torch.optim.AdamW(curve.parameters(), 1e-2)
    for step in range(60):
        randomness = StepRandomness(("test", step))
        latents, noise = randomness.normal(64, 1, 2, 2), randomness.normal(64, 1, 2, 2)
        errors, nats, loss = denoiser(latents, noise, randomness.stratified(64), torch.empty(64, 0, 0))
        assert not errors.requires_grad
        assert not nats.requires_grad
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert curve(torch.tensor(0.3)).item() > before + 0.5
    assert curve(torch.tensor([0.0, 1.0])).tolist() == pytest.approx(ends)


def test_offset_noise_is_common_to_the_pixels_of_a_channel():
    """The noise that the network should predict has covariance offset^2 between two pixels of a channel."""
    offset, num, seen = 0.7, 20_000, []

    class Listener(nn.Module):
        def forward(self, latents, noise, times, response):
            seen.append(noise)
            return torch.zeros(num), torch.zeros(num), torch.zeros(())

    moments = torch.cat([torch.zeros(num, 1, 2, 1, 2), torch.full((num, 1, 2, 1, 2), -100.0)], dim=2)
    loss = denoising_loss(small(Path("unused"), noise_offset=offset), 0.0, 1.0)
    loss(Listener(), (moments, torch.empty(num, 0, 0)), StepRandomness(("test",)))
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
            noise, times = torch.randn(4, 2, 8, 8), torch.tensor([0.0, 0.01, 0.1, 0.9])
            inputs = torch.randn(4, 2, 8, 8), noise, times, torch.empty(4, 0, 0)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = module(*inputs)
            kept[wanted] = sum(sizes)
            out[0].mean().backward()
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


def test_the_time_of_a_step_is_that_of_steps_alone(tmp_path):
    """A look at the held-out designs between two entries of the log is left out."""
    config = small(tmp_path, denoiser_steps=8, validation_steps=6, logging_steps=100, checkpointing_steps=100)

    def loss(module, batch, randomness):
        time.sleep(0.02)
        return module(batch[0]).square().mean(), {}

    def validate(module, step):
        time.sleep(0.5)
        return {"loss": 0.0}

    data = torch.utils.data.TensorDataset(torch.rand(48, 1))
    run_stage(stage_accelerator(config, "denoiser"), config, "denoiser", nn.Linear(1, 1), data, loss, validate)
    assert 0.02 < read_metrics(tmp_path, "denoiser")["seconds_per_step"] < 0.25


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


@pytest.mark.parametrize("launcher", [None, "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_one_thread_is_the_choice_of_the_user_unless_a_launcher_made_it(tmp_path, monkeypatch, launcher):
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if launcher is not None:
        monkeypatch.setenv(launcher, "no")
    try:
        torch.set_num_threads(cores + 1)
        stage_accelerator(small(tmp_path), "denoiser")
        assert torch.get_num_threads() == (cores + 1 if launcher is None else cores)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_bfloat16_rounds_and_little_more(tmp_path):
    curves = {}
    for precision in ("no", "bf16"):  # a process takes one alone
        finish(start(command_line(tmp_path / precision, mixed_precision=precision, logging_steps=1)))
        curves[precision] = [loss_curve(tmp_path / precision, stage)[6] for stage in ("autoencoder", "denoiser")]
    assert curves["bf16"] == pytest.approx(curves["no"], rel=0.02)
    assert curves["bf16"] != pytest.approx(curves["no"], rel=1e-5)


def test_eight_bit_adam_takes_the_steps_where_it_is_wanted(tmp_path, monkeypatch):
    """The package's class is stood in for: it needs a GPU."""
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, learning_rate, weight_decay):
            made.append((learning_rate, weight_decay))
            super().__init__(parameters, learning_rate, weight_decay=weight_decay)

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit)))
    monkeypatch.setattr("mechdiffusers.training.config.find_spec", lambda name: name)
    config = small(tmp_path, use_8bit_adam=True, weight_decay=0.01)
    train(config)
    assert made == [(config.autoencoder_learning_rate, 0.01), (config.denoiser_learning_rate, 0.01)]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = small(tmp_path)
    network = nn.Linear(1, 1)

    def compute_loss(module, batch, randomness):
        loss = module(batch[0]).mean() / 0
        return loss, {"loss": loss}

    data = torch.utils.data.TensorDataset(torch.ones(48, 1))
    with pytest.raises(
        FloatingPointError, match="^denoiser: the loss is not finite at step 3: .*lower the learning rate"
    ):
        run_stage(stage_accelerator(config, "denoiser"), config, "denoiser", network, data, compute_loss, lambda *_: {})


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


def test_a_dry_run_refuses_what_the_run_would(tmp_path):
    with pytest.raises(ValueError, match="^denoiser_batch_size must be at most the number of training designs, got 64"):
        rehearse(small(tmp_path / "run", denoiser_batch_size=64))


def test_a_dry_run_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match="^dry_run must be left out of what train is given"):
        train(small(tmp_path / "run", dry_run=True))
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_its_newest_figures(tmp_path):
    train(small(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["denoiser/step"] == 6
    bound = metrics["autoencoder/reconstruction_nats"] - metrics["autoencoder/kl_nats"]
    assert metrics["autoencoder/elbo_nats"] == pytest.approx(bound)
    assert metrics["autoencoder/elbo_bits_per_dim"] == pytest.approx(-bound / (8 * 8 * math.log(2)))
    assert 0 < metrics["denoiser/two_point_error"] < 1
    assert metrics["denoiser/diversity_ratio"] >= 0


def test_a_run_whose_samples_are_all_black_says_so(tmp_path, monkeypatch, caplog):
    def black(self, batch_size, **options):
        return SimpleNamespace(images=np.zeros((batch_size, 8, 8, 1)))

    monkeypatch.setattr(LatentDDPMPipeline, "__call__", black)
    train(small(tmp_path))
    assert read_metrics(tmp_path, "denoiser")["diversity_ratio"] == 0
    assert "the samples of step 6 have 0 of the diversity of the held-out designs" in caplog.text


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
        ({"response_dropout": 1.5}, "response_dropout must be at most 1, got 1.5"),
        ({"response_masking": -0.5}, "response_masking must be at least 0, got -0.5"),
        ({"response_column": "response"}, "response_column must be left out for random_composites"),
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
