"""Equilibrium of one strain, and the path of strains: stability, and trials that fail."""

import math

import numpy as np
import pytest
import torch

from mechdiffusers.mechanics import simulate
from mechdiffusers.mechanics.load_cases import LOAD_CASES, LoadCase
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.mechanics.newton import Cell, equilibrate
from mechdiffusers.mechanics.path_following import RESPONSE_TOLERANCE, follow
from mechdiffusers.microstructures import random_composites

CPU = torch.device("cpu")
LAW = CompressibleNeoHookean(0.3)


def moduli(num, size):
    return 1 + 99 * torch.from_numpy(random_composites(num, size=size)[0]).double()


@pytest.fixture
def column():
    return Cell(24, 3, 2, LOAD_CASES["uniaxial_compression"], LAW, CPU)


def test_a_trial_whose_forces_are_not_finite_is_forgotten(monkeypatch):
    cell = Cell(4, 4, 1, LOAD_CASES["shear"], LAW, CPU)
    modulus, start = moduli(2, 4), 0.1 * cell.affine.repeat(2, 1, 1, 1)
    expected = equilibrate(cell, modulus, start)
    evaluate, evaluated = cell.evaluate, []

    def collapses_once(displacement, modulus):
        now = evaluate(displacement, modulus)
        evaluated.append(now)
        if len(evaluated) == 2:
            now.forces[0], now.admissible[0] = math.inf, False
        return now

    monkeypatch.setattr(cell, "evaluate", collapses_once)
    found = equilibrate(cell, modulus, start)
    assert found.solved.all()
    held, expected_held = (state.forces * ~cell.free for state in (found, expected))
    assert torch.allclose((held * cell.affine).sum((1, 2, 3)), (expected_held * cell.affine).sum((1, 2, 3)), rtol=1e-8)


def test_an_unstable_state_is_left_for_a_stable_one(column):
    """A slender clamped column of one phase buckles near Euler's strain; the straight state is no answer beyond."""
    design = torch.zeros(1, 24, 3)
    design[0, 3, 0] = 0.02  # an imperfection, without which nothing says to which side
    strains = np.linspace(0.01, 0.12, 12)
    result = simulate(design, ["uniaxial_compression"], strains, element_order=2, return_fields=True)
    sideways = result.displacement[0, 0, :, :, :, 0].mean(-1).abs().amax(-1)
    assert result.converged.all()
    assert sideways[2] < 0.1
    assert sideways[-1] > 1.0
    stress = result.stress[0, 0]
    assert stress[-1] < 0.7 * stress[2] / strains[2] * strains[-1]  # straight, it would go on rising
    state = column.elements.state(result.displacement[:, 0, -1])
    assert column.solver.factorise(column.elements.stiffness(state, 1 + 99 * design.double())).definite.all()


def test_a_perfect_column_buckles_or_is_flagged_but_never_stays_straight():
    strains = torch.tensor([0.02, 0.04, 0.08, 0.1], dtype=torch.float64)  # Euler's is 0.05
    stress = simulate(torch.zeros(1, 24, 3), ["uniaxial_compression"], strains, element_order=2).stress[0, 0]
    assert stress[:2].isfinite().all()
    beyond = stress[2:] / (stress[0] / strains[0] * strains[2:])
    assert (beyond.isnan() | (beyond < 0.8)).all()


def test_a_start_that_is_balanced_is_an_answer_where_it_is_stable_alone():
    """The straight column that its half says, which is held on the plane of symmetry and cannot buckle."""
    load = LOAD_CASES["uniaxial_compression"]
    half = Cell(24, 1, 2, LoadCase(load.gradient, {**load.prescribed, "left": "x"}), LAW, CPU)
    column = Cell(24, 2, 2, load, LAW, CPU)
    strains = torch.tensor([0.01, 0.05], dtype=torch.float64)  # Euler's is 0.02
    ones = torch.ones(2, 24, 2, dtype=torch.float64)
    right = equilibrate(half, ones[..., :1], strains.view(-1, 1, 1, 1) * half.affine, tolerance=1e-12)
    assert right.solved.all()
    left = right.displacement.flip(2)[:, :, :-1] * torch.tensor([-1.0, 1.0])
    straight = torch.cat([left, right.displacement], 2)
    found = equilibrate(column, ones, straight)
    assert found.solved[0]
    assert torch.equal(found.displacement[0], straight[0])
    assert not found.solved[1] or (found.displacement[1] - straight[1]).abs().max() > 0.1


def test_the_tangent_of_a_path_is_the_derivative_of_its_states_where_it_is_stable_and_nan_elsewhere(column):
    modulus = torch.ones(1, 24, 3, dtype=torch.float64)
    strains = torch.tensor([0.0099, 0.01, 0.0101], dtype=torch.float64)
    behind, here, ahead = (now.displacement.clone() for now in follow(column, modulus, strains))
    tangent = column.path_tangent(column.elements.state(here), modulus)
    assert torch.allclose(tangent, (ahead - behind) / 2e-4, atol=1e-4)
    straight = 0.1 * column.affine[None]  # far beyond Euler's strain
    assert column.path_tangent(column.elements.state(straight), modulus).isnan().all()


@pytest.mark.parametrize("case", ["uniaxial_extension", "shear"])
def test_stress_and_energy_are_right_long_before_the_displacements_are(case):
    cell = Cell(16, 16, 1, LOAD_CASES[case], LAW, CPU)
    modulus, strains = moduli(4, 16), torch.linspace(0.05, 0.3, 6, dtype=torch.float64)
    paths = (follow(cell, modulus, strains, tolerance) for tolerance in (RESPONSE_TOLERANCE, 1e-11))
    apart = 0.0
    for loose, tight in zip(*paths, strict=True):
        assert torch.allclose(loose.energy, tight.energy, rtol=1e-12)
        assert torch.allclose(loose.stress, tight.stress, rtol=1e-9, atol=0)
        apart = max(apart, float((loose.displacement - tight.displacement).abs().max()))
    assert apart > 1e-8


def test_a_path_yields_every_strain_it_was_asked_for():
    cell = Cell(3, 3, 1, LOAD_CASES["shear"], LAW, CPU)
    strains = torch.tensor([0.1, 0.25, 0.3], dtype=torch.float64)
    for strain, now in zip(strains, follow(cell, moduli(2, 4)[:, :3, :3], strains), strict=True):
        assert torch.allclose(now.displacement[:, 0, :, 0], strain * 3)
