"""The training script as a user starts it, small."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from mechdiffusers.microstructures import random_composites
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import VDMScheduler
from mechdiffusers.schedulers.log_snr_curve import alpha_sigma
from mechdiffusers.training import TrainingConfig, parse_config
from mechdiffusers.training.autoencoder import LikelihoodAutoencoder, encode_all, measure_latents
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_bound import autoencoder_nats, latent_nats
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.randomness import StepRandomness
from mechdiffusers.training.train import train
from small_runs import SCRIPT, SMALL, assert_same_weights, small, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "trained"
    train(small(folder))
    return folder


def test_a_run_leaves_a_pipeline_grids_logs_and_its_settings(trained):
    pipe = LatentDDPMPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    names = {path.name for path in (trained / "validation").iterdir()}
    assert names == {"autoencoder-00000006.png", "denoiser-00000006.png"}
    assert list((trained / "logs").rglob("events*"))
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    # nobody has told it another precision
    assert TrainingConfig(**settings) == small(trained, mixed_precision="no")


def test_the_pipelines_scheduler_has_the_error_of_the_denoiser(trained):
    """Hardly trained, it predicts a velocity of about 0: the error is the velocity's own mean square, 1."""
    config = LatentDDPMPipeline.from_pretrained(trained / "pipeline").scheduler.config
    assert config.variance_type == "optimal"
    assert config.velocity_error == pytest.approx([1.0] * 50, abs=0.35)


@pytest.mark.slow
def test_a_learned_curve_ends_in_the_pipelines_scheduler(tmp_path):
    pipe = train(small(tmp_path, learned_noise_schedule=True))
    curve = VDMScheduler.from_pretrained(tmp_path / "pipeline" / "scheduler").curve
    fixed = VDMScheduler(beta_schedule=pipe.scheduler.config.beta_schedule).curve
    assert curve.at([0, 999]) == pytest.approx(fixed.at([0, 999]))
    assert abs(curve.at(300) - fixed.at(300)) > 1  # that of linear betas is no line, and the network starts near one


def test_the_latents_that_the_denoiser_sees_have_unit_variance_and_no_mean(trained):
    pipe = LatentDDPMPipeline.from_pretrained(trained / "pipeline")
    designs, _ = random_composites(64, size=8, seed=0)  # held-out ones first, then those trained on
    latents = pipe.encode(designs[16:], sample_posterior=True, generator=torch.manual_seed(0))
    assert latents.mean().item() == pytest.approx(0, abs=0.05)
    assert latents.std().item() == pytest.approx(1, abs=0.05)


def test_a_finished_run_is_not_overwritten(trained):
    with pytest.raises(ValueError, match="^output_dir must be new, got .* --resume_from_checkpoint latest"):
        train(small(trained))


def test_resuming_a_finished_run_changes_nothing(trained, tmp_path):
    before = weights(trained)
    train(small(trained, resume_from_checkpoint="latest"))
    after = weights(trained)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_seed_decides_everything(trained, tmp_path):
    train(small(tmp_path / "same"))
    assert_same_weights(tmp_path / "same", trained)
    train(small(tmp_path / "other", seed=1))
    ours, other = weights(trained), weights(tmp_path / "other")
    assert not any(torch.equal(ours[key], other[key]) for key in ours if key.endswith("conv_in.weight"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"mixed_precision": "bf16"},
        {"gradient_accumulation_steps": 2},
        {"learned_noise_schedule": True, "loss_weighting": "elbo"},
        {"resolution": 9},
    ],
    ids=lambda settings: next(iter(settings)) + "=" + str(next(iter(settings.values()))),
)
def test_every_way_to_train_ends_in_a_pipeline_that_samples(tmp_path, settings):
    config = small(tmp_path, **settings)
    train(config)
    pipe = LatentDDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    size = config.resolution
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, size, size, 1)
    assert pipe.scheduler.config.prediction_type == config.prediction_type


@pytest.mark.slow
def test_the_script_trains_on_a_folder_of_grey_images(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (7, 10)).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
    settings = {**SMALL, "dataset": str(tmp_path / "images"), "decoder_likelihood": "discretized_logistic"}
    del settings["num_train_designs"]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "run")}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command = [*launch, str(SCRIPT), "--config", str(tmp_path / "settings.yaml"), "--autoencoder_steps", "4"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    pipe = LatentDDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.decoder_scale > 0
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 7, 10, 1)


