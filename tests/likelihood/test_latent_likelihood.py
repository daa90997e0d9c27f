"""Evidence lower bounds and importance-weighted ones: their values where they are known, and what every call keeps."""

import contextlib
import itertools
import logging
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EDMEulerScheduler, ScoreSdeVeScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from analytic_denoisers import GaussianMixture
from device_without_double import METAL, DeviceWithoutDouble
from exact_pipeline import NOISE, GaussianLikelihood, chain_std, exact_pipeline, gaussian_evidence, rotated_gaussian
from mechdiffusers.likelihood import (
    AncestralPrior,
    ContinuousPrior,
    FlowPrior,
    LatentDiffusion,
    LatentLikelihood,
    StandardNormalPrior,
    latent_likelihood,
)
from mechdiffusers.likelihood.latent_likelihood import _summary
from mechdiffusers.schedulers import VDMScheduler

FAR = VDMScheduler(log_snr="linear", log_snr_range=(13.3, -12.0), prediction_type="v_prediction")
NEAR = VDMScheduler(log_snr="linear", log_snr_range=(6.0, -6.0), prediction_type="v_prediction")
#: Entries of the latents of 4 x 4 pixels, of which iwae with FlowPrior needs the exact trace.
DIMS = 8
#: Every bound with every prior that it has, at little cost.
LIKELIHOODS = [
    ("elbo", ContinuousPrior(num_levels=2)),
    ("elbo", AncestralPrior(num_steps=2)),
    ("elbo", FlowPrior(num_steps=2, num_probes=2)),
    ("elbo", FlowPrior(num_steps=2, num_probes=DIMS)),
    ("elbo", StandardNormalPrior()),
    ("iwae", AncestralPrior(num_steps=2)),
    ("iwae", FlowPrior(num_steps=2, num_probes=DIMS)),
    ("iwae", StandardNormalPrior()),
]
every_likelihood = pytest.mark.parametrize(("method", "prior"), LIKELIHOODS, ids=str)


def bound_of(pipe, method, prior, images, num_samples=2, generator=None, **options):
    """Two draws, unless it says otherwise, from a seed that is always the same."""
    generator = generator or torch.Generator().manual_seed(0)
    return getattr(LatentLikelihood(pipe, prior), method)(images, num_samples, generator=generator, **options)


