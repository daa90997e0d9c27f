"""A run that was interrupted, in whatever way, ends as if it had not been."""

import errno
import json
import resource
import shutil
import signal
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mechdiffusers.microstructures import random_composites
from mechdiffusers.training import checkpoints
from mechdiffusers.training.checkpoints import BestWeights
from mechdiffusers.training.output_folder import claim
from mechdiffusers.training.train import train
from small_runs import (
    SCRIPT,
    SMALL,
    assert_same_weights,
    command_line,
    conditional,
    finish,
    small,
    start,
    weights,
    write_dataset,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trained"
    train(small(folder))
    return folder


class Interruption(Exception):
    pass


def interrupt(monkeypatch, folder, stage: str, steps: int = 5, **settings: object) -> None:
    """Runs until some steps of a stage are done; a checkpoint stands at the fourth."""
    step = torch.optim.AdamW.step
    stages = ["autoencoder", "denoiser", "predictor"]
    allowed = steps + sum(SMALL[f"{before}_steps"] for before in stages[: stages.index(stage)])
    done = []

    def interrupted(*args, **kwargs):
        done.append(None)
        if len(done) > allowed:
            raise Interruption
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(Interruption):
        train(small(folder, **settings))
    monkeypatch.undo()


def names(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(trained, tmp_path, stage, monkeypatch):
    interrupt(monkeypatch, tmp_path / "run", stage)
    assert not (tmp_path / "run" / "pipeline").exists()
    assert {name for name in names(tmp_path / "run") if name.startswith(stage)} == {f"{stage}-00000004"}
    train(small(tmp_path / "run", resume_from_checkpoint="latest"))
    assert_same_weights(tmp_path / "run", trained)


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_an_interrupted_run_on_a_stream_ends_as_if_it_had_not_been(tmp_path, stage, monkeypatch):
    designs, _ = random_composites(80, size=8)
    datasets.Dataset.from_dict({"image": list(designs)}).to_parquet(tmp_path / "designs.parquet")
    stream = {"dataset": str(tmp_path / "designs.parquet"), "streaming": True}
    train(small(tmp_path / "straight", **stream))
    interrupt(monkeypatch, tmp_path / "run", stage, **stream)
    train(small(tmp_path / "run", resume_from_checkpoint="latest", **stream))
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


def test_a_run_interrupted_in_its_predictor_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    settings = conditional(write_dataset(tmp_path / "composites"))
    train(small(tmp_path / "straight", **settings))
    interrupt(monkeypatch, tmp_path / "run", "predictor", **settings)
    assert not (tmp_path / "run" / "pipeline").exists()
    assert {name for name in names(tmp_path / "run") if name.startswith("predictor")} == {"predictor-00000004"}
    train(small(tmp_path / "run", resume_from_checkpoint="latest", **settings))
    assert any(key.startswith("response_predictor") for key in weights(tmp_path / "run"))
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("damage", ["truncated", "missing", "unlisted"])
def test_a_torn_checkpoint_is_recognised_and_the_one_before_it_taken(trained, tmp_path, damage, monkeypatch, caplog):
    interrupt(monkeypatch, tmp_path / "run", "denoiser", checkpointing_steps=2)
    newest = tmp_path / "run" / "checkpoints" / "denoiser-00000004"
    file = newest / {"truncated": "optimizer.bin", "missing": "model.safetensors", "unlisted": "files.json"}[damage]
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    train(small(tmp_path / "run", resume_from_checkpoint="latest", checkpointing_steps=2))
    assert "denoiser-00000004 is torn" in caplog.text
    assert_same_weights(tmp_path / "run", trained)


@pytest.mark.parametrize(("torn", "newest"), [([4], 3), ([2, 4], 1)])
def test_a_torn_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path, torn, newest, monkeypatch):
    interrupt(monkeypatch, tmp_path / "run", "denoiser", checkpointing_steps=2)
    for step in torn:
        (tmp_path / "run" / "checkpoints" / f"denoiser-{step:08d}" / "files.json").unlink()
    only_one = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
    step, calls = torch.optim.AdamW.step, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) > 1:
            raise Interruption
        return step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(Interruption):
            train(small(tmp_path / "run", **only_one))
    found = checkpoints.newest_intact(tmp_path / "run" / "checkpoints", "denoiser")
    assert found.name == f"denoiser-{newest:08d}"


