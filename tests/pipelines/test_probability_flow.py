import math

import pytest
import torch
from diffusers import DDPMScheduler
from mechdiffusers.pipelines.continuous_diffusion import ContinuousDiffusion
from mechdiffusers.pipelines.probability_flow import flow_log_density, solve_adaptively

from analytic_denoisers import GaussianMixture, two_moons
from exact_pipeline import exact_diffusion, exact_pipeline, rotated_gaussian
from mechdiffusers.schedulers import VDMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "score")
GAUSSIANS = {
    "narrow": rotated_gaussian([0.3] * 4),
    "wide": rotated_gaussian([2.0] * 4),
    "rotated": rotated_gaussian([0.3, 0.7, 1.3, 2.0]),
}
SCHEDULERS = {
    "stock betas": DDPMScheduler(prediction_type="epsilon", clip_sample=False),
    "cosine betas": DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False),
    "linear log-SNR": VDMScheduler(log_snr="linear", log_snr_range=(13.3, -16.0), prediction_type="v_prediction"),
    "score": VDMScheduler(prediction_type="score"),
}
#: The flow starts from N(0, I), the data's own diffusion from what is left of them: here next to nothing.
PURE_NOISE = SCHEDULERS["linear log-SNR"]


def latents_of(mixture, num, seed=1):
    return mixture.sample(num, torch.Generator().manual_seed(seed))[:, None, None]


def true_log_density(mixture, diffusion, latents):
    """Log-density of z = x / alpha, x being the noisy latent at timestep 0, where the flow starts."""
    level = torch.tensor(diffusion.ends[0], dtype=torch.float64)
    alpha = torch.sigmoid(level).sqrt()
    return mixture.log_prob(alpha * latents.flatten(1), level) + latents[0].numel() * alpha.log()


def signs(num, probes, dims, seed=0):
    return torch.randn(num, probes, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sign()


def value_of(likelihood):
    return likelihood.noise_log_density + likelihood.volume_change


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("gaussian", GAUSSIANS.values(), ids=GAUSSIANS.keys())
def test_32_evaluations_give_a_gaussians_log_density_to_a_thousandth_of_a_nat_a_dimension(gaussian, scheduler):
    counted = []
    diffusion = exact_diffusion(gaussian, scheduler, counted)
    latents = latents_of(gaussian, 64)
    likelihood = flow_log_density(diffusion, latents, None, num_steps=8)
    error = (value_of(likelihood) - true_log_density(gaussian, diffusion, latents)) / 4
    assert len(counted) == 32 + 16  # those of half the steps, which only the error estimate needs
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize(("std", "mean", "num_steps"), [(0.5, 0.8, 8), (0.3, 0.9, 16)])
def test_a_mixture_takes_as_many_evaluations_and_twice_as_many_where_it_is_narrow_and_parted(std, mean, num_steps):
    mixture = GaussianMixture([0.6, 0.4], [[-mean], [mean]], [[[std**2]], [[std**2]]])
    diffusion = exact_diffusion(mixture, PURE_NOISE)
    latents = latents_of(mixture, 256)
    likelihood = flow_log_density(diffusion, latents, None, num_steps=num_steps)
    error = value_of(likelihood) - true_log_density(mixture, diffusion, latents)
    assert error.square().mean().sqrt() < 1e-3


def test_the_adaptive_method_gives_log_densities_to_a_hundred_thousandth_of_a_nat_a_dimension():
    moons = two_moons(num_components=4, width=0.3)
    for mixture in (*GAUSSIANS.values(), moons):
        diffusion = exact_diffusion(mixture, PURE_NOISE)
        latents = latents_of(mixture, 16)
        likelihood = flow_log_density(diffusion, latents, None, tolerance=1e-6)
        dims = latents[0].numel()
        error = (value_of(likelihood) - true_log_density(mixture, diffusion, latents)) / dims
        assert error.abs().max() < 1e-5


def test_the_error_falls_with_the_fourth_power_of_the_steps():
    gaussian = GAUSSIANS["rotated"]
    diffusion = exact_diffusion(gaussian, PURE_NOISE)
    latents = latents_of(gaussian, 16)
    reference = value_of(flow_log_density(diffusion, latents, None, tolerance=1e-9))
    coarse, fine = (
        (value_of(flow_log_density(diffusion, latents, None, num_steps=num)) - reference).square().mean().sqrt()
        for num in (16, 32)
    )
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.4)


@pytest.mark.parametrize("num_steps", [4, 8, 16])
def test_the_estimated_error_is_above_the_error(num_steps):
    moons = two_moons(num_components=4, width=0.3)
    for mixture in (*GAUSSIANS.values(), moons):
        diffusion = exact_diffusion(mixture, PURE_NOISE)
        latents = latents_of(mixture, 32)
        likelihood = flow_log_density(diffusion, latents, None, num_steps=num_steps)
        error = (value_of(likelihood) - true_log_density(mixture, diffusion, latents)).abs()
        # in the root mean square: of a single sample the two values may cross by chance
        assert error.square().mean() < likelihood.discretization_error.square().mean()


