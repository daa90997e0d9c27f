import csv
import json
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mechdiffusers import ResponseSpec, build_dataset, dataset_from_responses, random_composites
from mechdiffusers.cli import main

CASES, STRAINS = ["uniaxial_extension", "shear"], [0.05, 0.1, 0.2]


@pytest.fixture(scope="module")
def built():
    """Designs with responses of our own solver, as it stores them, and as numbers."""
    designs = random_composites(12, size=8, seed=1)[0]
    return designs, build_dataset(designs, CASES, STRAINS, element_order=1, progress=False)


def response_of(dataset) -> np.ndarray:
    return dataset.with_format("numpy")[:]["response"]


def write_images(folder, designs, name="{:03d}.png") -> list[str]:
    folder.mkdir(parents=True)
    names = [name.format(index) for index in range(len(designs))]
    for file, design in zip(names, designs, strict=True):
        (folder / file).parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(design, dtype=np.uint8) * 255).save(folder / file)
    return names


def write_table(path, names, response, strains=STRAINS, quantity="stress") -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["design", "load_case", "strain", quantity])
        for name, curves in zip(names, response, strict=True):
            for case, curve in zip(CASES, curves, strict=True):
                table.writerows([name, case, strain, repr(float(y))] for strain, y in zip(strains, curve, strict=True))


def imported(tmp_path, *options: str, units: str = "MPa"):
    arguments = ["--designs", str(tmp_path / "images"), "--responses", str(tmp_path / "r.csv"), "--units", units]
    main(["import", *arguments, "--output_dir", str(tmp_path / "mine"), *options])
    return datasets.load_dataset(str(tmp_path / "mine"))


def test_the_same_responses_by_our_solver_and_by_a_table_are_the_same_training_data_to_the_bit(tmp_path, built):
    designs, ours = built
    write_table(tmp_path / "r.csv", write_images(tmp_path / "images", designs), response_of(ours))
    splits = imported(tmp_path, "--num_heldout", "3", "--seed", "5")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 9, "heldout": 3}
    pairs = {
        np.asarray(row["image"]).tobytes(): np.asarray(row["response"], dtype=np.float32).tobytes()
        for rows in splits.values()
        for row in rows
    }
    expected = {
        np.asarray(row["image"]).tobytes(): np.asarray(row["response"], dtype=np.float32).tobytes() for row in ours
    }
    assert pairs == expected
    assert [row["image"].mode for row in splits["train"]] == ["1"] * 9
    spec = ResponseSpec.of(splits["train"])
    assert spec == ResponseSpec("stress", CASES, [STRAINS] * 2, units="MPa", signed=False)
    assert ResponseSpec.of(splits["heldout"]) == spec


def test_the_held_out_designs_are_drawn_by_the_seed_and_a_tenth_by_default(tmp_path, built):
    designs, ours = built
    write_table(tmp_path / "r.csv", write_images(tmp_path / "images", designs), response_of(ours))
    drawn = []
    for seed in "007":
        (tmp_path / "mine").exists() and (tmp_path / "mine").rename(tmp_path / f"before{len(drawn)}")
        drawn.append(imported(tmp_path, "--seed", seed)["heldout"].with_format("numpy")[:]["response"])
    assert len(drawn[0]) == 1
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ("{:03d}.png", "{:03d}.png"),
        ("{:03d}.png", "{:03d}"),
        ("soft/{:03d}.png", "soft/{:03d}.png"),
        ("soft/{:03d}.png", "{:03d}"),
        ("{:03d}.png", "{:03d}.inp"),
        ("run#{:03d}.png", "run#{:03d}"),
    ],
)
def test_a_table_names_designs_by_path_or_file_name_with_or_without_suffix(tmp_path, built, files, named):
    designs, ours = built
    write_images(tmp_path / "images", designs, files)
    order = np.random.default_rng(0).permutation(len(designs))
    write_table(tmp_path / "r.csv", [named.format(index) for index in order], response_of(ours)[order])
    for row in imported(tmp_path)["train"]:
        (same,) = np.flatnonzero((np.asarray(row["image"]) == designs.astype(bool)).all((1, 2)))
        np.testing.assert_array_equal(row["response"], response_of(ours)[same])


def test_items_of_a_stack_are_named_by_their_number(tmp_path, built):
    designs, ours = built
    np.save(tmp_path / "images.npy", designs)
    write_table(tmp_path / "r.csv", [str(index) for index in range(len(designs))], response_of(ours))
    (tmp_path / "images.npy").rename(tmp_path / "stack.npy")
    arguments = ["--designs", str(tmp_path / "stack.npy"), "--responses", str(tmp_path / "r.csv"), "--units", "MPa"]
    main(["import", *arguments, "--output_dir", str(tmp_path / "mine")])
    assert len(datasets.load_dataset(str(tmp_path / "mine"))["train"]) == 11


