import random
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch

from mechdiffusers.mechanics import ResponseSpec, response_spec, simulate
from mechdiffusers.microstructures import build_dataset, random_composites
from mechdiffusers.microstructures.build_dataset import builder
from mechdiffusers.microstructures.build_dataset.__main__ import main
from mechdiffusers.microstructures.build_dataset.columns import designs_of, grey_levels
from mechdiffusers.training import TrainingConfig
from mechdiffusers.training.data import load_designs

CASES, STRAINS = ("uniaxial_extension", "shear_x"), [0.1, 0.25]
DESIGNS, PARAMETERS = random_composites(40, size=4, seed=1)  # three parts


def build(designs=DESIGNS, **options):
    return build_dataset(
        designs, **{"load_cases": CASES, "strains": STRAINS, "element_order": 1, "progress": False, **options}
    )


def load(path, **options):
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=path.parent / "cache", **options
    )


def command(output_dir):
    program = [sys.executable, "-W", "error::RuntimeWarning", "-m", "mechdiffusers.microstructures.build_dataset"]
    settings = {"output_dir": output_dir, "num_train": 200, "num_heldout": 40, "size": 6, "element_order": 1}
    return [*program, *(str(part) for name, value in settings.items() for part in (f"--{name}", value))]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("quantity", ["stress", "energy"])
def test_responses_are_those_of_simulate_for_the_stored_images(quantity, tmp_path):
    build(quantity=quantity, young_stiff=20.0, output=tmp_path / "d.parquet")
    dataset = load(tmp_path / "d.parquet")
    designs = np.stack([np.asarray(image, dtype=float) for image in dataset["image"]])
    np.testing.assert_array_equal(designs, DESIGNS)
    expected = getattr(simulate(designs, CASES, STRAINS, element_order=1, young_stiff=20.0), quantity)
    np.testing.assert_allclose(dataset.with_format("numpy")["response"][:], expected, rtol=1e-6)
    assert np.all(dataset["converged"])


def test_binary_designs_take_one_bit_a_pixel_and_grey_ones_eight():
    assert build()[0]["image"].mode == "1"
    grey = np.random.default_rng(0).integers(0, 256, (2, 3, 4)) / 255
    dataset = build(torch.from_numpy(grey).float())
    assert dataset[0]["image"].mode == "L"
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in dataset["image"]]), np.rint(grey * 255))
    expected = simulate(grey, CASES, STRAINS, element_order=1).stress
    np.testing.assert_allclose(dataset["response"], expected, rtol=1e-6)


@pytest.mark.parametrize("designs", [DESIGNS, np.arange(256).reshape(1, 16, 16) / 255], ids=["binary", "grey"])
def test_designs_come_back_from_their_grey_levels(designs):
    np.testing.assert_array_equal(designs_of(grey_levels(designs)), designs)


def test_parameters_become_columns(tmp_path):
    build(parameters=PARAMETERS, output=tmp_path / "d.parquet")
    dataset = load(tmp_path / "d.parquet")
    assert dataset.column_names == ["image", "response", "converged", *PARAMETERS]
    for name, values in PARAMETERS.items():
        np.testing.assert_array_equal(dataset[name], values)


def test_the_specification_of_the_responses_goes_where_the_dataset_goes(tmp_path):
    path = tmp_path / "d.parquet"
    material = {"young_soft": 0.5, "young_stiff": 7.0, "poisson": 0.2}
    solver = {**material, "element_order": 1, "pixel_size": 2.0}
    spec = ResponseSpec("energy", CASES, [STRAINS] * 2, units='kJ/m, "per" µm', signed=False, solver=solver)
    built = build(quantity="energy", units=spec.units, pixel_size=2.0, output=path, **material)
    loaded = load(path)
    loaded.save_to_disk(tmp_path / "disk")
    copies = {
        "built": built,
        "parquet": loaded,
        "stream": load(path, streaming=True),
        "rows": loaded.select([3, 1]),
        "map": loaded.map(lambda row: {"more": 1}),
        "columns": loaded.select_columns(["response"]),
        "disk": datasets.load_from_disk(tmp_path / "disk"),
        "both": datasets.concatenate_datasets([built, loaded]),
    }
    for name, dataset in copies.items():
        assert ResponseSpec.of(dataset) == spec, name
    # and it is enough to compute the responses again
    again = spec.simulator()(np.stack([np.asarray(image, dtype=float) for image in loaded["image"][:3]]))
    np.testing.assert_allclose(loaded["response"][:3], again, rtol=1e-6)


