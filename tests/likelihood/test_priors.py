"""What holds for every prior, and what each refuses."""

import dataclasses
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from analytic_denoisers import GaussianMixture
from exact_pipeline import GaussianLikelihood, exact_pipeline, gaussian_evidence
from mechdiffusers import likelihood
from mechdiffusers.likelihood import (
    AncestralPrior,
    ContinuousPrior,
    FlowPrior,
    LatentLikelihood,
    StandardNormalPrior,
)
from mechdiffusers.likelihood.log_density import LogDensity
from mechdiffusers.likelihood.priors import Prior
from mechdiffusers.schedulers import ProbabilityFlowScheduler, VDMScheduler

FAR = VDMScheduler(log_snr="linear", log_snr_range=(13.3, -12.0), prediction_type="v_prediction")
DIMS = 3
#: The latents of codes from N(0, 1), as the pipeline below shifts and scales them.
LATENTS = GaussianMixture([1.0], [[-0.24] * DIMS], 0.64 * torch.eye(DIMS, dtype=torch.float64)[None])


@dataclasses.dataclass(frozen=True)
class KnownPrior(Prior):
    """A prior of a user's own: the density of the latents themselves."""

    def log_density(self, pipe, diffusion, latents, draw, importance):
        return LogDensity({"known": LATENTS.log_prob(latents.flatten(1), torch.tensor(torch.inf))}, {})


FAMILY = [
    ContinuousPrior(),
    ContinuousPrior(num_levels=3),
    AncestralPrior(num_steps=1000),
    AncestralPrior(num_steps=100),
    FlowPrior(),
    FlowPrior(num_steps=4, num_probes=2),
    FlowPrior(tolerance=1e-4),
    StandardNormalPrior(),
    KnownPrior(),
]
#: Whose density is the data's, to a thousandth of a nat a dimension; the others know a lower bound of it.
VALUES = (FlowPrior, StandardNormalPrior, KnownPrior)


@pytest.fixture
def exact():
    """An encoder that is the true posterior, of images that each prior has the same density of.

    Pixels have mean 1/2 and variance 1/4. Images of all combinations of 0 and 1 have the same moments. All
    log-densities here are of second degree, and their mean over these images is that over the data.
    """
    return exact_pipeline(LATENTS, FAR, share=1.2, std=0.8, gain=0.3, offset=-0.6, bias=0.5)


def all_images(repetitions):
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=DIMS)))
    return corners.reshape(-1, 1, 1, DIMS).repeat_interleave(repetitions, dim=0)


def test_the_family_is_complete():
    ours = {cls for cls in Prior.__subclasses__() if cls.__module__.startswith("mechdiffusers")}
    assert ours | {KnownPrior} == {type(prior) for prior in FAMILY}
    assert all(getattr(likelihood, cls.__name__) is cls for cls in ours)


@pytest.mark.parametrize("prior", FAMILY, ids=str)
def test_the_bound_is_at_most_the_known_likelihood_and_equals_it_where_the_density_is_a_value(exact, prior):
    images = all_images(50)
    output = GaussianLikelihood(exact, prior).elbo(images, num_samples=4, generator=torch.manual_seed(0))
    gap = gaussian_evidence(exact, LATENTS, images) - output.log_likelihood
    error = output.error.square().mean().sqrt() / len(images) ** 0.5
    assert error < 0.1
    assert gap.mean() > -4 * error
    # the continuous-time bound of an exact denoiser is tight, a chain's is not
    if isinstance(prior, AncestralPrior):
        assert gap.mean() > 4 * error
    else:
        assert gap.mean() < 4 * error
    # the errors are the spread of the estimates about their mean
    spread = gap.reshape(-1, 50).std(1).square().mean().sqrt()
    assert output.error.square().mean().sqrt().item() == pytest.approx(spread.item(), rel=0.15)


