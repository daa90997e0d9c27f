"""What wandb and trackio are told of a run: packages of their name that write it down stand in for them."""

import json
from dataclasses import fields

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mechdiffusers.training import TrainingConfig
from mechdiffusers.training.train import train
from small_runs import command_line, finish, small, start

#: What Accelerate calls of either.
STAND_IN = """
import json, os

def note(*what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def log(self, values, step):
        note("log", step, values)
    def finish(self):
        note("finish")

class config:
    def update(values, allow_val_change):
        note("config", values)

def init(project, name):
    note("init", project, name)
    return Run()
"""


def scalars(folder, stage: str) -> dict[tuple[int, str], float]:
    """What TensorBoard was told."""
    (file,) = (path for path in (folder / "logs" / stage).rglob("events*") if "loss" in tags(path))
    events = EventAccumulator(str(file)).Reload()
    return {(event.step, tag): event.value for tag in tags(file) for event in events.Scalars(tag)}


def tags(file) -> list[str]:
    return EventAccumulator(str(file)).Reload().Tags()["scalars"]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_is_told_settings_and_all_that_tensorboard_would_be(tmp_path, tracker, monkeypatch):
    """Accelerate finds them by their metadata, so that they are installed for a process of its own."""
    packages, notes = tmp_path / "packages", tmp_path / "notes"
    (packages / f"{tracker}-0.dist-info").mkdir(parents=True)
    (packages / f"{tracker}-0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {tracker}\nVersion: 0\n"
    )
    (packages / f"{tracker}.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=":")
    monkeypatch.setenv("NOTES", str(notes))
    finish(start(command_line(tmp_path / "run", report_to=tracker)))
    train(small(tmp_path / "twin"))

    told = [json.loads(line) for line in notes.read_text().splitlines()]
    for stage in ("autoencoder", "denoiser"):
        end = told.index(["finish"])
        (begun, (_, settings), *logs), told = told[:end], told[end + 1 :]
        assert begun == ["init", "mechdiffusers", f"run-{stage}"]
        assert settings.keys() == {field.name for field in fields(TrainingConfig)}
        assert (settings["denoiser_steps"], settings["report_to"]) == (6, tracker)
        assert [step for _, step, _ in logs] == [3, 4, 6, 6]
        values = {(step, tag): value for _, step, values in logs for tag, value in values.items()}
        expected = scalars(tmp_path / "twin", stage)
        assert values.keys() == expected.keys()
        for key in values.keys() - {(step, "seconds_per_step") for step in (3, 4, 6)}:
            assert values[key] == pytest.approx(expected[key], rel=1e-4), key
    assert told == []