@pytest.mark.parametrize("options", [{"num_steps": 16}, {"tolerance": 1e-6}], ids=["fixed", "adaptive"])
def test_a_density_on_the_line_integrates_to_one(options):
    mixture = GaussianMixture([0.6, 0.4], [[-0.7], [1.1]], [[[0.09]], [[0.16]]])
    diffusion = exact_diffusion(mixture, PURE_NOISE)
    line = torch.linspace(-4, 5, 400, dtype=torch.float64)
    likelihood = flow_log_density(diffusion, line[:, None, None, None], None, **options)
    assert torch.trapezoid(value_of(likelihood).exp(), line).item() == pytest.approx(1, abs=1e-3)


def test_the_estimate_by_probes_is_unbiased_and_its_variance_falls_as_one_over_their_number():
    gaussian = GAUSSIANS["rotated"]
    diffusion = exact_diffusion(gaussian, SCHEDULERS["stock betas"])
    num = 2000
    latents = latents_of(gaussian, 1).expand(num, -1, -1, -1)
    exact = value_of(flow_log_density(diffusion, latents[:1], None, num_steps=4))
    spreads = []
    for probes in (2, 8):
        likelihood = flow_log_density(diffusion, latents, signs(num, probes, 4, seed=probes), num_steps=4)
        deviation = value_of(likelihood) - exact
        spreads.append(deviation.square().mean())
        assert abs(deviation.mean()) < 4 * deviation.std() / num**0.5
        assert likelihood.probe_error.square().mean().item() == pytest.approx(spreads[-1].item(), rel=0.15)
    assert (spreads[0] / spreads[1]).item() == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_all_prediction_types_give_the_same_density_and_score(prediction_type):
    gaussian = GAUSSIANS["rotated"]
    pipe = exact_pipeline(gaussian, VDMScheduler(prediction_type=prediction_type))
    latents = latents_of(gaussian, 3)
    timesteps = torch.tensor([0.0, 300.5, 900.0])
    log_snr = pipe.scheduler.curve(timesteps)
    expected = gaussian.score(latents.flatten(1), log_snr).reshape(latents.shape)
    torch.testing.assert_close(pipe.score(latents, timesteps), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_steps": 32}, {"tolerance": 1e-8}], ids=["fixed", "adaptive"])
def test_latents_flow_to_noise_and_back(options):
    gaussian = GAUSSIANS["rotated"]
    pipe = exact_pipeline(gaussian, SCHEDULERS["stock betas"])
    latents = latents_of(gaussian, 8)
    noise = pipe.to_noise(latents, **options)
    torch.testing.assert_close(pipe.from_noise(noise, **options), latents, rtol=1e-5, atol=1e-5)
    # a Gaussian's flow scales its principal axes to unit variance
    variances, axes = torch.linalg.eigh(gaussian.covariance)
    whitened = latents.flatten(1) @ axes / variances.sqrt() @ axes.T
    torch.testing.assert_close(noise.flatten(1), whitened, rtol=1e-3, atol=1e-3)


def test_the_steps_of_the_adaptive_method_do_not_depend_on_the_batch():
    moons = two_moons(num_components=4, width=0.3)
    diffusion = exact_diffusion(moons, PURE_NOISE)
    latents = latents_of(moons, 5)
    together, alone = (value_of(flow_log_density(diffusion, x, None, tolerance=1e-4)) for x in (latents, latents[:1]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)


def test_a_float32_network_agrees_with_the_same_in_float64(make_pipeline):
    pipe = make_pipeline()
    latents = torch.randn(2, 2, 4, 4, generator=torch.manual_seed(0))
    single, noise = value_of_pipeline(pipe, latents), pipe.to_noise(latents, num_steps=4)
    pipe.to(torch.float64)
    double = value_of_pipeline(pipe, latents)
    torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise, pipe.to_noise(latents, num_steps=4), rtol=1e-4, atol=1e-4)


def value_of_pipeline(pipe, latents):
    diffusion = pipe._continuous_diffusion(pipe._response_tokens(None, len(latents)))
    return value_of(flow_log_density(diffusion, latents, signs(2, 2, 32), num_steps=4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.score(torch.zeros(2, 1, 1, 3), 5), "latents must have shape"),
        (lambda pipe: pipe.score(torch.zeros(2, 1, 1, 4), 1000), "timestep must be"),
        (lambda pipe: pipe.score(torch.zeros(2, 1, 1, 4), torch.zeros(3)), "timestep must be"),
        (lambda pipe: pipe.to_noise(torch.zeros(1, 1, 1, 4), num_steps=3), "num_steps must be an even integer"),
        (lambda pipe: pipe.from_noise(torch.zeros(1, 1, 1, 4), tolerance=0.0), "tolerance must lie inside"),
        (lambda pipe: ContinuousDiffusion(None, [1.0, -1.0], "flow"), "prediction_type must be one of"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(exact_pipeline(GAUSSIANS["narrow"]))


def test_a_tolerance_below_the_networks_precision_is_refused_instead_of_never_ending():
    generator = torch.manual_seed(0)

    def noisy(state, angle):
        return 1e-3 * torch.randn(state.shape, generator=generator, dtype=state.dtype)

    with pytest.raises(ValueError, match="^tolerance must be within reach"):
        solve_adaptively(noisy, torch.ones(1, 2, dtype=torch.float64), (0.0, 1.5), tolerance=1e-9)
