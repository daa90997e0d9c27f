import math

import pytest
import torch
from mechdiffusers.models import ResponseEncoder

MEANING = {"quantity": "stress", "load_cases": ["a", "b"], "strains": [[0.1, 0.2, 0.3]] * 2}


def encoder(**options) -> ResponseEncoder:
    torch.manual_seed(0)
    return ResponseEncoder(
        **{"token_dim": 8, "meaning": MEANING, "mean": [[1.0] * 3] * 2, "std": [[2.0] * 3] * 2, **options}
    )


def test_a_response_open_everywhere_becomes_the_null_tokens():
    model = encoder()
    response = torch.randn(3, 2, 3)
    response[1] = math.nan
    tokens = model(response)
    assert tokens.shape == (3, 2, 8)
    assert torch.equal(tokens[1], model.null_tokens)
    assert not torch.equal(tokens[0], model.null_tokens)


def test_an_encoder_without_a_meaning_gives_every_sample_the_null_token():
    model = ResponseEncoder(token_dim=8)
    assert torch.equal(model(torch.empty(4, 0, 0)), model.null_tokens.expand(4, 1, 8))


def test_an_open_entry_is_not_the_same_as_the_mean():
    model = encoder()
    given = torch.randn(1, 2, 3)
    mean, left_open = given.clone(), given.clone()
    mean[0, 0, 1], left_open[0, 0, 1] = 1.0, math.nan  # both are zero once normalised: the mask tells them apart
    assert not torch.equal(model(mean)[:, 0], model(left_open)[:, 0])
    assert torch.equal(model(mean)[:, 1], model(left_open)[:, 1])
    assert model(left_open).isfinite().all()


def test_tokens_do_not_depend_on_the_units_once_mean_and_std_are_in_them():
    response = torch.randn(5, 2, 3)
    in_kilo = encoder(mean=[[1e-3] * 3] * 2, std=[[2e-3] * 3] * 2)
    torch.testing.assert_close(encoder()(response), in_kilo(response / 1000))


def test_gradients_reach_the_null_tokens_only_through_open_responses():
    model = encoder()
    model(torch.randn(2, 2, 3)).sum().backward()
    assert not model.null_tokens.grad.any()
    model(torch.full((2, 2, 3), math.nan)).sum().backward()
    assert model.null_tokens.grad.all()


def test_it_comes_back_from_disk_with_its_meaning(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path)
    loaded = ResponseEncoder.from_pretrained(tmp_path)
    response = torch.randn(2, 2, 3)
    assert torch.equal(loaded(response), model(response))
    assert loaded.config.meaning == MEANING


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mean": None}, "mean"),
        ({"meaning": {"strains": []}}, "meaning"),
        ({"std": [[1.0] * 2] * 2}, "mean and std"),
        ({"std": [[0.0] * 3] * 2}, "std"),
    ],
)
def test_a_meaning_without_fitting_statistics_is_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name}.* must"):
        encoder(**options)


def test_a_response_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^response must have shape \(B, \*\(2, 3\)\), got \(1, 3, 2\)"):
        encoder()(torch.zeros(1, 3, 2))
