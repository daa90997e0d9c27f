import math

import pytest
import torch
from diffusers import DDPMScheduler

from mechdiffusers.pipelines import record_training_schedule
from mechdiffusers.schedulers import STOCK_SCHEDULERS, VDMScheduler, stock_scheduler

MEAN, STD = 0.5, 0.3


def exact_prediction(scheduler, x: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """What a perfect network says of data distributed as N(MEAN, STD^2)."""
    alphas_cumprod = scheduler.alphas_cumprod.double()
    position = torch.arange(len(alphas_cumprod), dtype=torch.float64)
    # Karras sigmas fall between the steps of training
    log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod))
    lower = min(int(t), len(position) - 2)
    lam = torch.lerp(log_snr[lower], log_snr[lower + 1], float(t) - lower)
    alpha, sigma = torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
    noise = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    clean = (x - sigma * noise) / alpha
    return {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", STOCK_SCHEDULERS)
def test_samples_of_an_exact_gaussian_denoiser_have_the_gaussians_moments(name, prediction_type):
    config = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing").config
    scheduler = stock_scheduler(name, config)
    scheduler.set_timesteps(1000 if name == "ddpm" else 100)  # ancestral steps converge slowly
    num = 20_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 1, 1, 1, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    stochastic = {"generator": generator} if name in ("ddpm", "sde-dpmsolver++") else {}
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        prediction = exact_prediction(scheduler, model_input, t, prediction_type)
        x = scheduler.step(prediction, t, x, **stochastic).prev_sample
    # five standard errors, and the solvers' own error at 100 steps
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * STD / math.sqrt(num) + 0.005)
    assert x.std().item() == pytest.approx(STD, abs=5 * STD / math.sqrt(2 * num) + 0.015)


def test_the_schedule_and_prediction_type_are_kept_and_nothing_clips():
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").config
    for name in STOCK_SCHEDULERS:
        scheduler = stock_scheduler(name, config)
        assert scheduler.config.prediction_type == "v_prediction"
        assert not scheduler.config.get("clip_sample", False)
        torch.testing.assert_close(scheduler.alphas_cumprod, DDPMScheduler.from_config(config).alphas_cumprod)


@pytest.mark.parametrize("first", STOCK_SCHEDULERS)
def test_nothing_of_a_solver_stays_behind_when_it_is_replaced(first):
    config = DDPMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing").config
    for second in STOCK_SCHEDULERS:
        direct = stock_scheduler(second, config)
        by_way_of_the_first = stock_scheduler(second, stock_scheduler(first, config).config)
        assert {k: v for k, v in direct.config.items() if k[0] != "_"} == {
            k: v for k, v in by_way_of_the_first.config.items() if k[0] != "_"
        }


@pytest.mark.parametrize("log_snr", ["linear", "cosine", [12.0, 3.0, -1.0, -6.0]])
def test_a_curve_of_ours_goes_along_as_betas(make_pipeline, log_snr):
    pipe = make_pipeline()
    ours = VDMScheduler.from_config(pipe.scheduler.config, log_snr=log_snr, timestep_spacing="log_snr")
    record_training_schedule(pipe.unet, ours)
    pipe = type(pipe)(pipe.vae, pipe.unet, ours, pipe.response_encoder)
    pipe.set_progress_bar_config(disable=True)
    for name in STOCK_SCHEDULERS:
        pipe.scheduler = stock_scheduler(name, ours.config)
        torch.testing.assert_close(pipe.scheduler.alphas_cumprod, ours.alphas_cumprod, rtol=1e-5, atol=1e-6)
        assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 8)


def test_a_network_that_predicts_the_score_is_refused():
    with pytest.raises(ValueError, match="^config must have a prediction_type that stock schedulers take"):
        stock_scheduler("ddim", VDMScheduler(prediction_type="score").config)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="^name must be one of .* got 'magic'"):
        stock_scheduler("magic", DDPMScheduler().config)