@pytest.mark.parametrize(("quantity", "units"), [("stress", "unit of young_soft"), ("energy", "unit of young_soft x")])
def test_units_are_those_of_the_moduli_unless_said(quantity, units):
    assert ResponseSpec.of(build(DESIGNS[:1], quantity=quantity)).units.startswith(units)


def test_a_design_that_is_not_solved_is_kept_as_nan_and_flagged(monkeypatch, tmp_path, caplog):
    def fails_once(designs, *args, **options):
        result = simulate(designs, *args, **options)
        if len(designs) == 16:
            result.stress[3, 1, 1:] = np.nan
        return result

    monkeypatch.setattr(response_spec, "simulate", fails_once)
    build(DESIGNS[:20], output=tmp_path / "d.parquet")
    dataset = load(tmp_path / "d.parquet")
    assert len(dataset) == 20
    np.testing.assert_array_equal(np.argwhere(~np.array(dataset["converged"])), [[3, 1]])
    np.testing.assert_array_equal(np.argwhere(np.isnan(dataset["response"])), [[3, 1, 1]])
    assert "1 of 40 paths are not solved" in caplog.text


def parts_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("[!.]*.npy")}


def test_a_build_that_fails_keeps_its_parts_and_ends_as_an_undisturbed_one(monkeypatch, tmp_path):
    def fails_at_the_last_part(designs, *args, **options):
        if len(designs) == 40 % 16:
            raise MemoryError
        return simulate(designs, *args, **options)

    monkeypatch.setattr(response_spec, "simulate", fails_at_the_last_part)
    with pytest.raises(MemoryError):
        build(output=tmp_path / "broken" / "d.parquet")
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [".unfinished-d.parquet"]
    done = parts_in(tmp_path)
    assert 0 < len(done) < 3
    monkeypatch.setattr(response_spec, "simulate", simulate)
    monkeypatch.setattr(builder, "dataset_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(output=tmp_path / "broken" / "d.parquet")
    assert done.items() <= parts_in(tmp_path).items()  # those were not computed again
    monkeypatch.undo()
    build(output=tmp_path / "broken" / "d.parquet")
    build(output=tmp_path / "whole" / "d.parquet")
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


def test_the_file_does_not_depend_on_the_number_of_processes(tmp_path):
    threads = torch.get_num_threads()
    for num in (1, 2):
        torch.set_num_threads(num)
        build(output=tmp_path / f"{num}.parquet")
    torch.set_num_threads(threads)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_equal_parts_are_computed_once():
    dataset = build(np.repeat(DESIGNS[:1], 48, axis=0))
    assert dataset["response"][:] == [dataset[0]["response"]] * 48


def test_a_finished_dataset_is_read_not_built_again(monkeypatch, tmp_path):
    first = build(parameters=PARAMETERS, output=tmp_path / "d.parquet")
    monkeypatch.setattr(builder, "compute_by_parts", None)
    assert build(parameters=PARAMETERS, output=tmp_path / "d.parquet")[:]["response"] == first[:]["response"]


@pytest.mark.parametrize(
    "changed", [{"designs": 1 - DESIGNS}, {"young_stiff": 50.0}, {"parameters": PARAMETERS}, {"strains": [0.1, 0.2]}]
)
def test_another_dataset_is_not_overwritten(changed, tmp_path):
    build(output=tmp_path / "d.parquet")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="^output must be new or hold this very dataset, got .*d.parquet"):
        build(output=tmp_path / "d.parquet", **changed)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("changed", [{"designs": 1 - DESIGNS}, {"poisson": 0.1}, {"quantity": "energy"}])
