"""Several processes train as one does, and sharded models go on from their checkpoints."""

import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from scipy.stats import kstest
from torch.utils.data import TensorDataset

from mechdiffusers.microstructures import random_composites
from mechdiffusers.models import response_normalisation
from mechdiffusers.training.accelerators import stage_accelerator
from mechdiffusers.training.checkpoints import newest_intact, save
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.moving_average import MovingAverage
from mechdiffusers.training.randomness import StepRandomness
from mechdiffusers.training.train import train
from small_runs import (
    SCRIPT,
    assert_same_weights,
    command_line,
    conditional,
    finish,
    loss_curve,
    small,
    start,
    write_dataset,
)

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]
CONFIGS = SCRIPT.parent / "configs" / "accelerate"
FIFTY = {"autoencoder_steps": 50, "denoiser_steps": 50, "logging_steps": 1, "checkpointing_steps": 20}


def launch(configuration: str, folder: Path, *more: str, **settings: object):
    return start([*LAUNCH, str(CONFIGS / f"{configuration}.yaml"), *command_line(folder, **settings), *more])


@pytest.fixture(scope="module")
def fifty(tmp_path_factory) -> dict[str, object]:
    return {**FIFTY, **conditional(write_dataset(tmp_path_factory.mktemp("data") / "composites"))}


