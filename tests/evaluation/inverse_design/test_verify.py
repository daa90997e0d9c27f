import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetInfo
from matplotlib.figure import Figure
from PIL import Image

from mechdiffusers.evaluation.inverse_design import (
    OutOfRangeWarning,
    response_error,
    stored_designs,
    stored_responses,
    verify,
)
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import build_dataset, random_composites


@pytest.fixture(scope="module")
def report(composites):
    """Three targets with two designs each: the first one the target's own."""
    designs, targets = stored_designs(composites), stored_responses(composites)[[2, 5, 9]]
    return verify(designs[[2, 3, 5, 6, 9, 10]], targets, ResponseSpec.of(composites), dataset=composites)


def test_a_training_design_has_its_stored_response():
    designs, _ = random_composites(3, size=16, seed=5)
    cases = ("uniaxial_extension", "shear_x")
    dataset = build_dataset(
        designs, cases, [0.1, 0.2], young_stiff=50.0, pixel_size=0.5, quantity="energy", progress=False
    )
    report = verify(designs, stored_responses(dataset), ResponseSpec.of(dataset))
    np.testing.assert_allclose(report.response, stored_responses(dataset), rtol=1e-5)
    assert (report.error < 1e-5).all()
    assert report.solved.all()


def test_designs_are_ranked_within_their_target_by_their_error(report):
    np.testing.assert_array_equal(report.rank, [1, 2] * 3)
    assert (report.error[::2] < 1e-6).all()
    np.testing.assert_allclose(report.error, response_error(report.response, np.repeat(report.target, 2, axis=0)))


def test_training_designs_are_not_new_and_are_what_retrieval_finds(report):
    assert (report.novelty == 0).all()
    np.testing.assert_array_equal(report.retrieval.index[:, 0], [2, 5, 9])
    assert report.retrieval.index.shape == (3, 2)


def test_a_design_that_is_not_solved_is_kept_flagged_and_ranked_last(composites):
    def failing(designs):
        response = np.ones((len(designs), 2, 3))
        response[0, 1, 2] = math.nan
        return response

    spec = ResponseSpec.of(composites)
    report = verify(stored_designs(composites)[:3], np.full((2, 3), 2.0), spec, simulator=failing)
    np.testing.assert_array_equal(report.solved, [False, True, True])
    np.testing.assert_array_equal(np.isnan(report.error), [True, False, False])
    assert report.rank[0] == 3
    assert report.to_dict()["designs"][0]["error"] is None


def test_a_design_that_fails_where_the_target_is_unspecified_is_flagged_and_ranked_by_its_error(composites):
    def failing(designs):
        response = np.ones((len(designs), 2, 3))
        response[0] = [[2, 2, 2], [2, 2, math.nan]]
        return response

    target = np.array([[2.0, 2.0, 2.0], [2.0, 2.0, math.nan]])
    report = verify(stored_designs(composites)[:3], target, ResponseSpec.of(composites), simulator=failing)
    np.testing.assert_array_equal(report.solved, [False, True, True])
    np.testing.assert_allclose(report.error, [0, 0.5, 0.5])
    assert report.rank[0] == 1


def test_a_target_out_of_range_is_warned_of():
    designs, _ = random_composites(250, size=4)
    dataset = build_dataset(designs, ("shear",), [0.1], element_order=1, progress=False)
    training, heldout = dataset.select(range(30)), dataset.select(range(30, 250))
    inside = np.median(stored_responses(training), axis=0)
    targets = np.stack([inside, 100 * inside])
    stored = {"dataset": training, "heldout": heldout}
    with pytest.warns(OutOfRangeWarning, match="targets wild "):
        verify(designs[:2], targets, ResponseSpec.of(dataset), **stored, names=["tame", "wild"])
    with pytest.warns(OutOfRangeWarning, match="targets 1 "):
        report = verify(designs[:2], targets, ResponseSpec.of(dataset), **stored)
    np.testing.assert_array_equal(report.reach.out_of_range, [False, True])
    assert report.to_dict()["reach"]["out_of_range"] == [False, True]


def test_a_report_of_lists_is_one_of_arrays(report, composites):
    ours = verify(report.designs.tolist(), report.target.tolist(), ResponseSpec.of(composites))
    np.testing.assert_array_equal(ours.designs[ours.rank == 1], report.designs[report.rank == 1])


def test_a_report_of_tensors_holds_the_numbers_of_one_of_arrays(report, composites):
    designs, target = (torch.from_numpy(values).clone() for values in (report.designs, report.target))
    designs.requires_grad_(), target.requires_grad_()
    ours = verify(designs, target, ResponseSpec.of(composites), dataset=composites)
    for name in (
        "designs",
        "target",
        "response",
        "error",
        "rank",
        "solved",
        "stiff_connectivity",
        "diversity",
        "novelty",
    ):
        torch.testing.assert_close(getattr(ours, name), torch.from_numpy(getattr(report, name)), msg=name)
    for row, expected in zip(ours.rows(), report.rows(), strict=True):
        assert row == pytest.approx(expected)


