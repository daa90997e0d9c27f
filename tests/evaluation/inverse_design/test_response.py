import math

import numpy as np
import pytest
import torch

from mechdiffusers.evaluation.inverse_design import response_error
from mechdiffusers.models import ResponsePredictor


def responses(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 2, (num, 3, 4))


def test_the_error_of_a_scaled_response_is_the_difference_of_its_scale():
    target = responses(5)
    np.testing.assert_allclose(response_error(1.07 * target, target), 0.07, rtol=1e-12)


def test_a_soft_load_case_counts_as_much_as_a_stiff_one():
    target = responses(1) * np.array([1.0, 1e3, 1e6])[:, None]
    errors = [response_error(target * np.where(np.arange(3) == case, 1.3, 1.0)[:, None], target) for case in range(3)]
    np.testing.assert_allclose(errors, 0.1, rtol=1e-9)


def test_the_error_is_that_of_the_definition():
    response, target = responses(4, seed=1), responses(4)
    norms = np.linalg.norm(response - target, axis=2) / np.linalg.norm(target, axis=2)
    np.testing.assert_allclose(response_error(response, target), norms.mean(1), rtol=1e-12)
    np.testing.assert_allclose(response_error(response, target[2])[2], norms[2].mean(), rtol=1e-12)


def test_what_the_target_leaves_open_does_not_count():
    response, target = responses(2, seed=1), responses(2)
    target[0, 1] = math.nan
    target[1, :, 2:] = math.nan
    expected = (
        response_error(response[:1, [0, 2]], target[:1, [0, 2]]),
        response_error(response[1:, :, :2], target[1:, :, :2]),
    )
    np.testing.assert_allclose(response_error(response, target), np.concatenate(expected))
    response[0, 1] = math.nan
    assert np.isfinite(response_error(response, target)).all()


def test_a_load_case_that_is_to_be_zero_is_measured_against_the_others():
    target = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    typical = math.sqrt((3**2 + 4**2 + 0) / 3)
    response = target + np.array([[0.0, 0.0], [0.0, 0.0], [0.6, -0.8]])
    np.testing.assert_allclose(response_error(response[None], target), 1.0 / typical / 3, rtol=1e-12)
    target[0] = math.nan  # unspecified load cases are not among the others
    np.testing.assert_allclose(response_error(response[None], target), 1.0 / (4 / math.sqrt(2)) / 2, rtol=1e-12)


def test_rounding_does_not_decide_whether_a_load_case_is_to_be_zero():
    response, target = responses(1), responses(1, seed=1)
    target[0, 1] = 0
    almost = target + np.array([0.0, 1e-9, 0.0])[:, None]
    np.testing.assert_allclose(response_error(response, almost), response_error(response, target), rtol=1e-6)


def test_the_error_of_a_target_that_is_zero_everywhere_is_in_units_of_the_response():
    response = np.array([[[3.0, 4.0], [0.0, -1.0]]])
    np.testing.assert_allclose(response_error(response, np.zeros((2, 2))), (5 + 1) / 2, rtol=1e-12)
    given = np.array([[0.0, math.nan], [math.nan, math.nan]])
    np.testing.assert_allclose(response_error(response, given), 3, rtol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
def test_the_error_does_not_know_signs_and_units(signed):
    response, target = responses(4, seed=1), responses(4)
    target[1, 2] = 0
    signs = np.array([1.0, -1.0, -1.0])[:, None]
    np.testing.assert_allclose(
        response_error(1e3 * signs * response, 1e3 * signs * target, signed=signed),
        response_error(response, target, signed=signed),
        rtol=1e-12,
    )


def test_a_signed_entry_near_zero_counts_as_one_that_is_zero():
    """C16 of 0.001 beside C11 and C22 of 10: 0.2 off is two per cent of these, not 200 times too much."""
    response = np.array([10.0, 10.0, 0.2])[None, :, None]
    errors = [
        response_error(response, np.array([10.0, 10.0, near])[:, None], signed=True).item()
        for near in (-1e-3, 0.0, 1e-12, 1e-3)
    ]
    np.testing.assert_allclose(errors, 0.2 / math.sqrt(200 / 3) / 3, rtol=0.01)


def test_the_error_of_a_signed_tensor_with_one_wrong_entry_is_its_relative_frobenius_distance():
    target = np.array([4.0, -1.0, 0.2, 3.0])[:, None]
    response = target + np.array([0.0, 0.0, 0.5, 0.0])[:, None]
    frobenius = np.linalg.norm(response - target) / np.linalg.norm(target)
    np.testing.assert_allclose(response_error(response[None], target, signed=True), frobenius / math.sqrt(4))


@pytest.mark.parametrize("signed", [False, True])
def test_the_error_inside_checkpoints_is_this_one(signed):
    """They carry their own copy, since they are loaded without this package."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal((200, 3, 4))
    target[rng.random((200, 3)) < 0.3] = 0
    target[rng.random((200, 3, 4)) < 0.3] = math.nan
    target = target[~np.isnan(target).all((1, 2))]
    assert (np.nan_to_num(target) == 0).all((1, 2)).any()  # some are zero everywhere
    response = rng.standard_normal(target.shape)
    spec = {"quantity": "q", "load_cases": ["a", "b", "c"], "strains": [[1.0, 2.0, 3.0, 4.0]] * 3, "units": "1"}
    entries = {name: [[1.0] * 4] * 3 for name in ("scale", "mean", "std")}
    predictor = ResponsePredictor(block_out_channels=(4,), spec={**spec, "signed": signed}, **entries)
    found = predictor.response_error(torch.from_numpy(response), torch.from_numpy(target))
    np.testing.assert_allclose(found, response_error(response, target, signed=signed), rtol=1e-12)


def test_an_unsolved_entry_that_the_target_gives_makes_the_error_nan():
    response = responses(3)
    response[1, 2, 3] = math.nan
    np.testing.assert_array_equal(np.isnan(response_error(response, responses(3))), [False, True, False])


def test_the_error_of_a_tensor_is_a_tensor_with_the_gradient_of_its_differences():
    target = torch.from_numpy(responses(2))
    target[0, 1] = math.nan
    response = torch.from_numpy(responses(2, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: response_error(values, target), response)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.ones((2, 4)), r"target must have the shape \(B, L, S\) or \(L, S\) .* got \(2, 4\) for \(5, 3, 4\)"),
        (np.full((3, 4), math.nan), "target must be finite and given somewhere"),
        (np.full((3, 4), math.inf), "target must be finite"),
    ],
)
def test_unfit_targets_are_refused(target, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        response_error(responses(5), target)
