import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from analytic_denoisers import GaussianMixture
from mechdiffusers.schedulers import ProbabilityFlowScheduler, VDMScheduler, estimate_velocity_error, optimize_steps

DENSITY = GaussianMixture([0.4, 0.6], [[-1.0, 0.3], [0.8, -0.5]], (0.05 * torch.eye(2)).expand(2, 2, 2))


def noise(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return DENSITY.predict(x, VDMScheduler().curve(t))


def solve(scheduler: ProbabilityFlowScheduler, x: torch.Tensor, num: int) -> torch.Tensor:
    scheduler.set_timesteps(num)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("solver", ["euler", "heun", "adams_bashforth"])
def test_the_best_steps_are_nearer_to_the_fine_solution_of_noise_they_never_saw(solver):
    scheduler = ProbabilityFlowScheduler(solver=solver, timestep_spacing="trailing")
    optimized = optimize_steps(denoiser, scheduler, noise(64, 0), 6, iterations=10)
    fresh = noise(256, 1)
    exact = solve(ProbabilityFlowScheduler(solver="rk4", timestep_spacing="log_snr"), fresh, 200)
    uniform = ProbabilityFlowScheduler(solver=solver, timestep_spacing="log_snr")
    ours, *others = (
        (solve(s, fresh, 6) - exact).square().mean().sqrt().item() for s in (optimized, scheduler, uniform)
    )
    assert ours < 0.7 * min(others)


def test_the_steps_stand_in_the_configuration_beside_those_of_other_numbers(tmp_path):
    scheduler = ProbabilityFlowScheduler(solver="adams_bashforth", timestep_spacing="trailing")
    optimized = scheduler
    for num in (4, 5):
        optimized = optimize_steps(denoiser, optimized, noise(16, 0), num, iterations=2)
    assert set(optimized.config.optimized_steps) == {"4", "5"}
    optimized.save_pretrained(tmp_path)
    loaded = ProbabilityFlowScheduler.from_pretrained(tmp_path)
    x = noise(8, 1)
    for num in (4, 5, 6):
        assert torch.equal(solve(loaded, x, num), solve(optimized, x, num))
    assert torch.equal(solve(loaded, x, 6), solve(scheduler, x, 6))
    assert not torch.allclose(solve(loaded, x, 5), solve(scheduler, x, 5))


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "heun"},
        {"log_snr": "cosine"},
        {"log_snr": [9.0, -5.0]},
        {"prediction_type": "v_prediction"},
        {"beta_end": 0.03},
        {"trained_betas": np.full(1000, 0.01)},
    ],
)
def test_steps_found_for_one_solver_curve_or_network_are_not_those_of_another(options):
    found = {"2": {"timesteps": [900.0, 300.0], "weights": [[-1.0], [0.5, -1.0]]}}
    optimized = ProbabilityFlowScheduler(solver="adams_bashforth", optimized_steps=found)
    assert ProbabilityFlowScheduler.from_config(optimized.config, **options).config.optimized_steps is None
    same = {"solver": "adams_bashforth", "beta_end": 0.02, "trained_betas": None, "log_snr_range": [13.3, -5.0]}
    assert ProbabilityFlowScheduler.from_config(optimized.config, **same).config.optimized_steps == found
    by_default = ProbabilityFlowScheduler(optimized_steps={"2": {"timesteps": [900.0, 300.0]}})
    assert ProbabilityFlowScheduler.from_config(by_default.config, solver="heun").config.optimized_steps


@pytest.mark.parametrize(("options", "inverse"), [({}, True), ({"final_sigmas_type": "sigma_min"}, False)])
def test_steps_found_for_the_way_to_clean_data_are_not_taken_on_another(options, inverse):
    found = {"2": {"timesteps": [900.0, 300.0]}}
    optimized = ProbabilityFlowScheduler(solver="euler", optimized_steps=found, **options)
    stock = ProbabilityFlowScheduler(solver="euler", **options)
    for scheduler in (optimized, stock):
        scheduler.set_timesteps(2, inverse=inverse)
    assert optimized.timesteps.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_velocity_error_of_an_exact_denoiser_is_the_conditional_variance(prediction_type):
    variance = 0.2
    density = GaussianMixture([1.0], [[0.0, 0.0]], (variance * torch.eye(2))[None])
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    curve = VDMScheduler.from_config(scheduler.config).curve
    errors = estimate_velocity_error(
        lambda x, t: density.predict(x, curve(t), prediction_type),
        scheduler,
        density.sample(20_000, torch.Generator().manual_seed(0)),
        num=11,
        generator=torch.Generator().manual_seed(1),
    )
    log_snr = curve(torch.linspace(0, 999, 11))
    exact = 1 / (1 / variance + log_snr.exp()) / torch.sigmoid(-log_snr)
    # a mean of 40,000 squares of normals has a relative standard error of 0.7 %
    torch.testing.assert_close(torch.tensor(errors).double(), exact, rtol=4.5 * 0.0071, atol=0)


def test_what_cannot_be_optimised_is_named():
    with pytest.raises(ValueError, match="^num_inference_steps must be an integer of at least 2, got 1"):
        optimize_steps(denoiser, ProbabilityFlowScheduler(), noise(2, 0), 1)
    for scheduler in (
        DDPMScheduler(),
        ProbabilityFlowScheduler(s_churn=1.0),
        ProbabilityFlowScheduler(clip_sample=True),
    ):
        with pytest.raises(ValueError, match="^scheduler must be a ProbabilityFlowScheduler with final_sigmas_type"):
            optimize_steps(denoiser, scheduler, noise(2, 0), 4)
    with pytest.raises(ValueError, match="^num must be at least 2, got 1"):
        estimate_velocity_error(denoiser, DDPMScheduler(), noise(2, 0), num=1)
    with pytest.raises(ValueError, match=r"^denoiser must give the samples' shape \(2, 2\), got \(2, 1\)"):
        estimate_velocity_error(lambda x, t: x[:, :1], DDPMScheduler(), noise(2, 0))
