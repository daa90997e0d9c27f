import itertools
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, ScoreSdeVeScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from exact_pipeline import NOISE, exact_diffusion, exact_pipeline, rotated_gaussian
from mechdiffusers.evaluation import GaussianMixture
from mechdiffusers.pipelines import variational_likelihood
from mechdiffusers.pipelines.continuous_diffusion import ContinuousDiffusion, log_snr_table
from mechdiffusers.pipelines.latent_prior import ancestral_terms, continuous_terms
from mechdiffusers.pipelines.variational_likelihood import _summary
from mechdiffusers.schedulers import ProbabilityFlowScheduler, VDMScheduler

FAR = VDMScheduler(log_snr="linear", log_snr_range=(13.3, -12.0), prediction_type="v_prediction")
NEAR = VDMScheduler(log_snr="linear", log_snr_range=(6.0, -6.0), prediction_type="v_prediction")
METHODS = [
    ("elbo", "continuous"),
    ("elbo", "ancestral"),
    ("elbo", "standard_normal"),
    ("iwae", "ancestral"),
    ("iwae", "flow"),
    ("ode", None),
]
#: Entries of the latents of 4 x 4 pixels, of which "iwae" with the "flow" prior needs the exact trace.
DIMS = 8


@pytest.mark.parametrize("prior", ["flow", "ancestral"])
def test_the_bounds_rise_with_the_samples_to_the_known_likelihood(prior):
    stds, steps = [0.4, 1.1], {"flow": 4, "ancestral": 40}[prior]
    pipe = exact_pipeline(rotated_gaussian(stds), FAR if prior == "flow" else NEAR)
    if prior == "ancestral":  # a chain of few steps has a Gaussian of its own, along the same axes
        pipe.scheduler.set_timesteps(steps)
        levels = pipe.scheduler.curve(pipe.scheduler.timesteps)
        stds = [chain_std(std, levels, 0.0) for std in stds]
    images = torch.tensor([[0.2, 0.9], [0.5, 0.1]]).reshape(2, 1, 1, 2)
    truth = gaussian_evidence(pipe, rotated_gaussian(stds), images)
    means, errors = [], []
    for samples, repetitions in ((1, 400), (4, 200), (16, 100), (64, 50)):
        batch = images.repeat_interleave(repetitions, dim=0)
        values = pipe.log_likelihood(
            batch, "iwae", samples, prior=prior, num_steps=steps, num_probes=2, generator=torch.manual_seed(samples)
        ).log_likelihood.reshape(2, repetitions)
        means.append(values.mean(1))
        errors.append(values.std(1) / repetitions**0.5)
    for lower, upper, error in zip(means[:-1], means[1:], errors[:-1], strict=True):
        assert (lower < upper + 3 * error).all()
    assert (means[0] < means[-1] - 0.05).all()
    assert (means[-1] < truth + 3 * errors[-1] + 2e-3).all()  # 4 steps of the flow leave a thousandth a dimension
    assert (means[-1] > truth - 0.1).all()


@pytest.mark.parametrize(("method", "prior"), [("elbo", "continuous"), ("elbo", "ancestral"), ("ode", None)])
def test_the_bound_lies_below_the_known_likelihood_by_the_divergence_of_the_posteriors(method, prior):
    mixture = rotated_gaussian([0.8, 0.8])
    pipe = exact_pipeline(mixture, FAR)
    repetitions = 300 if prior != "ancestral" else 4
    images = torch.tensor([[0.2, 0.9]]).reshape(1, 1, 1, 2).expand(repetitions, -1, -1, -1)
    output = pipe.log_likelihood(images, method, 4, prior=prior, generator=torch.manual_seed(0))
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    precision = 1 / NOISE**2 + scale**2 / 0.8**2  # of the codes
    mean = (images[0].flatten().double() / NOISE**2 + (scale / 0.8) ** 2 * shift) / precision
    ours = 0.7 * images[0].flatten().double() + 0.1
    divergence = (math.log(precision**-0.5 / 0.5) + (0.5**2 + (ours - mean) ** 2) * precision / 2 - 0.5).sum()
    expected = gaussian_evidence(pipe, mixture, images[:1]) - divergence
    chain_gap = {"ancestral": 2 * 0.05}.get(prior, 0)  # a thousand steps cost about a twentieth of a nat a dimension
    deviation = (output.log_likelihood - expected).mean().abs()
    assert deviation < 4 * output.error.mean() / repetitions**0.5 + chain_gap + 2e-3


