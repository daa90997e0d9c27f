"""What the training loop costs beside a bare one: averaged weights, logs, checkpoints every 500 steps.

    python benchmarks/training_overhead.py --output benchmarks/training_overhead.json

The same network, data, loss and optimiser: ``run_stage``, and a loop of nothing but batch, loss, backward pass,
clipping and step, its random numbers drawn for the whole batch at once. They take turns of twelve steps, so that what
else the machine does meets both alike. Of a turn the first step, which finds the memory as the other loop left it, and
the last are not counted. Every second turn of ours ends with a checkpoint, far more often than every 500 steps, to time
several of them: what such a step takes beyond the others is divided by 500 and added.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from record import record
from torch.utils.data import DataLoader, TensorDataset

from mechdiffusers.training import TrainingConfig, parse_config
from mechdiffusers.training.accelerators import stage_accelerator
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.loop import run_stage

PRESET = Path(__file__).parents[1] / "training" / "configs" / "composites_32.yaml"
SIZE = (16, 16)
#: Steps between two checkpoints that the overhead is said for.
CHECKPOINTING_STEPS = 500
#: Steps of a turn; the log's steps, multiples of 50, fall anywhere in it.
TURN = 12
#: What a loss asks of ``StepRandomness``, from the one generator that all draws of a process share.
PLAIN_DRAWS = SimpleNamespace(
    normal=torch.randn,
    integers=lambda high, num: torch.randint(high, (num,)),
    stratified=lambda num: (torch.rand(()) + torch.arange(num) / num) % 1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=18, help="of each loop; the first two are not counted")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/training_overhead.json"))
    arguments = parser.parse_args()

    config = parse_config(["--config", str(PRESET)])
    config.denoiser_steps = arguments.turns * TURN + 1  # the last one shows when the one before it ends
    config.checkpointing_steps, config.validation_steps = 2 * TURN, 10**9
    ours, bare = (seconds[2:] for seconds in time_in_turn(config))
    a_step, a_bare_step = ours[:, 1:-1].mean(1), bare[:, 1:-1].mean(1)
    checkpoints = ours[1::2, -1] - a_step[1::2]
    without_checkpoints = a_step / a_bare_step - 1
    record(
        {
            "overhead": without_checkpoints.mean() + checkpoints.mean() / CHECKPOINTING_STEPS / a_bare_step.mean(),
            "overhead_without_checkpoints": without_checkpoints.mean(),
            "its_standard_error": without_checkpoints.std(ddof=1) / len(ours) ** 0.5,
            "seconds_a_step": {"ours": a_step.tolist(), "bare": a_bare_step.tolist()},
            "seconds_a_checkpoint": checkpoints.tolist(),
            "steps_between_checkpoints": CHECKPOINTING_STEPS,
            "steps_a_turn": TURN,
        },
        arguments.output,
    )


def time_in_turn(config: TrainingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the steps of a stage, from one loss to the next, and of bare ones, shape ``(turns, TURN)`` each."""
    moments = torch.randn(4096, 1, 2 * config.latent_channels, *SIZE, generator=torch.Generator().manual_seed(0))
    latents = TensorDataset(moments, torch.empty(len(moments), 0, 0))
    loss, begin = denoising_loss(config, 0.0, 1.0), 0.0
    ours, bare = [], []

    def with_bare_turns(*step):
        nonlocal begin
        ours.append(time.perf_counter() - begin)
        if (len(ours) - 1) % TURN == 0:
            bare.extend(itertools.islice(bare_steps, TURN))
        begin = time.perf_counter()
        return loss(*step)

    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = folder
        accelerator = stage_accelerator(config, "denoiser")  # sets the number of threads
        bare_steps = seconds_of_bare_steps(config, latents, loss)
        denoiser = LatentDenoiser(config, SIZE)
        run_stage(accelerator, config, "denoiser", denoiser, latents, with_bare_turns, lambda *_: {"loss": 0.0})
    return np.reshape(ours[1:], (-1, TURN)), np.reshape(bare[:-TURN], (-1, TURN))


def seconds_of_bare_steps(config: TrainingConfig, latents: TensorDataset, loss) -> Iterator[float]:
    """Trains with nothing around it, a step whenever its time is asked for."""
    denoiser = LatentDenoiser(config, SIZE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.denoiser_learning_rate, fused=True)
    loader = DataLoader(latents, batch_size=config.denoiser_batch_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    while True:
        begin = time.perf_counter()
        value, _ = loss(denoiser, next(batches), PLAIN_DRAWS)
        value.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - begin


if __name__ == "__main__":
    main()
