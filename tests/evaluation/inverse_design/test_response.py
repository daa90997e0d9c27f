import math

import numpy as np
import pytest
import torch

from mechdiffusers.evaluation.inverse_design import (
    nearest_training_designs,
    response_error,
    stored_designs,
    stored_responses,
)


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
        (np.full((3, 4), math.nan), "target must be finite, given somewhere"),
        (np.full((3, 4), math.inf), "target must be finite"),
        (np.zeros((3, 4)), "target must be finite, given somewhere, and not zero"),
    ],
)
def test_unfit_targets_are_refused(target, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        response_error(responses(5), target)


def test_retrieval_finds_each_stored_design_by_its_own_response(composites):
    stored = stored_responses(composites)
    nearest = nearest_training_designs(stored, composites, k=3)
    np.testing.assert_array_equal(nearest.index[:, 0], np.arange(len(stored)))
    assert (nearest.error[:, 0] == 0).all()
    assert (np.diff(nearest.error, axis=1) >= 0).all()
    np.testing.assert_array_equal(nearest.designs, stored_designs(composites)[nearest.index])
    for target, response, error in zip(stored, nearest.response, nearest.error, strict=True):
        np.testing.assert_allclose(response_error(response, target), error)


def test_retrieval_minds_only_what_the_target_gives(composites):
    stored = stored_responses(composites)
    target = torch.from_numpy(np.where(np.arange(2)[:, None] == 1, stored[7], math.nan)).requires_grad_()
    errors = np.linalg.norm(stored[:, 1] - stored[7, 1], axis=1) / np.linalg.norm(stored[7, 1])
    np.testing.assert_array_equal(
        nearest_training_designs(target[None], composites, k=5).index[0], np.argsort(errors)[:5]
    )


def test_unfit_wishes_of_retrieval_are_refused(composites):
    with pytest.raises(ValueError, match=r"^k must be an integer from 1 to the 24 solved rows .* got 25"):
        nearest_training_designs(stored_responses(composites), composites, k=25)
    with pytest.raises(ValueError, match=r"^targets must have shape \(T, 2, 3\), got \(2, 3\)"):
        nearest_training_designs(np.ones((2, 3)), composites)
    with pytest.raises(ValueError, match="^dataset must be one split of a dataset with a column 'response'"):
        nearest_training_designs(np.ones((1, 2, 3)), composites.remove_columns("response"))
