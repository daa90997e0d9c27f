import math

import numpy as np
import pytest
from scipy.stats import kstest

from mechdiffusers.microstructures import random_composites
from mechdiffusers.microstructures.random_composites import _filtered


def test_a_design_depends_on_seed_and_index_alone():
    many, their_parameters = random_composites(1030, size=8, seed=3)  # more than one chunk of the generator
    few, parameters = random_composites(5, size=8, seed=3)
    np.testing.assert_array_equal(many[:5], few)
    for name, values in parameters.items():
        np.testing.assert_array_equal(their_parameters[name][:5], values)
    assert (random_composites(5, size=8, seed=4)[0] != few).any()


def test_designs_are_binary_and_meet_their_volume_fraction_to_half_a_pixel():
    designs, parameters = random_composites(64, size=32, seed=1)
    assert designs.dtype == np.float32
    assert set(np.unique(designs)) == {0.0, 1.0}
    assert np.abs(designs.mean((1, 2)) - parameters["volume_fraction"]).max() <= 0.5 / 32**2 + 1e-12


def test_parameters_have_the_distributions_that_results_are_compared_on():
    _, parameters = random_composites(2000, size=4, seed=0)
    uniform = {
        "volume_fraction": (parameters["volume_fraction"] - 0.2) / 0.6,
        "bandwidth": (parameters["bandwidth"] - 1.5) / 2.5,
        "anisotropy": np.log(parameters["anisotropy"]) / math.log(4),
        "direction": parameters["direction"] / math.pi,
    }
    for name, values in uniform.items():
        assert kstest(values, "uniform").pvalue > 1e-3, name


@pytest.mark.parametrize(("bandwidth", "anisotropy", "direction"), [(2.0, 1.0, 0.0), (3.0, 4.0, 0.0), (2.5, 2.0, 1.0)])
def test_the_field_has_the_power_spectrum_of_the_documentation(bandwidth, anisotropy, direction):
    num, size = 4000, 16
    noise = np.random.default_rng(0).standard_normal((num, size, size))
    fields = _filtered(noise, *(np.full(num, value) for value in (bandwidth, anisotropy, direction)))
    measured = (np.abs(np.fft.fft2(fields)) ** 2).mean(0) / size**2

    cycles = np.fft.fftfreq(size, 1 / size)
    y, x = np.meshgrid(-cycles, cycles, indexing="ij")
    along = x * math.cos(direction) + y * math.sin(direction)
    across = y * math.cos(direction) - x * math.sin(direction)
    expected = np.exp(-(anisotropy * along**2 + across**2 / anisotropy) / (2 * bandwidth**2))
    # a periodogram's relative deviation is at most sqrt(2 / num); the highest frequency of an even grid has no sign,
    # so that a rotated spectrum is the mean of two there
    inner = (np.abs(x) < size / 2) & (np.abs(y) < size / 2)
    assert np.abs(measured - expected)[inner].max() < 5 * math.sqrt(2 / num)


def test_features_are_long_in_the_direction_of_the_anisotropy():
    def mean_jump(direction, axis):
        designs, _ = random_composites(64, seed=0, anisotropy=(4, 4), direction=(direction, direction))
        return np.abs(np.diff(designs, axis=axis)).mean()

    assert mean_jump(0.0, axis=2) < 0.5 * mean_jump(0.0, axis=1)  # along x
    assert mean_jump(math.pi / 2, axis=1) < 0.5 * mean_jump(math.pi / 2, axis=2)  # along y
    diagonal, _ = random_composites(64, seed=0, anisotropy=(4, 4), direction=(math.pi / 4, math.pi / 4))
    rising = np.abs(diagonal[:, 1:, :-1] - diagonal[:, :-1, 1:]).mean()  # row 0 is at the top: down-left to up-right
    falling = np.abs(diagonal[:, 1:, 1:] - diagonal[:, :-1, :-1]).mean()
    assert rising < 0.7 * falling


def test_designs_are_periodic():
    designs, _ = random_composites(500, seed=0)
    across_the_border = np.abs(designs[:, 0] - designs[:, -1]).mean()
    inside = np.abs(designs[:, 15] - designs[:, 16]).mean()
    assert abs(across_the_border - inside) < 5 * math.sqrt(2 * inside / (500 * 32 / 4))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num": 0}, "num"),
        ({"num": 2.5}, "num"),
        ({"num": 1, "size": 2}, "size"),
        ({"num": 1, "seed": -1}, "seed"),
        ({"num": 1, "volume_fraction": (0.0, 0.5)}, "volume_fraction"),
        ({"num": 1, "volume_fraction": (0.6, 0.5)}, "volume_fraction"),
        ({"num": 1, "bandwidth": (float("nan"), 2)}, "bandwidth"),
        ({"num": 1, "anisotropy": (-1, 2)}, "anisotropy"),
        ({"num": 1, "direction": 3.0}, "direction"),
        ({"num": 1, "direction": (0, float("inf"))}, "direction"),
    ],
)
def test_bad_input_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        random_composites(**arguments)
