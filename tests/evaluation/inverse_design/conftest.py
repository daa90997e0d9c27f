import pytest
import torch

from mechdiffusers.evaluation.inverse_design import stored_responses
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import build_dataset, random_composites
from mechdiffusers.models import ResponseEncoder, response_normalisation


@pytest.fixture(scope="session")
def composites():
    """A dataset of 24 designs of 8 x 8 pixels, at order 1."""
    designs, _ = random_composites(24, size=8, seed=3)
    return build_dataset(designs, ("uniaxial_extension", "shear"), [0.1, 0.2, 0.3], element_order=1, progress=False)


@pytest.fixture
def conditional(make_pipeline, composites):
    """A pipeline with random weights for the responses of the dataset."""
    pipe = make_pipeline(conditional=True)
    normalisation = response_normalisation(torch.from_numpy(stored_responses(composites)))
    encoder = ResponseEncoder(6, 8, spec=ResponseSpec.of(composites).to_dict(), **normalisation)
    pipe.register_modules(response_encoder=encoder.eval())
    return pipe
