"""What every test of the training needs."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state a process, with its mixed precision: each test has its own, as each run has."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