def test_as_many_checkpoints_are_kept_as_wanted(tmp_path):
    train(small(tmp_path, checkpointing_steps=1, checkpoints_total_limit=3))
    kept = {f"{stage}-{step:08d}" for stage in ("autoencoder", "denoiser") for step in (4, 5, 6)}
    assert names(tmp_path) == kept | {"latents.safetensors"}


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_new_run_from_a_checkpoint_ends_as_the_run_that_wrote_it(trained, tmp_path, stage):
    train(small(tmp_path / "fork", resume_from_checkpoint=str(trained / "checkpoints" / f"{stage}-00000004")))
    assert_same_weights(tmp_path / "fork", trained)


def test_a_new_run_from_a_denoisers_checkpoint_may_train_it_further(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "denoiser-00000006"
    train(small(tmp_path / "fork", resume_from_checkpoint=str(checkpoint), denoiser_steps=8))
    assert "denoiser-00000008" in names(tmp_path / "fork")


def test_a_new_run_from_an_autoencoders_checkpoint_may_have_another_denoiser(trained, tmp_path):
    checkpoint = str(trained / "checkpoints" / "autoencoder-00000006")
    pipe = train(small(tmp_path / "fork", resume_from_checkpoint=checkpoint, denoiser_block_out_channels=[4, 4]))
    assert list(pipe.unet.config.block_out_channels) == [4, 4]
    ours, theirs = weights(tmp_path / "fork"), weights(trained)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith("vae"))
    assert (tmp_path / "fork" / "metrics.json").exists()


def test_a_new_run_goes_on_with_the_best_autoencoder(tmp_path):
    best = {"load_best_model_at_end": True, "validation_steps": 1, "autoencoder_learning_rate": 0.3}
    train(small(tmp_path / "run", **best))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "denoiser-00000004")
    train(small(tmp_path / "fork", resume_from_checkpoint=checkpoint, **best))
    assert_same_weights(tmp_path / "fork", tmp_path / "run")


def test_a_new_run_has_none_of_what_the_other_reached_later_or_otherwise(tmp_path):
    """Its card would show another model's figures and samples."""
    settings = conditional(write_dataset(tmp_path / "composites"))
    train(small(tmp_path / "run", **settings))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "autoencoder-00000006")
    other = {**settings, "response_column": None, "denoiser_steps": 3}
    train(small(tmp_path / "fork", resume_from_checkpoint=checkpoint, **other))
    metrics = json.loads((tmp_path / "fork" / "metrics.json").read_text())
    assert "denoiser/loss_without_response" not in metrics
    assert max(path.name for path in (tmp_path / "fork" / "validation").iterdir()) == "denoiser-00000003.png"


