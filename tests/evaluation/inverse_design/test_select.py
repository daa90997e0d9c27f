"""The shape of curves, whatever their height, and the choice of designs by it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from mechdiffusers.evaluation.inverse_design import curve_shape_error, nearest_in_curve_shape, response_error
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import random_composites

SPEC = ResponseSpec(
    "stress",
    ["uniaxial_extension", "shear"],
    [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]],
    units="modulus of the soft phase",
    signed=False,
    solver={"element_order": 2},
)


def curves(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 2, (num, 2, 3))


def test_the_height_of_a_load_case_is_no_error_of_its_shape():
    target = curves(5)
    heights = np.random.default_rng(1).uniform(0.1, 10, (5, 2, 1))
    np.testing.assert_allclose(curve_shape_error(heights * target, target), 0, atol=1e-15)


def test_no_factor_takes_away_more():
    response, target = curves(4, seed=1), curves(4)
    least = np.zeros(4)
    for i, case in np.ndindex(4, 2):
        y, wanted = response[i, case], target[i, case]
        least[i] += minimize_scalar(lambda s, y=y, wanted=wanted: np.sum((s * y - wanted) ** 2)).fun ** 0.5 / (
            2 * np.linalg.norm(wanted)
        )
    np.testing.assert_allclose(curve_shape_error(response, target), least, rtol=1e-9)
    assert (curve_shape_error(response, target) < response_error(response, target)).all()
    np.testing.assert_allclose(curve_shape_error(response, target[2])[2], least[2], rtol=1e-9)


def test_what_a_target_leaves_open_has_no_shape_and_what_is_not_solved_has_no_error():
    response, target = curves(3, seed=1), curves(3)
    target[0, 1], target[1, :, 2] = math.nan, math.nan
    response[0, 1], response[2, 0, 1] = math.nan, math.nan
    found = curve_shape_error(response, target)
    np.testing.assert_allclose(found[:1], curve_shape_error(response[:1, :1], target[:1, :1]))
    np.testing.assert_allclose(found[1:2], curve_shape_error(response[1:2, :, :2], target[1:2, :, :2]))
    assert math.isnan(found[2])


def test_a_curve_of_the_other_sign_has_another_shape():
    target = curves(3) * [[[1.0], [-1.0]]]
    np.testing.assert_allclose(curve_shape_error(2 * target, target), 0, atol=1e-15)
    np.testing.assert_allclose(curve_shape_error(-2 * target, target), 1, rtol=1e-12)


def test_among_signed_scalars_of_a_simulator_of_ones_own_the_sign_comes_before_the_size(designs):
    spec = ResponseSpec("stiffness", ["C16"], [[0.0]], units="GPa", signed=True)
    found = np.array([3.0, -0.1, 0.9, -1.0, 1.2, -7.0]).reshape(6, 1, 1)
    chosen = nearest_in_curve_shape(designs, [[-1.0]], spec, 6, simulator=lambda _: found)
    np.testing.assert_array_equal(chosen, designs[[3, 1, 5, 2, 4, 0]])


@pytest.mark.parametrize("shape", [(5, 2, 3), (1, 2, 3), (3,), (2, 4)])
def test_a_target_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"target must have the shape \(B, L, S\) or \(L, S\)"):
        curve_shape_error(curves(3), np.ones(shape))


@pytest.fixture(scope="module")
def designs() -> np.ndarray:
    return np.asarray(random_composites(6, size=8, seed=4)[0], dtype=np.float32)


def test_first_order_elements_tell_the_shape_though_not_the_height(designs):
    fine, coarse = (SPEC.simulator(element_order=order)(designs) for order in (2, 1))
    assert curve_shape_error(coarse, fine).mean() < 0.1 * response_error(coarse, fine).mean()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_nearest_in_curve_shape_comes_first_however_high_its_curves(designs, kind):
    response = SPEC.simulator(element_order=1)(designs)
    targets = response[[2, 3]] * np.array([[[3.0], [0.2]], [[0.5], [4.0]]])
    chosen = nearest_in_curve_shape(kind(designs), targets, SPEC, 2)
    assert type(chosen) is type(kind(designs))
    np.testing.assert_array_equal(chosen, nearest_in_curve_shape(designs.tolist(), targets, SPEC, 2))
    np.testing.assert_array_equal(np.asarray(chosen)[0], designs[2])
    np.testing.assert_array_equal(np.asarray(chosen)[2], designs[3])  # each target has three of them
    errors = curve_shape_error(response[:3], targets[0])
    np.testing.assert_array_equal(np.asarray(chosen)[1], designs[np.argsort(errors)[1]])


def test_of_equal_shapes_the_nearest_in_height_comes_first(designs):
    spec = replace(SPEC, strains=[[0.1]] * 2)
    response = spec.simulator(element_order=1)(designs)
    target = 1.01 * response[4]
    chosen = nearest_in_curve_shape(designs, target, spec, len(designs))
    order = np.argsort(response_error(response, target))
    assert order[0] == 4
    np.testing.assert_array_equal(chosen, designs[order])


def test_a_design_that_is_not_solved_comes_last(designs):
    known = SPEC.simulator(element_order=1)(designs)
    known[0, 0, 2] = math.nan
    chosen = nearest_in_curve_shape(designs, known[1], SPEC, len(designs), simulator=lambda _: known)
    np.testing.assert_array_equal(chosen[[0, -1]], designs[[1, 0]])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"designs": np.zeros((5, 8, 8))}, "designs"),
        ({"target": np.ones((2, 2, 4))}, "target"),
        ({"num_designs": 0}, "num_designs"),
        ({"num_designs": 4}, "num_designs must be at most the 3 designs of a target, got 4"),
        ({"target": -np.ones((2, 2, 3))}, "target must be non-negative, since its specification is unsigned, got -1"),
        ({"spec": SPEC.to_dict()}, r"spec must be a ResponseSpec, such as ResponseSpec.of\(dataset\), got dict"),
        ({"spec": replace(SPEC, solver=None)}, "simulator must be given for responses from elsewhere"),
        (
            {"simulator": lambda designs: np.ones((len(designs), 2))},
            r"simulator must return the response of 6 designs, shape \(6, 2, 3\), got \(6, 2\)",
        ),
    ],
)
def test_bad_input_is_named(designs, change, named):
    arguments = {"designs": designs, "target": np.ones((2, 2, 3)), "spec": SPEC, "num_designs": 1, **change}
    with pytest.raises(ValueError, match=named):
        nearest_in_curve_shape(**arguments)
