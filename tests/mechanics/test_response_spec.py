import json
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.microstructures import build_dataset, random_composites

SOLVER = {"element_order": 1, "young_soft": 2.0, "young_stiff": 50.0, "poisson": 0.2, "pixel_size": 0.5}
OURS = ResponseSpec("stress", ["shear", "shear_x"], [[0.1, 0.2]] * 2, units="MPa", signed=False, solver=SOLVER)
THEIRS = ResponseSpec("stiffness", ["C11", "C22", "C12"], [[0.0]] * 3, units="GPa", signed=True)


@pytest.mark.parametrize("spec", [OURS, THEIRS], ids=["ours", "theirs"])
def test_a_specification_comes_back_from_json_and_from_other_processes(spec):
    assert ResponseSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, replace(spec), replace(spec, units="1")}) == 2
    with pytest.raises(FrozenInstanceError):
        spec.units = "Pa"


def test_what_the_first_edition_stored_is_still_read():
    stored = {
        "quantity": "stress",
        "load_cases": ["shear", "shear_x"],
        "strains": [[0.1, 0.2], [0.1, 0.2]],
        "units": "MPa",
        "element_order": 1,
        "pixel_size": 0.5,
        "material": {"law": "CompressibleNeoHookean", "young_soft": 2.0, "young_stiff": 50.0, "poisson": 0.2},
    }
    assert ResponseSpec.from_dict(stored) == OURS
    assert OURS.to_dict() == {**stored, "signed": False}
    with pytest.raises(ValueError, match="^spec must have a material of the law CompressibleNeoHookean, got"):
        ResponseSpec.from_dict({**stored, "material": {**stored["material"], "law": "Ogden"}})


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_strains_may_be_lists_tuples_or_arrays(kind):
    assert ResponseSpec("stress", ("a", "b"), kind([[0.1, 0.2], [0.3, 0.4]]), units="1", signed=False) == ResponseSpec(
        "stress", ["a", "b"], [[0.1, 0.2], [0.3, 0.4]], units="1", signed=False
    )


def test_the_shape_is_that_of_a_response_and_scalars_have_no_curve():
    assert (OURS.shape, OURS.is_scalar) == ((2, 2), False)
    assert (THEIRS.shape, THEIRS.is_scalar) == ((3, 1), True)
    assert not replace(THEIRS, strains=[[0.1]] * 3).is_scalar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantity": ""}, "quantity must be a word or words, got ''"),
        ({"units": None}, "units must be a word or words, got None; '1' is for a quantity without units"),
        ({"signed": "yes"}, "signed must be True or False, got 'yes'"),
        ({"signed": None}, "signed must be True or False, got None"),
        ({"load_cases": "C11"}, "load_cases must be a sequence of different names, at least one, got 'C11'"),
        ({"load_cases": []}, "load_cases must be a sequence of different names"),
        ({"load_cases": ["C11", "C11", "C12"]}, "load_cases must be a sequence of different names"),
        ({"load_cases": ["C11", "C22", 3]}, "load_cases must be a sequence of different names"),
        ({"strains": [0.0, 0.0, 0.0]}, "strains must be 3 lists, one for each of the load cases"),
        ({"strains": [[0.0], [0.0]]}, "strains must be 3 lists"),
        ({"strains": [[0.1], [0.1, 0.2], [0.1]]}, "strains must be 3 lists"),
        ({"strains": [[]] * 3}, "strains must be 3 lists"),
        ({"strains": None}, "strains must be 3 lists"),
        ({"strains": [[0.2, 0.1]] * 3}, "strains must be .* finite and increasing"),
        ({"strains": [[0.1, np.inf]] * 3}, "strains must be .* finite and increasing"),
        ({"solver": SOLVER}, "quantity must be 'stress' or 'energy' for our solver, got 'stiffness'"),
    ],
)
def test_unfit_specifications_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(THEIRS, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_cases": ["shear", "torsion"]}, "load_cases must be among .* got 'torsion'"),
        ({"strains": [[0.0, 0.1]] * 2}, "strains must be positive for our solver"),
        ({"solver": {"poisson": 0.7}}, r"poisson must lie inside \(0, 0.5\), got 0.7"),
        ({"solver": {"element_order": 3}}, "element_order must be the integer 1 or 2, got 3"),
        ({"solver": {"speed": 3}}, "solver must be None or settings of simulate among .*'young_soft'.*, got"),
        ({"solver": "abaqus"}, "solver must be None or settings of simulate"),
    ],
)
def test_what_our_solver_cannot_have_made_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(OURS, **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"units": "kPa", "signed": True}, "units 'MPa', not 'kPa'"),
        ({"quantity": "energy"}, "quantity 'stress', not 'energy'"),
        ({"load_cases": ["shear_x", "shear"]}, "load_cases ['shear', 'shear_x'], not ['shear_x', 'shear']"),
        ({"signed": True}, "signed False, not True"),
        ({"solver": None}, f"solver {SOLVER}, not None"),
        ({"strains": [[0.1, 0.2 * (1 + 1e-12)]] * 2}, None),
        ({"solver": {**SOLVER, "young_stiff": 50.0 * (1 + 1e-12)}}, None),
        ({"solver": {**SOLVER, "pixel_size": 2.0}}, f"solver {SOLVER}, not { ({**SOLVER, 'pixel_size': 2.0}) }"),
    ],
)
def test_the_first_difference_is_a_sentence_and_the_last_digits_are_none(change, sentence):
    assert OURS.difference(replace(OURS, **change)) == sentence


def test_our_simulator_is_simulate_with_the_settings_of_the_specification():
    designs = random_composites(2, size=6, seed=0)[0].astype(float)
    expected = simulate(designs, OURS.load_cases, OURS.strains, **SOLVER).stress
    np.testing.assert_array_equal(OURS.simulator()(designs), expected)
    finer = simulate(designs, OURS.load_cases, OURS.strains, **{**SOLVER, "element_order": 2}).stress
    np.testing.assert_array_equal(OURS.simulator(element_order=2)(designs), finer)
    energy = replace(OURS, quantity="energy").simulator()(designs)
    np.testing.assert_array_equal(energy, simulate(designs, OURS.load_cases, OURS.strains, **SOLVER).energy)


def test_settings_left_out_stand_at_the_defaults_of_simulate():
    spec = replace(OURS, solver={"young_stiff": 7})
    expected = {"element_order": 2, "young_soft": 1.0, "young_stiff": 7.0, "poisson": 0.3, "pixel_size": 1.0}
    assert spec.solver == expected


def test_responses_from_elsewhere_have_no_simulator_of_ours():
    with pytest.raises(ValueError, match="^simulator must be given for responses from elsewhere"):
        THEIRS.simulator()


def test_a_dataset_and_a_pipeline_know_their_specification(make_pipeline):
    designs = random_composites(2, size=4, seed=0)[0]
    dataset = build_dataset(designs, OURS.load_cases, [0.1, 0.2], units="MPa", progress=False, **SOLVER)
    assert ResponseSpec.of(dataset) == OURS
    pipe = make_pipeline(conditional=True)
    assert ResponseSpec.of(pipe).to_dict() == ResponseSpec.from_dict(pipe.response_encoder.config.spec).to_dict()
    with pytest.raises(ValueError, match="^pipeline must be trained with responses"):
        ResponseSpec.of(make_pipeline())


@pytest.mark.parametrize("stored", [None, {"quantity": "stress"}, "stress"])
def test_what_is_no_stored_specification_is_refused(stored):
    with pytest.raises(ValueError, match="^spec must be a dictionary with"):
        ResponseSpec.from_dict(stored)
