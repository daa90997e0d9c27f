"""Designs from the Hub (``hub_server.py``), by the name of their dataset, are those of the files that lie there."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from hub_server import Commit, Repository
from mechdiffusers.training.data import load_designs
from small_runs import SCRIPT, assert_same_weights, command_line, conditional, finish, small, start, write_dataset

NAME = "mechanic/composites"


@pytest.fixture
def folder(hub, tmp_path) -> Path:
    """A folder of the two splits, and the same on the Hub, private, with the card of the designs that we release."""
    folder = write_dataset(tmp_path / "composites")
    card = SCRIPT.parents[1] / "data" / "composites-32" / "README.md"
    commit = Commit("designs", {path.name: path.read_bytes() for path in (card, *folder.iterdir())})
    hub.repositories[f"datasets/{NAME}"] = Repository(private=True, branches={"main": [commit]})
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_designs_of_the_hub_are_those_of_its_files(hub, folder, streaming):
    both = []
    for dataset in (folder, NAME):
        designs = load_designs(
            small("unused", **{**conditional(dataset), "num_train_designs": 48}, streaming=streaming)
        )
        both.append((designs.spec, designs.heldout, designs.heldout_response, list(islice(designs.train, 48))))
    (spec, *ours), (expected, *theirs) = both
    assert spec == expected
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert any(path.endswith("train.parquet") for _, path in hub.requests)


def test_a_dataset_that_is_not_on_the_hub_is_refused(hub):
    with pytest.raises(ValueError, match="^dataset must be 'random_composites', .* got 'mechanic/none'"):
        load_designs(small("unused", dataset="mechanic/none"))


@pytest.mark.slow
def test_the_script_trains_on_designs_of_the_hub(folder, tmp_path):
    for name, dataset in (("theirs", NAME), ("ours", folder)):
        finish(start(command_line(tmp_path / name, dataset=str(dataset), num_train_designs=None)))
    assert_same_weights(tmp_path / "theirs", tmp_path / "ours")
