import json
import math

import pytest
import torch

from mechdiffusers.models import ResponseEncoder, response_normalisation

SPEC = {"quantity": "stress", "load_cases": ["a", "b"], "strains": [[0.1, 0.2, 0.3]] * 2}


def encoder(**options) -> ResponseEncoder:
    torch.manual_seed(0)
    return ResponseEncoder(
        **{
            "token_dim": 8,
            "spec": SPEC,
            "scale": [[0.5] * 3] * 2,
            "mean": [[1.0] * 3] * 2,
            "std": [[2.0] * 3] * 2,
            **options,
        }
    )


def test_a_response_unspecified_everywhere_becomes_the_null_tokens():
    model = encoder()
    response = torch.randn(3, 2, 3)
    response[1] = math.nan
    tokens = model(response)
    assert tokens.shape == (3, 2, 8)
    assert torch.equal(tokens[1], model.null_tokens)
    assert not torch.equal(tokens[0], model.null_tokens)


def test_an_encoder_without_a_specification_gives_every_sample_the_null_token():
    model = ResponseEncoder(token_dim=8)
    assert torch.equal(model(torch.empty(4, 0, 0)), model.null_tokens.expand(4, 1, 8))


def test_an_unspecified_entry_is_not_the_same_as_the_mean():
    model = encoder()
    given = torch.randn(1, 2, 3)
    mean, unspecified = given.clone(), given.clone()
    # both are zero once normalised: the mask tells them apart
    mean[0, 0, 1], unspecified[0, 0, 1] = 0.5 * math.sinh(1.0), math.nan
    assert not torch.equal(model(mean)[:, 0], model(unspecified)[:, 0])
    assert torch.equal(model(mean)[:, 1], model(unspecified)[:, 1])
    assert model(unspecified).isfinite().all()


def test_tokens_do_not_depend_on_the_units_once_the_scale_is_in_them():
    response = torch.randn(5, 2, 3)
    in_kilo = encoder(scale=[[5e-4] * 3] * 2)
    torch.testing.assert_close(encoder()(response), in_kilo(response / 1000))


def test_equal_relative_changes_of_a_response_are_equal_changes_of_what_the_network_sees():
    """Above its scale the normalisation is logarithmic: for responses from 3 to 300 scales to 6 %, above 10 to 1 %."""
    model, seen = encoder(scale=[[1.0] * 3] * 2), []
    model.proj_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., :3]))
    for factor in (1.0, 1.05):
        model(factor * torch.tensor([3.0, 10.0, 300.0]).expand(1, 2, 3))
    change = (seen[1] - seen[0]) * 2  # times the standard deviation
    expected = torch.full((2, 3), math.log(1.05))
    torch.testing.assert_close(change[0], expected, rtol=0.06, atol=0)
    torch.testing.assert_close(change[0, :, 1:], expected[:, 1:], rtol=0.01, atol=0)


def test_the_measured_normalisation_gives_every_entry_mean_0_and_variance_1():
    responses = torch.exp(torch.randn(500, 2, 3, generator=torch.manual_seed(0)) + torch.tensor([-3.0, 0.0, 3.0]))
    responses[::7, 1, 2] = math.nan
    responses[:, 0, 1] = 0.0  # as at strain 0
    model, seen = encoder(**response_normalisation(responses)), []
    model.proj_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., :3]))
    model(responses)
    values = torch.where(responses.isnan(), math.nan, seen[0])
    constant = torch.tensor([[False, True, False], [False, False, False]])
    torch.testing.assert_close(values.nanmean(0), torch.zeros(2, 3), atol=1e-5, rtol=0)
    variance = values.square().nanmean(0)
    torch.testing.assert_close(variance, torch.where(constant, 0.0, 1.0), atol=1e-4, rtol=0)


def signed_responses() -> torch.Tensor:
    """Of either sign, from thousandths to thousands; one entry is always zero, and one unknown now and then."""
    responses = torch.randn(500, 2, 3, generator=torch.manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3])
    responses[::7, 1, 2] = math.nan
    responses[:, 0, 1] = 0.0
    return responses


def test_a_signed_response_is_scaled_by_its_root_mean_square():
    responses = signed_responses()
    normalisation = response_normalisation(responses, signed=True)
    scale = responses.double().square().nanmean(0).sqrt()
    scale[0, 1] = 1  # of an entry that is always zero
    torch.testing.assert_close(torch.tensor(normalisation["scale"]).double(), scale, rtol=1e-6, atol=0)
    seen = encoder(**normalisation).normalise(responses).double()
    mean, std = (torch.tensor(normalisation[name]) for name in ("mean", "std"))
    torch.testing.assert_close(
        seen, (torch.asinh(responses / scale) - mean) / std, equal_nan=True, check_dtype=False, rtol=1e-4, atol=1e-5
    )


def test_the_scale_of_a_signed_response_is_linear_around_zero():
    """To 1 % within a fifth of the root mean square, so that equal changes count alike whatever the sign."""
    normalisation = response_normalisation(signed_responses(), signed=True)
    model = encoder(**normalisation)
    scale, std = torch.tensor(normalisation["scale"]), torch.tensor(normalisation["std"])
    shares = torch.linspace(-0.2, 0.2, 9)[:, None, None]
    change = (model.normalise(shares * scale) - model.normalise(torch.zeros(1, 2, 3))) * std
    torch.testing.assert_close(change, shares.expand(-1, 2, 3), rtol=0.01, atol=1e-6)


