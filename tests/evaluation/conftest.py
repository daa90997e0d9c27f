import pytest
from mechdiffusers.microstructures import build_dataset, random_composites


@pytest.fixture(scope="session")
def composites():
    """A dataset of 24 designs of 8 x 8 pixels, at order 1."""
    designs, _ = random_composites(24, size=8, seed=3)
    return build_dataset(designs, ("uniaxial_extension", "shear"), [0.1, 0.2, 0.3], element_order=1, progress=False)