def test_a_saved_report_is_a_table_a_picture_a_target_and_everything_as_json(report, tmp_path):
    report.save(tmp_path / "report", ["soft", "middling", "stiff"])
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        *("soft.png", "middling.png", "stiff.png"),
        *("verification.csv", "verification.json", "designs.npy"),
    }
    with Image.open(tmp_path / "report" / "soft.png") as picture:
        assert picture.width > picture.height > 100
    rows = list(csv.DictReader((tmp_path / "report" / "verification.csv").open()))
    np.testing.assert_allclose([float(row["error"]) for row in rows], report.error)
    assert [row["target"] for row in rows] == ["soft", "soft", "middling", "middling", "stiff", "stiff"]
    content = json.loads((tmp_path / "report" / "verification.json").read_text())
    np.testing.assert_allclose(content["responses"], report.response)
    assert content["spec"] == report.spec.to_dict()
    assert ResponseSpec.from_dict(content["spec"]) == report.spec
    np.testing.assert_array_equal(np.load(tmp_path / "report" / "designs.npy"), report.designs)


def test_a_name_of_a_target_is_no_formula(report, tmp_path):
    report.save(tmp_path / "report", ["E_$x^$", "$", "${^$"])
    assert len(list((tmp_path / "report").glob("*.png"))) == 3


def test_a_report_is_saved_under_fit_names_alone(report, tmp_path):
    for last in ([], ["b"], ["../c"], ["c\\d"], [".."], [""], [3], ["c\0"], ["c" * 201]):
        names = ["a", "b", *last]
        with pytest.raises(ValueError, match="^names must be 3 different names of files"):
            report.save(tmp_path / "report", names)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"designs": np.full((2, 8, 8), 0.5)},
            r"designs must be 0 or 1 everywhere, as their family is, got 0.5: np.rint\(designs\) makes them so; bin",
        ),
        ({"designs": np.full((2, 8, 8), np.nan)}, "designs must be 0 or 1 everywhere, as their family is, got nan$"),
        ({"designs": np.full((2, 8, 8), 2)}, "designs must be 0 or 1 everywhere, as their family is, got 2.0$"),
        ({"designs": "soft"}, "designs must be a tensor, an array or lists of real numbers, .* got str"),
        ({"designs": np.full((2, 8, 8), 1 + 1e-9)}, r"designs must be 0 or 1 .* got 1.000000001: np.rint\(designs\)"),
        ({"designs": np.linspace(0, 2, 128).reshape(2, 8, 8)}, r"designs must be 0 or 1 .* got 1.5[0-9]*$"),
        *(
            (
                {"target": target},
                "target must be a tensor, an array or lists of real numbers, as long as each other, got ",
            )
            for target in ([[1.0], "stiff"], 1j * np.ones((2, 3)), 1j * torch.ones(2, 3), [[1.0], [1.0, 2.0]])
        ),
        ({"designs": np.zeros((8, 8))}, r"designs must have shape \(B, H, W\)"),
        (
            {"designs": np.zeros((3, 8, 8)), "target": np.ones((2, 2, 3))},
            "designs must have shape .* each of 2 targets",
        ),
        ({"target": np.ones((3, 3))}, r"target must have shape \(T, 2, 3\): the load cases \['uniaxial_extension', "),
        ({"target": np.full((2, 3), np.nan)}, "target must be finite and given somewhere"),
        ({"target": np.full((2, 3), np.inf)}, "target must be finite and given somewhere"),
        ({"target": -np.ones((2, 3))}, "target must be non-negative, since its specification is unsigned, got -1$"),
        (
            {"spec": {"load_cases": ["shear"]}},
            r"spec must be a ResponseSpec, such as ResponseSpec.of\(dataset\), got dict",
        ),
        ({"spec": None}, r"spec must be a ResponseSpec, such as ResponseSpec.of\(dataset\), got NoneType"),
        (
            {"simulator": None, "spec": ResponseSpec("damping", ["x", "y"], [[1, 2, 3]] * 2, units="1", signed=False)},
            "simulator must be given for responses from elsewhere, whose specification has no solver",
        ),
        ({"simulator": "abacus"}, r"simulator must be a function of designs \(B, H, W\), got 'abacus'"),
        ({"simulator": None, "device": "abacus"}, "device must be one that torch has here, got 'abacus'"),
        ({"names": ["soft", "stiff"]}, "names must be 1 different names of files"),
        ({"names": 5}, r"names must be 1 different names of files, one for each target, got \[5\]"),
        (
            {"designs": np.zeros((2, 6, 6)), "dataset": slice(0, 24)},
            r"dataset must have designs of the size \(6, 6\) of the designs, got \(8, 8\)",
        ),
        (
            {"dataset": slice(0, 1)},
            "dataset must have as many solved designs as there are for a target, 2, got 1",
        ),
        ({"heldout": slice(12, 24)}, "heldout must come with the training data, got no dataset"),
    ],
)
def test_unfit_arguments_are_named_before_anything_is_simulated(composites, changes, message):
    def never(designs):
        raise AssertionError("simulated")

    rows = {name: composites.select(range(24)[value]) for name, value in changes.items() if isinstance(value, slice)}
    arguments = {"designs": np.zeros((2, 8, 8)), "target": np.ones((2, 3)), "spec": ResponseSpec.of(composites)}
    with pytest.raises(ValueError, match=f"^{message}"):
        verify(**{**arguments, "simulator": never, **changes, **rows})


