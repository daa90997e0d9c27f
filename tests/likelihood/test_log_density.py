"""Log-densities of latents, by the continuous-time process, by a chain and by the flow, against known ones."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from analytic_denoisers import GaussianMixture, two_moons
from exact_pipeline import chain_std, exact_diffusion, rotated_gaussian
from mechdiffusers.likelihood import ContinuousDiffusion, LatentDiffusion
from mechdiffusers.likelihood.log_density import ancestral_terms, continuous_terms, flow_log_density
from mechdiffusers.schedulers import VDMScheduler

FAR = VDMScheduler(log_snr="linear", log_snr_range=(13.3, -12.0), prediction_type="v_prediction")


def source(num, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(shape=None):
        if shape is None:
            return torch.rand(num, generator=generator, dtype=torch.float64)
        return torch.randn(num, *shape, generator=generator, dtype=torch.float64)

    return draw


def total(terms):
    return torch.stack(list(terms.values())).sum(0)


def one_noise_for_the_whole_path(noise, levels):
    """Draws with which a chain's path is alpha z + sigma noise at all of its log-SNRs, a marginal draw at each."""
    kept = torch.exp((levels[:-1] - levels[1:]) / 2)  # of the noise of z_t in that of z_s
    factors = iter([torch.ones((), dtype=torch.float64), *((1 - kept) / (1 - kept**2).sqrt())])
    return lambda shape: next(factors) * noise


@pytest.mark.parametrize(
    ("steps", "gap"),
    [(10, 9.77), (50, 1.13), (100, 0.53), (1000, 0.050), pytest.param(10_000, 0.005, marks=pytest.mark.slow)],
)
def test_the_bound_of_a_chain_lies_below_the_truth_by_the_known_gap(steps, gap):
    # Gaussian data of standard deviation 0.5, exact denoiser, log-SNR from 13.3 to -5 in equal steps
    gaussian = rotated_gaussian([0.5])
    diffusion = exact_diffusion(gaussian, VDMScheduler(log_snr="linear"))
    # the bound is of second degree in latent and noise: its mean is that over plus and minus a standard deviation
    latents, noise = (x.reshape(4, 1, 1, 1) for x in torch.tensor([[0.5, 0.5, -0.5, -0.5], [1.0, -1.0] * 2]).double())
    timesteps = torch.linspace(999, 0, steps + 1, dtype=torch.float64)
    draw = one_noise_for_the_whole_path(noise, diffusion.log_snr(timesteps))
    bound = total(ancestral_terms(diffusion, latents, timesteps, torch.zeros(steps + 1), draw))
    truth = gaussian.log_prob(latents.flatten(1), torch.tensor(torch.inf))
    assert (truth - bound).mean().item() == pytest.approx(gap, abs=0.005 if steps <= 100 else 0.0005)


def test_the_continuous_bound_of_an_exact_denoiser_is_the_entropy_of_the_data():
    gaussian, num = rotated_gaussian([0.3, 0.7, 1.3, 2.0]), 2000
    latents = gaussian.sample(num, torch.manual_seed(0))[:, None, None]
    terms, error = continuous_terms(exact_diffusion(gaussian, FAR), latents, 16, source(num))
    deviation = total(terms) - gaussian.log_prob(latents.flatten(1), torch.tensor(torch.inf))
    assert abs(deviation.mean()) < 4 * deviation.std() / num**0.5
    assert deviation.std() / num**0.5 < 0.05
    assert error.isfinite().all()


