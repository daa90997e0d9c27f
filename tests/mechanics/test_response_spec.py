"""The specification of a response: what it refuses, how it is stored, compared and simulated."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, load_dataset

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.microstructures import build_dataset, random_composites

SOLVER = {"element_order": 1, "young_soft": 2.0, "young_stiff": 30.0, "poisson": 0.2, "pixel_size": 0.5}
SIMULATED = ResponseSpec(
    "energy", ["shear", "uniaxial_extension"], [[0.1, 0.2], [0.05, 0.1]], units="mJ", signed=False, solver=SOLVER
)
MEASURED = ResponseSpec("stress", ["compression"], [[-0.2, -0.1, 0.0, 0.1]], units="MPa", signed=True)
SCALAR = ResponseSpec("stiffness", ["C11", "C22", "C12"], [[0.0]] * 3, units="GPa", signed=True)
ALL = pytest.mark.parametrize("spec", [SIMULATED, MEASURED, SCALAR], ids=["simulated", "measured", "scalar"])
FIRST_EDITION = {
    "quantity": "energy",
    "load_cases": ["shear", "uniaxial_extension"],
    "strains": [[0.1, 0.2], [0.05, 0.1]],
    "units": "mJ",
    "element_order": 1,
    "pixel_size": 0.5,
    "material": {"law": "CompressibleNeoHookean", "young_soft": 2.0, "young_stiff": 30.0, "poisson": 0.2},
}


@ALL
def test_a_specification_comes_back_from_its_dictionary_and_from_json(spec):
    assert ResponseSpec.from_dict(spec.to_dict()) == spec
    assert ResponseSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()


def test_a_dictionary_of_the_first_edition_is_read():
    """It has the settings of the solver beside the others, and says nothing of signs."""
    assert ResponseSpec.from_dict(FIRST_EDITION) == SIMULATED
    assert SIMULATED.to_dict() == {**FIRST_EDITION, "signed": False}
    without = {name: FIRST_EDITION[name] for name in ("quantity", "load_cases", "strains", "units")}
    assert ResponseSpec.from_dict(without) == replace(SIMULATED, solver=None)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("stress", r"spec must be a dictionary with \['load_cases', .*\], as ResponseSpec.to_dict, got 'stress'"),
        ({"quantity": "stress"}, r"spec must be a dictionary with .* got \['quantity'\]"),
        (
            {**FIRST_EDITION, "material": {"law": "Ogden"}},
            "spec must have a material of the law CompressibleNeoHookean, got {'law': 'Ogden'}",
        ),
        (
            {**FIRST_EDITION, "material": "steel"},
            "spec must have a material of the law CompressibleNeoHookean, got 'st",
        ),
        (
            {**FIRST_EDITION, "material": {**FIRST_EDITION["material"], "density": 1.0}},
            "solver must be None or settings of simulate among .* 'density'",
        ),
        ({**FIRST_EDITION, "element_order": 3}, "element_order must"),
        ({**FIRST_EDITION, "signed": "no"}, "signed must be True or False, got 'no'"),
        ({**FIRST_EDITION, "load_cases": ["shear", "torsion"]}, "load_cases must .* got 'torsion'"),
    ],
)
def test_other_dictionaries_are_refused(stored, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ResponseSpec.from_dict(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantity": ""}, "quantity must be a word or words, got ''$"),
        ({"quantity": None}, "quantity must be a word or words, got None$"),
        ({"units": " "}, "units must be a word or words, got ' '; '1' is for a quantity without units"),
        ({"units": 1}, "units must be a word or words, got 1; '1' is for a quantity without units"),
        ({"signed": None}, "signed must be True or False, got None"),
        ({"signed": 1}, "signed must be True or False, got 1"),
        *(
            ({"load_cases": cases}, "load_cases must be a sequence of different names, at least one, got ")
            for cases in ("abc", [], ["a", "a", "b"], ["a", "", "b"], ["a", 2, "b"], None, {"a", "b", "c"})
        ),
        *(
            (
                {"strains": strains},
                r"strains must be 3 lists, one for each of the load cases \['C11', 'C22', 'C12'\], eq",
            )
            for strains in (
                [0.1, 0.2, 0.3],
                [[0.1]] * 2,
                [[0.1], [0.1, 0.2], [0.1]],
                [[]] * 3,
                [["a"]] * 3,
                [[0.2, 0.1]] * 3,
                [[0.1, 0.1]] * 3,
                [[0.1, math.inf]] * 3,
                [[math.nan]] * 3,
                None,
            )
        ),
    ],
)
def test_unfit_arguments_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(SCALAR, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"solver": {"density": 1.0}},
            r"solver must be None or settings of simulate among \['element_order', .* got {'d",
        ),
        ({"solver": "ours"}, "solver must be None or settings of simulate among .* got 'ours'"),
        ({"solver": {"element_order": 3}}, "element_order must be .* got 3"),
        ({"solver": {"young_soft": -1.0}}, "young_soft must be .* got -1"),
        ({"solver": {"young_stiff": "hard"}}, "young_stiff must be .* got 'hard'"),
        ({"solver": {"poisson": 0.5}}, "poisson must .* got 0.5"),
        ({"solver": {"pixel_size": 0.0}}, "pixel_size must be .* got 0.0"),
        ({"quantity": "stiffness"}, "quantity must be 'stress' or 'energy' for our solver, got 'stiffness'"),
        ({"load_cases": ["shear", "torsion"]}, "load_cases must .* got 'torsion'"),
        ({"strains": [[0.0, 0.1]] * 2}, "strains must be positive for our solver, got "),
        ({"strains": [[-0.1, 0.1]] * 2}, "strains must be positive for our solver, got "),
    ],
)
def test_what_our_solver_cannot_have_made_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(SIMULATED, **change)
    if "solver" not in change:
        replace(SIMULATED, solver=None, **change)  # from elsewhere


def test_settings_that_are_left_out_are_the_defaults_of_simulate():
    spec = replace(SIMULATED, solver={"young_stiff": 7})
    assert spec.solver == {
        "element_order": 2,
        "young_soft": 1.0,
        "young_stiff": 7.0,
        "poisson": 0.3,
        "pixel_size": 1.0,
    }
    assert isinstance(spec.solver["young_stiff"], float)


def test_lists_tuples_and_arrays_make_the_same_specification():
    lists = ResponseSpec("stress", ["a", "b"], [[1, 2], [1, 2]], units="MPa", signed=True)
    tuples = ResponseSpec("stress", ("a", "b"), ((1.0, 2.0), (1.0, 2.0)), units="MPa", signed=True)
    arrays = ResponseSpec("stress", ["a", "b"], np.array([[1, 2]] * 2), units="MPa", signed=np.True_)
    tensors = ResponseSpec("stress", ["a", "b"], torch.tensor([[1.0, 2.0]] * 2), units="MPa", signed=True)
    assert lists == tuples == arrays == tensors
    for spec in (lists, arrays):
        assert spec.load_cases == ("a", "b")
        assert spec.strains == ((1.0, 2.0), (1.0, 2.0))
        assert spec.signed is True


@ALL
def test_equal_specifications_are_one_key_and_others_are_another(spec):
    again = ResponseSpec.from_dict(spec.to_dict())
    assert again == spec
    assert hash(again) == hash(spec)
    assert {spec: 1}[again] == 1
    assert replace(spec, units="another unit") not in {spec}
    assert replace(SIMULATED, solver={"element_order": 2}) != SIMULATED


@ALL
def test_a_specification_survives_pickling(spec):
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_specification_does_not_change():
    with pytest.raises(FrozenInstanceError):
        SCALAR.units = "MPa"


@pytest.mark.parametrize(("spec", "shape", "is_scalar"), [(SIMULATED, (2, 2), False), (SCALAR, (3, 1), True)])
def test_a_scalar_has_one_value_an_entry_at_no_strain(spec, shape, is_scalar):
    assert spec.shape == shape
    assert spec.is_scalar == is_scalar
    assert not replace(SCALAR, strains=[[0.1]] * 3).is_scalar  # one point of a curve
    assert not replace(SCALAR, strains=[[0.0], [0.0], [0.1]]).is_scalar


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"quantity": "stress"}, "quantity 'energy', not 'stress'"),
        ({"load_cases": ["shear", "shear_x"]}, "load_cases ['shear', 'uniaxial_extension'], not ['shear', 'shear_x']"),
        ({"strains": [[0.1, 0.3]] * 2}, "strains [[0.1, 0.2], [0.05, 0.1]], not [[0.1, 0.3], [0.1, 0.3]]"),
        ({"units": "J"}, "units 'mJ', not 'J'"),
        ({"signed": True}, "signed False, not True"),
        ({"solver": None}, f"solver {SOLVER}, not None"),
        ({"solver": {**SOLVER, "poisson": 0.3}}, f"solver {SOLVER}, not {dict(SOLVER, poisson=0.3)}"),
        ({"signed": True, "units": "J", "solver": None}, "units 'mJ', not 'J'"),
    ],
)
def test_the_difference_names_the_first_entry_that_differs(change, sentence):
    assert SIMULATED.difference(replace(SIMULATED, **change)) == sentence


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1.4e-9, 1.1e-9, False),
        (3e8, 3 * 0.1 * 1e9, True),
        (1, 1.0, True),
        (0.1, 0.1 + 1e-11, True),
        (1, 1 + 1e-7, False),
    ],
)
def test_numbers_are_compared_to_nine_digits(one, other, same):
    sizes = (replace(SIMULATED, solver={**SOLVER, "pixel_size": size}) for size in (one, other))
    strains = (replace(MEASURED, strains=[[0.0, strain]]) for strain in (one, other))
    for first, second in (sizes, strains):
        assert (first.difference(second) is None) == same
        assert (second.difference(first) is None) == same


@ALL
def test_the_specification_of_a_dataset_goes_through_parquet(spec, tmp_path):
    features = Features({"response": Array2D(spec.shape, "float32", id=json.dumps(spec.to_dict()))})
    rows = np.ones((3, *spec.shape), np.float32)
    Dataset.from_dict({"response": list(rows)}, features=features).to_parquet(tmp_path / "d.parquet")
    options = {"data_files": str(tmp_path / "d.parquet"), "split": "train", "cache_dir": str(tmp_path / "cache")}
    for streaming in (False, True):
        assert ResponseSpec.of(load_dataset("parquet", streaming=streaming, **options)) == spec


def test_a_built_dataset_has_the_specification_of_its_settings():
    settings = {"element_order": 1, "young_soft": 2.0, "young_stiff": 30.0, "poisson": 0.2, "pixel_size": 0.5}
    designs = random_composites(1, size=4)[0]
    options = {"quantity": "energy", "units": "mJ", "progress": False, **settings}
    dataset = build_dataset(designs, SIMULATED.load_cases, SIMULATED.strains, **options)
    assert ResponseSpec.of(dataset) == SIMULATED


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"image": [1]}), r"dataset must have a column 'response', got \['image'\]"),
        (DatasetDict(), "dataset must be one of the datasets library, one split, got DatasetDict"),
        (None, "dataset must be one of the datasets library, one split, got NoneType"),
        (
            Dataset.from_dict({"response": [[[1.0]]]}),
            "dataset must say what its responses are, got a column 'response' that has lost its 'id': ",
        ),
    ],
    ids=["no responses", "several splits", "nothing", "no specification"],
)
def test_a_dataset_without_a_specification_is_refused(dataset, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ResponseSpec.of(dataset)


def test_the_specification_of_a_pipeline_is_that_of_its_encoder(make_pipeline, tmp_path):
    pipe = make_pipeline(conditional=True)
    spec = ResponseSpec.of(pipe)
    assert spec.load_cases == ("uniaxial_extension", "shear")
    assert spec.solver is None
    pipe.save_pretrained(tmp_path)
    assert ResponseSpec.of(type(pipe).from_pretrained(tmp_path)) == spec


def test_a_pipeline_without_responses_has_no_specification(make_pipeline):
    with pytest.raises(ValueError, match="^pipeline must be trained with responses, got one that was trained without"):
        ResponseSpec.of(make_pipeline())


@pytest.mark.parametrize("order", [None, 1, 2])
@pytest.mark.parametrize("quantity", ["stress", "energy"])
def test_the_simulator_is_simulate_with_the_settings_of_the_specification(quantity, order):
    designs = np.asarray(random_composites(2, size=4)[0], dtype=float)
    spec = replace(SIMULATED, quantity=quantity)
    found = spec.simulator(element_order=order)(designs)
    settings = {**SOLVER, "element_order": order or 1}
    expected = simulate(designs, SIMULATED.load_cases, SIMULATED.strains, **settings)
    np.testing.assert_array_equal(found, getattr(expected, quantity))
    assert spec.solver == SOLVER  # another element order is not kept


def test_a_simulator_can_be_pickled_and_shows_its_progress_where_asked_for(capsys):
    designs = np.asarray(random_composites(1, size=4)[0], dtype=float)
    silent = SIMULATED.simulator()(designs)
    assert not capsys.readouterr().err
    again = pickle.loads(pickle.dumps(SIMULATED.simulator(progress=True)))
    np.testing.assert_array_equal(again(designs), silent)
    assert capsys.readouterr().err


def test_a_simulator_refuses_an_element_order_or_device_that_there_is_none_of():
    with pytest.raises(ValueError, match=r"^element_order must .* got 3"):
        SIMULATED.simulator(element_order=3)
    with pytest.raises(ValueError, match="^device must be one that torch has here, got 'abacus'"):
        SIMULATED.simulator(device="abacus")(np.ones((1, 4, 4)))


def test_responses_from_elsewhere_have_no_simulator_of_ours():
    with pytest.raises(
        ValueError, match="^simulator must be given for responses from elsewhere, .* a function of desi"
    ):
        SCALAR.simulator()
