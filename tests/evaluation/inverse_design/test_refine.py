"""Refinement by simulating one design after the other, with the simulator itself as an exact or a biased predictor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mechdiffusers.evaluation.inverse_design import refine, response_error
from mechdiffusers.evaluation.inverse_design.interface_flips import interface_length, lengthening, sets_of_flips
from mechdiffusers.evaluation.inverse_design.refine import _kriged
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import random_composites

SPEC = ResponseSpec(
    "stress",
    ["uniaxial_extension", "uniaxial_extension_x"],
    [[0.05], [0.05]],
    units="modulus of the soft phase",
    signed=False,
    solver={"element_order": 1},
)
FINER = replace(SPEC, solver={**SPEC.solver, "element_order": 2})


exact = SPEC.simulator()


class CountedSimulator:
    """Stands for ``ResponseSpec.simulator``: a function at each element order, and the designs that each was given."""

    def __init__(self, monkeypatch, at_order) -> None:
        self.simulated = {1: [], 2: []}

        def simulator(spec, *, element_order=None, device=None, progress=False):
            order = element_order or spec.solver["element_order"]

            def simulate(designs):
                self.simulated[order] += [design.tobytes() for design in designs]
                return at_order[order](designs)

            return simulate

        monkeypatch.setattr(ResponseSpec, "simulator", simulator)


@pytest.fixture(scope="module")
def question():
    designs, _ = random_composites(4, size=6, seed=3)
    return np.asarray(designs[:2], dtype=np.float32), exact(np.asarray(designs[2:], dtype=np.float64))


def test_the_errors_that_come_back_are_those_of_the_designs_and_never_grow(question) -> None:
    designs, targets = question
    refined = refine(designs, targets, SPEC, exact, num_rounds=2)
    assert refined.designs.shape == designs.shape
    assert refined.designs.dtype == designs.dtype
    of_lists = refine(designs.astype(int).tolist(), targets, SPEC, exact, num_rounds=2)
    np.testing.assert_array_equal(of_lists.designs, refined.designs)
    assert set(np.unique(refined.designs)) <= {0, 1}
    np.testing.assert_allclose(refined.error[:, 0], response_error(exact(designs), targets), rtol=1e-9)
    np.testing.assert_allclose(refined.error[:, -1], response_error(exact(refined.designs), targets), rtol=1e-9)
    assert (np.diff(refined.error) <= 0).all()
    assert (refined.error[:, -1] < 0.5 * refined.error[:, 0]).all()


def test_what_is_known_of_the_designs_is_not_simulated_again(question) -> None:
    designs, targets = question
    simulated: list[int] = []

    def counted(chosen):
        simulated.append(len(chosen))
        return exact(chosen)

    expected = refine(designs, targets, SPEC, exact, simulator=counted, num_rounds=2)
    of_all = [simulated.pop() for _ in list(simulated)][::-1]
    refined = refine(designs, targets, SPEC, exact, simulator=counted, response=exact(designs), num_rounds=2)
    np.testing.assert_array_equal(refined.designs, expected.designs)
    assert of_all == [2, *simulated]


@pytest.fixture(scope="module")
def predictor():
    """Stress that is exponential in the pixels, fitted to some designs: wrong by some per cent, as networks are."""
    designs, _ = random_composites(128, size=6, seed=9)
    pixels = np.column_stack([np.asarray(designs).reshape(128, -1), np.ones(128)])
    weights = np.linalg.lstsq(pixels, np.log(exact(np.asarray(designs)).reshape(128, -1)))[0]

    def predict(designs):
        return np.exp(designs.reshape(len(designs), -1) @ weights[:-1] + weights[-1]).reshape(-1, 2, 1)

    return predict


def test_coarse_simulations_bring_designs_nearer_by_as_few_of_the_spec(question, monkeypatch) -> None:
    designs = question[0]
    fine = FINER.simulator()
    targets = fine(np.asarray(random_composites(4, size=6, seed=3)[0][2:], dtype=np.float64))
    counted = CountedSimulator(monkeypatch, {order: SPEC.simulator(element_order=order) for order in (1, 2)})
    refined = refine(designs, targets, FINER, exact, num_rounds=1, num_coarse_steps=4)
    assert len(counted.simulated[2]) <= 2 * (1 + 1)
    assert 2 < len(counted.simulated[1]) <= 2 * (1 + 4)
    of_them = fine(refined.designs.astype(np.float64))
    np.testing.assert_allclose(refined.error[:, -1], response_error(of_them, targets), rtol=1e-9)
    assert (np.diff(refined.error) <= 0).all()
    without = refine(designs, targets, FINER, exact, num_rounds=1, num_coarse_steps=0)
    assert refined.error[:, -1].mean() < 0.5 * without.error[:, -1].mean()


def stand_in(monkeypatch, coarse=1.0, fine=1.0, lost=lambda order, design: False) -> CountedSimulator:
    """Responses of first-order elements times a factor of each load case at each order, in the place of our solver."""

    def at_order(order, factor):
        def simulate(designs):
            missing = np.array([lost(order, design) for design in designs])
            return np.where(missing[:, None, None], np.nan, exact(designs) * np.broadcast_to(factor, (2, 1)))

        return simulate

    return CountedSimulator(monkeypatch, {1: at_order(1, coarse), 2: at_order(2, fine)})


def test_what_first_order_elements_are_always_wrong_by_does_not_matter(question, predictor, monkeypatch) -> None:
    designs, targets = question
    options = {"response": exact(designs), "num_rounds": 1, "num_coarse_steps": 3}
    stand_in(monkeypatch)
    right = refine(designs, targets, FINER, predictor, **options)
    factor = np.array([[1.5], [0.7]])
    stand_in(monkeypatch, coarse=factor)
    wrong = refine(designs, targets, FINER, lambda chosen: predictor(chosen) * factor, **options)
    np.testing.assert_array_equal(wrong.designs, right.designs)
    np.testing.assert_allclose(wrong.error, right.error, rtol=1e-9)
    assert (right.error[:, 1] < 0.5 * right.error[:, 0]).all()


@pytest.mark.parametrize("order", [1, 2])
def test_a_design_that_is_not_solved_at_either_order_stays(question, predictor, monkeypatch, order) -> None:
    designs, targets = question
    start = designs[0].astype(np.float64)
    simulator = stand_in(monkeypatch, lost=lambda at, design: at == order and (design == start).all())
    refined = refine(designs, targets, FINER, predictor, num_rounds=1, num_coarse_steps=2)
    np.testing.assert_array_equal(refined.designs[0], designs[0])
    assert refined.error[1, 1] < refined.error[1, 0]
    assert len(simulator.simulated[2]) == 2 + 1  # a neighbour of the other one alone
    if order == 2:
        assert np.isnan(refined.error[0]).all()
    else:
        assert refined.error[0, 0] == refined.error[0, 1]


def test_a_chain_leaves_a_design_that_is_not_solved_at_the_order_of_the_spec(question, predictor, monkeypatch) -> None:
    designs, targets = question
    start = designs[0].astype(np.float64)
    simulator = stand_in(monkeypatch, lost=lambda order, design: order == 2 and (design != start).any())
    refined = refine(designs[:1], targets[0], FINER, predictor, num_rounds=3, num_coarse_steps=1)
    np.testing.assert_array_equal(refined.designs[0], designs[0])
    assert (refined.error == refined.error[0, 0]).all()
    assert len(set(simulator.simulated[2])) == len(simulator.simulated[2]) == 1 + 3


def test_what_a_predictor_is_always_wrong_by_does_not_matter(question) -> None:
    designs, targets = question
    right = refine(designs, targets, SPEC, exact, num_rounds=1)
    biased = refine(designs, targets, SPEC, lambda designs: exact(designs) + 0.7, num_rounds=1)
    np.testing.assert_array_equal(biased.designs, right.designs)


@pytest.mark.parametrize("order", [1, 2])
def test_a_design_does_not_depend_on_those_after_it_and_tensors_come_back_as_tensors(
    question, predictor, order
) -> None:
    designs, targets = question
    spec, options = {1: SPEC, 2: FINER}[order], {"num_rounds": 1, "num_coarse_steps": 2}
    both = refine(torch.from_numpy(designs), torch.from_numpy(targets), spec, predictor, **options, seed=5)
    alone = refine(designs[:1], targets[0], spec, predictor, **options, seed=5)
    assert isinstance(both.designs, torch.Tensor)
    assert isinstance(both.error, torch.Tensor)
    np.testing.assert_array_equal(both.designs[0], alone.designs[0])
    other = refine(designs[:1], targets[0], spec, predictor, **options, seed=6)
    assert (other.designs != alone.designs).any()


@pytest.mark.parametrize("spec", [SPEC, FINER], ids=["first order", "coarse steps"])
def test_what_a_target_leaves_open_counts_for_nothing(question, spec) -> None:
    designs, targets = question
    open_target = targets[0].copy()
    open_target[1] = np.nan

    def of_one_case_alone(designs):
        response = exact(designs)
        response[:, 1] = np.random.default_rng(0).normal(size=response[:, 1].shape)
        return response

    options = {"num_rounds": 1, "num_coarse_steps": 2}
    refined = refine(designs[:1], open_target, spec, of_one_case_alone, **options)
    same = refine(designs[:1], open_target, spec, exact, **options)
    np.testing.assert_array_equal(refined.designs, same.designs)


def test_a_design_of_one_phase_has_no_neighbours_and_stays() -> None:
    target = exact(np.zeros((1, 6, 6))) * 2
    refined = refine(np.zeros((1, 6, 6)), target, SPEC, exact, num_rounds=2)
    assert not refined.designs.any()
    np.testing.assert_allclose(refined.error, 0.5, rtol=1e-9)


def test_a_simulator_of_ones_own_refines_towards_a_signed_scalar_in_every_step() -> None:
    """The difference of the volume fractions of the two halves: signed, one number, and no solver of ours."""
    spec = ResponseSpec("imbalance", ["left_right"], [[0.0]], units="1", signed=True)
    simulated = []

    def imbalance(designs):
        simulated.append(len(designs))
        half = designs.shape[2] // 2
        return (designs[:, :, :half].mean((1, 2)) - designs[:, :, half:].mean((1, 2)))[:, None, None]

    designs = np.asarray(random_composites(2, size=6, seed=3)[0], dtype=np.float64)
    targets = imbalance(designs) - 0.25
    assert (targets < 0).any()
    simulated.clear()
    refined = refine(designs, targets, spec, lambda chosen: imbalance(chosen) + 0.1, simulator=imbalance, num_rounds=2)
    assert (refined.error[:, -1] < 0.5 * refined.error[:, 0]).all()
    found = imbalance(refined.designs)
    np.testing.assert_allclose(refined.error[:, -1], response_error(found, targets, signed=True), rtol=1e-9)


@pytest.mark.parametrize("near", [0.0, 1e-9])
def test_an_entry_that_is_to_be_zero_does_not_outweigh_the_others(near) -> None:
    """The volume fraction, and the difference of the halves, which is to be zero or nearly so, as it already is."""
    spec = ResponseSpec("share", ["whole", "difference"], [[0.0], [0.0]], units="1", signed=True)

    def shares(designs):
        left, right = designs[:, :, :4].mean((1, 2)), designs[:, :, 4:].mean((1, 2))
        return np.stack([(left + right) / 2, left - right], 1)[..., None]

    half = np.asarray(random_composites(1, size=8, seed=3)[0][:, :, :4], dtype=np.float64)
    design = np.concatenate([half, half[:, :, ::-1]], axis=2)
    wanted = [[design.mean() - 6 / 64], [near]]
    refined = refine(design, wanted, spec, shares, simulator=shares, num_rounds=4)
    assert refined.error[0, -1] < 0.5 * refined.error[0, 0]


def test_one_pixel_that_is_wrong_is_found(question) -> None:
    designs, _ = question
    other = designs[0].copy()
    row, column = np.argwhere(lengthening(other) == 0)[0]
    other[row, column] = 1 - other[row, column]
    wanted, found = exact(designs[:1])[0], exact(other[None])[0]
    longest = interface_length(designs[0])
    scale = np.linalg.norm(wanted, axis=1)
    sets = sets_of_flips(other, found, wanted, scale, longest, exact, np.random.default_rng(0))
    assert any((neighbour == designs[0]).all() for neighbour in sets)


@pytest.mark.parametrize("room", [0, 4])
def test_neighbours_differ_at_the_interface_and_theirs_is_no_longer_than_it_may_be(room) -> None:
    (design,), _ = random_composites(1, size=16, seed=2)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16 * 16, 4))

    def predict(designs):
        return (designs.reshape(len(designs), -1) @ weights).reshape(-1, 2, 2)

    response = predict(design[None])[0]
    longest = interface_length(design) + room
    sets = sets_of_flips(design, response, response + 5, np.ones(len(response)), longest, predict, rng)
    lengths = [interface_length(neighbour) for neighbour in sets]
    assert max(lengths) <= longest
    assert len(sets) > 10
    if room:
        assert max(lengths) > interface_length(design)
    padded = np.pad(design, 1, mode="edge")
    around = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    assert not (np.stack(sets) != design)[:, (around == design).all(0)].any()


def test_how_much_longer_the_interface_becomes_is_what_changing_the_pixel_does() -> None:
    designs, _ = random_composites(3, size=16, seed=0)
    changes = np.full(designs.shape, 9)
    for number, row, column in np.ndindex(designs.shape):
        other = designs[number].copy()
        other[row, column] = 1 - other[row, column]
        changes[number, row, column] = interface_length(other) - interface_length(designs[number])
    np.testing.assert_array_equal(lengthening(designs), changes)


def test_kriging_gives_known_values_back_and_a_straight_line_between_two() -> None:
    known = np.array([[[0, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]]], dtype=float)
    values = np.array([1.0, 3.0, -2.0]).reshape(3, 1, 1)
    np.testing.assert_allclose(_kriged(known, values, known), values, atol=1e-12)
    quarter = np.array([[[1.0, 0, 0], [0, 0, 0]]])
    np.testing.assert_allclose(_kriged(known[:2], values[:2], quarter), 1.5, rtol=1e-12)
    np.testing.assert_allclose(_kriged(known[:1], values[:1], quarter), 1.0, rtol=1e-12)


def test_kriging_of_designs_that_depend_on_each_other_gives_what_is_linear_in_the_pixels() -> None:
    known = np.array([[[0, 0, 0, 0]], [[1, 1, 0, 0]], [[0, 0, 1, 0]], [[1, 1, 1, 0]]], dtype=float)
    slopes = np.array([[1.0, -3.0], [1.0, -3.0], [4.0, 0.5], [0.0, 0.0]])
    others = np.array([[[1, 0, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 1, 1]]], dtype=float)
    values, wanted = ((designs[:, 0] @ slopes + 7)[:, None] for designs in (known, others))
    np.testing.assert_allclose(_kriged(known, values, others), wanted, rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"designs": np.full((2, 6, 6), 0.5)}, "designs"),
        ({"designs": np.zeros((3, 6, 6))}, "designs"),
        ({"target": np.full((2, 2, 3), 1.0)}, "target"),
        ({"designs": [["soft"]]}, "designs must be a tensor, an array or lists of real numbers, .* got list"),
        ({"response": np.ones((2, 1, 3))}, r"response must have shape \(2, "),
        ({"response": np.full((2, *SPEC.shape), np.inf)}, "response must be finite"),
        ({"target": -np.ones(SPEC.shape)}, "target must be non-negative, since its specification is unsigned, got -1"),
        ({"spec": SPEC.to_dict()}, r"spec must be a ResponseSpec, such as ResponseSpec.of\(dataset\), got dict"),
        ({"spec": replace(SPEC, solver=None)}, "simulator must be given for responses from elsewhere"),
        ({"simulator": "abacus"}, r"simulator must be a function of designs \(B, H, W\), got 'abacus'"),
        (
            {"simulator": lambda designs: np.ones((len(designs), 3))},
            r"simulator must return the response of 2 designs, shape \(2, 2, 1\), got \(2, 3\)",
        ),
        ({"simulator": lambda designs: np.full((len(designs), 2, 1), np.inf)}, "simulator must return a finite resp"),
        ({"predict": None}, "predict must be a function of designs, such as pipe.predict_response, got None"),
        ({"predict": lambda designs: np.ones((len(designs), 1))}, r"predict must give a response of shape \(1, 2, "),
        ({"num_rounds": 0}, "num_rounds"),
        ({"num_rounds": True}, "num_rounds"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"num_coarse_steps": -1}, "num_coarse_steps must be an integer of at least 0, got -1"),
    ],
)
def test_bad_input_is_named(question, change, named) -> None:
    designs, targets = question
    arguments = {"designs": designs, "target": targets, "spec": SPEC, "predict": exact, "num_rounds": 1, **change}
    with pytest.raises(ValueError, match=named):
        refine(**arguments)