@pytest.mark.parametrize("prior", [prior for prior in FAMILY if not isinstance(prior, ContinuousPrior)], ids=str)
def test_every_weight_is_the_known_likelihood_where_the_density_is_a_value_and_a_bound_of_it_elsewhere(exact, prior):
    if isinstance(prior, FlowPrior):
        prior = dataclasses.replace(prior, num_probes=DIMS)
    images = all_images(20)
    output = GaussianLikelihood(exact, prior).iwae(images, num_samples=4, generator=torch.manual_seed(0))
    gap = gaussian_evidence(exact, LATENTS, images) - output.log_likelihood
    if isinstance(prior, VALUES):
        tolerance = 1e-3 if isinstance(prior, FlowPrior) else 1e-12
        assert gap.abs().max() < tolerance * DIMS
        torch.testing.assert_close(
            output.effective_sample_size, torch.full((len(images),), 4.0).double(), rtol=1e-4, atol=0
        )
        assert output.terms["importance_gain"].abs().max() < tolerance * DIMS
    else:
        assert gap.mean() > -4 * gap.std() / len(images) ** 0.5
        assert (output.terms["importance_gain"] > 0).all()


@pytest.mark.parametrize("prior", [prior for prior in FAMILY if not isinstance(prior, KnownPrior)], ids=str)
def test_a_prior_is_a_value_that_cannot_change(prior):
    assert dataclasses.replace(prior) == prior
    assert hash(dataclasses.replace(prior)) == hash(prior)
    for name in ("num_steps", "num_levels", "other"):
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            setattr(prior, name, 1)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ContinuousPrior, {"num_levels": 0}, "num_levels must be an integer of at least 1, got 0"),
        (ContinuousPrior, {"num_levels": 1.5}, "num_levels must be"),
        (ContinuousPrior, {"num_levels": True}, "num_levels must be"),
        (ContinuousPrior, {"num_levels": None}, "num_levels must be"),
        (AncestralPrior, {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        (AncestralPrior, {"num_steps": 2.5}, "num_steps must be"),
        (AncestralPrior, {"num_steps": True}, "num_steps must be"),
        (FlowPrior, {"num_steps": 0}, "num_steps must be an even integer of at least 2"),
        (FlowPrior, {"num_steps": 5}, "num_steps must be an even"),
        (FlowPrior, {"num_steps": None}, "num_steps must be an even"),
        (FlowPrior, {"num_probes": 0}, "num_probes must be an integer of at least 1, got 0"),
        (FlowPrior, {"num_probes": 2.5}, "num_probes must be"),
        (FlowPrior, {"tolerance": 0.0}, "tolerance must lie inside"),
        (FlowPrior, {"tolerance": -1.0}, "tolerance must"),
        (FlowPrior, {"tolerance": 1.0}, "tolerance must"),
    ],
)
def test_bad_options_are_named_at_construction(cls, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cls(**options)


@pytest.mark.parametrize(
    "thing",
    ["flow", 16, object(), FlowPrior, ContinuousPrior],
    ids=["word", "number", "object", "class", "another class"],
)
def test_a_thing_that_is_no_prior_is_refused(pipe, thing):
    with pytest.raises(ValueError, match=r"^prior must be a prior such as ContinuousPrior\(num_levels=16\), got"):
        LatentLikelihood(pipe, thing)


def test_the_importance_weighted_bound_refuses_what_would_lift_it(pipe):
    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="^prior must be AncestralPrior, FlowPrior .* for iwae, got ContinuousPrior"):
        LatentLikelihood(pipe).iwae(images)
    for prior in (FlowPrior(), FlowPrior(num_probes=31), FlowPrior(tolerance=1e-3)):
        with pytest.raises(ValueError, match="^num_probes must be at least the 32 entries of a latent for iwae"):
            LatentLikelihood(pipe, prior).iwae(images)
    output = LatentLikelihood(pipe, FlowPrior(num_steps=2, num_probes=32)).iwae(images, 1)
    assert output.log_likelihood.isfinite().all()