def test_probabilities_of_all_binary_images_are_those_of_quadrature_and_sum_to_one():
    mixture = GaussianMixture(
        [0.6, 0.4], [[-0.7, 0.3], [1.1, -0.5]], torch.eye(2, dtype=torch.float64).expand(2, 2, 2) * 0.2
    )
    pipe = exact_pipeline(mixture, FAR, std=1.2, share=0.5, gain=2.0, gaussian=False)
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2))).reshape(4, 1, 1, 2)
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    codes = grid / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    prior = mixture.log_prob(grid, torch.tensor(torch.inf)).exp() * (line[1] - line[0]) ** 2
    given = torch.sigmoid(2.0 * codes * (2 * images.reshape(4, 1, 2) - 1)).prod(-1)
    truth = given @ prior
    output = pipe.log_likelihood(images, "iwae", 2000, prior="flow", num_probes=2, generator=torch.manual_seed(0))
    probabilities = output.log_likelihood.exp()
    assert ((probabilities - truth).abs() < 4 * output.error * truth + 1e-3 * truth).all()
    assert probabilities.sum().item() == pytest.approx(1, abs=0.02)
    assert (output.effective_sample_size > 1).all()
    assert (output.effective_sample_size <= 2000).all()


@pytest.fixture
def small(make_pipeline):
    return make_pipeline(size=4)


def binary_images(num, size=4):
    return torch.randint(0, 2, (num, 1, size, size), generator=torch.manual_seed(0)).float()


def options_of(method, prior):
    """Two draws at little cost, by every method."""
    return {
        "method": method,
        "prior": prior,
        "num_samples": 2,
        "num_steps": None if prior == "standard_normal" else 2,
        "num_probes": DIMS if (method, prior) == ("iwae", "flow") else 2,
    }


@pytest.mark.parametrize(("method", "prior"), METHODS)
def test_the_terms_sum_to_the_total_in_nats_and_bits(small, method, prior):
    output = small.log_likelihood(binary_images(3), **options_of(method, prior), generator=torch.manual_seed(0))
    torch.testing.assert_close(total(output.terms), output.log_likelihood)
    torch.testing.assert_close(output.bits_per_dim * 16 * math.log(2), -output.log_likelihood)
    assert output.log_likelihood.dtype == torch.float64
    assert output.log_likelihood.shape == output.error.shape == (3,)
    assert output.error.isfinite().all()


@pytest.mark.parametrize(("method", "prior"), METHODS)
def test_an_image_has_the_same_value_in_every_batch(small, method, prior):
    images, options = binary_images(3), options_of(method, prior)

    def values(images, first, **more):
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(images))]
        return small.log_likelihood(images, generator=generators, **options, **more).log_likelihood

    together = values(images, 0)
    torch.testing.assert_close(values(images, 0, batch_size=1), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values(images[1:], 1), together[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "prior"), METHODS)
def test_what_passes_the_networks_at_once_is_bounded_and_changes_no_value(small, monkeypatch, method, prior):
    options, at_once = options_of(method, prior), []
    for network in (small.unet.conv_in, small.vae.encoder, small.vae.decoder):
        network.register_forward_pre_hook(lambda network, inputs: at_once.append(len(inputs[0])))

    def values(budget, images, **more):
        at_once.clear()
        monkeypatch.setattr(variational_likelihood, "_ENTRIES_A_BATCH", budget)
        output = small.log_likelihood(images, **{**options, **more}, generator=torch.manual_seed(0))
        return output.log_likelihood, max(at_once)

    whole, all_at_once = values(2**20, binary_images(3))
    assert all_at_once == 6
    parts, largest = values(64, binary_images(3))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert largest == 4  # draws of an image of 16 pixels
    assert values(64, binary_images(4), num_samples=3)[1] == largest
    if method == "ode":
        assert values(64, binary_images(3), num_probes=4)[1] == 2  # of 4 probes of 8 entries each
        assert values(64, binary_images(3), num_probes=DIMS)[1] == largest  # the exact trace has none for each draw


