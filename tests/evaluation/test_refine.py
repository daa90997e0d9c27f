"""Refinement by simulating one design after the other, with the simulator itself as an exact or a biased predictor."""

import numpy as np
import pytest
import torch
from mechdiffusers.evaluation import refine, response_error
from mechdiffusers.evaluation.refine import _movable, _sets_of_flips
from mechdiffusers.microstructures import random_composites
from mechdiffusers.microstructures.build_dataset.parts import simulated_response

MEANING = {
    "quantity": "stress",
    "load_cases": ["uniaxial_extension", "uniaxial_extension_x"],
    "strains": [[0.05]] * 2,
    "units": "modulus of the soft phase",
    "element_order": 1,
    "pixel_size": 1.0,
    "material": {"law": "CompressibleNeoHookean", "young_soft": 1.0, "young_stiff": 100.0, "poisson": 0.3},
}


def exact(designs):
    return simulated_response(designs, MEANING)


@pytest.fixture(scope="module")
def question():
    designs, _ = random_composites(4, size=6, seed=3)
    return np.asarray(designs[:2], dtype=np.float32), exact(np.asarray(designs[2:], dtype=np.float64))


def test_the_errors_that_come_back_are_those_of_the_designs_and_never_grow(question) -> None:
    designs, targets = question
    refined = refine(designs, targets, MEANING, exact, num_rounds=2)
    assert refined.designs.shape == designs.shape
    assert refined.designs.dtype == designs.dtype
    assert set(np.unique(refined.designs)) <= {0, 1}
    np.testing.assert_allclose(refined.error[:, 0], response_error(exact(designs), targets), rtol=1e-9)
    np.testing.assert_allclose(refined.error[:, -1], response_error(exact(refined.designs), targets), rtol=1e-9)
    assert (np.diff(refined.error) <= 0).all()
    assert (refined.error[:, -1] < 0.5 * refined.error[:, 0]).all()


def test_what_a_predictor_is_always_wrong_by_does_not_matter(question) -> None:
    designs, targets = question
    right = refine(designs, targets, MEANING, exact, num_rounds=1)
    biased = refine(designs, targets, MEANING, lambda designs: exact(designs) + 0.7, num_rounds=1)
    np.testing.assert_array_equal(biased.designs, right.designs)


def test_a_design_does_not_depend_on_those_after_it_and_tensors_come_back_as_tensors(question) -> None:
    designs, targets = question
    both = refine(torch.from_numpy(designs), torch.from_numpy(targets), MEANING, exact, num_rounds=1, seed=5)
    alone = refine(designs[:1], targets[0], MEANING, exact, num_rounds=1, seed=5)
    assert isinstance(both.designs, torch.Tensor)
    assert isinstance(both.error, torch.Tensor)
    np.testing.assert_array_equal(both.designs[0], alone.designs[0])
    other = refine(designs[:1], targets[0], MEANING, exact, num_rounds=1, seed=6)
    assert (other.designs != alone.designs).any()


def test_what_a_target_leaves_open_counts_for_nothing(question) -> None:
    designs, targets = question
    open_target = targets[0].copy()
    open_target[1] = np.nan

    def of_one_case_alone(designs):
        response = exact(designs)
        response[:, 1] = np.random.default_rng(0).normal(size=response[:, 1].shape)
        return response

    refined = refine(designs[:1], open_target, MEANING, of_one_case_alone, num_rounds=1)
    same = refine(designs[:1], open_target, MEANING, exact, num_rounds=1)
    np.testing.assert_array_equal(refined.designs, same.designs)


def test_a_design_of_one_phase_has_no_neighbours_and_stays() -> None:
    target = exact(np.zeros((1, 6, 6))) * 2
    refined = refine(np.zeros((1, 6, 6)), target, MEANING, exact, num_rounds=2)
    assert not refined.designs.any()
    np.testing.assert_allclose(refined.error, 0.5, rtol=1e-9)


def test_one_pixel_that_is_wrong_is_found(question) -> None:
    designs, _ = question
    movable = _movable(designs[0])
    for row, column in np.argwhere(movable):
        other = designs[0].copy()
        other[row, column] = 1 - other[row, column]
        if _movable(other)[row, column]:  # there and back without a longer interface
            break
    wanted, found = exact(designs[:1])[0], exact(other[None])[0]
    sets = _sets_of_flips(other, found, wanted, exact, np.random.default_rng(0))
    assert any((neighbour == designs[0]).all() for neighbour in sets)


def test_no_pixel_that_may_change_makes_the_interface_longer() -> None:
    designs, _ = random_composites(3, size=16, seed=0)

    def length(design) -> int:
        return int(sum(np.abs(np.diff(design, axis=axis)).sum() for axis in (0, 1)))

    for design in np.asarray(designs):
        changes = np.full(design.shape, np.nan)
        for row, column in np.ndindex(design.shape):
            other = design.copy()
            other[row, column] = 1 - other[row, column]
            changes[row, column] = length(other) - length(design)
        np.testing.assert_array_equal(_movable(design), changes <= 0)
        assert _movable(design).any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"designs": np.full((2, 6, 6), 0.5)}, "designs"),
        ({"designs": np.zeros((3, 6, 6))}, "designs"),
        ({"target": np.full((2, 2, 3), 1.0)}, "target"),
        ({"num_rounds": 0}, "num_rounds"),
        ({"num_rounds": True}, "num_rounds"),
    ],
)
def test_bad_input_is_named(question, change, named) -> None:
    designs, targets = question
    arguments = {"designs": designs, "target": targets, "num_rounds": 1, **change}
    with pytest.raises(ValueError, match=named):
        refine(meaning=MEANING, predict=exact, **arguments)