def binary_images(num, size=4):
    return torch.randint(0, 2, (num, 1, size, size), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture
def small(make_pipeline):
    return make_pipeline(size=4)


@pytest.mark.parametrize(
    ("prior", "scheduler"),
    [(FlowPrior(num_steps=4, num_probes=2), FAR), (AncestralPrior(num_steps=40), NEAR)],
    ids=["flow", "chain"],
)
def test_the_bounds_rise_with_the_samples_to_the_known_likelihood(prior, scheduler):
    stds = [0.4, 1.1]
    pipe = exact_pipeline(rotated_gaussian(stds), scheduler)
    if isinstance(prior, AncestralPrior):  # a chain of few steps has a Gaussian of its own, along the same axes
        pipe.scheduler.set_timesteps(prior.num_steps)
        levels = pipe.scheduler.curve(pipe.scheduler.timesteps)
        stds = [chain_std(std, levels, 0.0) for std in stds]
    images = torch.tensor([[0.2, 0.9], [0.5, 0.1]]).reshape(2, 1, 1, 2)
    truth = gaussian_evidence(pipe, rotated_gaussian(stds), images)
    means, errors = [], []
    for samples, repetitions in ((1, 400), (4, 200), (16, 100), (64, 50)):
        batch = images.repeat_interleave(repetitions, dim=0)
        output = GaussianLikelihood(pipe, prior).iwae(batch, samples, generator=torch.manual_seed(samples))
        values = output.log_likelihood.reshape(2, repetitions)
        means.append(values.mean(1))
        errors.append(values.std(1) / repetitions**0.5)
    for lower, upper, error in zip(means[:-1], means[1:], errors[:-1], strict=True):
        assert (lower < upper + 3 * error).all()
    assert (means[0] < means[-1] - 0.05).all()
    assert (means[-1] < truth + 3 * errors[-1] + 2e-3).all()  # 4 steps of the flow leave a thousandth a dimension
    assert (means[-1] > truth - 0.1).all()


@pytest.mark.parametrize("prior", [ContinuousPrior(), AncestralPrior(), FlowPrior()], ids=str)
def test_the_bound_lies_below_the_known_likelihood_by_the_divergence_of_the_posteriors(prior):
    mixture, is_chain = rotated_gaussian([0.8, 0.8]), isinstance(prior, AncestralPrior)
    pipe = exact_pipeline(mixture, FAR)
    repetitions = 4 if is_chain else 300
    images = torch.tensor([[0.2, 0.9]]).reshape(1, 1, 1, 2).expand(repetitions, -1, -1, -1)
    output = GaussianLikelihood(pipe, prior).elbo(images, 4, generator=torch.manual_seed(0))
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    precision = 1 / NOISE**2 + scale**2 / 0.8**2  # of the codes
    mean = (images[0].flatten().double() / NOISE**2 + (scale / 0.8) ** 2 * shift) / precision
    ours = 0.7 * images[0].flatten().double() + 0.1
    divergence = (math.log(precision**-0.5 / 0.5) + (0.5**2 + (ours - mean) ** 2) * precision / 2 - 0.5).sum()
    expected = gaussian_evidence(pipe, mixture, images[:1]) - divergence
    chain_gap = 2 * 0.05 if is_chain else 0  # a thousand steps cost about a twentieth of a nat a dimension
    deviation = (output.log_likelihood - expected).mean().abs()
    assert deviation < 4 * output.error.mean() / repetitions**0.5 + chain_gap + 2e-3


def test_probabilities_of_all_binary_images_are_those_of_quadrature_and_sum_to_one():
    mixture = GaussianMixture(
        [0.6, 0.4], [[-0.7, 0.3], [1.1, -0.5]], torch.eye(2, dtype=torch.float64).expand(2, 2, 2) * 0.2
    )
    pipe = exact_pipeline(mixture, FAR, std=1.2, share=0.5, gain=2.0)
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2))).reshape(4, 1, 1, 2)
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    codes = grid / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    prior = mixture.log_prob(grid, torch.tensor(torch.inf)).exp() * (line[1] - line[0]) ** 2
    given = torch.sigmoid(2.0 * codes * (2 * images.reshape(4, 1, 2) - 1)).prod(-1)
    truth = given @ prior
    output = LatentLikelihood(pipe, FlowPrior(num_probes=2)).iwae(images, 2000, generator=torch.manual_seed(0))
    probabilities = output.log_likelihood.exp()
    assert ((probabilities - truth).abs() < 4 * output.error * truth + 1e-3 * truth).all()
    assert probabilities.sum().item() == pytest.approx(1, abs=0.02)
    assert (output.effective_sample_size > 1).all()
    assert (output.effective_sample_size <= 2000).all()


@every_likelihood
def test_the_terms_sum_to_the_total_in_nats_and_bits(small, method, prior):
    output = bound_of(small, method, prior, binary_images(3))
    torch.testing.assert_close(torch.stack(list(output.terms.values())).sum(0), output.log_likelihood)
    torch.testing.assert_close(output.bits_per_dim * 16 * math.log(2), -output.log_likelihood)
    assert output.log_likelihood.shape == output.error.shape == (3,)
    assert output.error.isfinite().all()
    assert (output.effective_sample_size is not None) == (method == "iwae")
    of_both = {**output.terms, "value": output.log_likelihood, "bits": output.bits_per_dim, "error": output.error}
    assert {value.dtype for value in of_both.values()} == {torch.float64}


@every_likelihood
def test_an_image_has_the_same_value_in_every_batch(small, method, prior):
    images = binary_images(3)

    def values(images, first, **more):
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(images))]
        return bound_of(small, method, prior, images, generator=generators, **more).log_likelihood

    together = values(images, 0)
    torch.testing.assert_close(values(images, 0, batch_size=1), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values(images[1:], 1), together[1:], rtol=1e-4, atol=1e-4)


@every_likelihood
def test_what_passes_the_networks_at_once_is_limited_and_changes_no_value(small, monkeypatch, method, prior):
    at_once = []
    for network in (small.unet.conv_in, small.vae.encoder, small.vae.decoder):
        network.register_forward_pre_hook(lambda network, inputs: at_once.append(len(inputs[0])))

    def values(budget, images, prior=prior, num_samples=2):
        at_once.clear()
        monkeypatch.setattr(latent_likelihood, "_ENTRIES_A_BATCH", budget)
        return bound_of(small, method, prior, images, num_samples).log_likelihood, max(at_once)

    whole, all_at_once = values(2**20, binary_images(3))
    assert all_at_once == 6
    parts, largest = values(64, binary_images(3))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert largest == 4  # draws of an image of 16 pixels
    assert values(64, binary_images(4), num_samples=3)[1] == largest
    if isinstance(prior, FlowPrior) and method == "elbo":
        assert values(64, binary_images(3), FlowPrior(2, num_probes=4))[1] == 2  # of 4 probes of 8 entries each
        assert values(64, binary_images(3), FlowPrior(2, DIMS))[1] == largest  # the exact trace has none for each draw


