"""Designs go to another solver and its results come back: design --export and verify, without Python."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mechdiffusers.cli import main
from mechdiffusers.evaluation.inverse_design import load_split, read_targets, stored_responses, verify, write_targets
from mechdiffusers.evaluation.inverse_design.exchange import write_export
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import dataset_from_responses, random_composites
from mechdiffusers.microstructures.dataset_folder import write_dataset_folder
from mechdiffusers.models import ResponseEncoder, response_normalisation

SPEC = ResponseSpec("damping", ["along x", "along y"], [[0.0], [0.0]], units="1", signed=True)


def elsewhere(designs: np.ndarray) -> np.ndarray:
    """Another solver: how much stiffer halves of a design are than their other halves."""
    rows, columns = designs.mean(2), designs.mean(1)
    return np.stack([half[:, :4].mean(1) - half[:, 4:].mean(1) for half in (columns, rows)], 1)[..., None]


@pytest.fixture
def question(tmp_path, conditional):
    """A checkpoint of responses from elsewhere, its data and a file of two targets."""
    designs = random_composites(40, size=8, seed=3)[0].astype(float)
    dataset = dataset_from_responses(designs, elsewhere(designs), SPEC)
    write_dataset_folder(
        tmp_path / "data", {"train": dataset.select(range(30)), "heldout": dataset.select(range(30, 40))}
    )

    normalisation = response_normalisation(torch.from_numpy(elsewhere(designs)), signed=True)
    encoder = ResponseEncoder(6, 8, spec=SPEC.to_dict(), **normalisation)
    pipe = type(conditional)(**{**conditional.components, "response_encoder": encoder, "response_predictor": None})
    pipe.save_pretrained(tmp_path / "checkpoint")
    curves = stored_responses(dataset)[[35, 36]]
    curves[1, 0] = 0  # as no relative error knows
    write_targets(tmp_path / "targets.csv", dict(zip(["soft 1.5", "b"], curves, strict=True)), SPEC)
    return tmp_path


def design(folder, *options: str) -> None:
    given = [str(folder / "targets.csv"), "--checkpoint", str(folder / "checkpoint"), "--dataset", str(folder / "data")]
    short = ["--num_designs", "3", "--num_inference_steps", "2", "--output_dir", str(folder / "out")]
    main(["design", *given, *short, *options])


def write_results(path, names, response, quantity="damping") -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["design", "load_case", "strain", quantity])
        for name, values in zip(names, response, strict=True):
            table.writerows([name, case, "", value[0]] for case, value in zip(SPEC.load_cases, values, strict=True))


def test_designs_that_another_solver_simulates_get_the_report_that_its_function_gives(question):
    design(question, "--export")
    files = sorted((question / "out" / "png").glob("*.png"))
    assert [file.name for file in files] == [f"{t}-0{i}.png" for t in ("b", "soft 1.5") for i in range(3)]
    pictures = np.stack([np.asarray(Image.open(file), dtype=float) for file in files])
    arrays = np.stack([np.load(file) for file in sorted((question / "out" / "npy").glob("*.npy"))])
    np.testing.assert_array_equal(pictures, arrays)
    assert {file.suffix for kind in ("inp", "vtu", "msh") for file in (question / "out" / kind).iterdir()} == {
        ".inp",
        ".vtu",
        ".msh",
    }
    write_results(question / "results.csv", [file.stem for file in files], elsewhere(arrays))
    files = ["--responses", str(question / "results.csv"), "--targets", str(question / "targets.csv")]
    main(["verify", "--designs", str(question / "out"), *files, "--output_dir", str(question / "report")])
    names, targets = read_targets(question / "targets.csv", SPEC)

    stored = {"dataset": load_split(question / "data", "train"), "heldout": load_split(question / "data", "heldout")}
    designs = np.load(question / "out" / "designs.npy")
    expected = verify(designs, targets, SPEC, simulator=elsewhere, names=names, **stored)
    expected.save(question / "expected", names)
    for file in ("verification.csv", "verification.json", "designs.npy", "b.png", "soft 1.5.png"):
        assert (question / "report" / file).read_bytes() == (question / "expected" / file).read_bytes(), file
    assert "retrieval" in json.loads((question / "report" / "verification.json").read_text())


def test_images_of_ones_own_are_verified_where_the_dataset_says_what_the_responses_are(question):
    design(question, "--export")
    (question / "out" / "png").rename(question / "mine")
    designs = np.load(question / "out" / "designs.npy")
    names = json.loads((question / "out" / "export.json").read_text())["names"]
    write_results(question / "results.csv", names, elsewhere(designs))
    files = ["--responses", str(question / "results.csv"), "--targets", str(question / "targets.csv")]
    with pytest.raises(SystemExit, match="dataset must be given for designs that --export did not write"):
        main(["verify", "--designs", str(question / "mine"), *files])
    data = ["--dataset", str(question / "data"), "--output_dir", str(question / "report")]
    main(["verify", "--designs", str(question / "mine"), *files, *data])
    np.testing.assert_array_equal(np.load(question / "report" / "designs.npy"), designs)


def test_a_checkpoint_of_responses_from_elsewhere_designs_only_for_export(question):
    with pytest.raises(SystemExit, match="export must be given, .* --export writes the designs for yours"):
        design(question)
    with pytest.raises(SystemExit, match="export must be given, and num_rounds left out"):
        design(question, "--export", "--num_rounds", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names, response: (names[:-1], response[:-1]), "responses must have a row for every design, got none"),
        (
            lambda names, response: ([*names, "c-00"], [*response, response[0]]),
            "'c-00' in row 14 of results.csv, which no",
        ),
        (
            lambda names, response: (names, response, "stress"),
            "responses must be of the quantity 'damping' .* got 'stress'",
        ),
    ],
)
def test_results_that_do_not_match_the_designs_are_refused(question, change, message):
    design(question, "--export")
    names = json.loads((question / "out" / "export.json").read_text())["names"]
    write_results(question / "results.csv", *change(names, elsewhere(np.load(question / "out" / "designs.npy"))))
    files = ["--responses", str(question / "results.csv"), "--targets", str(question / "targets.csv")]
    with pytest.raises(SystemExit, match=message):
        main(["verify", "--designs", str(question / "out"), *files, "--output_dir", str(question / "report")])
    assert not (question / "report").exists()


@pytest.mark.parametrize("named", ["{}", "{}.png", "{}.inp"])
def test_results_may_have_a_row_a_design_and_names_of_files(question, named):
    design(question, "--export")
    names = json.loads((question / "out" / "export.json").read_text())["names"]
    response = elsewhere(np.load(question / "out" / "designs.npy"))[..., 0]
    rows = [f"{named.format(name)},{y},{x}\n" for name, (x, y) in zip(names, response.tolist(), strict=True)]
    (question / "results.csv").write_text("design,along y,along x\n" + "".join(rows))
    files = ["--responses", str(question / "results.csv"), "--targets", str(question / "targets.csv")]
    main(["verify", "--designs", str(question / "out"), *files, "--output_dir", str(question / "report")])
    found = json.loads((question / "report" / "verification.json").read_text())["responses"]
    np.testing.assert_array_equal(np.array(found)[..., 0], response)


@pytest.mark.parametrize(("strains", "got"), [("2 4 6", "2 to 6"), ("0.01 0.03", "0.01 to 0.03"), ("none", "0 to 0")])
def test_results_at_other_strains_than_the_targets_are_refused(tmp_path, strains, got):
    """In per cent, or short of them, or without any: not one of them says anything of the targets."""
    spec = ResponseSpec("stress", ["pull"], [[0.05, 0.1]], units="MPa", signed=False)
    designs = random_composites(2, size=8)[0]
    write_export(tmp_path / "out", designs, ["a-00", "a-01"], spec, None)
    write_targets(tmp_path / "targets.csv", {"a": np.array([[1.0, 2.0]])}, spec)
    at = [""] if strains == "none" else strains.split()
    lines = [f"a-0{index},pull,{strain},1\n" for index in range(2) for strain in at]
    (tmp_path / "results.csv").write_text("design,load_case,strain,stress\n" + "".join(lines))
    files = ["--responses", str(tmp_path / "results.csv"), "--targets", str(tmp_path / "targets.csv")]
    message = rf"known at one of the strains \[0.05, 0.1\] of 'pull', .* got strains from {got} in results.csv"
    with pytest.raises(SystemExit, match=message):
        main(["verify", "--designs", str(tmp_path / "out"), *files, "--output_dir", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


def test_an_export_that_breaks_off_is_none(tmp_path, monkeypatch):
    """Also where an earlier one is written over."""
    designs = random_composites(3, size=8)[0]
    write_export(tmp_path / "out", designs[:2], ["a-00", "a-01"], SPEC, None)
    monkeypatch.setattr("numpy.save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises((ValueError, OSError), match="no space left"):
        write_export(tmp_path / "out", designs, ["b-00", "b-01", "b-02"], SPEC, None)
    assert not (tmp_path / "out" / "export.json").exists()


def test_a_name_that_is_none_for_files_is_refused_before_anything_is_generated(question):
    text = (question / "targets.csv").read_text().replace("soft 1.5", "a\\b")
    (question / "targets.csv").write_text(text)
    with pytest.raises(SystemExit, match="names must be 2 different names of files, one for each target"):
        design(question, "--export")
    assert not list((question / "out").glob("**/*.png"))


def test_data_of_which_no_design_is_wholly_known_serve_targets_in_one_load_case(question):
    """Of each design one load case was measured."""
    for split in ("train", "heldout"):
        rows = load_split(question / "data", split)
        response = stored_responses(rows)
        response[::2, 0] = response[1::2, 1] = np.nan
        designs = np.stack([np.asarray(image, dtype=float) for image in rows["image"]])
        dataset_from_responses(designs, response, SPEC).to_parquet(question / "data" / f"{split}.parquet")
    write_targets(question / "targets.csv", {"a": np.array([[0.25], [np.nan]])}, SPEC)
    design(question, "--export")
    designs = np.load(question / "out" / "designs.npy")
    names = json.loads((question / "out" / "export.json").read_text())["names"]
    write_results(question / "results.csv", names, elsewhere(designs))
    files = ["--responses", str(question / "results.csv"), "--targets", str(question / "targets.csv")]
    main(["verify", "--designs", str(question / "out"), *files, "--output_dir", str(question / "report")])
    content = json.loads((question / "report" / "verification.json").read_text())
    assert 0 < content["reach"]["p_value"][0] <= 1
    assert np.isfinite(content["retrieval"]["error"]).all()


def test_designs_without_results_are_unsolved(question):
    design(question, "--export")
    names = json.loads((question / "out" / "export.json").read_text())["names"]
    response = elsewhere(np.load(question / "out" / "designs.npy"))
    response[0] = np.nan
    write_results(question / "results.csv", names, response)
    files = ["--responses", str(question / "results.csv"), "--targets", str(question / "targets.csv")]
    main(["verify", "--designs", str(question / "out"), *files, "--output_dir", str(question / "report")])
    rows = list(csv.DictReader((question / "report" / "verification.csv").open()))
    assert [row["solved"] for row in rows] == ["False"] + ["True"] * 5
    assert rows[0]["rank"] == "3"
