"""The benchmarks of inverse design and likelihood run, and go on where they were, on a model of random weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdiffusers.evaluation.inverse_design import stored_responses
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures import build_dataset, random_composites
from mechdiffusers.models import ResponseEncoder, ResponsePredictor, response_normalisation

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def folder(make_pipeline, tmp_path):
    """A checkpoint with random weights and a dataset of designs of 8 x 8 pixels."""
    designs, _ = random_composites(60, size=8)
    options = {"load_cases": ("uniaxial_extension", "shear"), "strains": [0.1, 0.2, 0.3], "element_order": 1}
    (tmp_path / "data").mkdir()
    build_dataset(designs[:20], output=tmp_path / "data" / "heldout.parquet", progress=False, **options)
    train = build_dataset(designs[20:], output=tmp_path / "data" / "train.parquet", progress=False, **options)
    pipe = make_pipeline(conditional=True)
    normalisation = response_normalisation(torch.from_numpy(stored_responses(train)))
    spec = ResponseSpec.of(train)
    pipe.register_modules(
        response_encoder=ResponseEncoder(6, 8, spec=spec.to_dict(), **normalisation),
        response_predictor=ResponsePredictor((4, 8), 1, spec.to_dict(), **normalisation).eval(),
    )
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path


def run(folder: Path, script: str, *arguments: str, checkpoint: bool = True) -> dict:
    """What a benchmark records."""
    command = [sys.executable, str(BENCHMARKS / script), *(["checkpoint"] if checkpoint else [])]
    command += ["--dataset", "data", "--output", "figures.json", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text())["figures"]


@pytest.mark.slow
def test_inverse_design_is_measured_and_nothing_is_computed_twice(folder):
    quick = ["--num_targets", "5", "--num_designs", "3", "--num_inference_steps", "2", "--num_timed", "1"]
    first = run(folder, "inverse_design.py", *quick)
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")}
    second = run(folder, "inverse_design.py", *quick)
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")} == files
    assert first.pop("from_target_to_verified")["seconds"] > 0
    second.pop("from_target_to_verified")
    assert first == second
    assert first["designs"]["designs_a_target"] == 3
    of_one, of_two = (first["designs"]["best_of_percent"][number]["mean"] for number in ("1", "2"))
    assert of_one == pytest.approx(first["designs"]["single_percent"]["mean"])
    assert first["designs"]["best_percent"]["mean"] < of_two < of_one
    assert first["retrieval"]["best_percent"]["mean"] < first["retrieval"]["single_percent"]["mean"]


def test_the_least_of_some_errors_is_expected_as_of_numbers_drawn_from_1_to_n(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from candidates import best_of

    errors = np.random.default_rng(0).permuted(np.tile(np.arange(1.0, 13.0), (3, 1)), axis=1)
    found = best_of(errors)
    assert {k: each["mean"] for k, each in found.items()} == pytest.approx({k: 1300 / (k + 1) for k in (1, 2, 4, 8)})
    unsolved = best_of(np.pad(errors, [(0, 0), (0, 4)], constant_values=np.nan))
    assert (unsolved[1]["mean"], unsolved[16]["mean"]) == (pytest.approx(650), 100)
    assert best_of(np.vstack([errors, np.full((1, 12), np.nan)])) == found  # nor does a target without any
    assert all(each["standard_error"] < 1e-12 for each in found.values())


@pytest.mark.slow
def test_designs_for_published_energies_stand_beside_random_and_nearest_training_designs(folder):
    quick = ["--num_targets", "4", "--num_designs", "3", "--num_inference_steps", "2", "--figure", "first.png"]
    first = run(folder, "mechanical_mnist.py", *quick)
    assert (folder / "first.png").exists()
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")}
    assert run(folder, "mechanical_mnist.py", *quick) == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")} == files
    for name in ("designs", "random_training_designs", "nearest_training_designs"):
        assert (first[name]["targets"], first[name]["designs_a_target"]) == (4, 3)
    assert (
        first["nearest_training_designs"]["best_percent"]["mean"]
        <= (first["random_training_designs"]["best_percent"]["mean"])
    )
    assert 0 <= first["autoencoder"]["soft_pixels_reconstructed"] <= 1


@pytest.mark.slow
def test_sweeps_have_a_point_for_each_setting(folder):
    quick = ["--num_targets", "2", "--num_designs", "2", "--steps", "2", "3", "--num_inference_steps", "2"]
    quick += ["--guidance_scales", "1", "2", "--trained_on", "20=checkpoint", "--figure", "sweeps.png"]
    figures = run(folder, "inverse_design_sweeps.py", *quick)
    assert {"vdm", "adams-bashforth", "predictor-corrector", "ddpm"} <= figures["steps"].keys()
    assert all(found.keys() == {"2", "3"} for found in figures["steps"].values())
    assert figures["guidance_scale"].keys() == {"1.0", "2.0"}
    assert figures["predictor_error_percent"]["20"]["mean"] > 0
    assert (folder / "sweeps.png").exists()


@pytest.mark.slow
def test_open_targets_are_judged_where_they_are_given_and_everywhere(folder):
    quick = ["--num_targets", "4", "--num_designs", "3", "--num_inference_steps", "2"]
    first = run(folder, "open_targets.py", *quick)
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")}
    assert run(folder, "open_targets.py", *quick) == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")} == files
    whole, *others = first["open"].values()
    for name in ("", "retrieval_"):
        assert whole[f"{name}where_given"] == whole[f"{name}everywhere"]
        assert all(found[f"{name}where_given"] != found[f"{name}everywhere"] for found in others)


def test_what_targets_leave_open_is_a_part_of_each(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from open_targets import left_open

    targets = np.random.default_rng(0).uniform(1, 2, (2, 3, 6))
    open_entries = {name: np.isnan(left) for name, left in left_open(targets).items()}
    assert {name: int(mask[0].sum()) for name, mask in open_entries.items()} == {
        "nothing": 0,
        "every_second_strain": 9,
        "last_load_case": 6,
        "all_load_cases_but_the_first": 12,
    }
    assert open_entries["every_second_strain"][..., 1::2].all()
    assert open_entries["last_load_case"][:, -1].all()
    assert not open_entries["all_load_cases_but_the_first"][:, 0].any()
    for name, left in left_open(targets).items():
        np.testing.assert_array_equal(left[~open_entries[name]], targets[~open_entries[name]])


@pytest.mark.slow
def test_refined_designs_are_measured_and_nothing_is_computed_twice(folder):
    quick = ["--num_targets", "5", "--num_designs", "3", "--num_refined", "2", "--num_rounds", "2"]
    quick += ["--num_coarse_steps", "2", "--num_inference_steps", "2"]
    first = run(folder, "refined_designs.py", *quick)
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")}
    assert run(folder, "refined_designs.py", *quick) == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.np*")} == files
    assert first["simulations_a_target"] == [2, 4, 6]
    assert first["coarse_simulations_a_target"] == [3, 3, 3]  # of the choice alone: the dataset is of first order
    best = [each["mean"] for each in first["best_percent"]]
    assert best == sorted(best, reverse=True)
    assert best[0] > best[-1]
    known = run(folder, "refined_designs.py", *quick, "--from_training_designs")
    assert known["coarse_simulations_a_target"] == [0, 0, 0]
    assert known["novelty"]["chosen"] == 0


@pytest.mark.slow
def test_variants_of_the_denoiser_are_trained_with_their_options_and_measured_once(folder):
    settings = {"response_column": "response", "num_heldout_designs": 20, "latent_channels": 2}
    settings |= {"denoiser_block_out_channels": [8, 8], "denoiser_layers_per_block": 1, "denoiser_batch_size": 4}
    (folder / "settings.yaml").write_text(json.dumps(settings))  # which YAML reads as well
    quick = ["--config", "settings.yaml", "--denoiser_steps", "2", "--num_targets", "2", "--num_designs", "2"]
    quick += ["--num_bounded", "3", "--variants", "", "--prediction_type epsilon"]
    first = run(folder, "denoiser_variants.py", *quick)
    trained = {
        path.parts[-4].rsplit("-", 1)[0]: json.loads(path.read_text())["prediction_type"]
        for path in (folder / "runs/denoiser_variants").glob("*/pipeline/scheduler/scheduler_config.json")
    }
    assert trained == {"as_released": "v_prediction", "prediction_type-epsilon": "epsilon"}
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.*")}
    assert run(folder, "denoiser_variants.py", *quick) == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.*")} == files
    longer = run(folder, "denoiser_variants.py", *quick, "--denoiser_steps", "3")
    assert longer["variants"]["as released"]["bound"] != first["variants"]["as released"]["bound"]
    for found in first["variants"].values():
        assert found["denoiser_alone"]["designs_a_target"] == found["with_predictor"]["targets"] == 2
        assert found["bound"]["mean_nats"] < 0


@pytest.mark.slow
def test_the_pixel_baseline_is_trained_and_measured_beside_the_latent_model(folder):
    quick = ["--minutes", "0.02", "--num_targets", "1", "--num_designs", "2", "--batch_size", "4"]
    quick += ["--ancestral_steps", "4", "--ddim_steps", "2"]
    figures = run(folder, "pixel_baseline.py", *quick)
    assert figures["pixel_training"]["steps"] >= 1
    for model in ("latent", "latent with predictor", "pixel"):
        for sampler in ("4 ancestral steps", "2 DDIM steps"):
            assert figures[f"{model}, {sampler}"]["designs_a_target"] == 2


@pytest.mark.slow
def test_the_characteristic_of_out_of_range_targets_is_recorded(folder):
    figures = run(folder, "out_of_range.py", "--figure", "roc.png", checkpoint=False)
    assert figures["negative hardening"]["area"] > 0.5
    assert (folder / "roc.png").exists()


def likelihoods(folder: Path, script: str, *arguments: str) -> dict:
    """What a benchmark of likelihoods records, which needs no dataset."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--checkpoint", "checkpoint"]
    done = subprocess.run([*command, "--output", "figures.json"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text())["figures"]


@pytest.mark.slow
def test_likelihoods_of_a_checkpoint_are_measured_beside_other_models(folder):
    options = ["--num", "4", "--baseline_minutes", "0.02"]
    value = likelihoods(folder, "likelihood_checkpoint.py", "value", *options)
    models = [name for name, row in value.items() if isinstance(row, dict) and "bits_per_dim" in row]
    assert len(models) == 4
    assert sum(value["terms_of_the_bound_nats"].values()) == pytest.approx(
        value["latent_diffusion_continuous_bound"]["nats"]
    )
    flow = likelihoods(folder, "likelihood_checkpoint.py", "flow", "--num", "4")
    of_parts = flow["defaults"]["error_nats_per_latent_dim"]
    assert of_parts["both"]["largest"] <= of_parts["steps"]["largest"] + of_parts["probes"]["largest"]
    assert of_parts["steps"]["mean"] > 0
    assert likelihoods(folder, "likelihood_checkpoint.py", "mean", "--num", "20")["noise_levels_a_design"] == 1
    cost = likelihoods(folder, "likelihood_checkpoint.py", "cost", "--num", "2")
    assert cost["ours_4_steps"]["evaluations_with_error_estimate"] == 4 * 4 + 2 * 4
    errors = [cost[f"ours_{num}_steps"]["rms_error_nats_per_latent_dim"] for num in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_strange_designs_are_told_by_their_likelihood(folder):
    figures = likelihoods(folder, "likelihood_out_of_distribution.py", "--num", "4", "--num_levels", "2")
    assert figures["noise_levels_a_design"] == 2
    assert all(0 <= family["low_likelihood"]["area"] <= 1 for family in figures["families"].values())


def test_numbers_of_two_commits_are_the_same_only_to_the_last_bit(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from same_numbers import comparison

    values = np.linspace(1, 2, 6).reshape(2, 3)
    last_bit = values.copy()
    last_bit[1, 1] = np.nextafter(values[1, 1], 2)
    old = {"commit": np.array("a"), "same": values, "last bit": values, "gone": values}
    new = {"commit": np.array("b"), "same": values.copy(), "last bit": last_bit, "come": values}
    old["kind"], new["kind"] = values, values.astype(np.float32)
    found = comparison(old, new)
    assert (found["old_commit"], found["new_commit"], found["identical"]) == ("a", "b", 1)
    assert found["differing"]["last bit"]["entries_differing"] == 1
    assert found["differing"]["last bit"]["largest_difference"] == last_bit[1, 1] - values[1, 1]
    assert found["differing"]["kind"] == {"old": "float64 (2, 3)", "new": "float32 (2, 3)"}
    assert found["only_in_one"] == ["come", "gone"]
    assert found["numbers"]["same"]["mean"] == pytest.approx(1.5)
