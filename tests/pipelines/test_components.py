"""A pipeline is its components: they make it alone, and those that do not fit are refused."""

import math

import pytest
import torch

from mechdiffusers.models import ResponseEncoder
from mechdiffusers.pipelines import LatentDDPMPipeline


@pytest.mark.parametrize("decoder", [{}, {"decoder_likelihood": "discretized_logistic", "decoder_scale": 1e-3}])
def test_components_alone_make_the_same_pipeline(make_pipeline, decoder):
    pipe = make_pipeline(**decoder)
    again = LatentDDPMPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    found, expected = (
        one(batch_size=4, num_inference_steps=3, generator=torch.manual_seed(0), output_type="pt").images
        for one in (again, pipe)
    )
    assert torch.equal(found, expected)
    assert (len(found.unique()) > 2) == bool(decoder)
    assert (again.decoder_likelihood, again.decoder_scale) == (pipe.decoder_likelihood, pipe.decoder_scale)


def other(part: torch.nn.Module, **changes: object) -> torch.nn.Module:
    return type(part).from_config({**part.config, **changes})


def test_a_specification_of_the_first_edition_says_that_responses_are_not_signed(make_pipeline):
    pipe = make_pipeline(predictor=True)
    for signed in (False, True):
        spec = {**pipe.response_encoder.config.spec, "signed": signed}
        parts = {**pipe.components, "response_encoder": other(pipe.response_encoder, spec=spec)}
        if signed:
            message = "^response_predictor must predict the responses .* got another signed: None, not True"
            with pytest.raises(ValueError, match=message):
                LatentDDPMPipeline(**parts)
        else:
            LatentDDPMPipeline(**parts)


def test_parts_that_do_not_fit_are_refused_by_name(make_pipeline):
    pipe = make_pipeline(predictor=True)
    config = pipe.response_encoder.config

    def refuse(message: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            LatentDDPMPipeline(**{**pipe.components, **changed})

    channels = "unet must have the 2 channels of the vae's latents, got "
    refuse(f"{channels}4 in and 4 out", unet=other(pipe.unet, in_channels=4, out_channels=4))
    refuse(f"{channels}2 in and 4 out", unet=other(pipe.unet, out_channels=4))
    refuse(
        "response_encoder must make tokens of the unet's cross_attention_dim=6, got token_dim=8",
        response_encoder=other(pipe.response_encoder, token_dim=8),
    )
    for name in ("scale", "mean", "std"):
        wrong = other(pipe.response_predictor, **{name: [[2 * value for value in row] for row in config[name]]})
        message = f"response_predictor must normalise responses as response_encoder does, got another {name}: "
        refuse(message, response_predictor=wrong)
    refuse(
        "response_predictor must predict the responses of response_encoder, got another quantity: 'stress', not None",
        response_encoder=ResponseEncoder(token_dim=6),
    )


@pytest.mark.parametrize(
    ("likelihood", "scale", "message"),
    [
        ("gaussian", None, r"vae must have a _decoder_likelihood of \('bernoulli', .* got 'gaussian'"),
        ("bernoulli", 0.1, "vae must have no _decoder_scale with a bernoulli decoder, got 0.1"),
        ("discretized_logistic", None, "vae must have a positive _decoder_scale .* got None"),
        ("discretized_logistic", -1.0, "vae must have a positive _decoder_scale .* got -1.0"),
        ("discretized_logistic", math.inf, "vae must have a positive _decoder_scale .* got inf"),
    ],
)
def test_a_decoder_that_means_nothing_is_refused(make_pipeline, likelihood, scale, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_pipeline(decoder_likelihood=likelihood, decoder_scale=scale)
