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
    with pytest.raises(ValueError, match="^dataset must have a column 'response', got .'converged', 'image'"):
        nearest_training_designs(np.ones((1, 2, 3)), composites.remove_columns("response"))
