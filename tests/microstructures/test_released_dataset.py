"""data/composites-32 holds what its card says."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_dataset

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.microstructures import random_composites

FOLDER = Path(__file__).parents[2] / "data" / "composites-32"
SPLITS = ("heldout", "train")

pytestmark = pytest.mark.skipif(not (FOLDER / "train.parquet").exists(), reason="it is still being built")


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> DatasetDict:
    return load_dataset(str(FOLDER), cache_dir=tmp_path_factory.mktemp("cache"))


def images_of(dataset: Dataset) -> np.ndarray:
    return dataset.with_format("numpy")[:]["image"]


def test_the_designs_are_those_of_the_generator_the_heldout_ones_first(splits):
    assert len(splits["heldout"]) == 512
    assert len(splits["train"]) >= 6000
    designs, parameters = random_composites(sum(len(splits[name]) for name in SPLITS), size=32, seed=0)
    np.testing.assert_array_equal(np.concatenate([images_of(splits[name]) for name in SPLITS]), designs)
    for column, values in parameters.items():
        # processors differ in the last digit of exp and log
        np.testing.assert_allclose(np.concatenate([splits[name][column] for name in SPLITS]), values, rtol=1e-14)


@pytest.mark.parametrize("split", SPLITS)
def test_the_specification_is_that_of_the_card(splits, split):
    assert ResponseSpec.of(splits[split]) == ResponseSpec(
        "stress",
        ["uniaxial_extension", "uniaxial_extension_x", "shear"],
        [[0.05, 0.1, 0.15, 0.2, 0.25, 0.3]] * 3,
        units="Young's modulus of the soft phase",
        signed=False,
        solver={"element_order": 2, "young_soft": 1.0, "young_stiff": 100.0, "poisson": 0.3, "pixel_size": 1.0},
    )


@pytest.mark.parametrize("split", SPLITS)
def test_nearly_all_paths_are_solved_and_the_others_flagged(splits, split):
    rows = splits[split].with_format("numpy")[:]
    np.testing.assert_array_equal(rows["converged"], ~np.isnan(rows["response"]).any(-1))
    assert rows["converged"].mean() >= 0.995
    assert np.nanmin(rows["response"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_responses_are_those_of_simulate(splits, split):
    rows = splits[split].select(np.linspace(0, len(splits[split]) - 1, 4).astype(int))
    spec = ResponseSpec.of(rows)
    designs = images_of(rows).astype(float)
    result = simulate(designs, spec.load_cases, spec.strains)  # our own defaults
    np.testing.assert_allclose(rows.with_format("numpy")[:]["response"], result.stress, rtol=1e-6)
    np.testing.assert_array_equal(spec.simulator()(designs), result.stress)


def test_the_card_counts_the_paths_that_are_not_solved(splits):
    heldout, train = (
        ~splits[split].select_columns("converged").with_format("numpy")[:]["converged"] for split in SPLITS
    )
    card = " ".join((FOLDER / "README.md").read_text().split())
    assert f"{train.sum()} of the {train.size:,} paths to train on, {heldout.sum()} of the {heldout.size:,}" in card
    assert not np.concatenate([train, heldout])[:, :2].any()  # all of them in shear


def test_it_is_small_enough_to_be_carried_along():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6
