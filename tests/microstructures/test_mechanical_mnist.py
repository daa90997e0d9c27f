import zipfile

import numpy as np
import pytest
from mechdiffusers.microstructures import load_mechanical_mnist, response_meaning

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


def test_the_meaning_of_the_published_energies_is_known(tmp_path):
    meaning = response_meaning(load_mechanical_mnist(write(tmp_path)))
    assert meaning["quantity"] == "energy"
    assert meaning["load_cases"] == ["uniaxial_extension"]
    assert meaning["strains"] == [[d / 28 for d in (0.001, 0.01, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 12, 14)]]
    assert meaning["material"]["young_stiff"] == 100


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
