import csv
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mechdiffusers.cli import main
from mechdiffusers.evaluation.inverse_design import (
    OutOfRangeWarning,
    load_split,
    nearest_in_curve_shape,
    read_targets,
    response_error,
    stored_designs,
    stored_responses,
    write_targets,
)
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import build_dataset, random_composites
from mechdiffusers.models import ResponsePredictor, response_normalisation

ROOT = Path(__file__).parents[3]


def test_the_command_line_leaves_a_table_and_a_picture_of_each_target(conditional, composites, tmp_path, caplog):
    conditional.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "data").mkdir()
    composites.select(range(16)).to_parquet(tmp_path / "data" / "train.parquet")
    composites.select(range(16, 24)).to_parquet(tmp_path / "data" / "heldout.parquet")
    curves = dict(zip(("soft", "stiff"), stored_responses(composites)[[20, 21]], strict=True))
    write_targets(tmp_path / "targets.csv", curves, ResponseSpec.of(composites))
    options = ["--num_designs", "3", "--num_inference_steps", "2", "--guidance_scale", "2"]
    folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path / "data")]
    with caplog.at_level("INFO"):
        main(["design", str(tmp_path / "targets.csv"), *folders, *options, "--output_dir", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "verification.csv").open()))
    assert [row["target"] for row in rows] == ["soft"] * 3 + ["stiff"] * 3
    for name in ("soft", "stiff"):
        Image.open(tmp_path / "out" / f"{name}.png").verify()
        assert f"{min(float(row['error']) for row in rows if row['target'] == name):.2%}" in caplog.text


def save_with_predictor(pipe, dataset, folder: Path) -> ResponseSpec:
    """Saves a checkpoint whose predictor has random weights; returns the specification of its responses."""
    spec = ResponseSpec.of(dataset)
    normalisation = response_normalisation(torch.from_numpy(stored_responses(dataset)))
    pipe.register_modules(response_predictor=ResponsePredictor((4, 8), 1, spec.to_dict(), **normalisation).eval())
    pipe.save_pretrained(folder)
    return spec


def drawn_and_refined(dataset, pipe, folder: Path, num_designs: int, *options: str) -> list[dict[str, np.ndarray]]:
    """What the command line leaves for two targets, without rounds of simulations and with two, of the same draws."""
    spec = save_with_predictor(pipe, dataset, folder / "checkpoint")
    curves = dict(zip(("a", "b"), stored_responses(dataset)[[20, 21]], strict=True))
    write_targets(folder / "t.csv", curves, spec)
    found = []
    for rounds in (["0", "--num_candidates", "1", "--num_refinements", "0"], ["2", *options]):
        drawn = ["--num_designs", str(num_designs), "--num_inference_steps", "2", "--num_rounds", *rounds]
        folders = ["--checkpoint", str(folder / "checkpoint"), "--output_dir", str(folder / rounds[0])]
        main(["design", str(folder / "t.csv"), *folders, *drawn])
        rows = list(csv.DictReader((folder / rounds[0] / "verification.csv").open()))
        errors = np.array([float(row["error"]) for row in rows]).reshape(2, -1)
        found.append({"designs": np.load(folder / rounds[0] / "designs.npy"), "error": errors})
    return found


def test_rounds_of_simulations_bring_the_designs_nearer(conditional, composites, tmp_path):
    drawn, refined = drawn_and_refined(composites, conditional, tmp_path, 2)
    assert refined["error"].shape == (2, 2)
    assert (np.sort(refined["error"]) <= np.sort(drawn["error"]) + 1e-9).all()
    assert (refined["error"].min(1) < drawn["error"].min(1)).any()


def test_the_design_nearest_in_curve_shape_alone_is_refined_and_kept(conditional, composites, tmp_path):
    drawn, refined = drawn_and_refined(composites, conditional, tmp_path, 3, "--num_refined", "1")
    targets = stored_responses(composites)[[20, 21]]
    chosen = nearest_in_curve_shape(drawn["designs"], targets, ResponseSpec.of(composites), 1)
    same = (chosen[:, None] == drawn["designs"].reshape(2, 3, *chosen.shape[1:])).all((2, 3))
    assert same.any(1).all()
    start = np.take_along_axis(drawn["error"], same.argmax(1)[:, None], 1)
    assert refined["error"].shape == start.shape
    assert (refined["error"] <= start + 1e-9).all()
    assert (refined["error"] < start - 1e-3).any()
    away = (refined["designs"][:, None] != drawn["designs"].reshape(2, 3, *chosen.shape[1:])).mean((2, 3))
    np.testing.assert_array_equal(away.argmin(1), same.argmax(1))


class StoppedError(Exception):
    """In place of the designs."""