def test_curves_at_other_strains_are_brought_to_common_ones_with_gaps_where_they_do_not_reach(tmp_path, built):
    designs, _ = built
    names = write_images(tmp_path / "images", designs)
    with (tmp_path / "r.csv").open("w") as file:
        file.write("design,load_case,strain,stress\n")
        for index, name in enumerate(names):
            end = 0.3 if index else 0.15  # the first one broke early
            for strain in np.linspace(0.01, end, 5 + index):
                file.write(f"{name},pull,{strain},{2 * strain}\n")
    with pytest.raises(
        SystemExit, match="strains must be given, since curves of 'pull' .* all reach from 0.01 to 0.15"
    ):
        imported(tmp_path)
    splits = imported(tmp_path, "--strains", "0.1", "0.2")
    found = np.concatenate([response_of(rows) for rows in splits.values()])[:, 0]
    broken = np.isnan(found[:, 1])
    assert broken.sum() == 1
    np.testing.assert_allclose(found[~broken], [[0.2, 0.4]] * 11, rtol=1e-6)
    np.testing.assert_allclose(found[broken, 0], 0.2, rtol=1e-6)


def test_load_cases_may_have_strains_of_their_own(tmp_path, built):
    designs, _ = built
    names = write_images(tmp_path / "images", designs)
    with (tmp_path / "r.csv").open("w") as file:
        file.write("design,load_case,strain,stress\n")
        for name in names:
            file.writelines(f"{name},pull,{x},{3 * x}\n" for x in (0.1, 0.2, 0.3))
            file.writelines(f"{name},push,{x},{2 * x}\n" for x in (-0.1, 0.0))
    with pytest.raises(
        SystemExit, match="strains must be given, since load cases have different numbers of them: pull 3"
    ):
        imported(tmp_path, "--signed")
    for given in (["pull=0.1,0.2"], ["pull=0.1,x", "push=0,1"], ["pull=0.1", "0.2"], ["half"]):
        with pytest.raises(
            SystemExit, match=r"strains must be numbers, .* of the load cases \['pull', 'push'\] once, as"
        ):
            imported(tmp_path, "--signed", "--strains", *given)
    rows = imported(tmp_path, "--signed", "--strains", "push=-0.1,-0.05", "pull=0.15,0.3")["train"]
    assert ResponseSpec.of(rows).strains == ((0.15, 0.3), (-0.1, -0.05))
    np.testing.assert_allclose(response_of(rows), [[[0.45, 0.9], [-0.2, -0.1]]] * 11, rtol=1e-6)


@pytest.mark.parametrize("options", [[], ["--strains", "0.1"]])
def test_curves_and_single_values_are_two_datasets(tmp_path, built, options):
    names = write_images(tmp_path / "images", built[0])
    lines = [f"{name},pull,0.1,1\n{name},pull,0.2,1\n{name},density,,0.5\n" for name in names]
    (tmp_path / "r.csv").write_text("design,load_case,strain,value\n" + "".join(lines))
    message = "curves throughout or single values throughout, got strains for 'pull' and none for 'density' in r.csv"
    with pytest.raises(SystemExit, match=message):
        imported(tmp_path, *options)