def test_with_a_network_that_says_nothing_the_continuous_bound_is_that_of_a_standard_normal_prior():
    silent = ContinuousDiffusion(lambda x, t: torch.zeros_like(x), FAR.curve, "v_prediction")
    latents = torch.randn(64, 1, 1, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    terms, error = continuous_terms(silent, latents, 2, source(64))
    expected = -(latents.flatten(1).square() + math.log(2 * math.pi)).sum(1) / 2
    assert (error == 0).all()
    # the last step misses nothing but the noise of timestep 0
    torch.testing.assert_close(total(terms), expected, rtol=1e-4, atol=1e-4)


def test_the_error_of_the_continuous_bound_is_the_spread_of_repeated_draws():
    gaussian = rotated_gaussian([0.5] * 8)
    latents = gaussian.sample(1, torch.manual_seed(0))[:, None, None].expand(2000, -1, -1, -1)
    terms, error = continuous_terms(exact_diffusion(gaussian, FAR), latents, 8, source(2000))
    assert error.square().mean().sqrt().item() == pytest.approx(terms["diffusion"].std().item(), rel=0.1)


def test_the_bound_of_a_chain_of_few_steps_has_no_gap_with_the_variance_for_the_denoisers_error():
    # of the 9.77 nats a dimension above: the reverse transitions of a round Gaussian are themselves round Gaussians
    std, dims, num = 0.5, 8, 2000
    gaussian = rotated_gaussian([std] * dims)
    diffusion = exact_diffusion(gaussian, VDMScheduler(log_snr="linear"))
    timesteps = torch.linspace(999, 0, 11, dtype=torch.float64)
    levels = diffusion.log_snr(timesteps)
    # E|z - E[z | z_t]|^2 = 1 / (1 / std^2 + SNR) an entry, over sigma^2
    velocity_error = 1 / (1 / std**2 + levels.exp()) / torch.sigmoid(-levels)
    latents = gaussian.sample(num, torch.manual_seed(0))[:, None, None]
    bound = total(ancestral_terms(diffusion, latents, timesteps, velocity_error, source(num)))
    gap = (gaussian.log_prob(latents.flatten(1), torch.tensor(torch.inf)) - bound) / dims
    assert abs(gap.mean()) < 4 * gap.std() / num**0.5 + 1e-4
    assert gap.std() / num**0.5 < 0.05


@pytest.mark.parametrize("velocity_error", [0.0, 1.0, 0.3])
def test_the_weights_of_whole_paths_have_the_chains_own_density_as_their_mean(velocity_error):
    std = 0.7
    gaussian = rotated_gaussian([std])
    timesteps = torch.linspace(999, 0, 6, dtype=torch.float64)
    scheduler = VDMScheduler(log_snr="linear", log_snr_range=(4.0, -4.0))
    diffusion = exact_diffusion(gaussian, scheduler)
    line = torch.linspace(-6, 6, 61, dtype=torch.float64)
    latents = line.repeat_interleave(4000)[:, None, None, None]
    errors = torch.full((6,), velocity_error)
    terms = ancestral_terms(diffusion, latents, timesteps, errors, source(len(latents)), sampled=True)
    density = total(terms).exp().reshape(61, 4000).mean(1)
    assert torch.trapezoid(density, line).item() == pytest.approx(1, abs=0.02)
    own = chain_std(std, diffusion.log_snr(timesteps), velocity_error)
    variance = torch.trapezoid(density * line**2, line).item()
    assert variance == pytest.approx(own**2, rel=0.03)
    if velocity_error == 0:
        bound = total(ancestral_terms(diffusion, latents, timesteps, errors, source(len(latents))))
        assert (bound.reshape(61, 4000).mean(1) < density.log() + 0.05).all()


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
    level = torch.tensor(diffusion.curve.ends[0], dtype=torch.float64)
    alpha = torch.sigmoid(level).sqrt()
    return mixture.log_prob(alpha * latents.flatten(1), level) + latents[0].numel() * alpha.log()


def signs(num, probes, dims, seed=0):
    return torch.randn(num, probes, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sign()


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("gaussian", GAUSSIANS.values(), ids=GAUSSIANS.keys())
def test_32_evaluations_give_a_gaussians_log_density_to_a_thousandth_of_a_nat_a_dimension(gaussian, scheduler):
    counted = []
    diffusion = exact_diffusion(gaussian, scheduler, counted)
    latents = latents_of(gaussian, 64)
    found = flow_log_density(diffusion, latents, None, num_steps=8)
    error = (total(found.terms) - true_log_density(gaussian, diffusion, latents)) / 4
    assert len(counted) == 32 + 16  # those of half the steps, which only the error estimate needs
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize(("std", "mean", "num_steps"), [(0.5, 0.8, 8), (0.3, 0.9, 16)])
def test_a_mixture_takes_as_many_evaluations_and_twice_as_many_where_it_is_narrow_and_parted(std, mean, num_steps):
    mixture = GaussianMixture([0.6, 0.4], [[-mean], [mean]], [[[std**2]], [[std**2]]])
    diffusion = exact_diffusion(mixture, PURE_NOISE)
    latents = latents_of(mixture, 256)
    found = flow_log_density(diffusion, latents, None, num_steps=num_steps)
    error = total(found.terms) - true_log_density(mixture, diffusion, latents)
    assert error.square().mean().sqrt() < 1e-3


def test_the_adaptive_method_gives_log_densities_to_a_hundred_thousandth_of_a_nat_a_dimension():
    moons = two_moons(num_components=4, width=0.3)
    for mixture in (*GAUSSIANS.values(), moons):
        diffusion = exact_diffusion(mixture, PURE_NOISE)
        latents = latents_of(mixture, 16)
        found = flow_log_density(diffusion, latents, None, tolerance=1e-6)
        dims = latents[0].numel()
        error = (total(found.terms) - true_log_density(mixture, diffusion, latents)) / dims
        assert error.abs().max() < 1e-5


def test_the_error_falls_with_the_fourth_power_of_the_steps():
    gaussian = GAUSSIANS["rotated"]
    diffusion = exact_diffusion(gaussian, PURE_NOISE)
    latents = latents_of(gaussian, 16)
    reference = total(flow_log_density(diffusion, latents, None, tolerance=1e-9).terms)
    coarse, fine = (
        (total(flow_log_density(diffusion, latents, None, num_steps=num).terms) - reference).square().mean().sqrt()
        for num in (16, 32)
    )
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.4)


@pytest.mark.parametrize("num_steps", [4, 8, 16])
def test_the_estimated_error_is_above_the_error(num_steps):
    moons = two_moons(num_components=4, width=0.3)
    for mixture in (*GAUSSIANS.values(), moons):
        diffusion = exact_diffusion(mixture, PURE_NOISE)
        latents = latents_of(mixture, 32)
        found = flow_log_density(diffusion, latents, None, num_steps=num_steps)
        error = (total(found.terms) - true_log_density(mixture, diffusion, latents)).abs()
        # in the root mean square: of a single sample the two values may cross by chance
        assert error.square().mean() < found.errors["steps"].square().mean()


@pytest.mark.parametrize("options", [{"num_steps": 16}, {"tolerance": 1e-6}], ids=["fixed", "adaptive"])
def test_a_density_on_the_line_integrates_to_one(options):
    mixture = GaussianMixture([0.6, 0.4], [[-0.7], [1.1]], [[[0.09]], [[0.16]]])
    diffusion = exact_diffusion(mixture, PURE_NOISE)
    line = torch.linspace(-4, 5, 400, dtype=torch.float64)
    found = flow_log_density(diffusion, line[:, None, None, None], None, **options)
    assert torch.trapezoid(total(found.terms).exp(), line).item() == pytest.approx(1, abs=1e-3)


def test_the_estimate_by_probes_is_unbiased_and_its_variance_falls_as_one_over_their_number():
    gaussian = GAUSSIANS["rotated"]
    diffusion = exact_diffusion(gaussian, SCHEDULERS["stock betas"])
    num = 2000
    latents = latents_of(gaussian, 1).expand(num, -1, -1, -1)
    exact = total(flow_log_density(diffusion, latents[:1], None, num_steps=4).terms)
    spreads = []
    for probes in (2, 8):
        found = flow_log_density(diffusion, latents, signs(num, probes, 4, seed=probes), num_steps=4)
        deviation = total(found.terms) - exact
        spreads.append(deviation.square().mean())
        assert abs(deviation.mean()) < 4 * deviation.std() / num**0.5
        assert found.errors["probes"].square().mean().item() == pytest.approx(spreads[-1].item(), rel=0.15)
    assert (spreads[0] / spreads[1]).item() == pytest.approx(4, rel=0.2)


def test_the_steps_of_the_adaptive_method_do_not_depend_on_the_batch():
    moons = two_moons(num_components=4, width=0.3)
    diffusion = exact_diffusion(moons, PURE_NOISE)
    latents = latents_of(moons, 5)
    together, alone = (
        total(flow_log_density(diffusion, x, None, tolerance=1e-4).terms) for x in (latents, latents[:1])
    )
    torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)


def test_a_float32_network_agrees_with_the_same_in_float64(pipe):
    latents = torch.randn(2, 2, 4, 4, generator=torch.manual_seed(0))

    def value():
        return total(flow_log_density(LatentDiffusion(pipe), latents, signs(2, 2, 32), num_steps=4).terms)

    single = value()
    pipe.to(torch.float64)
    torch.testing.assert_close(single, value(), rtol=1e-4, atol=1e-4)
