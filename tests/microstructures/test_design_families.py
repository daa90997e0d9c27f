import numpy as np
import pytest

from mechdiffusers.microstructures import DESIGN_FAMILIES


@pytest.mark.parametrize("name", DESIGN_FAMILIES)
def test_a_family_is_of_binary_designs_that_a_seed_determines(name):
    make = DESIGN_FAMILIES[name]
    designs = make(5, 16, np.random.default_rng(0)).astype(float)
    assert designs.shape == (5, 16, 16)
    assert np.isin(designs, (0, 1)).all()
    np.testing.assert_array_equal(designs, make(5, 16, np.random.default_rng(0)).astype(float))