@pytest.mark.parametrize(("method", "prior"), METHODS)
def test_inference_mode_around_a_call_changes_nothing(small, method, prior):
    options = options_of(method, prior)
    expected = small.log_likelihood(binary_images(2), **options, generator=torch.manual_seed(0)).log_likelihood
    with torch.inference_mode():
        found = small.log_likelihood(binary_images(2), **options, generator=torch.manual_seed(0)).log_likelihood
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("method", "prior"), METHODS)
def test_float32_networks_agree_with_the_same_in_float64(small, method, prior):
    def value():
        output = small.log_likelihood(binary_images(2), **options_of(method, prior), generator=torch.manual_seed(0))
        return output.log_likelihood / DIMS

    single = value()
    small.to(torch.float64)
    # two steps of a chain under random weights cost thousands of nats, of which float32 has seven digits
    torch.testing.assert_close(single, value(), rtol=1e-6, atol=1e-4)


def test_images_of_all_kinds_have_the_same_value(pipe):
    designs = np.random.default_rng(0).integers(0, 2, (2, 8, 8)).astype(np.float32)
    pictures = pipe.image_processor.numpy_to_pil(designs[..., None])
    first, *others = (
        pipe.log_likelihood(images, generator=torch.manual_seed(0)).log_likelihood
        for images in (designs, torch.from_numpy(designs)[:, None], designs[..., None], pictures)
    )
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-4)


def test_grey_images_have_a_likelihood_under_a_discretised_logistic_decoder(make_pipeline):
    pipe = make_pipeline(size=(7, 6), decoder_likelihood="discretized_logistic", decoder_scale=0.1)
    images = torch.randint(0, 256, (2, 1, 7, 6), generator=torch.manual_seed(0)) / 255
    output = pipe.log_likelihood(images, generator=torch.manual_seed(0))
    assert (output.bits_per_dim > 0).all()  # a probability
    with pytest.raises(ValueError, match="^images must have pixels of multiples of 1/255"):
        pipe.log_likelihood(images * 0.999)


def test_a_response_is_a_condition(make_pipeline):
    pipe = make_pipeline(conditional=True)
    images = binary_images(2, size=8)
    response = torch.ones(2, 2, 3)
    free, given = (
        pipe.log_likelihood(images, response=r, generator=torch.manual_seed(0)).log_likelihood for r in (None, response)
    )
    assert (free != given).all()
    with pytest.raises(ValueError, match="^response must be one for each of 2"):
        pipe.log_likelihood(images, response=response.repeat(2, 1, 1)[:3])
    with pytest.raises(ValueError, match="^response must have shape"):
        pipe.log_likelihood(images, response=0.5)


def test_a_flow_of_large_error_is_warned_of_and_called_no_bound(pipe, caplog):
    images = binary_images(2, size=8)
    pipe.unet.conv_out.weight.data.mul_(30)
    with caplog.at_level(logging.WARNING):
        output = pipe.log_likelihood(images, "ode", num_steps=2, num_probes=2, generator=torch.manual_seed(0))
    assert "raise num_steps or num_probes" in caplog.text
    assert not output.is_lower_bound
    assert (output.error > 0.01 * 32).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "vlb"}, "method must be one of"),
        ({"prior": "flow"}, "prior must be one of .* for method 'elbo'.*'ode'"),
        ({"method": "iwae", "prior": "continuous"}, "prior must be one of"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_samples": 1.5}, "num_samples must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"prior": "standard_normal", "num_steps": 3}, "num_steps must be None"),
        ({"method": "ode", "num_steps": 5}, "num_steps must be an even"),
        ({"method": "ode", "num_probes": 1}, "num_probes must be"),
        ({"method": "ode", "tolerance": -1.0}, "tolerance must"),
        ({"tolerance": 1e-3}, "tolerance must be None"),
        ({"method": "iwae", "prior": "flow"}, "num_probes must be at least the 32 entries"),
        ({"generator": [torch.Generator()]}, "generator must be"),
        ({"response": torch.ones(2, 2, 3)}, "response must be None"),
        ({"images": torch.full((2, 1, 8, 8), 0.5)}, "images must have pixels of 0 or 1"),
        ({"images": torch.zeros(2, 1, 8, 9)}, "images must have one channel"),
        ({"images": torch.full((2, 1, 8, 8), 1.5)}, "images must lie in"),
    ],
)
def test_bad_input_is_named(pipe, options, message):
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe.log_likelihood(**{"images": images, **options})