def test_a_new_run_has_steps_left_to_train(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "denoiser-00000004"
    with pytest.raises(ValueError, match="^denoiser_steps must be above those of resume_from_checkpoint, got 4 for"):
        train(small(tmp_path / "fork", resume_from_checkpoint=str(checkpoint), denoiser_steps=4))
    assert not (tmp_path / "fork").exists()


def test_two_runs_are_not_at_work_in_one_folder(tmp_path):
    config = small(tmp_path / "run")
    with claim(config), pytest.raises(ValueError, match="^output_dir must be a folder that no other run is at work in"):
        train(small(tmp_path / "run", resume_from_checkpoint="latest", seed=1))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 0
    with claim(config):  # when the first has ended
        pass


def test_a_new_run_does_not_start_from_a_torn_checkpoint(trained, tmp_path):
    torn = tmp_path / "torn" / "checkpoints" / "denoiser-00000004"
    shutil.copytree(trained, tmp_path / "torn")
    (torn / "optimizer.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="^resume_from_checkpoint must be a whole checkpoint, got .*optimizer.bin"):
        train(small(tmp_path / "fork", resume_from_checkpoint=str(torn)))


@pytest.mark.parametrize("resume", ["yes", "runs/x/checkpoints/denoiser-00000100", "runs/x/checkpoints"])
def test_what_is_no_checkpoint_is_named(tmp_path, resume):
    with pytest.raises(ValueError, match="^resume_from_checkpoint must be 'latest' or a folder such as"):
        train(small(tmp_path / "run", resume_from_checkpoint=resume))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_settings(trained):
    before = (trained / "config.yaml").read_text()
    with pytest.raises(
        ValueError, match="^resume_from_checkpoint must .* kl_weight was 1.0, is 0.5; denoiser_steps was 6"
    ):
        train(small(trained, resume_from_checkpoint="latest", kl_weight=0.5, denoiser_steps=8, validation_steps=2))
    assert (trained / "config.yaml").read_text() == before


def test_a_run_that_was_refused_before_its_first_step_may_be_corrected(trained, tmp_path):
    with pytest.raises(ValueError, match="^autoencoder_batch_size must be at most the number of training designs"):
        train(small(tmp_path / "run", resume_from_checkpoint="latest", autoencoder_batch_size=64))
    train(small(tmp_path / "run", resume_from_checkpoint="latest"))
    assert_same_weights(tmp_path / "run", trained)


def test_a_new_run_that_was_refused_before_its_first_step_may_be_corrected(trained, tmp_path):
    start = {"resume_from_checkpoint": str(trained / "checkpoints" / "autoencoder-00000006")}
    with pytest.raises(ValueError, match="^denoiser_batch_size must be at most the number of training designs"):
        train(small(tmp_path / "run", denoiser_batch_size=64, **start))
    train(small(tmp_path / "run", **start))
    assert_same_weights(tmp_path / "run", trained)


def test_what_decides_which_weights_are_best_does_not_change_on_the_way(tmp_path):
    settings = {"load_best_model_at_end": True, "denoiser_steps": 2, "autoencoder_steps": 2}
    train(small(tmp_path, **settings))
    with pytest.raises(ValueError, match="^resume_from_checkpoint must .* validation_steps was 6, is 2"):
        train(small(tmp_path, resume_from_checkpoint="latest", validation_steps=2, **settings))


def test_what_the_launcher_was_told_is_a_setting_of_the_run(tmp_path, monkeypatch):
    settings = {"denoiser_steps": 2, "autoencoder_steps": 2}
    train(small(tmp_path, **settings))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="^resume_from_checkpoint must .* mixed_precision was 'no', is 'bf16'"):
        train(small(tmp_path, resume_from_checkpoint="latest", **settings))


@pytest.mark.parametrize("text", ["", "- seed\n", "seed: [\n"])
def test_a_run_whose_settings_cannot_be_read_is_named(trained, tmp_path, text):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint must go on with a run, got .*config\.yaml"):
        train(small(run, resume_from_checkpoint="latest"))


def test_a_precision_that_was_left_unset_is_what_the_launcher_tells(trained, tmp_path, monkeypatch):
    """As runs of before it was written down have it."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "mixed_precision": None}))
    with pytest.raises(ValueError, match="^resume_from_checkpoint must .* mixed_precision was 'no', is 'bf16'"):
        train(small(run, resume_from_checkpoint="latest", mixed_precision="bf16"))
    train(small(run, resume_from_checkpoint="latest"))
    assert_same_weights(run, trained)


def test_a_checkpoint_of_other_shards_is_refused(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / "denoiser-00000006"
    shutil.copyfile(newest / "average-0.safetensors", newest / "average-1.safetensors")
    with pytest.raises(
        ValueError, match="^resume_from_checkpoint must .* as many shards as before, got 1 for .* with 2$"
    ):
        train(small(run, resume_from_checkpoint="latest"))


def test_no_space_for_any_file_of_a_checkpoint_leaves_the_earlier_ones(trained, tmp_path, monkeypatch):
    """Where the file should be is a link to the device that the system calls full."""
    run = tmp_path / "run"
    interrupt(monkeypatch, run, "denoiser")
    before, save_state = names(run), Accelerator.save_state
    for file in ("optimizer.bin", "files.json"):  # what writes safetensors would replace a link

        def save_where_full(accelerator, folder, file=file):
            (Path(folder) / file).symlink_to("/dev/full")
            save_state(accelerator, folder)

        with monkeypatch.context() as patched:
            patched.setattr(Accelerator, "save_state", save_where_full)
            with pytest.raises(OSError, match="^the checkpoint of denoiser at step 6 could not be written to") as full:
                train(small(run, resume_from_checkpoint="latest"))
        assert names(run) == before
    assert full.value.__cause__.errno == errno.ENOSPC
    train(small(run, resume_from_checkpoint="latest"))
    assert_same_weights(run, trained)


@pytest.mark.slow
def test_a_full_disk_ends_the_script_and_leaves_the_earlier_checkpoints(trained, tmp_path, monkeypatch):
    """The system refuses the process its write, as on a full disk; the script says so and ends."""
    run = tmp_path / "run"
    interrupt(monkeypatch, run, "denoiser")
    before = names(run)

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, resource.RLIM_INFINITY))

    process = start([*command_line(run), "--resume_from_checkpoint", "latest"], preexec_fn=small_disk)
    messages = process.communicate()[1]
    assert process.returncode == 1
    assert messages.splitlines()[-1].startswith("error: the checkpoint of denoiser at step 6 could not be written to")
    assert names(run) == before
    train(small(run, resume_from_checkpoint="latest"))
    assert_same_weights(run, trained)


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_weights_of_an_undisturbed_one(tmp_path):
    """Two of the benchmark, the second killed while it writes a checkpoint; the seed, which a failure shows, is new."""
    seed = str(time.time_ns())
    benchmark = SCRIPT.parents[1] / "benchmarks" / "kill_and_resume.py"
    finish(start([str(benchmark), "--runs", "2", "--seed", seed, "--output", str(tmp_path / "killed.json")]))
    figures = json.loads((tmp_path / "killed.json").read_text())["figures"]
    assert (figures["runs"], figures["killed"], figures["identical"]) == (2, 2, 2), (seed, figures)
    assert figures["half_written_checkpoints"] == 1, (seed, figures)


@pytest.mark.slow
def test_sigterm_saves_the_state_and_ends_the_process(trained, tmp_path):
    run = tmp_path / "run"
    process = start(command_line(run, denoiser_steps=40, checkpointing_steps=100))
    for line in process.stderr:  # progress bars end their lines by carriage returns, which text mode translates
        if line.startswith("denoiser") and " 5/40" in line:
            break
    process.send_signal(signal.SIGTERM)
    messages = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "denoiser has stopped at step" in messages
    (stopped,) = [name for name in names(run) if name.startswith("denoiser")]
    assert 5 <= int(stopped.removeprefix("denoiser-")) < 40
    again = finish(start([*command_line(run, denoiser_steps=40), "--resume_from_checkpoint", "latest"]))
    assert f"denoiser goes on from step {int(stopped.removeprefix('denoiser-'))}" in again
    train(small(tmp_path / "straight", denoiser_steps=40))
    assert_same_weights(run, tmp_path / "straight")


def test_the_best_weights_are_those_of_least_loss(tmp_path):
    best, module = BestWeights(tmp_path, "stage"), nn.Linear(1, 1)
    for step, loss in enumerate([3.0, 1.0, 2.0]):
        nn.init.constant_(module.weight, loss)
        best.offer(module, loss, step)
    best.load_into(module)
    assert module.weight.item() == 1.0


def test_weights_of_a_loss_that_is_none_give_way_to_any(tmp_path):
    best = BestWeights(tmp_path, "denoiser")
    for step, loss in enumerate([float("nan"), 2.0, float("nan")], 1):
        best.offer(nn.Linear(1, 1), loss, step)
    assert best.load_into(nn.Linear(1, 1)) == 2


def test_best_weights_of_later_steps_are_told_from_earlier_ones(tmp_path):
    """A new run from the checkpoint of step 4 has none that its way there has not seen."""
    best = BestWeights(tmp_path, "stage")
    assert not best.were_kept_by(5)
    best.offer(nn.Linear(1, 1), 1.0, 5)
    assert best.were_kept_by(5)
    assert not best.were_kept_by(4)


def test_a_run_may_end_with_its_best_weights(tmp_path):
    # at this learning rate the loss on held-out designs grows
    settings = {"validation_steps": 1, "denoiser_learning_rate": 1.0, "lr_scheduler": "constant"}
    pipe = train(small(tmp_path / "best", load_best_model_at_end=True, **settings))
    kept = load_file(tmp_path / "best" / "checkpoints" / "best-denoiser.safetensors")
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, kept[f"unet.{key}"])
    train(small(tmp_path / "last", **settings))
    best, last = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("best", "last"))
    assert best["denoiser/loss"] < last["denoiser/loss"]
    assert best["denoiser/step"] < last["denoiser/step"]


def test_the_newest_intact_checkpoint_of_an_empty_folder_is_none(tmp_path):
    assert checkpoints.newest_intact(tmp_path, "denoiser") is None