@every_likelihood
def test_inference_mode_around_a_call_changes_nothing(small, method, prior):
    expected = bound_of(small, method, prior, binary_images(2)).log_likelihood
    with torch.inference_mode():
        found = bound_of(small, method, prior, binary_images(2)).log_likelihood
    assert torch.equal(found, expected)


@every_likelihood
def test_float32_networks_agree_with_the_same_in_float64(small, method, prior):
    def value():
        return bound_of(small, method, prior, binary_images(2)).log_likelihood / DIMS

    single = value()
    small.to(torch.float64)
    # two steps of a chain under random weights cost thousands of nats, of which float32 has seven digits
    torch.testing.assert_close(single, value(), rtol=1e-6, atol=1e-4)


@every_likelihood
def test_double_precision_is_never_asked_of_a_device_that_has_none(small, monkeypatch, method, prior):
    expected = bound_of(small, method, prior, binary_images(2))
    monkeypatch.setattr(type(small), "_execution_device", METAL)
    with DeviceWithoutDouble():
        found = bound_of(small, method, prior, binary_images(2))
    for value, there in ((expected.log_likelihood, found.log_likelihood), (expected.error, found.error)):
        assert there.device.type == "cpu"
        assert torch.equal(there, value)


@every_likelihood
@pytest.mark.parametrize("scheduler", [DDPMScheduler, VDMScheduler])
def test_an_evaluation_amid_sampling_changes_neither_the_samples_nor_the_pipeline(small, method, prior, scheduler):
    small.scheduler = scheduler.from_config(small.scheduler.config, clip_sample=False)

    def evaluate(pipe, step, timestep, tensors):
        with nothing_changes(pipe):
            bound_of(pipe, method, prior, binary_images(2))
        return {}

    assert torch.equal(sampled_with(small, evaluate), sampled_with(small))


@pytest.mark.parametrize("name", ["score", "to_noise", "from_noise", "interpolate"])
def test_a_diffusion_amid_sampling_changes_neither_the_samples_nor_the_pipeline(small, name):
    def evaluate(pipe, step, timestep, tensors):
        latents, diffusion = tensors["latents"], LatentDiffusion(pipe)
        with nothing_changes(pipe):
            {
                "score": lambda: diffusion.score(latents, 20),
                "to_noise": lambda: diffusion.to_noise(latents, 2),
                "from_noise": lambda: diffusion.from_noise(latents, 2),
                "interpolate": lambda: pipe.interpolate(binary_images(1), 1 - binary_images(1), 3),
            }[name]()
        return {}

    assert torch.equal(sampled_with(small, evaluate), sampled_with(small))


