import itertools

import numpy as np
import pytest
import torch

from mechdiffusers.evaluation import diversity, diversity_ratio, novelty, stiff_connectivity
from mechdiffusers.microstructures import random_composites

TRAINING = random_composites(20, size=12, seed=0)[0]


@pytest.mark.parametrize(("down", "right"), list(itertools.product((-1, 0, 1), repeat=2)))
@pytest.mark.parametrize("turned", [False, True])
def test_a_shifted_or_turned_training_design_is_not_new(down, right, turned):
    designs = np.roll(TRAINING[:5], (down, right), axis=(1, 2))
    assert (novelty(designs[:, ::-1, ::-1] if turned else designs, TRAINING) == 0).all()


@pytest.mark.parametrize("change", [lambda x: 1 - x, lambda x: np.roll(x, 3, axis=1), lambda x: x.transpose(0, 2, 1)])
def test_other_changes_of_a_training_design_are_new(change):
    assert (novelty(change(TRAINING[:5]), TRAINING) > 0).all()


def test_novelty_is_the_least_fraction_of_differing_pixels():
    designs = random_composites(4, size=12, seed=1)[0]
    expected = []
    for design in designs:
        fractions = []
        for other, down, right in itertools.product([*TRAINING, *TRAINING[:, ::-1, ::-1]], (-1, 0, 1), (-1, 0, 1)):
            pairs = [
                design[i, j] != other[i - down, j - right]
                for i, j in itertools.product(range(12), repeat=2)
                if 0 <= i - down < 12 and 0 <= j - right < 12
            ]
            fractions.append(np.mean(pairs))
        expected.append(min(fractions))
    np.testing.assert_allclose(novelty(designs, TRAINING), expected, rtol=1e-6)


def test_a_few_pixels_changed_are_that_fraction_new():
    designs = TRAINING[:3].copy()
    designs[:, 5:7, 4] = 1 - designs[:, 5:7, 4]
    np.testing.assert_allclose(novelty(designs, TRAINING), 2 / 144, rtol=1e-6)


def test_diversity_is_the_mean_over_pairs():
    designs = TRAINING[:6]
    pairs = [np.mean(a != b) for a, b in itertools.combinations(designs, 2)]
    assert diversity(designs) == pytest.approx(np.mean(pairs))
    assert diversity(torch.from_numpy(designs)) == diversity(designs)
    assert diversity(np.repeat(designs[:1], 5, axis=0)) == 0


def test_black_samples_have_none_of_the_data_s_diversity_and_a_resampling_has_about_all_of_it():
    data = random_composites(500, size=12, seed=1)[0]
    assert diversity_ratio(np.zeros((64, 12, 12)), data) == 0
    assert diversity_ratio(np.repeat(TRAINING[:1] * 0.1, 64, axis=0), data) == 0
    resampled = data[np.random.default_rng(0).integers(len(data), size=200)]
    assert diversity_ratio(resampled, data) == pytest.approx(1, abs=0.05)


def test_the_ratio_of_diversities_is_that_of_differing_pixels_and_does_not_depend_on_the_range_of_grey_levels():
    ratio = diversity_ratio(TRAINING[:6], TRAINING[6:])
    assert ratio == pytest.approx(diversity(TRAINING[:6]) / diversity(TRAINING[6:]))
    assert diversity_ratio(TRAINING[:6] / 255, torch.from_numpy(TRAINING[6:] / 255)) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (TRAINING[:1], TRAINING, "samples must be at least two designs to differ, got 1"),
        (TRAINING, np.zeros((3, 12, 12)), "reference must hold designs that differ, got equal ones"),
        (TRAINING * 2, TRAINING, r"samples must lie in \[0, 1\]"),
    ],
)
def test_sets_of_which_no_ratio_is_known_are_refused(samples, reference, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        diversity_ratio(samples, reference)


def test_the_stiff_phase_of_one_piece_is_connected_and_a_chequerboard_is_not():
    chequerboard = np.indices((4, 4)).sum(0) % 2
    halves = np.zeros((4, 4))
    halves[:, 0], halves[0, 2:] = 1, 1
    connectivity = stiff_connectivity(np.stack([np.ones((4, 4)), chequerboard, halves, np.zeros((4, 4))]))
    np.testing.assert_allclose(connectivity, [1, 1 / 8, 4 / 6, np.nan])


def test_what_goes_in_as_a_tensor_comes_back_as_one():
    tensor = torch.from_numpy(TRAINING)
    assert torch.equal(novelty(1 - tensor, tensor), torch.from_numpy(novelty(1 - TRAINING, TRAINING)))


@pytest.mark.parametrize(
    ("designs", "message"),
    [
        (np.zeros((4, 4)), r"designs must be a stack of designs, shape \(B, H, W\)"),
        (np.full((1, 12, 12), np.nan), r"designs must lie in \[0, 1\]"),
        (np.full((1, 12, 12), 1.5), r"designs must lie in \[0, 1\]"),
        (np.zeros((1, 8, 8)), r"designs must have the size of the training designs, .* got \(8, 8\) and \(12, 12\)"),
    ],
)
def test_unfit_designs_are_refused(designs, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        novelty(designs, TRAINING)


def test_a_single_design_has_no_diversity():
    with pytest.raises(ValueError, match="^designs must be at least two to differ, got 1"):
        diversity(TRAINING[:1])