def test_a_spreadsheet_of_signed_entries_is_a_response_without_a_curve(tmp_path, built):
    designs, _ = built
    names = write_images(tmp_path / "images", designs)
    values = np.random.default_rng(0).normal(size=(len(names), 2))
    lines = [f"{name},{a!r},{b!r}\n" for name, (a, b) in zip(names, values.tolist(), strict=True)]
    (tmp_path / "r.csv").write_text("file_name,C11,C12\n" + "".join(lines))
    with pytest.raises(SystemExit, match="responses must not be negative unless the specification is signed"):
        imported(tmp_path, "--quantity", "stiffness", units="GPa")
    with pytest.raises(SystemExit, match="quantity must be given"):
        imported(tmp_path, "--signed")
    splits = imported(tmp_path, "--signed", "--quantity", "stiffness", units="GPa")
    spec = ResponseSpec.of(splits["train"])
    assert spec == ResponseSpec("stiffness", ["C11", "C12"], [[0.0], [0.0]], units="GPa", signed=True)
    assert spec.is_scalar
    found = np.concatenate([response_of(rows) for rows in splits.values()])[..., 0]
    np.testing.assert_array_equal(np.sort(found, 0), np.sort(values.astype(np.float32), 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: [*lines, "other.png,shear,0.1,1"],
            "'other.png' in row 74 of r.csv, which none of the designs '000.png' to '011.png' has",
        ),
        (lambda lines: lines[:-6], "responses must have a row for every design, got none in r.csv for 011.png and 0"),
        (
            lambda lines: [*lines, "011,shear,0.1,1"],
            "one name for a design, got '011' in row 74 .* and '011.png' in row 68",
        ),
        (lambda lines: [line.replace(",", ";") for line in lines], "responses must have commas"),
        (lambda lines: [lines[0] + ",extra", *lines[1:]], "responses must have the columns"),
    ],
)
def test_what_does_not_match_is_refused_before_anything_is_written(tmp_path, built, change, message):
    designs, ours = built
    write_table(tmp_path / "r.csv", write_images(tmp_path / "images", designs), response_of(ours))
    lines = (tmp_path / "r.csv").read_text().splitlines()
    (tmp_path / "r.csv").write_text("\n".join(change(lines)) + "\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=message):
        imported(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_two_files_of_one_name_must_be_named_with_their_folder(tmp_path, built):
    designs, ours = built
    write_images(tmp_path / "images", designs, "a/{:03d}.png")
    write_images(tmp_path / "more", designs[:1], "{:03d}.png")
    (tmp_path / "more").rename(tmp_path / "images" / "b")
    write_table(tmp_path / "r.csv", [f"{index:03d}" for index in range(12)], response_of(ours))
    with pytest.raises(SystemExit, match="'000' in row 2 of r.csv, which fits a/000.png and b/000.png"):
        imported(tmp_path)


def test_mixed_sizes_are_refused(tmp_path, built):
    designs, ours = built
    names = write_images(tmp_path / "images", designs)
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "images" / names[3])
    write_table(tmp_path / "r.csv", names, response_of(ours))
    with pytest.raises(SystemExit, match="one size"):
        imported(tmp_path)
    assert not (tmp_path / "mine").exists()


def test_an_import_that_breaks_off_leaves_nothing_that_looks_like_a_dataset(tmp_path, built, monkeypatch):
    designs, ours = built
    write_table(tmp_path / "r.csv", write_images(tmp_path / "images", designs), response_of(ours))
    written = []

    def full_disk(self, path, *arguments, **options):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_bytes(b"half")

    monkeypatch.setattr(datasets.Dataset, "to_parquet", full_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="output_dir must be a folder that can be written, got .* No space left"):
        imported(tmp_path)
    assert written
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="output_dir must not exist yet"):
        imported(tmp_path)


SPEC = ResponseSpec("stiffness", ["C11", "C12"], [[0.0], [0.0]], units="GPa", signed=True)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_a_dataset_of_arrays_keeps_them(kind):
    designs = random_composites(3, size=8, seed=0)[0].astype(float)
    response = np.array([[[1.0], [-2.0]], [[3.0], [np.nan]], [[0.0], [0.0]]])
    dataset = dataset_from_responses(kind(designs), kind(response), SPEC)
    np.testing.assert_array_equal(response_of(dataset), response)
    np.testing.assert_array_equal([np.asarray(image) for image in dataset["image"]], designs)
    np.testing.assert_array_equal(dataset["converged"], [[True, True], [True, False], [True, True]])
    assert json.loads(dataset.features["response"].id) == SPEC.to_dict()


@pytest.mark.parametrize(
    ("response", "spec", "message"),
    [
        (np.ones((2, 2, 2)), SPEC, r"response must have shape \(2, 2, 1\) for the designs, got \(2, 2, 2\)"),
        (np.ones((3, 2, 1)), SPEC, r"response must have shape \(2, 2, 1\)"),
        (np.full((2, 2, 1), np.inf), SPEC, "response must be finite"),
        (np.full((2, 2, 1), -1e39), SPEC, r"response must be finite in single precision, .* got 1e\+39"),
        (
            np.full((2, 2, 1), np.nan),
            SPEC,
            "response must be known of some design at every strain, got none for 'C11' at 0",
        ),
        ("much", SPEC, "response must be an array of numbers, got str"),
        (np.ones((2, 2, 1)), SPEC.to_dict(), "spec must be a ResponseSpec, got dict"),
    ],
)
def test_unfit_responses_are_refused(response, spec, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataset_from_responses(np.zeros((2, 4, 4)), response, spec)


@pytest.mark.parametrize("levels", [[0, 128], [128, 129], [0, 100, 255], range(8), range(100, 130)])
@pytest.mark.parametrize("make", [dataset_from_responses, build_dataset])
def test_designs_that_training_would_read_as_others_are_refused(make, levels):
    """Two greys are read as two phases, three to eight as more phases, and a sliver of the range is no image."""
    designs = np.resize(np.array(levels) / 255, (3, 8, 8))
    rest = (np.ones((3, 2, 1)), SPEC) if make is dataset_from_responses else (["shear"], [0.1])
    with pytest.raises(
        ValueError, match="^designs must be 0 and 1 alone, or have more than 8 grey levels over the range"
    ):
        make(designs, *rest)


def test_what_was_imported_is_said(tmp_path, built, caplog):
    designs, ours = built
    write_table(tmp_path / "r.csv", write_images(tmp_path / "images", designs), response_of(ours))
    with caplog.at_level(logging.INFO):
        imported(tmp_path)
    assert "11 designs to train on and 1 held out, of 8 x 8 pixels, 2 load cases at 3 strains, 0 of 24" in caplog.text