def sampled_with(pipe, callback=None):
    """Latents whose noise, of the start and of the steps, comes from the generator that everything shares."""
    torch.manual_seed(3)
    options = {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": callback}
    return pipe(batch_size=2, **options).images


@contextlib.contextmanager
def nothing_changes(pipe):
    def state():
        networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        return {
            "pipeline": {name: repr(value) for name, value in vars(pipe).items()},
            "configuration": dict(pipe.config),
            "parts": {name: id(part) for name, part in pipe.components.items()},
            "configurations": {name: dict(part.config) for name, part in pipe.components.items() if part is not None},
            "modes": {name: [module.training for module in part.modules()] for name, part in networks.items()},
            "gradients": {
                name: [(each.requires_grad, each.grad) for each in part.parameters()] for name, part in networks.items()
            },
            "scheduler": pickle.dumps(pipe.scheduler),
            "random numbers": torch.get_rng_state().tolist(),
        }

    weights = {name: part.state_dict() for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    copies = {name: {key: value.clone() for key, value in part.items()} for name, part in weights.items()}
    before, timesteps = state(), pipe.scheduler.timesteps
    yield
    assert pipe.scheduler.timesteps is timesteps
    after = state()
    assert before.keys() == after.keys()
    for name, found in before.items():
        assert after[name] == found, name
    for name, part in copies.items():
        assert all(torch.equal(weights[name][key], value) for key, value in part.items()), name


@pytest.mark.parametrize("options", [{}, {"num_samples": 3, "batch_size": 2}], ids=["defaults", "options"])
def test_the_pipelines_own_likelihood_is_the_bound_of_the_continuous_time_process(pipe, options):
    images = binary_images(3, size=8)
    expected = LatentLikelihood(pipe).elbo(images, generator=torch.manual_seed(0), **options)
    found = pipe.log_likelihood(images, generator=torch.manual_seed(0), **options)
    of_sixteen = LatentLikelihood(pipe, ContinuousPrior(16)).elbo(images, generator=torch.manual_seed(0), **options)
    for output in (found, of_sixteen):
        assert output.keys() == expected.keys()
        assert output.terms.keys() == expected.terms.keys()
        for name, value in (*expected.terms.items(), *((key, expected[key]) for key in expected if key != "terms")):
            of_it = output.terms[name] if name in output.terms else output[name]
            assert torch.equal(torch.as_tensor(of_it), torch.as_tensor(value)), name


def test_a_response_is_a_condition_of_the_pipelines_own_likelihood(make_pipeline):
    pipe, images, response = make_pipeline(conditional=True), binary_images(2, size=8), torch.ones(2, 2, 3)
    found = pipe.log_likelihood(images, response=response, generator=torch.manual_seed(0)).log_likelihood
    expected = LatentLikelihood(pipe).elbo(images, response=response, generator=torch.manual_seed(0)).log_likelihood
    assert torch.equal(found, expected)
    assert (pipe.log_likelihood(images, generator=torch.manual_seed(0)).log_likelihood != found).all()


@every_likelihood
def test_a_response_is_one_of_each_image_or_one_of_all(make_pipeline, method, prior):
    pipe, images = make_pipeline(size=4, conditional=True), binary_images(3)
    responses = torch.tensor([0.5, 1.0, 4.0])[:, None, None].expand(3, 2, 3)

    def values(images, response, first=0, **options):
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(images))]
        options["generator"] = generators
        return bound_of(pipe, method, prior, images, response=response, **options).log_likelihood

    close = {"rtol": 1e-4, "atol": 1e-4}
    own = values(images, responses)
    torch.testing.assert_close(values(images, responses, batch_size=1), own, **close)
    for i in range(3):
        torch.testing.assert_close(values(images[i : i + 1], responses[i : i + 1], first=i), own[i : i + 1], **close)
    for_all = values(images, responses[:1])
    torch.testing.assert_close(values(images, responses[:1].expand(3, -1, -1)), for_all, **close)
    torch.testing.assert_close(values(images, responses[:1].numpy()), for_all, **close)
    torch.testing.assert_close(for_all[:1], own[:1], **close)
    free = values(images, None)
    if isinstance(prior, StandardNormalPrior):  # which knows of none
        torch.testing.assert_close(own, free, **close)
    else:
        assert (own != free).all()
        assert (own[1:] != for_all[1:]).all()


@every_likelihood
def test_another_number_of_responses_is_refused(make_pipeline, method, prior):
    pipe = make_pipeline(size=4, conditional=True)
    for num, given in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match=f"^response must be one for each of {num} samples, got {given}"):
            bound_of(pipe, method, prior, binary_images(num), response=torch.ones(given, 2, 3))
    for response in (0.5, torch.ones(2, 3), torch.ones(2, 2, 4)):
        with pytest.raises(ValueError, match="^response must have shape"):
            bound_of(pipe, method, prior, binary_images(2), response=response)


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


def test_a_flow_of_large_error_is_warned_of_and_called_no_bound(pipe, caplog):
    images = binary_images(2, size=8)
    pipe.unet.conv_out.weight.data.mul_(30)
    with caplog.at_level(logging.WARNING):
        output = LatentLikelihood(pipe, FlowPrior(2, 2)).elbo(images, generator=torch.manual_seed(0))
    assert "raise num_steps or num_probes" in caplog.text
    assert not output.is_lower_bound
    assert (output.error > 0.01 * 32).any()


