import numpy as np
import pytest

from mechdiffusers.evaluation import StatisticsDistance, receiver_operating_characteristic
from mechdiffusers.microstructures import DESIGN_FAMILIES, random_composites


def test_the_area_is_the_share_of_pairs_in_order_and_that_under_the_curve():
    rng = np.random.default_rng(0)
    usual, strange = rng.integers(0, 6, 40).astype(float), rng.integers(2, 9, 30).astype(float)
    roc = receiver_operating_characteristic(usual, strange)
    pairs = (strange[:, None] > usual).mean() + 0.5 * (strange[:, None] == usual).mean()
    assert roc.area == pytest.approx(pairs)
    assert np.trapezoid(roc.true_positives, roc.false_positives) == pytest.approx(pairs)
    assert (roc.false_positives[0], roc.true_positives[0]) == (0, 0)
    assert (roc.false_positives[-1], roc.true_positives[-1]) == (1, 1)


def test_the_distance_of_known_designs_has_the_number_of_features_as_its_mean_square():
    designs, _ = random_composites(500, 16)
    distance = StatisticsDistance(designs, reach=1)
    assert np.mean(distance(designs) ** 2) == pytest.approx(5 * 499 / 500)
    distance = StatisticsDistance(designs)
    noise = DESIGN_FAMILIES["noise"](50, 16, np.random.default_rng(0))
    assert receiver_operating_characteristic(distance(designs), distance(noise)).area > 0.95


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="^strange must be finite scores"):
        receiver_operating_characteristic(np.zeros(3), np.array([np.nan]))
    with pytest.raises(ValueError, match="^usual must be finite scores"):
        receiver_operating_characteristic(np.zeros((0,)), np.zeros(3))
