import math
from itertools import product

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter

from mechdiffusers.evaluation import (
    bootstrap_interval,
    distance_of_means,
    two_point_correlation,
    two_point_error,
    volume_fraction_distance,
)


def test_the_two_point_correlation_is_the_probability_that_both_points_are_stiff():
    designs = (np.random.default_rng(0).random((3, 6, 8)) < 0.4).astype(float)
    correlation = two_point_correlation(designs)
    for dy, dx in [(0, 0), (1, 0), (0, 3), (2, 5), (5, 7)]:
        both = designs * np.roll(designs, (-dy, -dx), axis=(1, 2))
        np.testing.assert_allclose(correlation[:, dy, dx], both.mean((1, 2)), atol=1e-12)


def test_a_tensor_comes_back_as_a_tensor():
    designs = torch.rand(3, 4, 6).round()
    correlation = two_point_correlation(designs)
    torch.testing.assert_close(correlation, torch.from_numpy(two_point_correlation(designs.numpy())))


def test_of_a_crop_only_the_pairs_inside_it_are_counted():
    designs = np.random.default_rng(0).random((2, 4, 5))
    correlation = two_point_correlation(designs, periodic=False)
    assert correlation.shape == (2, 7, 9)
    for dy, dx in product(range(-3, 4), range(-4, 5)):
        pairs = [
            designs[:, y, x] * designs[:, y + dy, x + dx]
            for y, x in product(range(4), range(5))
            if 0 <= y + dy < 4 and 0 <= x + dx < 5
        ]
        np.testing.assert_allclose(correlation[:, dy, dx], np.mean(pairs, axis=0), atol=1e-12)


def test_all_crops_of_an_image_have_its_statistics_on_average_unless_they_are_taken_as_periodic():
    smooth = gaussian_filter(np.random.default_rng(0).standard_normal((48, 48)), 3, mode="wrap")
    image = (smooth > np.quantile(smooth, 0.6)).astype(float)
    crops = sliding_window_view(np.pad(image, (0, 11), mode="wrap"), (12, 12)).reshape(-1, 12, 12)
    lags = np.fft.ifftshift(np.arange(-11, 12))  # lag zero first
    truth = two_point_correlation(image[None])[0][np.ix_(lags, lags)]
    np.testing.assert_allclose(two_point_correlation(crops, periodic=False).mean(0), truth, atol=1e-12)
    bias = two_point_correlation(crops).mean(0)[:6, :6] - truth[:6, :6]
    assert np.abs(bias).max() > 0.03


def test_the_error_of_crops_counts_each_pair_of_pixels_once():
    samples, reference = np.array([[[1.0, 0.0]]]), np.array([[[1.0, 1.0]]])
    # 2 pairs at lag 0, which differ by 1/2, and 1 pair at each of the lags 1 and -1, which differ by 1
    assert two_point_error(samples, reference, periodic=False) == pytest.approx(math.sqrt((2 * 0.25 + 2) / 4))
    assert two_point_error(samples, reference, periodic=True) == pytest.approx(math.sqrt((0.25 + 1) / 2))


@pytest.mark.parametrize("periodic", [True, False])
def test_two_point_statistics_of_a_tensor_have_the_gradient_of_finite_differences(periodic):
    generator = torch.Generator().manual_seed(0)
    samples, reference = torch.rand(2, 2, 3, 4, dtype=torch.float64, generator=generator) * 0.8 + 0.1
    samples.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: two_point_correlation(x, periodic=periodic), samples)
    assert torch.autograd.gradcheck(lambda x: two_point_error(x, reference, periodic=periodic), samples)


@pytest.mark.parametrize("periodic", [True, False])
def test_the_error_of_equal_sets_is_at_its_least(periodic):
    samples = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    error = two_point_error(samples, samples.detach(), periodic=periodic)
    error.backward()
    assert error.item() == 0
    assert samples.grad.abs().max().item() == 0