def test_a_single_probe_is_refused_unless_it_is_the_exact_trace(pipe):
    with pytest.raises(ValueError, match="^num_probes must be an integer of at least 2, got 1"):
        LatentLikelihood(pipe, FlowPrior(num_probes=1)).elbo(torch.zeros(1, 1, 8, 8))
    line = exact_pipeline(GaussianMixture([1.0], [[0.0]], [[[1.0]]]), FAR)
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    assert LatentLikelihood(line, FlowPrior(num_probes=1)).elbo(images).error.isfinite().all()


@pytest.mark.parametrize("cls", [DDIMScheduler, ProbabilityFlowScheduler])
@pytest.mark.parametrize("method", ["elbo", "iwae"])
def test_a_scheduler_without_an_ancestral_chain_says_what_needs_none(pipe, cls, method, tmp_path):
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = cls.from_config(DDPMScheduler.from_pretrained(tmp_path).config, clip_sample=False)
    assert pipe.scheduler.config.variance_type == "fixed_small"  # of the class before, with no spec here
    images, name = torch.zeros(1, 1, 8, 8), cls.__name__
    with pytest.raises(
        ValueError, match=f"^scheduler must have an ancestral chain .* got {name} .*ContinuousPrior and FlowPrior"
    ):
        getattr(LatentLikelihood(pipe, AncestralPrior()), method)(images)
    assert LatentLikelihood(pipe).elbo(images).is_lower_bound
    assert LatentLikelihood(pipe, FlowPrior(num_steps=2)).elbo(images).log_likelihood.isfinite().all()


def test_a_chain_of_a_variance_that_the_network_would_have_to_learn_is_refused(pipe):
    for variance_type in ("learned", "optimal"):  # DDPMScheduler takes any word
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
        with pytest.raises(ValueError, match=f"^scheduler must have an ancestral chain .* with '{variance_type}'"):
            LatentLikelihood(pipe, AncestralPrior()).iwae(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("base", [DDPMScheduler, VDMScheduler])
def test_a_scheduler_derived_from_one_with_a_chain_has_that_chain(pipe, base):
    derived = type("MyScheduler", (base,), {})
    values = []
    for cls in (base, derived):
        pipe.scheduler = cls.from_config(pipe.scheduler.config, clip_sample=False)
        likelihood = LatentLikelihood(pipe, AncestralPrior(num_steps=3))
        values.append(likelihood.elbo(torch.zeros(1, 1, 8, 8), generator=torch.manual_seed(0)).log_likelihood)
    assert torch.equal(*values)


@pytest.mark.parametrize("cls", [DDPMScheduler, VDMScheduler])
def test_more_steps_than_a_chain_has_are_refused(pipe, cls):
    pipe.scheduler = cls.from_config(pipe.scheduler.config, clip_sample=False)
    with pytest.raises(ValueError, match="^num_steps must .* got 1001"):
        LatentLikelihood(pipe, AncestralPrior(num_steps=1001)).elbo(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("method", ["elbo", "iwae"])
def test_a_chain_has_the_variance_of_its_scheduler(pipe, method):
    images = torch.randint(0, 2, (2, 1, 8, 8), generator=torch.manual_seed(0)).float()

    def value(cls, **options):
        pipe.scheduler = cls.from_config(pipe.scheduler.config, timestep_spacing="trailing", **options)
        evaluate = getattr(LatentLikelihood(pipe, AncestralPrior(num_steps=3)), method)
        return evaluate(images, num_samples=1, generator=torch.manual_seed(0)).log_likelihood

    def optimal(velocity_error):
        return value(VDMScheduler, variance_type="optimal", velocity_error=velocity_error)

    of_tables = optimal([0.0, 0.0]), optimal([1.0, 1.0]), optimal([0.0, 1.0])
    assert (of_tables[2] != of_tables[0]).all()
    for variance_type, of_table in zip(("fixed_small", "fixed_large"), of_tables[:2], strict=True):
        for cls in (VDMScheduler, DDPMScheduler):
            of_type = value(cls, variance_type=variance_type, clip_sample=False)
            torch.testing.assert_close(of_type, of_table, rtol=1e-4, atol=1e-4)
