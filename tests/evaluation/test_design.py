import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from mechdiffusers.evaluation import stored_responses
from mechdiffusers.evaluation.design import designs_for, main
from mechdiffusers.evaluation.targets import read_targets, write_targets
from mechdiffusers.microstructures import response_meaning
from mechdiffusers.models import ResponseEncoder, response_normalisation
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def conditional(make_pipeline, composites):
    """A pipeline with random weights for the responses of the dataset."""
    pipe = make_pipeline(conditional=True)
    normalisation = response_normalisation(torch.from_numpy(stored_responses(composites)))
    encoder = ResponseEncoder(6, 8, meaning=response_meaning(composites), **normalisation)
    pipe.register_modules(response_encoder=encoder.eval())
    return pipe


def test_the_command_line_leaves_a_table_and_a_picture_of_each_target(conditional, composites, tmp_path, caplog):
    conditional.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "data").mkdir()
    composites.select(range(16)).to_parquet(tmp_path / "data" / "train.parquet")
    composites.select(range(16, 24)).to_parquet(tmp_path / "data" / "heldout.parquet")
    curves = dict(zip(("soft", "stiff"), stored_responses(composites)[[20, 21]], strict=True))
    write_targets(tmp_path / "targets.csv", curves, response_meaning(composites))
    options = ["--num_designs", "3", "--num_inference_steps", "2", "--guidance_scale", "2"]
    folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path / "data")]
    with caplog.at_level("INFO"):
        main([str(tmp_path / "targets.csv"), *folders, *options, "--output_dir", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "verification.csv").open()))
    assert [row["target"] for row in rows] == ["soft"] * 3 + ["stiff"] * 3
    for name in ("soft", "stiff"):
        Image.open(tmp_path / "out" / f"{name}.png").verify()
        assert f"{min(float(row['error']) for row in rows if row['target'] == name):.2%}" in caplog.text


def test_designs_of_a_target_do_not_depend_on_the_other_targets(conditional, composites):
    targets = stored_responses(composites)[:3]
    together = designs_for(conditional, targets, 2, seed=5, num_inference_steps=2)
    alone = designs_for(conditional, targets[:1], 2, seed=5, num_inference_steps=2)
    assert together.shape == (6, 8, 8)
    np.testing.assert_array_equal(together[:2], alone)


def test_a_checkpoint_without_responses_is_refused_in_one_sentence(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(SystemExit, match="^error: checkpoint must be trained with responses"):
        main([str(tmp_path / "targets.csv"), "--checkpoint", str(tmp_path / "checkpoint")])


def test_a_folder_without_data_is_refused_in_one_sentence(conditional, composites, tmp_path):
    conditional.save_pretrained(tmp_path / "checkpoint")
    write_targets(tmp_path / "t.csv", {"a": stored_responses(composites)[0]}, response_meaning(composites))
    arguments = [str(tmp_path / "t.csv"), "--checkpoint", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path)]
    with pytest.raises(SystemExit, match="^error: dataset must be a folder of train.parquet and heldout.parquet"):
        main(arguments)


def test_the_shipped_targets_are_three_and_given_at_all_strains_of_the_released_dataset():
    meaning = {
        "quantity": "stress",
        "load_cases": ["uniaxial_extension", "uniaxial_extension_x", "shear"],
        "strains": [[0.05, 0.1, 0.15, 0.2, 0.25, 0.3]] * 3,
    }
    names, targets = read_targets(ROOT / "examples" / "targets.csv", meaning)
    assert names == ["balanced", "stiff_along_y", "from_no_design"]
    assert np.isfinite(targets).all()
    assert (np.diff(targets, axis=2) > 0).all()