@pytest.mark.slow
def test_the_script_trains_on_a_stream(tmp_path):
    import datasets

    designs, _ = random_composites(64, size=8)
    datasets.Dataset.from_dict({"image": list(designs)}).to_parquet(tmp_path / "designs.parquet")
    train(small(tmp_path / "run", dataset=str(tmp_path / "designs.parquet"), streaming=True))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_a_bad_setting_ends_the_script_with_one_sentence(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / "run"), "--num_train_designs", "-3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: num_train_designs must be positive, got -3"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_batch_larger_than_the_data_is_refused_before_any_work(tmp_path, stage):
    with pytest.raises(ValueError, match=f"^{stage}_batch_size must be at most the number of training designs"):
        train(small(tmp_path, **{f"{stage}_batch_size": 64}))
    assert not (tmp_path / "checkpoints").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^output_dir must be a folder that can be written, got .*file"):
        train(small(tmp_path / "file" / "run"))


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
def test_the_bound_is_the_expected_log_weight(likelihood):
    """E_q[log p(x|z) + log p(z) - log q(z|x)] by Monte Carlo equals reconstruction minus the closed-form KL."""
    torch.manual_seed(0)
    options = {} if likelihood == "bernoulli" else {"dataset": "elsewhere"}
    config = small(Path("unused"), decoder_likelihood=likelihood, **options)
    autoencoder = LikelihoodAutoencoder(config, (8, 8)).double()
    image = torch.rand(1, 1, 8, 8).round().double()
    num = 4000
    noise = torch.randn(num, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        reconstruction, kl, _ = autoencoder(image.expand(num, -1, -1, -1), noise)
        posterior = autoencoder.vae.encode(2 * image - 1).latent_dist
        codes = posterior.mean + posterior.std * noise
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(codes).sum((1, 2, 3))
        log_posterior = torch.distributions.Normal(posterior.mean, posterior.std).log_prob(codes).sum((1, 2, 3))
    log_weight = reconstruction.double() + log_prior - log_posterior
    error = log_weight - (reconstruction.double() - kl.double())
    assert error.mean().item() == pytest.approx(0, abs=5 * error.std().item() / math.sqrt(num) + 1e-3)


def test_shift_and_scale_are_those_of_draws_from_the_posteriors():
    autoencoder = LikelihoodAutoencoder(small(Path("unused")), (8, 8))
    moments = torch.cat([torch.randn(500, 2, 4, 4) * 3 + 1, torch.full((500, 2, 4, 4), math.log(4.0))], dim=1)
    measure_latents(autoencoder.vae, moments)
    assert autoencoder.vae.config.shift_factor == pytest.approx(1, abs=0.1)
    assert 1 / autoencoder.vae.config.scaling_factor == pytest.approx(math.sqrt(9 + 4), rel=0.02)


def test_cached_moments_are_those_of_the_encoder():
    autoencoder = LikelihoodAutoencoder(small(Path("unused")), (8, 8))
    images = torch.randint(0, 2, (300, 1, 8, 8), dtype=torch.uint8) * 255  # more than one batch
    responses = torch.randn(300, 2, 3)
    designs = torch.utils.data.TensorDataset(images, responses)
    moments, cached = encode_all(autoencoder.vae, designs, torch.device("cpu"), 290, with_half_turn=True)
    for view, pixels in enumerate((images[:290], images[:290].rot90(2, (2, 3)))):
        posterior = autoencoder.vae.encode(2 * (pixels.float() / 255) - 1).latent_dist
        expected = torch.cat([posterior.mean, posterior.logvar], dim=1)
        torch.testing.assert_close(moments[:, view], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(cached, responses[:290])


class Exact(nn.Module):
    """The denoiser of latents N(0, 1): E[noise | z_t] = sigma z_t and E[z_0 | z_t] = alpha z_t."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, noisy, timesteps, encoder_hidden_states):
        alpha, sigma = (scale[:, None, None, None] for scale in alpha_sigma(self.process.curve(timesteps)))
        outputs = {"epsilon": sigma * noisy, "sample": alpha * noisy, "v_prediction": 0 * noisy}
        return SimpleNamespace(sample=outputs[self.process.config.prediction_type].to(noisy.dtype))


def exact_denoiser(**settings) -> LatentDenoiser:
    denoiser = LatentDenoiser(small(Path("unused"), **settings), (2, 2))
    denoiser.unet = Exact(denoiser.process)
    return denoiser


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_exact_denoiser_of_a_gaussian_has_the_loss_that_theory_gives(prediction_type):
    """The least mean square is the variance of what is predicted, given the noisy latents."""
    denoiser = exact_denoiser(prediction_type=prediction_type)
    num = 20_000
    mean, posterior_std = 1.0, 0.6  # prior variance 1 = 0.64 of the means + 0.36 of the posteriors
    means = mean + 0.8 * torch.randn(num, 1, 1, 2, 2, generator=torch.manual_seed(0))
    moments = torch.cat([means, torch.full_like(means, 2 * math.log(posterior_std))], dim=2)
    loss_function = denoising_loss(small(Path("unused")), shift=mean, scale=1.0)
    loss, _ = loss_function(denoiser, (moments, torch.empty(num, 0, 0)), StepRandomness(("test",)))
    sigma_squared = 1 - denoiser.process.alphas_cumprod
    expected = {
        "epsilon": 1 - sigma_squared.mean(),  # Var[noise | z_t] = 1 - sigma^2
        "sample": sigma_squared.mean(),  # Var[z_0 | z_t] = 1 - alpha^2
        "v_prediction": torch.tensor(1.0),  # Var[alpha noise - sigma z_0 | z_t] = 1: it is independent of z_t
    }[prediction_type]
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_bound_of_an_exact_denoiser_is_the_log_density(prediction_type, learned):
    """Of latents N(0, 1) the mean log-density is known; that the clean end has noise costs 5e-5 nats an entry."""
    denoiser = exact_denoiser(prediction_type=prediction_type, learned_noise_schedule=learned)
    num = 40_000
    randomness = StepRandomness(("test",))
    latents, noise = randomness.normal(num, 1, 2, 2), randomness.normal(num, 1, 2, 2)
    _, nats, _ = denoiser(latents, noise, randomness.stratified(num), torch.empty(num, 0, 0))
    bound = latent_nats(denoiser.process, latents, nats)
    assert bound == pytest.approx(4 * -math.log(2 * math.pi * math.e) / 2, abs=4 * nats.std().item() / math.sqrt(num))


def test_under_the_priors_log_density_of_the_latents_the_whole_bound_is_the_autoencoders():
    """Reconstruction + entropy + E_q[log N(z; 0, 1)] = reconstruction - KL; and a scale s adds log s a dimension."""
    autoencoder = LikelihoodAutoencoder(small(Path("unused")), (8, 8))
    images = torch.rand(300, 1, 8, 8, generator=torch.manual_seed(0)).round()
    designs = torch.utils.data.TensorDataset((images * 255).to(torch.uint8), torch.empty(300, 0, 0))
    moments = encode_all(autoencoder.vae, designs, torch.device("cpu"), 300)[0][:, 0]

    noise = StepRandomness(("test",)).normal(300, 2, 4, 4)
    mean, logvar = moments.chunk(2, dim=1)

    def nats(scale: float = 1.0) -> float:
        autoencoder.vae.register_to_config(scaling_factor=scale, shift_factor=0.1)
        latents = (mean + torch.exp(logvar / 2) * noise - 0.1) * scale
        return autoencoder_nats(autoencoder.vae, logvar, latents, images)

    with torch.no_grad():
        reconstruction, kl, _ = autoencoder(images, noise)
    log_prior = -(math.log(2 * math.pi) + mean.square() + logvar.exp()).double().flatten(1).sum(1).mean().item() / 2
    assert nats() + log_prior == pytest.approx((reconstruction - kl).mean().item(), abs=1e-4)
    assert nats(scale=3.0) - nats() == pytest.approx(32 * math.log(3), rel=1e-5)


def test_the_denoiser_is_conditioned_on_the_null_token_and_learns_it():
    denoiser = LatentDenoiser(small(Path("unused")), (4, 4))
    batch = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.5, 1.0]), torch.empty(3, 0, 0)
    denoiser(*batch)[0].mean().backward()
    assert denoiser.response_encoder.null_tokens.grad.abs().sum() > 0


def test_make_quick_trains_on_the_released_designs(monkeypatch):
    monkeypatch.chdir(SCRIPT.parents[1])
    assert "--config training/configs/quick.yaml" in Path("Makefile").read_text()
    config = parse_config(["--config", "training/configs/quick.yaml"])
    assert load_designs(config).num_train == pq.read_metadata("data/composites-32/train.parquet").num_rows