def test_by_default_eight_designs_are_drawn_of_chosen_candidates_or_128_to_choose_from(
    conditional, composites, tmp_path, monkeypatch
):
    def stopped(pipe, targets, num_designs, **options):
        raise StoppedError(num_designs, options["num_candidates"], options["num_refinements"])

    monkeypatch.setattr(import_module("mechdiffusers.evaluation.inverse_design.command"), "designs_for", stopped)
    spec = save_with_predictor(conditional, composites, tmp_path / "checkpoint")
    write_targets(tmp_path / "t.csv", {"a": stored_responses(composites)[20]}, spec)
    arguments = [str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path / "checkpoint")]
    for rounds, expected in ((["--num_rounds", "3"], (128, 1, 0)), ([], (8, 4, 2))):
        with pytest.raises(StoppedError) as stop:
            main(["design", *arguments, *rounds])
        assert stop.value.args == expected


def test_what_cannot_be_told_of_the_range_is_warned_of_once_and_before_anything_is_drawn(
    conditional, composites, tmp_path, monkeypatch
):
    warned_before = []

    def drawn(pipe, targets, num_designs, **options):
        warned_before.extend(warned.list)
        return np.repeat(stored_designs(composites)[:1], len(targets) * num_designs, axis=0)

    monkeypatch.setattr(import_module("mechdiffusers.evaluation.inverse_design.command"), "designs_for", drawn)
    conditional.save_pretrained(tmp_path / "checkpoint")
    composites.select(range(16)).to_parquet(tmp_path / "train.parquet")
    composites.select(range(16, 24)).to_parquet(tmp_path / "heldout.parquet")
    write_targets(tmp_path / "t.csv", {"a": stored_responses(composites)[20]}, ResponseSpec.of(composites))
    folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path)]
    with pytest.warns(OutOfRangeWarning) as warned:
        main(["design", str(tmp_path / "t.csv"), *folders, "--num_designs", "1", "--output_dir", str(tmp_path / "out")])
    assert len(warned_before) == len(warned.list) == 1


def test_a_predictor_chooses_and_refines_where_nothing_else_is_asked_for(conditional, composites, tmp_path):
    spec = save_with_predictor(conditional, composites, tmp_path / "checkpoint")
    write_targets(tmp_path / "t.csv", {"a": stored_responses(composites)[20]}, spec)
    designs = {}
    asked = {
        "default": [],
        "same": ["--num_candidates", "4", "--num_refinements", "2"],
        "neither": ["--num_candidates", "1", "--num_refinements", "0"],
    }
    for name, values in asked.items():
        options = ["--num_designs", "2", "--num_inference_steps", "2", *values]
        folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--output_dir", str(tmp_path / name)]
        main(["design", str(tmp_path / "t.csv"), *folders, *options])
        designs[name] = np.load(tmp_path / name / "designs.npy")
    np.testing.assert_array_equal(designs["default"], designs["same"])
    assert (designs["default"] != designs["neither"]).any()


def test_rounds_without_a_predictor_are_refused_in_one_sentence(conditional, composites, tmp_path):
    conditional.save_pretrained(tmp_path / "checkpoint")
    arguments = [str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path / "checkpoint"), "--num_rounds", "2"]
    with pytest.raises(SystemExit, match="^error: num_rounds must be 0, or positive for a checkpoint of binary"):
        main(["design", *arguments])


def test_designs_to_refine_without_rounds_are_refused_in_one_sentence(conditional, composites, tmp_path):
    save_with_predictor(conditional, composites, tmp_path / "checkpoint")
    arguments = [str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path / "checkpoint"), "--num_refined", "3"]
    with pytest.raises(SystemExit, match="^error: num_refined must come with num_rounds of at least 1, got 3 without"):
        main(["design", *arguments])


def test_more_refined_than_drawn_are_refused_in_one_sentence(conditional, composites, tmp_path):
    save_with_predictor(conditional, composites, tmp_path / "checkpoint")
    arguments = [str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path / "checkpoint"), "--num_rounds", "2"]
    with pytest.raises(SystemExit, match="^error: num_refined must be at most num_designs=3, got 4"):
        main(["design", *arguments, "--num_designs", "3", "--num_refined", "4"])


def test_a_device_that_is_not_here_is_refused_in_one_sentence(tmp_path):
    for device in ("abacus", "cuda:99"):
        with pytest.raises(SystemExit, match=f"^error: device must be one that torch has here, got '{device}'"):
            main(["design", str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path), "--device", device])


def test_a_checkpoint_that_is_not_there_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="^error: checkpoint must be a folder or a name on the Hub, got"):
        main(["design", str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path / "none")])