def test_the_measured_normalisation_gives_every_signed_entry_mean_0_and_variance_1():
    responses = signed_responses() + torch.tensor([2e-3, -3.0, 0.0])
    seen = encoder(**response_normalisation(responses, signed=True)).normalise(responses)
    constant = torch.tensor([[False, True, False], [False, False, False]])
    torch.testing.assert_close(seen.nanmean(0), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.square().nanmean(0), torch.where(constant, 0.0, 1.0), atol=1e-4, rtol=0)


def test_a_scalar_response_has_a_token_for_each_of_its_entries():
    responses = torch.randn(100, 3, 1, generator=torch.manual_seed(0))
    spec = {"quantity": "stiffness", "load_cases": ["C11", "C22", "C12"], "strains": [[0.0]] * 3, "signed": True}
    model = encoder(spec=spec, **response_normalisation(responses, signed=True))
    assert model(responses).shape == (100, 3, 8)
    assert not torch.equal(model(responses), model(-responses))
    assert torch.equal(model.prepare(-responses.abs()), -responses.abs())


def test_a_negative_response_is_accepted_where_the_specification_is_signed_alone():
    response = torch.tensor([[[1.0, 2.0, 3.0], [1.0, math.nan, -4.0]]])
    for spec in (SPEC, {**SPEC, "signed": False}):
        message = "^response must be non-negative, .* got -4 in sample 0, load case 'b'"
        with pytest.raises(ValueError, match=message):
            encoder(spec=spec).prepare(response)
    prepared = encoder(spec={**SPEC, "signed": True}).prepare(response)
    torch.testing.assert_close(prepared, response, equal_nan=True, rtol=0, atol=0)


def test_a_response_may_be_zero_everywhere():
    assert torch.equal(encoder().prepare(torch.zeros(2, 2, 3)), torch.zeros(2, 2, 3))


def test_normalised_responses_are_what_the_network_sees_of_them_and_unknown_ones_stay_unknown():
    model, seen = encoder(), []
    model.proj_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., :3]))
    response = 10 * torch.rand(5, 2, 3)
    model(response)
    assert torch.equal(model.normalise(response), seen[0])
    response[0, 1, 2] = math.nan
    assert torch.equal(model.normalise(response).isnan(), response.isnan())


def test_an_entry_that_no_design_has_cannot_be_normalised():
    responses = torch.rand(5, 2, 3)
    responses[:, 1, 2] = math.nan
    with pytest.raises(
        ValueError, match="^response must be known of some design .* got none in load case 1 at strain 2"
    ):
        response_normalisation(responses)


@pytest.mark.parametrize("value", [0.0, -4.0, 1e8])
def test_what_no_design_does_still_has_tokens(value):
    assert encoder()(torch.full((1, 2, 3), value)).isfinite().all()


def test_gradients_reach_the_null_tokens_only_through_unspecified_responses():
    model = encoder()
    model(torch.randn(2, 2, 3)).sum().backward()
    assert not model.null_tokens.grad.any()
    model(torch.full((2, 2, 3), math.nan)).sum().backward()
    assert model.null_tokens.grad.all()


def test_it_comes_back_from_disk_with_its_spec(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path)
    loaded = ResponseEncoder.from_pretrained(tmp_path)
    response = torch.randn(2, 2, 3)
    assert torch.equal(loaded(response), model(response))
    assert loaded.config.spec == SPEC


def test_a_checkpoint_of_the_first_edition_calls_its_specification_meaning(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["meaning"] = config.pop("spec")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = ResponseEncoder.from_pretrained(tmp_path)
    response = torch.randn(2, 2, 3)
    assert torch.equal(loaded(response), model(response))
    assert loaded.config.spec == SPEC
    loaded.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["spec"] == SPEC
    assert "meaning" not in config


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mean": None}, "scale, mean and std"),
        ({"spec": {"strains": []}}, "spec"),
        ({"std": [[1.0] * 2] * 2}, "scale, mean and std"),
        ({"scale": [[0.0] * 3] * 2}, "scale"),
        ({"std": [[0.0] * 3] * 2}, "std"),
    ],
)
def test_a_specification_without_fitting_statistics_is_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name}.* must"):
        encoder(**options)


def test_a_response_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^response must have shape \(B, \*\(2, 3\)\), got \(1, 3, 2\)"):
        encoder()(torch.zeros(1, 3, 2))


def test_a_quantity_that_is_zero_for_all_is_normalised_to_zero():
    response = torch.cat([torch.zeros(9, 1, 1), torch.rand(9, 1, 1)], dim=1)
    for signed in (False, True):
        normalisation = response_normalisation(response, signed)
        model = encoder(spec={**SPEC, "strains": [[0.0]] * 2, "signed": signed}, **normalisation)
        assert (model.normalise(response)[:, 0] == 0).all()
