import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from mechdiffusers.evaluation.inverse_design import stored_designs, stored_responses, verify
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.mechanics.load_cases import LOAD_CASES
from mechdiffusers.microstructures import load_mechanical_mnist
from mechdiffusers.microstructures.mechanical_mnist.__main__ import main
from mechdiffusers.training import parse_config
from mechdiffusers.training.data import load_designs

PUBLISHED = Path(os.environ.get("MECHANICAL_MNIST_DIR", Path(__file__).parents[3] / "shared/data/mechanical_mnist"))
CONFIG = Path(__file__).parents[2] / "training" / "configs" / "mechanical_mnist.yaml"

BITMAPS = np.random.default_rng(0).integers(0, 256, (3, 784))
ENERGIES = np.linspace(0.5, 6.5, 13) * np.array([[1.0], [2.0], [3.0]])


UNIAXIAL = (0.001, 0.01, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 12, 14)
SHEAR = (0.001, 0.01, 0.1, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)


def write(folder, bitmaps=BITMAPS, energies=ENERGIES, names=("mnist_img.txt", "summary_psi.txt")):
    for name, table, digits in zip(names, (bitmaps, energies), ("%g", "%.5f"), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(folder / name, table, fmt=digits)
    return folder


def compress(file, archive):
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(file, file.relative_to(archive.parent))
    file.unlink()


def load(folder, load_case="uniaxial_extension"):
    return load_mechanical_mnist(folder, load_case)


def test_bitmaps_and_changes_in_energy_are_those_of_the_files(tmp_path):
    rows = load(write(tmp_path)).with_format("numpy")[:]
    np.testing.assert_array_equal(rows["image"], BITMAPS.reshape(-1, 28, 28))
    np.testing.assert_allclose(rows["response"][:, 0], (ENERGIES - ENERGIES[:, :1])[:, 1:], rtol=1e-6)


@pytest.mark.parametrize(
    ("load_case", "displacements"),
    [
        ("uniaxial_extension", UNIAXIAL),
        ("equibiaxial_extension", UNIAXIAL),
        ("shear", SHEAR),
        ("confined_compression", SHEAR),
    ],
)
def test_the_strains_of_each_load_case_are_those_at_which_the_edges_move_by_the_published_displacements(
    load_case, displacements, tmp_path
):
    spec = ResponseSpec.of(load(write(tmp_path, energies=ENERGIES[:, : len(displacements) + 1]), load_case))
    assert (spec.quantity, spec.load_cases) == ("energy", (load_case,))
    assert (spec.solver["young_soft"], spec.solver["young_stiff"]) == (1, 100)
    moved = LOAD_CASES[load_case].affine((29, 29), (28, 28), torch.device("cpu"))
    upright, across = (
        moved[0, 0] - moved[-1, 0],
        moved[0, -1] - moved[0, 0],
    )  # of top against bottom, right against left
    direction = {"shear": (1, 0), "confined_compression": (0, -1)}.get(load_case, (0, 1))
    for strain, displacement in zip(spec.strains[0], displacements, strict=True):
        np.testing.assert_allclose(strain * upright, displacement * np.array(direction))
        np.testing.assert_allclose(strain * across[0], displacement * (load_case == "equibiaxial_extension"))


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("form", ["plain", "zipped", "subfolders", "archives"])
def test_the_published_names_are_read_zipped_or_not(part, form, tmp_path):
    subfolders = ("MNIST_input_files", "FEA_psi_results")
    names = f"mnist_img_{part}.txt", f"summary_psi_{part}_all.txt"
    inside = form in ("subfolders", "archives")
    paths = [f"{place}/{name}" if inside else name for place, name in zip(subfolders, names, strict=True)]
    write(tmp_path, names=paths)
    if form == "zipped":
        for path in paths:
            compress(tmp_path / path, tmp_path / f"{path}.zip")
    if form == "archives":
        for path, place in zip(paths, subfolders, strict=True):
            compress(tmp_path / path, tmp_path / f"{place}.zip")
            (tmp_path / place).rmdir()
    rows = load(tmp_path).with_format("numpy")[:]
    np.testing.assert_array_equal(rows["image"], BITMAPS.reshape(-1, 28, 28))
    np.testing.assert_allclose(rows["response"][:, 0], (ENERGIES - ENERGIES[:, :1])[:, 1:], rtol=1e-6)


def test_training_rows_come_before_test_rows(tmp_path):
    write(tmp_path, BITMAPS[2:], ENERGIES[2:], ("mnist_img_test.txt", "summary_psi_test_all.txt"))
    write(tmp_path, BITMAPS[:2], ENERGIES[:2], ("mnist_img_train.txt", "summary_psi_train_all.txt"))
    images = load(tmp_path).with_format("numpy")[:]["image"]
    np.testing.assert_array_equal(images, BITMAPS.reshape(-1, 28, 28))


def test_the_load_case_is_required_unless_the_name_of_the_folder_says_it(tmp_path):
    accepted = "uniaxial_extension, equibiaxial_extension, shear, confined_compression"
    for load_case in (None, "torsion"):
        with pytest.raises(ValueError, match=f"^load_case must be one of {accepted}, .* got {load_case!r}"):
            load(write(tmp_path / "data"), load_case)
    told = write(tmp_path / "Mechanical-MNIST Equibiaxial-Extension")
    assert ResponseSpec.of(load_mechanical_mnist(told)).load_cases == ("equibiaxial_extension",)
    with pytest.raises(ValueError, match="^load_case must be that of the folder's name, equibiaxial_extension, got"):
        load(told)


@pytest.mark.parametrize(("load_case", "columns"), [("uniaxial_extension", 11), ("shear", 13), ("shear", 12)])
def test_a_table_of_another_load_case_is_refused_with_the_number_of_columns_that_each_has(load_case, columns, tmp_path):
    each = "13 for uniaxial_extension, 13 for equibiaxial_extension, 11 for shear, 11 for confined_compression"
    with pytest.raises(
        ValueError, match=f"^folder must hold as many numbers .* {each}, got {columns} for {load_case}$"
    ):
        load(write(tmp_path / "data", energies=ENERGIES[:, :columns]), load_case)


@pytest.mark.parametrize(
    "changed",
    [
        {"bitmaps": BITMAPS[:2]},
        {"bitmaps": BITMAPS[:, 1:]},
        {"bitmaps": BITMAPS + 0.5},
        {"bitmaps": BITMAPS + 1},
        {"energies": ENERGIES[:, 1:]},
    ],
)
def test_files_of_another_kind_are_refused(changed, tmp_path):
    with pytest.raises(ValueError, match="^folder must hold"):
        load(write(tmp_path, **changed))


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    (write(tmp_path) / "mnist_img.txt").unlink()
    with pytest.raises(ValueError, match="^folder must hold mnist_img.txt, as it is or zipped, .* got none in"):
        load(tmp_path)
    (tmp_path / "mnist_img.txt").write_text("1 2 three")
    with pytest.raises(ValueError, match="^folder must hold a readable table mnist_img.txt, got"):
        load(tmp_path)
    (tmp_path / "summary_psi.txt").unlink()
    with pytest.raises(ValueError, match="^folder must hold one of summary_psi_train_all.txt, .*, summary_psi.txt, as"):
        load(tmp_path)


def split(folder, name):
    return Dataset(pq.read_table(folder / f"{name}.parquet"))


@pytest.fixture
def dataset(tmp_path):
    """What the command makes of three rows, of which it holds out the last."""
    folder = tmp_path / "made" / "dataset"
    arguments = ["--folder", str(write(tmp_path)), "--output_dir", str(folder), "--num_heldout", "1"]
    main([*arguments, "--load_case", "uniaxial_extension"])
    return folder


def test_the_last_rows_are_held_out_and_the_others_trained_on(dataset):
    for name, rows in (("train", slice(2)), ("heldout", slice(2, None))):
        images = split(dataset, name).with_format("numpy")[:]["image"]
        np.testing.assert_array_equal(images, BITMAPS[rows].reshape(-1, 28, 28))
        energies = (ENERGIES - ENERGIES[:, :1])[rows, 3:]
        np.testing.assert_allclose(stored_responses(split(dataset, name))[:, 0], energies, rtol=1e-6)


def test_the_energies_kept_are_those_of_the_displacements_that_leave_them_digits(dataset, tmp_path):
    whole = ResponseSpec.of(load(tmp_path))
    kept = replace(whole, strains=[[d / 28 for d in (0.1, 0.5, 1, 2, 4, 6, 8, 10, 12, 14)]])
    assert ResponseSpec.of(split(dataset, "train")) == ResponseSpec.of(split(dataset, "heldout")) == kept


def test_the_released_configuration_trains_on_what_the_command_writes(dataset):
    designs = load_designs(
        parse_config(["--config", str(CONFIG), "--dataset", str(dataset), "--num_heldout_designs", "1"])
    )
    np.testing.assert_array_equal(designs.heldout[:, 0], BITMAPS[2:].reshape(-1, 28, 28))
    assert designs.num_train == 2
    assert designs.spec == ResponseSpec.of(split(dataset, "train"))


def test_the_folder_of_the_published_files_is_asked_for_where_neither_argument_nor_environment_names_it(
    tmp_path, monkeypatch, capsys
):
    arguments = ["--output_dir", str(tmp_path / "dataset"), "--num_heldout", "1", "--load_case", "uniaxial_extension"]
    monkeypatch.delenv("MECHANICAL_MNIST_DIR", raising=False)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--folder or MECHANICAL_MNIST_DIR must name the folder" in capsys.readouterr().err
    monkeypatch.setenv("MECHANICAL_MNIST_DIR", str(write(tmp_path)))
    main(arguments)
    assert len(split(tmp_path / "dataset", "train")) == 2


def test_a_folder_that_exists_and_a_split_without_rows_are_refused_and_nothing_is_left_behind(dataset, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for output_dir, num_heldout, error in ((dataset, 1, "output_dir must"), (tmp_path / "new", 3, "num_heldout must")):
        arguments = ["--folder", str(tmp_path), "--load_case", "uniaxial_extension", "--output_dir", str(output_dir)]
        with pytest.raises(SystemExit, match=f"^error: {error}"):
            main([*arguments, "--num_heldout", str(num_heldout)])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published data: set MECHANICAL_MNIST_DIR to their folder")
@pytest.mark.slow
def test_the_heldout_designs_have_the_published_energies_by_the_specification_that_travels_with_them(tmp_path):
    arguments = ["--folder", str(PUBLISHED), "--output_dir", str(tmp_path / "dataset")]
    main([*arguments, "--load_case", "uniaxial_extension"])
    assert len(split(tmp_path / "dataset", "train")) == 7500
    assert len(split(tmp_path / "dataset", "heldout")) == 500
    rows = split(tmp_path / "dataset", "heldout").select([0, 499])
    report = verify(stored_designs(rows), stored_responses(rows), ResponseSpec.of(rows), binary=False)
    assert report.error.max() <= 1.5e-3