@pytest.mark.parametrize("heldout", [slice(0, 12), None])
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"units": "MPa"}, "units 'unit of young_soft', not 'MPa'"),
        ({"signed": True}, "signed False, not True"),
        ({"strains": [[0.1, 0.2, 0.4]] * 2}, r"strains \[\[0.1, 0.2, 0.3\], .* not \[\[0.1, 0.2, 0.4\], "),
        ({"solver": None}, "solver {'element_order': 1, .*}, not None"),
        ({"solver": {"element_order": 2}}, "solver {'element_order': 1, .*}, not {'element_order': 2, "),
        ({"solver": {"element_order": 1, "pixel_size": 0.5}}, "solver {.*'pixel_size': 1.0}, not {.*'pixel_size': 0.5"),
    ],
)
def test_stored_designs_of_another_specification_than_the_targets_are_refused(composites, change, difference, heldout):
    spec = replace(ResponseSpec.of(composites), **change)
    features = composites.features.copy()
    features["response"] = Array2D((2, 3), "float32", id=json.dumps(spec.to_dict()))
    changed = Dataset(composites.data, info=DatasetInfo(features=features))
    # the dataset is of another specification, or the held-out designs alone are
    stored = {"dataset": composites} if heldout is None else {"dataset": changed, "heldout": composites.select([0, 1])}
    name = "dataset" if heldout is None else "heldout"
    message = f"^{name} must have responses of the specification of the target, got {difference}"
    with pytest.raises(ValueError, match=message):
        verify(np.zeros((1, 8, 8)), np.ones((2, 3)), spec, **stored)


def test_designs_outside_the_unit_interval_are_refused(composites):
    with pytest.raises(ValueError, match=r"^designs must lie in \[0, 1\]"):
        verify(np.full((1, 8, 8), 1.5), np.ones((2, 3)), ResponseSpec.of(composites), binary=False)


@pytest.mark.parametrize(
    ("simulator", "message"),
    [
        (lambda designs: np.ones((2, 3)), r"the response of 2 designs, shape \(2, 2, 3\), got \(2, 3\)"),
        (lambda designs: np.full((2, 2, 3), -math.inf), "a finite response, NaN where a design is not solved, got inf"),
        (lambda designs: ["soft"], "simulator must be a tensor, an array or lists of real numbers"),
    ],
)
def test_a_simulator_that_gives_no_response_is_refused(composites, simulator, message):
    with pytest.raises(ValueError, match=f"^simulator must .*{message.removeprefix('simulator must ')}"):
        verify(np.zeros((2, 8, 8)), np.ones((2, 3)), ResponseSpec.of(composites), simulator=simulator)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_signed_scalars_are_verified_by_a_simulator_of_ones_own(kind, tmp_path):
    """Of a coupling that is asked to be zero the error is a share of the other entry."""
    spec = ResponseSpec("stiffness", ["C11", "C16"], [[0.0], [0.0]], units="GPa", signed=True)
    given = []

    def simulator(designs):
        given.append(designs)
        return kind(np.array([[[-4.0], [0.5]], [[-4.0], [0.0]], [[4.0], [0.0]]]))

    designs = random_composites(3, size=8)[0]
    report = verify(designs, [[-4.0], [0.0]], spec, simulator=simulator)
    assert len(given) == 1
    np.testing.assert_array_equal(given[0], designs)
    typical = 4 / math.sqrt(2)  # the root mean square of the load cases' norms, 4 and 0
    np.testing.assert_allclose(report.error, [0.5 / typical / 2, 0, 8 / typical / 2], rtol=1e-12)
    np.testing.assert_array_equal(report.rank, [2, 1, 3])
    assert report.spec == spec
    report.save(tmp_path, ["coupled"])
    content = json.loads((tmp_path / "verification.json").read_text())
    assert ResponseSpec.from_dict(content["spec"]) == spec
    assert content["responses"][0] == [[-4.0], [0.5]]


def test_a_figure_shows_negative_responses_and_single_values(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure) or path.touch())
    spec = ResponseSpec("stiffness", ["C16"], [[0.0]], units="GPa", signed=True)
    found = np.array([-3.0, -2.0]).reshape(2, 1, 1)
    report = verify(random_composites(2, size=8)[0], [[-1.0]], spec, simulator=lambda _: found)
    report.save(tmp_path)
    axes = figures[0].axes[-1]
    for line in axes.lines:
        (value,) = line.get_ydata()
        assert axes.get_ylim()[0] < value < axes.get_ylim()[1]
        assert line.get_marker() in ("s", "o")
    assert sorted(line.get_ydata().item() for line in axes.lines) == [-3, -2, -1]


def test_grey_designs_are_verified_where_their_family_is_grey(composites):
    report = verify(np.full((1, 8, 8), 0.5), np.ones((2, 3)), ResponseSpec.of(composites), binary=False)
    assert report.solved.all()
    assert math.isnan(report.diversity[0])
