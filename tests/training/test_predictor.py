"""What the predictor of responses is trained on, and how well it learns."""

import torch
from mechdiffusers.mechanics import simulate
from mechdiffusers.mechanics.load_cases import mirrored_cases, transposed_cases
from mechdiffusers.microstructures import random_composites
from mechdiffusers.training.predictor import reflected
from mechdiffusers.training.randomness import StepRandomness

CASES = ["uniaxial_extension", "uniaxial_extension_x", "equibiaxial_extension", "shear", "shear_x"]


def stresses(designs: torch.Tensor) -> torch.Tensor:
    found = simulate(designs, CASES, [0.05, 0.1], element_order=1)
    return found.stress


def test_a_reflected_design_responds_as_its_load_cases_say() -> None:
    designs = torch.from_numpy(random_composites(3, size=8, seed=4)[0])
    itself = stresses(designs)
    for reflection, cases in (
        (designs.flip(-1), mirrored_cases(CASES)),
        (designs.mT.contiguous(), transposed_cases(CASES)),
    ):
        response = stresses(reflection)
        told = [i for i, case in enumerate(cases) if case is not None]
        assert len(told) >= 3
        torch.testing.assert_close(response[:, told], itself[:, [cases[i] for i in told]], rtol=1e-6, atol=0)
        for i in set(range(len(CASES))) - set(told):
            assert not torch.allclose(response[:, i], itself[:, i], rtol=1e-3)


def test_reflections_leave_open_what_they_change() -> None:
    cases = ["uniaxial_extension", "uniaxial_extension_x", "shear"]
    images = torch.rand(400, 1, 4, 4)
    response = torch.arange(3.0)[None, :, None].repeat(400, 1, 2)
    seen, told = reflected(images, response, cases, StepRandomness((0,)))
    as_it_was = (seen == images).flatten(1).all(1)
    assert 0.5 < as_it_was.double().mean() < 0.62  # 9 / 16
    torch.testing.assert_close(told[as_it_was], response[as_it_was])
    assert told[~as_it_was][:, 2].isnan().all()
    transposed = (seen == images.mT).flatten(1).all(1)
    torch.testing.assert_close(told[transposed][:, :2, 0], torch.tensor([1.0, 0.0]).expand(int(transposed.sum()), 2))


def test_only_square_designs_are_transposed() -> None:
    images = torch.rand(100, 1, 4, 6)
    seen, _ = reflected(images, torch.ones(100, 1, 2), ["uniaxial_extension"], StepRandomness((0,)))
    mirrored = (seen == images.flip(-1)).flatten(1).all(1)
    assert ((seen == images).flatten(1).all(1) | mirrored).all()
    assert mirrored.any()
