"""What the predictor of responses is trained on, and how well it learns."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mechdiffusers.mechanics import simulate
from mechdiffusers.mechanics.load_cases import mirrored_cases, transposed_cases
from mechdiffusers.microstructures import random_composites
from mechdiffusers.microstructures.build_dataset.columns import dataset_of, grey_levels
from mechdiffusers.models import ResponsePredictor
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.predictor import augment, symmetries
from mechdiffusers.training.publish import model_card
from mechdiffusers.training.randomness import StepRandomness
from mechdiffusers.training.rehearsal import rehearse
from mechdiffusers.training.stages import check_stages
from mechdiffusers.training.train import train
from small_runs import SPEC, conditional, responses_of, small, weights, write_dataset

CASES = ["uniaxial_extension", "uniaxial_extension_x", "equibiaxial_extension", "shear", "shear_x"]


def stresses(designs: torch.Tensor) -> torch.Tensor:
    found = simulate(designs, CASES, [0.05, 0.1], element_order=1)
    return found.stress


def test_a_reflected_design_responds_as_its_load_cases_say() -> None:
    designs = torch.from_numpy(random_composites(3, size=8, seed=4)[0])
    itself = stresses(designs)
    for reflection, cases in (
        (designs.flip(-1), mirrored_cases(CASES)),
        (designs.mT.contiguous(), transposed_cases(CASES)),
    ):
        response = stresses(reflection)
        told = [i for i, case in enumerate(cases) if case is not None]
        assert len(told) >= 3
        torch.testing.assert_close(response[:, told], itself[:, [cases[i] for i in told]], rtol=1e-6, atol=0)
        for i in set(range(len(CASES))) - set(told):
            assert not torch.allclose(response[:, i], itself[:, i], rtol=1e-3)


def test_the_settings_say_which_symmetries_there_are(tmp_path) -> None:
    cases = ["uniaxial_extension", "uniaxial_extension_x", "shear"]
    both = {"random_half_turn": True, "random_reflections": True}
    every = {"half_turn": [0, 1, 2], "mirror": [0, 1, None], "transpose": [1, 0, None]}
    assert symmetries(small(tmp_path, **both), cases, (8, 8)) == every
    assert set(symmetries(small(tmp_path, **both), cases, (8, 9))) == {"half_turn", "mirror"}
    assert set(symmetries(small(tmp_path, **{**both, "random_reflections": False}), cases, (8, 8))) == {"half_turn"}
    assert symmetries(small(tmp_path, **dict.fromkeys(both, False)), cases, (8, 8)) == {}
    # nothing is known of a transposed design that was pulled along y alone
    assert set(symmetries(small(tmp_path, **both), cases[:1], (8, 8))) == {"half_turn", "mirror"}


def test_turned_designs_keep_of_their_response_what_follows_from_it() -> None:
    images = torch.rand(400, 1, 4, 4)
    response = torch.arange(3.0)[None, :, None].repeat(400, 1, 2)
    reflections = {"mirror": [0, 1, None], "transpose": [1, 0, None]}
    seen, told = augment(images, response, reflections, StepRandomness((0,)))
    as_it_was = (seen == images).flatten(1).all(1)
    assert 0.5 < as_it_was.double().mean() < 0.62  # 9 / 16
    torch.testing.assert_close(told[as_it_was], response[as_it_was])
    assert told[~as_it_was][:, 2].isnan().all()
    transposed = (seen == images.mT).flatten(1).all(1)
    torch.testing.assert_close(told[transposed][:, :2, 0], torch.tensor([1.0, 0.0]).expand(int(transposed.sum()), 2))
    seen, told = augment(images, response, {"half_turn": [0, 1, 2]}, StepRandomness((0,)))
    half = (seen == images.flip(-1, -2)).flatten(1).all(1)
    assert 0.4 < half.double().mean() < 0.6
    assert torch.equal(told, response)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "composites")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trained"
    train(small(folder, predictor_steps=150, predictor_learning_rate=3e-3, ema_decay=0.9, **conditional(dataset)))
    return folder


def test_a_run_with_responses_leaves_a_predictor_that_has_learned_them(trained):
    pipe = LatentDDPMPipeline.from_pretrained(trained / "pipeline")
    assert type(pipe.response_predictor) is ResponsePredictor
    assert pipe.response_predictor.config.spec == SPEC.to_dict()
    for name in ("scale", "mean", "std"):  # a denoiser and a predictor of one run normalise alike
        assert pipe.response_predictor.config[name] == pipe.response_encoder.config[name]
    assert pipe.response_predictor.config.symmetries.keys() == {"half_turn", "mirror"}
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["predictor/step"] == 150
    assert metrics["predictor/loss"] < 0.3  # that of the mean alone is near 1
    assert 0 < metrics["predictor/response_error"] < 0.5


def test_the_predictors_weights_are_averaged(trained):
    last = load_file(trained / "checkpoints" / "predictor-00000150" / "model.safetensors")
    averaged = LatentDDPMPipeline.from_pretrained(trained / "pipeline").response_predictor.state_dict()
    assert last.keys() == averaged.keys()
    assert not any(torch.equal(last[key], averaged[key]) for key in last)


def test_the_card_names_the_predictor_and_its_figures(trained):
    text = str(model_card(trained, "mechanic/composites"))
    num = LatentDDPMPipeline.from_pretrained(trained / "pipeline").response_predictor.num_parameters()
    assert re.search(rf"^\| response_predictor \| `ResponsePredictor`.* \| {num:,} \|$", text, re.M)
    assert "(`predictor/response_error`)" in text


def test_a_run_of_no_steps_for_it_leaves_no_predictor(dataset, tmp_path):
    pipe = train(small(tmp_path, predictor_steps=0, **conditional(dataset)))
    assert pipe.response_predictor is None
    assert not (tmp_path / "pipeline" / "response_predictor").exists()
    assert not list((tmp_path / "checkpoints").glob("predictor-*"))
    assert not [name for name in json.loads((tmp_path / "metrics.json").read_text()) if name.startswith("predictor")]
    assert "response_predictor |" not in str(model_card(tmp_path, "mechanic/composites"))
    assert LatentDDPMPipeline.from_pretrained(tmp_path / "pipeline").response_predictor is None


def test_a_run_without_responses_leaves_no_predictor(dataset, tmp_path):
    settings = {**conditional(dataset), "response_column": None}
    assert train(small(tmp_path, **settings)).response_predictor is None


def test_a_new_run_from_a_denoisers_checkpoint_may_have_another_predictor(trained, dataset, tmp_path):
    other = {
        "predictor_block_out_channels": [4],
        "predictor_layers_per_block": 1,
        "predictor_steps": 3,
        "predictor_learning_rate": 1e-3,
        "random_reflections": False,
        "ema_decay": 0.9,
    }
    start = str(trained / "checkpoints" / "denoiser-00000004")
    pipe = train(small(tmp_path, **{**conditional(dataset), **other, "resume_from_checkpoint": start}))
    assert list(pipe.response_predictor.config.block_out_channels) == [4]
    ours, theirs = weights(tmp_path), weights(trained)
    same = [key for key in ours if not key.startswith("response_predictor")]
    assert all(torch.equal(ours[key], theirs[key]) for key in same)
    assert json.loads((tmp_path / "metrics.json").read_text())["predictor/step"] == 3


def test_a_dry_run_counts_the_predictor_where_there_is_one(dataset, tmp_path):
    settings = {**conditional(dataset), "predictor_steps": 60_000}
    lines = rehearse(small(tmp_path / "run", **settings)).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["autoencoder", "denoiser", "predictor"]
    assert "60000 steps of 16" in lines[-1]
    lines = rehearse(small(tmp_path / "run", **{**settings, "predictor_steps": 0})).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["autoencoder", "denoiser"]


@pytest.mark.parametrize("setting", ["random_half_turn", "random_reflections"])
@pytest.mark.parametrize("predictor_steps", [0, 6])
def test_turned_designs_of_load_cases_that_nobody_knows_are_refused_before_any_work(tmp_path, setting, predictor_steps):
    designs, _ = random_composites(64, size=8)
    spec = replace(SPEC, load_cases=["shear", "pull"], solver=None)
    dataset_of(grey_levels(designs), responses_of(designs), {}, spec).to_parquet(tmp_path / "designs.parquet")
    settings = conditional(tmp_path / "designs.parquet") | {"random_half_turn": False, "random_reflections": False}
    settings |= {setting: True, "predictor_steps": predictor_steps}
    known = "uniaxial_extension, .*, each also with the suffix _x"
    with pytest.raises(
        ValueError, match=f"^{setting} must be left out where nothing is known of it: .* {known}, got 'pull'$"
    ):
        train(small(tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "checkpoints").exists()
    check_stages(small(tmp_path, **settings | {setting: False}), load_designs(small(tmp_path, **settings)))


def test_designs_without_responses_may_be_turned(tmp_path):
    config = small(tmp_path, random_half_turn=True)
    check_stages(config, load_designs(config))


def test_a_batch_of_the_predictor_larger_than_the_data_is_refused_before_any_work(dataset, tmp_path):
    with pytest.raises(ValueError, match="^predictor_batch_size must be at most the number of training designs"):
        train(small(tmp_path, predictor_batch_size=64, **conditional(dataset)))
    assert not (tmp_path / "checkpoints").exists()