@pytest.mark.parametrize("method", ["elbo", "iwae"])
def test_the_chain_of_a_pipeline_has_the_variance_of_its_scheduler(pipe, method):
    images = binary_images(2, size=8)

    def value(cls, **options):
        pipe.scheduler = cls.from_config(pipe.scheduler.config, timestep_spacing="trailing", **options)
        output = pipe.log_likelihood(images, method, prior="ancestral", num_steps=3, generator=torch.manual_seed(0))
        return output.log_likelihood

    def optimal(velocity_error):
        return value(VDMScheduler, variance_type="optimal", velocity_error=velocity_error)

    of_tables = optimal([0.0, 0.0]), optimal([1.0, 1.0]), optimal([0.0, 1.0])
    assert (of_tables[2] != of_tables[0]).all()
    for variance_type, of_table in zip(("fixed_small", "fixed_large"), of_tables[:2], strict=True):
        for cls in (VDMScheduler, DDPMScheduler):
            of_type = value(cls, variance_type=variance_type, clip_sample=False)
            torch.testing.assert_close(of_type, of_table, rtol=1e-4, atol=1e-4)


def test_the_error_of_the_importance_weighted_bound_is_that_of_the_mean_weight():
    log_weights = torch.randn(5, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    weights = log_weights.exp()
    expected = weights.std(1) / weights.mean(1) / 3**0.5
    torch.testing.assert_close(_summary({"weight": log_weights}, "iwae", dims=1, num_pixels=1).error, expected)


@pytest.mark.parametrize("cls", [DDIMScheduler, ProbabilityFlowScheduler])
def test_a_scheduler_without_an_ancestral_chain_says_what_it_can_do(pipe, cls, tmp_path):
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = cls.from_config(DDPMScheduler.from_pretrained(tmp_path).config, clip_sample=False)
    assert pipe.scheduler.config.variance_type == "fixed_small"  # of the class before, with no meaning here
    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="^scheduler must have an ancestral chain .* possible are"):
        pipe.log_likelihood(images, prior="ancestral")
    assert pipe.log_likelihood(images).is_lower_bound


def test_a_chain_of_a_variance_that_the_network_would_have_to_learn_is_refused(pipe):
    for variance_type in ("learned", "optimal"):  # DDPMScheduler takes any word
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
        with pytest.raises(ValueError, match=f"^scheduler must have an ancestral chain .* with '{variance_type}'"):
            pipe.log_likelihood(torch.zeros(1, 1, 8, 8), "iwae")


def test_a_scheduler_that_preserves_no_variance_is_refused_and_others_are_named(pipe):
    for scheduler in (EDMEulerScheduler(), ScoreSdeVeScheduler()):
        pipe.scheduler = scheduler
        for method in ("elbo", "iwae", "ode"):
            with pytest.raises(ValueError, match=r"^scheduler must be variance preserving .*, such as DDPMScheduler"):
                pipe.log_likelihood(binary_images(1, size=8), method)


def test_without_its_decoders_scale_a_pipeline_says_what_it_can_do(make_pipeline):
    pipe = make_pipeline(decoder_likelihood="discretized_logistic", decoder_scale=0.1)
    pipe.register_to_config(decoder_scale=None)
    with pytest.raises(
        ValueError, match=r"^decoder_scale must be a positive number .* got None: .* only score, to_noise"
    ):
        pipe.log_likelihood(binary_images(1, size=8))


def test_a_deterministic_autoencoder_has_no_bound(pipe, monkeypatch):
    def deterministic(self, parameters):
        DiagonalGaussianDistribution.__init__(self, parameters, deterministic=True)

    frozen = type("Frozen", (DiagonalGaussianDistribution,), {"__init__": deterministic})
    monkeypatch.setattr("diffusers.models.autoencoders.autoencoder_kl.DiagonalGaussianDistribution", frozen)
    with pytest.raises(ValueError, match="^vae must have a posterior of positive variance.*to_noise"):
        pipe.log_likelihood(torch.zeros(1, 1, 8, 8))
