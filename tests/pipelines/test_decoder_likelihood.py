"""The decoder as a probability mass function of the pixels, and the most likely image of its output."""

import pytest
import torch

from mechdiffusers.pipelines.pipeline_latent_ddpm import decoder_log_prob, most_likely_images

LEVELS = torch.arange(256, dtype=torch.float64) / 255


def masses(decoded: float, scale: float) -> torch.Tensor:
    """Probabilities of the 256 grey levels."""
    output = torch.full((1, 1, 1, 256), decoded, dtype=torch.float64)
    return decoder_log_prob(output, LEVELS[None, None, None], "discretized_logistic", scale).exp().flatten()


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.02, 1.0])
@pytest.mark.parametrize("decoded", [-30.0, -1.0, -0.3, 0.0, 0.999, 4.0])
def test_the_masses_of_the_discretised_logistic_sum_to_one(decoded, scale):
    assert masses(decoded, scale).sum().item() == pytest.approx(1, abs=1e-12)


def test_the_masses_are_differences_of_the_logistic_distribution_with_open_tails():
    scale, mean = 0.05, 0.4
    edges = (torch.arange(255, dtype=torch.float64) + 0.5) / 255
    distribution = torch.sigmoid((edges - mean) / scale)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    expected = torch.diff(torch.cat([zero, distribution, one]))
    torch.testing.assert_close(
        masses(2 * mean - 1, scale), expected, rtol=1e-10, atol=1e-15
    )  # the difference loses digits


def test_the_masses_of_the_bernoulli_decoder_sum_to_one():
    logits = torch.linspace(-40, 40, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    total = sum(decoder_log_prob(logits, torch.full_like(logits, x), "bernoulli").exp() for x in (0, 1))
    torch.testing.assert_close(total, torch.ones_like(logits))


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.01, 0.2])
@pytest.mark.parametrize("decoded", [-1.7, -0.999, -0.996, -0.97, -0.5, 0.1234, 0.991, 0.99, 1.3])
def test_the_most_likely_image_has_the_largest_mass(decoded, scale):
    output = torch.full((1, 1, 1, 1), decoded, dtype=torch.float64)
    best = most_likely_images(output, "discretized_logistic", scale)
    assert best.item() == LEVELS[masses(decoded, scale).argmax()].item()


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
def test_gradients_are_finite_however_wrong_the_decoder_is(likelihood):
    decoded = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0]).repeat(2, 1)[None, None].requires_grad_()
    images = torch.tensor([[0.0], [1.0]]).expand(2, 5)[None, None]
    decoder_log_prob(
        decoded, images, likelihood, 0.01 if likelihood == "discretized_logistic" else None
    ).sum().backward()
    assert decoded.grad.isfinite().all()


@pytest.mark.parametrize(
    ("likelihood", "scale", "message"),
    [
        ("gaussian", None, "vae must have a _decoder_likelihood of .*'discretized_logistic'.*, got 'gaussian'"),
        ("bernoulli", 0.1, "vae must have no _decoder_scale with a bernoulli decoder, got 0.1"),
        ("discretized_logistic", None, "vae must have a positive _decoder_scale .*, got None"),
        ("discretized_logistic", 0.0, "vae must have a positive _decoder_scale .*, got 0.0"),
        ("discretized_logistic", float("nan"), "vae must have a positive _decoder_scale .*, got nan"),
        ("discretized_logistic", float("inf"), "vae must have a positive _decoder_scale .*, got inf"),
    ],
)
def test_a_decoder_of_unknown_likelihood_or_without_its_scale_makes_no_pipeline(
    make_pipeline, likelihood, scale, message
):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_pipeline(decoder_likelihood=likelihood, decoder_scale=scale)


def test_the_log_probability_of_an_unknown_likelihood_or_without_its_scale_is_refused():
    output = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="^likelihood must be one of .*, got 'gaussian'"):
        decoder_log_prob(output, output, "gaussian")
    with pytest.raises(ValueError, match="^scale must be a positive number .*, got None"):
        decoder_log_prob(output, output, "discretized_logistic")
