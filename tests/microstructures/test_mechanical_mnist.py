import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from mechdiffusers.evaluation.inverse_design import stored_designs, stored_responses, verify
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import load_mechanical_mnist
from mechdiffusers.microstructures.mechanical_mnist.__main__ import main
from mechdiffusers.training import parse_config
from mechdiffusers.training.data import load_designs

PUBLISHED = Path(os.environ.get("MECHANICAL_MNIST_DIR", Path(__file__).parents[3] / "shared/data/mechanical_mnist"))
CONFIG = Path(__file__).parents[2] / "training" / "configs" / "mechanical_mnist.yaml"

BITMAPS = np.random.default_rng(0).integers(0, 256, (3, 784))
ENERGIES = np.linspace(0.5, 6.5, 13) * np.array([[1.0], [2.0], [3.0]])


def write(folder, bitmaps=BITMAPS, energies=ENERGIES):
    np.savetxt(folder / "mnist_img.txt", bitmaps, fmt="%g")
    np.savetxt(folder / "summary_psi.txt", energies, fmt="%.5f")
    return folder


def test_bitmaps_and_changes_in_energy_are_those_of_the_files(tmp_path):
    rows = load_mechanical_mnist(write(tmp_path)).with_format("numpy")[:]
    np.testing.assert_array_equal(rows["image"], BITMAPS.reshape(-1, 28, 28))
    np.testing.assert_allclose(rows["response"][:, 0], (ENERGIES - ENERGIES[:, :1])[:, 1:], rtol=1e-6)


def test_the_specification_of_the_published_energies_is_known(tmp_path):
    spec = ResponseSpec.of(load_mechanical_mnist(write(tmp_path)))
    assert spec.quantity == "energy"
    assert spec.load_cases == ("uniaxial_extension",)
    assert spec.strains == (tuple(d / 28 for d in (0.001, 0.01, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 12, 14)),)
    assert not spec.signed
    assert spec.solver["young_stiff"] == 100


def test_the_zipped_bitmaps_are_read_as_they_are_published(tmp_path):
    expected = load_mechanical_mnist(write(tmp_path))[:]
    with zipfile.ZipFile(tmp_path / "mnist_img.txt.zip", "w") as archive:
        archive.write(tmp_path / "mnist_img.txt", "mnist_img.txt")
    (tmp_path / "mnist_img.txt").unlink()
    assert load_mechanical_mnist(tmp_path)[:]["response"] == expected["response"]


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
        load_mechanical_mnist(write(tmp_path, **changed))


def test_a_missing_file_is_named(tmp_path):
    (write(tmp_path) / "summary_psi.txt").unlink()
    with pytest.raises(ValueError, match="^folder must hold a readable table summary_psi.txt"):
        load_mechanical_mnist(tmp_path)


def split(folder, name):
    return Dataset(pq.read_table(folder / f"{name}.parquet"))


@pytest.fixture
def dataset(tmp_path):
    """What the command makes of three rows, of which it holds out the last."""
    folder = tmp_path / "made" / "dataset"
    main(["--folder", str(write(tmp_path)), "--output_dir", str(folder), "--num_heldout", "1"])
    return folder


def test_the_last_rows_are_held_out_and_the_others_trained_on(dataset):
    for name, rows in (("train", slice(2)), ("heldout", slice(2, None))):
        images = split(dataset, name).with_format("numpy")[:]["image"]
        np.testing.assert_array_equal(images, BITMAPS[rows].reshape(-1, 28, 28))
        energies = (ENERGIES - ENERGIES[:, :1])[rows, 3:]
        np.testing.assert_allclose(stored_responses(split(dataset, name))[:, 0], energies, rtol=1e-6)


def test_the_energies_kept_are_those_of_the_displacements_that_leave_them_digits(dataset, tmp_path):
    whole = ResponseSpec.of(load_mechanical_mnist(tmp_path))
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
    arguments = ["--output_dir", str(tmp_path / "dataset"), "--num_heldout", "1"]
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
        with pytest.raises(SystemExit, match=f"^error: {error}"):
            main(["--folder", str(tmp_path), "--output_dir", str(output_dir), "--num_heldout", str(num_heldout)])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published data: set MECHANICAL_MNIST_DIR to their folder")
@pytest.mark.slow
def test_the_heldout_designs_have_the_published_energies_by_the_specification_that_travels_with_them(tmp_path):
    main(["--folder", str(PUBLISHED), "--output_dir", str(tmp_path / "dataset")])
    assert len(split(tmp_path / "dataset", "train")) == 7500
    assert len(split(tmp_path / "dataset", "heldout")) == 500
    rows = split(tmp_path / "dataset", "heldout").select([0, 499])
    report = verify(stored_designs(rows), stored_responses(rows), ResponseSpec.of(rows), binary=False)
    assert report.error.max() <= 1.5e-3