@pytest.mark.parametrize("method", ["elbo", "iwae"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"num_samples": 1.5}, "num_samples must be"),
        ({"num_samples": True}, "num_samples must be"),
        ({"num_samples": None}, "num_samples must be"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"generator": [torch.Generator()]}, "generator must be one or a list of 2"),
        ({"generator": 0}, "generator must be one or a list of 2, one an image, got 0"),
        ({"images": torch.zeros(0, 1, 8, 8)}, "images must be at least one, got none"),
        ({"images": []}, "images must be at least one, got none"),
        ({"response": torch.ones(2, 2, 3)}, "response must be None"),
        ({"images": torch.full((2, 1, 8, 8), 0.5)}, "images must have pixels of 0 or 1"),
        ({"images": torch.zeros(2, 1, 8, 9)}, "images must have one channel"),
        ({"images": torch.full((2, 1, 8, 8), 1.5)}, "images must lie in"),
        ({"images": torch.full((2, 1, 8, 8), torch.nan)}, "images must lie in"),
    ],
)
def test_bad_input_is_named(pipe, method, options, message):
    likelihood = LatentLikelihood(pipe, StandardNormalPrior())
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(likelihood, method)(**{"images": torch.zeros(2, 1, 8, 8), **options})


def test_the_error_of_the_importance_weighted_bound_is_that_of_the_mean_weight():
    log_weights = torch.randn(5, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    weights = log_weights.exp()
    expected = weights.std(1) / weights.mean(1) / 3**0.5
    found = _summary({"weight": log_weights}, {}, importance=True, dims=1, num_pixels=1)
    torch.testing.assert_close(found.error, expected)


@pytest.mark.parametrize(
    ("prior", "is_known"),
    [
        (ContinuousPrior(2), True),
        (ContinuousPrior(1), False),
        (FlowPrior(2, 2), True),
        (AncestralPrior(2), False),
        (StandardNormalPrior(), False),
    ],
    ids=str,
)
def test_the_error_of_a_single_draw_is_known_where_its_levels_or_its_flow_tell_it(small, prior, is_known):
    output = bound_of(small, "elbo", prior, binary_images(2), num_samples=1)
    assert output.error.isfinite().all() == is_known
    assert output.error.isnan().all() == (not is_known)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), ScoreSdeVeScheduler()], ids=["edm", "variance exploding"])
@every_likelihood
def test_a_scheduler_that_preserves_no_variance_is_refused_and_others_are_named(small, method, prior, scheduler):
    small.scheduler = scheduler
    with pytest.raises(ValueError, match=r"^scheduler must (be one of|have an ancestral chain) .*DDPMScheduler"):
        bound_of(small, method, prior, binary_images(1))


def test_a_pipeline_that_has_lost_its_decoders_scale_says_so(make_pipeline):
    pipe = make_pipeline(decoder_likelihood="discretized_logistic", decoder_scale=0.1)
    pipe.vae.register_to_config(_decoder_scale=None)
    with pytest.raises(ValueError, match=r"^scale must be a positive number .* got None"):
        pipe.log_likelihood(binary_images(1, size=8))


@pytest.mark.parametrize(("method", "prior"), [("elbo", ContinuousPrior()), ("iwae", StandardNormalPrior())], ids=str)
def test_a_deterministic_autoencoder_has_no_bound(pipe, monkeypatch, method, prior):
    def deterministic(self, parameters):
        DiagonalGaussianDistribution.__init__(self, parameters, deterministic=True)

    frozen = type("Frozen", (DiagonalGaussianDistribution,), {"__init__": deterministic})
    monkeypatch.setattr("diffusers.models.autoencoders.autoencoder_kl.DiagonalGaussianDistribution", frozen)
    with pytest.raises(ValueError, match="^vae must have a posterior of positive variance .*LatentDiffusion"):
        bound_of(pipe, method, prior, torch.zeros(1, 1, 8, 8))


def test_a_pipeline_of_the_code_in_its_checkpoint_has_the_same_likelihood_and_way_between_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    other = DiffusionPipeline.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)
    assert type(other) is not type(pipe)
    images = binary_images(2, size=8)
    found, expected = (each.log_likelihood(images, generator=torch.manual_seed(0)) for each in (other, pipe))
    assert torch.equal(found.log_likelihood, expected.log_likelihood)
    paths = (each.interpolate(images[:1], images[1:], num=3, output_type="pt") for each in (other, pipe))
    assert torch.equal(*paths)


@pytest.mark.slow
def test_without_the_package_likelihoods_and_interpolation_say_to_install_it(pipe, tmp_path, plain_diffusers):
    pipe.save_pretrained(tmp_path / "checkpoint")
    script = """
        import torch
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained("checkpoint", trust_remote_code=True, use_safetensors=True)
        images = torch.zeros(1, 1, 8, 8)
        for call in (lambda: pipe.log_likelihood(images), lambda: pipe.interpolate(images, images)):
            try:
                call()
            except ImportError as error:
                assert "pip install mechdiffusers" in str(error), error
            else:
                raise AssertionError
    """
    plain_diffusers(script)