@pytest.mark.parametrize("periodic", [True, False])
def test_tensors_and_arrays_have_the_same_error(periodic):
    samples, reference = np.random.default_rng(0).random((2, 3, 4, 6))
    expected = two_point_error(samples, reference, periodic=periodic)
    assert two_point_error(*map(torch.from_numpy, (samples, reference)), periodic=periodic).item() == expected


def test_the_interval_of_a_distance_between_like_sets_does_not_lie_above_the_distance():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 1, (300, 40)), rng.normal(0, 1, (300, 40))
    low, high = bootstrap_interval(distance_of_means, ours, theirs, num_resamples=300)
    assert low < distance_of_means(ours, theirs)
    assert low < high


def test_a_laminate_has_a_triangular_wave_for_a_correlation():
    laminate = np.tile([1.0] * 4 + [0.0] * 4, (1, 8, 2)).reshape(1, 8, 16)
    triangle = [4, 3, 2, 1, 0, 1, 2, 3] * 2
    np.testing.assert_allclose(two_point_correlation(laminate)[0, 3], np.array(triangle) / 8, atol=1e-12)


def test_the_error_is_zero_for_the_same_statistics_and_known_for_homogeneous_designs():
    designs = (np.random.default_rng(0).random((5, 8, 8)) < 0.5).astype(float)
    assert two_point_error(designs, np.roll(designs, 3, axis=1)) == pytest.approx(0, abs=1e-12)
    assert two_point_error(np.ones((1, 4, 4)), np.zeros((2, 4, 4))) == pytest.approx(1)
    assert two_point_error(np.full((1, 4, 4), 0.5), np.zeros((2, 4, 4))) == pytest.approx(0.25)


def test_the_distance_of_volume_fractions_is_the_shift_of_a_shifted_distribution():
    fractions = np.random.default_rng(0).uniform(0.2, 0.6, 50)
    designs = np.broadcast_to(fractions[:, None, None], (50, 4, 4))
    assert volume_fraction_distance(designs + 0.25, designs) == pytest.approx(0.25)


def test_the_bootstrap_interval_of_a_mean_has_the_width_of_its_standard_error():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(2, 1, (400, 1)), rng.normal(0, 1, (400, 1))
    low, high = bootstrap_interval(lambda a, b: float(a.mean() - b.mean()), ours, theirs, num_resamples=2000)
    difference, standard_error = ours.mean() - theirs.mean(), math.sqrt((ours.var() + theirs.var()) / 400)
    assert low == pytest.approx(difference - 1.96 * standard_error, abs=0.15 * standard_error)
    assert high == pytest.approx(difference + 1.96 * standard_error, abs=0.15 * standard_error)
    assert (low, high) == bootstrap_interval(lambda a, b: float(a.mean() - b.mean()), ours, theirs, num_resamples=2000)


def test_two_halves_of_a_set_differ_by_its_standard_error():
    values = np.random.default_rng(0).normal(0, 1, (20_000, 50))
    distance = distance_of_means(values[:10_000], values[10_000:])
    assert distance == pytest.approx(math.sqrt(2 / 10_000), rel=0.4)


@pytest.mark.parametrize(
    "designs", [np.zeros((4, 4)), np.zeros((0, 4, 4)), np.full((1, 4, 4), np.nan), np.full((1, 4, 4), 1.5)]
)
def test_what_is_no_stack_of_designs_is_refused(designs):
    with pytest.raises(ValueError, match="^designs must"):
        two_point_correlation(designs)
    with pytest.raises(ValueError, match="^samples must"):
        volume_fraction_distance(designs, np.zeros((1, 4, 4)))


def test_sets_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^samples must have the reference's size \(8, 8\), got \(4, 4\)"):
        two_point_error(np.zeros((1, 4, 4)), np.zeros((1, 8, 8)))


def test_a_level_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="^level must"):
        bootstrap_interval(distance_of_means, np.zeros((2, 1)), np.zeros((2, 1)), level=1.0)
