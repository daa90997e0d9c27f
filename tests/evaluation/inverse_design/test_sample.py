from importlib import import_module

import numpy as np
import pytest
import torch

from mechdiffusers.evaluation.inverse_design import designs_for, response_error, stored_responses
from mechdiffusers.models import ResponsePredictor


def test_designs_of_a_target_do_not_depend_on_the_other_targets(conditional, composites):
    targets = stored_responses(composites)[:3]
    together = designs_for(conditional, targets, 2, seed=5, num_inference_steps=2)
    alone = designs_for(conditional, targets[:1], 2, seed=5, num_inference_steps=2)
    assert together.shape == (6, 8, 8)
    np.testing.assert_array_equal(together[:2], alone)
    assert not np.array_equal(together[:2], together[2:4])


def test_designs_chosen_from_candidates_are_predicted_nearer_and_do_not_depend_on_the_batch(
    conditional, composites, monkeypatch
):
    config = conditional.response_encoder.config
    options = {name: config[name] for name in ("spec", "scale", "mean", "std")}
    turned = {"half_turn": [0, 1], "mirror": [0, None]}
    torch.manual_seed(1)
    predictor = ResponsePredictor(block_out_channels=(4, 8), symmetries=turned, **options).eval()
    conditional.register_modules(response_predictor=predictor)
    conditional.to(torch.float64)  # in which a batch rounds to less than it could hide
    targets = stored_responses(composites)[:3]
    wanted = torch.from_numpy(targets).repeat_interleave(2, 0)
    designs = {num: designs_for(conditional, targets, 2, num_inference_steps=2, num_candidates=num) for num in (1, 16)}
    errors = {
        num: response_error(conditional.predict_response(found[..., None]), wanted).mean()
        for num, found in designs.items()
    }
    assert errors[16] < errors[1]
    # two designs at once
    monkeypatch.setattr(import_module("mechdiffusers.evaluation.inverse_design.sample"), "_BATCH", 32)
    again = designs_for(conditional, targets, 2, num_inference_steps=2, num_candidates=16)
    np.testing.assert_array_equal(again, designs[16])


@pytest.mark.parametrize("targets", [np.ones((0, 2, 3)), 1.0, np.ones((1, 1, 2, 3))])
def test_targets_of_another_shape_are_named(conditional, targets):
    with pytest.raises(ValueError, match=r"^targets must have shape \(T, L, S\) or \(L, S\)"):
        designs_for(conditional, targets)


@pytest.mark.parametrize("num", [0, -1, True, 2.0])
def test_a_number_of_designs_or_candidates_that_is_none_is_named(conditional, composites, num):
    targets = stored_responses(composites)[:1]
    with pytest.raises(ValueError, match="^num_designs must be an integer of at least 1, got"):
        designs_for(conditional, targets, num)
    with pytest.raises(ValueError, match="^num_candidates must be an integer of at least 1, got"):
        designs_for(conditional, targets, num_candidates=num)


@pytest.mark.parametrize("seed", ["first", -1, 2**64])
def test_a_seed_that_is_none_is_named(conditional, composites, seed):
    with pytest.raises(ValueError, match="^seed must be "):
        designs_for(conditional, stored_responses(composites)[:1], seed=seed)


def test_one_target_and_a_view_that_runs_backwards_are_targets_too(conditional):
    targets = np.random.default_rng(0).uniform(0.5, 2.0, (2, 2, 3))
    expected = designs_for(conditional, targets[1:], 2, num_inference_steps=2)
    np.testing.assert_array_equal(designs_for(conditional, targets[1], 2, num_inference_steps=2), expected)
    np.testing.assert_array_equal(designs_for(conditional, targets[::-1][:1], 2, num_inference_steps=2), expected)