@pytest.fixture(scope="module")
def alone(fifty, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    finish(start(command_line(folder, **fifty)))
    return folder


@pytest.fixture(scope="module")
def sharded(fifty, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sharded"
    finish(launch("fsdp", folder, **fifty))
    assert_two_processes_worked(folder, "average-{}.safetensors")
    return folder


def assert_two_processes_worked(folder: Path, own: str = "random_states_{}.pkl") -> None:
    """Each process leaves a file of its own in every checkpoint."""
    newest = newest_intact(folder / "checkpoints", "denoiser")
    assert newest is not None
    assert [(newest / own.format(process)).exists() for process in range(3)] == [True, True, False]


def assert_same_curves(one: Path, other: Path, tolerance: dict[str, float], num_steps: int = 50) -> None:
    for stage, rel in tolerance.items():
        expected, curve = loss_curve(one, stage), loss_curve(other, stage)
        assert set(curve) == set(range(1, 51))
        steps = range(1, num_steps + 1)
        assert [curve[step] for step in steps] == pytest.approx([expected[step] for step in steps], rel=rel)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    finish(start(command_line(tmp_path / "alone", **FIFTY)))
    finish(launch("one_machine", tmp_path / "run", **FIFTY))
    assert_two_processes_worked(tmp_path / "run")
    assert_same_curves(tmp_path / "alone", tmp_path / "run", {"autoencoder": 1e-4, "denoiser": 1e-4})


@pytest.mark.slow
def test_two_processes_share_a_stream(tmp_path):
    designs, _ = random_composites(80, size=8)
    datasets.Dataset.from_dict({"image": list(designs)}).to_parquet(tmp_path / "designs.parquet")
    stream = {"dataset": str(tmp_path / "designs.parquet"), "streaming": True, "logging_steps": 1}
    train(small(tmp_path / "alone", **stream))
    finish(launch("one_machine", tmp_path / "run", **stream))
    assert_two_processes_worked(tmp_path / "run")
    for stage in ("autoencoder", "denoiser"):
        expected, curve = (loss_curve(tmp_path / name, stage) for name in ("alone", "run"))
        assert set(curve) == set(range(1, 7))
        assert [curve[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.slow
def test_nothing_but_rounding_tells_shares_of_a_batch_from_the_whole(fifty, tmp_path):
    """In float64 the losses agree to their own digits, also with responses and a learned curve."""

    def losses(folder: Path, **settings: object) -> np.ndarray:
        config, seen = small(folder, **{**fifty, **settings}), []
        accelerator, designs = stage_accelerator(config, "denoiser"), load_designs(config)
        responses = designs.train.tensors[1]
        options = {"spec": designs.spec.to_dict(), **response_normalisation(responses)}
        denoiser = LatentDenoiser(config, (4, 4), **options).double()
        moments = torch.randn(len(responses), 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        compute_loss = denoising_loss(config, 0.0, 1.0)

        def kept(*step):
            loss, quantities = compute_loss(*step)
            seen.append(quantities["loss"].item())
            return loss, quantities

        data = TensorDataset(moments, responses)
        run_stage(accelerator, config, "denoiser", denoiser, data, kept, lambda *_: {"loss": 0.0})
        return np.reshape(seen, (50, -1)).mean(1)

    halves = losses(tmp_path / "halves", gradient_accumulation_steps=2, denoiser_batch_size=8)
    assert halves == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.slow
def test_two_processes_rehearse(tmp_path):
    messages = finish(launch("one_machine", tmp_path / "run", "--dry_run", "true"))
    assert messages.count("48 training designs of 8 x 8 pixels, 16 held out") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}


@pytest.mark.slow
def test_two_processes_with_shards_of_the_weights_train_as_one(alone, sharded):
    assert_same_curves(alone, sharded, {"autoencoder": 1e-4})
    # shards are summed in another order than whole gradients, which the second stage amplifies about twofold a step
    assert_same_curves(alone, sharded, {"denoiser": 1e-4}, num_steps=15)


@pytest.mark.slow
def test_sharded_processes_stop_on_sigterm_and_go_on(sharded, fifty, tmp_path):
    run = tmp_path / "run"
    process = launch("fsdp", run, **fifty)
    for line in process.stderr:
        if line.startswith("denoiser") and " 5/50" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode != 0
    assert not (run / "pipeline").exists()
    assert "denoiser goes on from step" in finish(launch("fsdp", run, "--resume_from_checkpoint", "latest", **fifty))
    assert_same_weights(run, sharded)


@pytest.mark.slow
def test_two_processes_with_deepspeed_train_as_one_and_go_on(tmp_path):
    pytest.importorskip("deepspeed")
    run, settings = tmp_path / "run", {**FIFTY, "max_grad_norm": 0.1}
    finish(start(command_line(tmp_path / "alone", **settings)))
    settings |= {"gradient_accumulation_steps": 2, "autoencoder_batch_size": 8, "denoiser_batch_size": 8}
    finish(launch("deepspeed", run, **settings))
    assert_same_curves(tmp_path / "alone", run, {"autoencoder": 1e-4, "denoiser": 1e-4})
    assert_two_processes_worked(run, "average-{}.safetensors")
    assert_two_processes_worked(run, "pytorch_model/zero_pp_rank_{}_mp_rank_00_optim_states.pt")
    shutil.copytree(run, tmp_path / "again")
    for left_out in ("checkpoints/denoiser-00000050", "pipeline"):
        shutil.rmtree(tmp_path / "again" / left_out)
    messages = finish(launch("deepspeed", tmp_path / "again", "--resume_from_checkpoint", "latest", **settings))
    assert "denoiser goes on from step 40" in messages
    assert_same_weights(tmp_path / "again", run)


@pytest.mark.parametrize("process", [0, 1])
def test_every_process_writes_its_part_of_what_deepspeed_has_sharded(tmp_path, monkeypatch, process):
    """Its engine, for which one stands in here, waits until all of them save; all else is Accelerate's own."""
    accelerator, saved = stage_accelerator(small(tmp_path), "denoiser"), []
    accelerator._models.append(SimpleNamespace(save_checkpoint=lambda folder, _: saved.append(Path(folder).name)))
    for state in (PartialState, AcceleratorState):
        monkeypatch.setitem(state._shared_state, "distributed_type", DistributedType.DEEPSPEED)
        monkeypatch.setitem(state._shared_state, "process_index", process)
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: None)
    save(accelerator, MovingAverage([torch.zeros(1)], decay=0.9), tmp_path, "denoiser", 4, limit=1)
    assert saved == [".unfinished-denoiser"]
    folder = tmp_path / ("denoiser-00000004" if process == 0 else ".unfinished-denoiser")
    assert (folder / f"average-{process}.safetensors").exists()
    assert (folder / f"random_states_{process}.pkl").exists()


@pytest.mark.parametrize(
    ("stage", "precision", "message"),
    [
        ("3", "no", "zero_stage of DeepSpeed must be at most 2, got 3"),
        ("2", "bf16", "mixed_precision must be 'no' with DeepSpeed, .* got 'bf16'"),
    ],
)
def test_what_deepspeed_would_shard_or_round_otherwise_is_refused(tmp_path, monkeypatch, stage, precision, message):
    process = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr("mechdiffusers.training.accelerators.process_state", lambda: process)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    with pytest.raises(ValueError, match=f"^{message}"):
        train(small(tmp_path, mixed_precision=precision))


@pytest.mark.slow
def test_processes_that_are_started_by_their_ranks_alone_stop_on_sigterm_with_its_status(tmp_path, monkeypatch):
    """As srun starts them, whose status is theirs."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2}
    processes = []
    for rank in range(2):
        for name, value in {**together, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        processes.append(start(command_line(tmp_path / "run", **FIFTY)))
    for line in processes[0].stderr:
        if line.startswith("autoencoder") and " 5/50" in line:
            break
    for process in processes:
        process.send_signal(signal.SIGTERM)
    messages = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, messages
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("autoencoder-*")
    assert newest_intact(checkpoint.parent, "autoencoder") == checkpoint


def test_two_processes_draw_what_one_draws_for_the_same_batch():
    together = StepRandomness((0, "stage", 7))
    shares = [StepRandomness((0, "stage", 7), rank, 2) for rank in range(2)]
    normal, integers, uniform = together.normal(6, 3), together.integers(1000, 6), together.uniform(6, 2)
    assert torch.equal(torch.cat([share.normal(3, 3) for share in shares]), normal)
    assert torch.equal(torch.cat([share.integers(1000, 3) for share in shares]), integers)
    assert torch.equal(torch.cat([share.uniform(3, 2) for share in shares]), uniform)
    assert torch.equal(torch.cat([share.stratified(3) for share in shares]), together.stratified(6))
    assert not torch.equal(StepRandomness((0, "stage", 8)).normal(6, 3), normal)


def test_stratified_numbers_are_equally_spaced_and_each_uniform():
    numbers = StepRandomness((0, "stage", 7)).stratified(8)
    torch.testing.assert_close(numbers.sort().values.diff(), torch.full((7,), 1 / 8))
    firsts = torch.tensor([StepRandomness(("test", step)).stratified(8)[5] for step in range(2000)])
    assert kstest(firsts.numpy(), "uniform").pvalue > 1e-4


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mechdiffusers.training.stages.process_state", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="^denoiser_batch_size must be a multiple of the number of processes, got 16"):
        train(small(tmp_path, autoencoder_batch_size=15))