def test_a_checkpoint_without_responses_is_refused_in_one_sentence(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(SystemExit, match="^error: checkpoint must be trained with responses"):
        main(["design", str(tmp_path / "targets.csv"), "--checkpoint", str(tmp_path / "checkpoint")])


def test_a_folder_without_data_is_refused_in_one_sentence(conditional, composites, tmp_path):
    conditional.save_pretrained(tmp_path / "checkpoint")
    write_targets(tmp_path / "t.csv", {"a": stored_responses(composites)[0]}, ResponseSpec.of(composites))
    arguments = [str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path)]
    with pytest.raises(SystemExit, match="^error: dataset must be a folder of train.parquet and heldout.parquet"):
        main(["design", *arguments])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "names must be 1 different names of files, one for each target, got .'a/b'."),
        (
            {"target": -np.ones((2, 3))},
            "targets must not be negative unless the specification is signed, got '-1' in ",
        ),
        ({"rows": 2}, "dataset must have as many solved designs as there are for a target, 3, got 2"),
        ({"size": 6}, r"dataset must have designs of the size \(8, 8\) of the designs, got \(6, 6\)"),
        ({"young_stiff": 10.0}, "dataset must have responses of the specification of the target, got solver "),
        ({"num_designs": "0"}, "num_designs must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_verified_is_not_generated(conditional, composites, tmp_path, monkeypatch, changes, message):
    conditional.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(import_module("mechdiffusers.evaluation.inverse_design.command"), "designs_for", None)
    data = composites
    if {"size", "young_stiff"} & changes.keys():
        designs, _ = random_composites(8, size=changes.get("size", 8))
        spec = ResponseSpec.of(composites)
        data = build_dataset(
            designs,
            spec.load_cases,
            spec.strains,
            element_order=1,
            young_stiff=changes.get("young_stiff", 100.0),
            progress=False,
        )
    (tmp_path / "data").mkdir()
    data.select(range(changes.get("rows", 4))).to_parquet(tmp_path / "data" / "train.parquet")
    data.select(range(4, 8)).to_parquet(tmp_path / "data" / "heldout.parquet")
    curve = changes.get("target", stored_responses(composites)[0])
    write_targets(tmp_path / "t.csv", {changes.get("name", "a"): curve}, ResponseSpec.of(composites))
    folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path / "data")]
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(["design", str(tmp_path / "t.csv"), *folders, "--num_designs", changes.get("num_designs", "3")])


@pytest.mark.filterwarnings("ignore::mechdiffusers.evaluation.inverse_design.OutOfRangeWarning")
@pytest.mark.parametrize("target", [[[0.0], [1.0]], [[0.0, 1.0, 2.0]] * 2, [[0.0]] * 2])
def test_a_target_may_be_zero_somewhere_along_a_load_case_or_everywhere(conditional, composites, tmp_path, target):
    conditional.save_pretrained(tmp_path / "checkpoint")
    composites.select(range(16)).to_parquet(tmp_path / "train.parquet")
    composites.select(range(16, 24)).to_parquet(tmp_path / "heldout.parquet")
    target = np.broadcast_to(target, (2, 3))
    write_targets(tmp_path / "t.csv", {"a": target}, ResponseSpec.of(composites))
    folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path)]
    options = ["--num_designs", "2", "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out")]
    main(["design", str(tmp_path / "t.csv"), *folders, *options])
    content = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert content["targets"] == [target.tolist()]
    found = np.array([row["error"] for row in content["designs"]])
    np.testing.assert_allclose(found, response_error(np.array(content["responses"]), target), rtol=1e-12)
    np.testing.assert_allclose(content["reach"]["nearest_error"], content["retrieval"]["error"][0][0], rtol=1e-12)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_generated(
    conditional, composites, tmp_path, monkeypatch
):
    conditional.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(import_module("mechdiffusers.evaluation.inverse_design.command"), "designs_for", None)
    write_targets(tmp_path / "t.csv", {"a": stored_responses(composites)[0]}, ResponseSpec.of(composites))
    (tmp_path / "file").touch()
    options = ["--checkpoint", str(tmp_path / "checkpoint"), "--output_dir", str(tmp_path / "file" / "out")]
    with pytest.raises(SystemExit, match="^error: output_dir must be a folder that can be written, got"):
        main(["design", str(tmp_path / "t.csv"), *options])


def test_the_shipped_targets_are_three_and_given_at_all_strains_of_the_released_dataset():
    spec = ResponseSpec.of(load_split(ROOT / "data" / "composites-32", "train"))
    names, targets = read_targets(ROOT / "examples" / "targets.csv", spec)
    assert names == ["balanced", "stiff_along_y", "from_no_design"]
    assert np.isfinite(targets).all()
    assert (np.diff(targets, axis=2) > 0).all()