def test_no_build_takes_the_parts_of_another(changed, monkeypatch, tmp_path):
    monkeypatch.setattr(builder, "dataset_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # once all parts are there
        build(output=tmp_path / "d.parquet")
    monkeypatch.undo()
    build(output=tmp_path / "d.parquet", **changed)
    build(output=tmp_path / "whole.parquet", **changed)
    assert (tmp_path / "d.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_build_of_more_designs_takes_the_parts_of_one_of_fewer(monkeypatch, tmp_path):
    monkeypatch.setattr(builder, "dataset_of", lambda *_: 1 / 0)
    found = []
    for num in (32, 40):
        with pytest.raises(ZeroDivisionError):
            build(DESIGNS[:num], output=tmp_path / "d.parquet")
        found.append(parts_in(tmp_path))
    assert [len(parts) for parts in found] == [2, 3]
    assert found[0].items() <= found[1].items()


@pytest.mark.slow
def test_builds_killed_at_any_moment_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    subprocess.run(command(tmp_path / "whole" / "d"), check=True, capture_output=True)
    rng = random.Random(time.time_ns())
    kills = 0
    while kills < 3:
        process = subprocess.Popen(command(tmp_path / "killed" / "d"), stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob("killed/d/.unfinished-*/*.npy")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5) if kills else 0)  # the first time there is something left to do for sure
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    assert kills
    subprocess.run(command(tmp_path / "killed" / "d"), check=True, capture_output=True)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert sorted(files_of(tmp_path / "whole")) == ["d/README.md", "d/heldout.parquet", "d/train.parquet"]


def test_training_reads_the_images(tmp_path):
    build(output=tmp_path / "d.parquet")
    config = TrainingConfig(output_dir="unused", dataset=str(tmp_path / "d.parquet"), num_heldout_designs=4)
    read = load_designs(config)
    images = {image.numpy().tobytes() for image, _ in read.train} | {image.numpy().tobytes() for image in read.heldout}
    assert images == {(design * 255).astype(np.uint8).tobytes() for design in DESIGNS}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"designs": DESIGNS[0]}, "designs"),
        ({"designs": DESIGNS[:0]}, "designs"),
        ({"designs": DESIGNS.tolist()}, "designs"),
        ({"designs": DESIGNS + 0.5}, "designs"),
        ({"designs": np.where(DESIGNS == 1, np.nan, DESIGNS)}, "designs"),
        ({"designs": DESIGNS * 0.3}, "designs"),
        ({"load_cases": ("twist",)}, "load_cases"),
        ({"load_cases": "shear"}, "load_cases"),
        ({"strains": [0.2, 0.1]}, "strains"),
        ({"quantity": "force"}, "quantity"),
        ({"units": 3}, "units"),
        ({"element_order": 3}, "element_order"),
        ({"young_stiff": -1.0}, "young_stiff"),
        ({"poisson": 0.5}, "poisson"),
        ({"device": "abacus"}, "device"),
        ({"parameters": {"image": np.ones(40)}}, "parameters"),
        ({"parameters": {"porosity": np.ones(39)}}, "parameters"),
        ({"parameters": {"porosity": ["a"] * 40}}, "parameters"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(changed, name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} must"):
        build(output=tmp_path / "new" / "d.parquet", **changed)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^output must be a file that can be written, got .*file"):
        build(output=tmp_path / "file" / "d.parquet")
    with pytest.raises(ValueError, match="^output must be new or a dataset of responses, got .*file"):
        build(output=tmp_path / "file")


def test_a_built_folder_is_a_dataset_with_its_splits(tmp_path):
    sizes = {"num_train": 12, "num_heldout": 5, "size": 4, "element_order": 1, "strains": 0.1}
    for name, seed in (("one", 0), ("other", 1)):
        settings = {"output_dir": tmp_path / name / "designs", "seed": seed, **sizes}
        main([part for key, value in settings.items() for part in (f"--{key}", str(value))])
    # the two folders have one name: what is cached of one is not taken for the other
    for name in ("one", "other", "one"):
        folder = tmp_path / name / "designs"
        splits = datasets.load_dataset(str(folder))
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "heldout": 5}
        stored = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
        np.testing.assert_array_equal(splits["train"]["response"], stored["response"])
        assert ResponseSpec.of(splits["train"]) == ResponseSpec.of(stored)


@pytest.mark.parametrize(("option", "value"), [("load_cases", "twist"), ("num_train", "0"), ("poisson", "0.7")])
def test_the_command_line_names_what_is_unfit(option, value, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {option} must "):
        main(["--output_dir", str(tmp_path), "--size", "4", f"--{option}", value])
    assert not list(tmp_path.iterdir())
