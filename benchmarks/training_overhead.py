"""What the training loop costs beside a bare one: averaged weights, logs, checkpoints every 500 steps.

    python benchmarks/training_overhead.py --output benchmarks/training_overhead.json

The same network, data, loss and optimiser: ``run_stage``, and a loop of nothing but batch, loss, backward pass,
clipping and step, its random numbers drawn for the whole batch at once. They take turns step by step: a bare step is
made whenever ``run_stage`` asks for its loss, so that what else the machine does meets both alike. Checkpoints are
written far more often than every 500 steps, to time several of them: what the steps that write one take beyond the
others is divided by 500 and added to what the others take beyond bare ones.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from mechdiffusers.training import TrainingConfig, parse_config
from mechdiffusers.training.accelerators import stage_accelerator
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.loop import run_stage
from record import record
from torch.utils.data import DataLoader, TensorDataset

PRESET = Path(__file__).parents[1] / "training" / "configs" / "composites_32.yaml"
SIZE = (16, 16)
#: Steps between two checkpoints that the overhead is said for.
CHECKPOINTING_STEPS = 500
#: First steps, which set up what later ones use.
WARMUP = 5
#: What a loss asks of ``StepRandomness``, from the one generator that all draws of a process share.
PLAIN_DRAWS = SimpleNamespace(
    normal=torch.randn,
    integers=lambda high, num: torch.randint(high, (num,)),
    stratified=lambda num: (torch.rand(()) + torch.arange(num) / num) % 1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--timed_checkpoints", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/training_overhead.json"))
    arguments = parser.parse_args()

    config = parse_config(["--config", str(PRESET)])
    config.denoiser_steps, config.validation_steps = arguments.steps + WARMUP + 1, 10**9
    config.checkpointing_steps = arguments.steps // arguments.timed_checkpoints
    ours, bare = time_in_turn(config)
    writes = [(WARMUP + i + 1) % config.checkpointing_steps == 0 for i in range(len(ours))]
    plain = [(a, b) for a, b, writing in zip(ours, bare, writes, strict=True) if not writing]
    a_step, a_bare_step = (statistics.mean(seconds) for seconds in zip(*plain, strict=True))
    checkpoints = [seconds - a_step for seconds, writing in zip(ours, writes, strict=True) if writing]
    differences = [a - b for a, b in plain]
    record(
        {
            "overhead": (a_step + statistics.mean(checkpoints) / CHECKPOINTING_STEPS) / a_bare_step - 1,
            "overhead_without_checkpoints": a_step / a_bare_step - 1,
            "its_standard_error": statistics.stdev(differences) / len(differences) ** 0.5 / a_bare_step,
            "seconds_a_step": {"ours": a_step, "bare": a_bare_step},
            "seconds_a_checkpoint": checkpoints,
            "steps_between_checkpoints": CHECKPOINTING_STEPS,
            "steps_timed": len(plain),
        },
        arguments.output,
    )


def time_in_turn(config: TrainingConfig) -> tuple[list[float], list[float]]:
    """Seconds of each step of a stage, from one loss to the next, and of each bare step, the first ones left out."""
    moments = torch.randn(4096, 1, 2 * config.latent_channels, *SIZE, generator=torch.Generator().manual_seed(0))
    latents = TensorDataset(moments, torch.empty(len(moments), 0, 0))
    loss, begun = denoising_loss(config, 0.0, 1.0), []
    ours, bare = [], []

    def with_a_bare_step(*step):
        begin = time.perf_counter()
        if begun:
            ours.append(begin - begun.pop())
        bare_step()
        begun.append(time.perf_counter())
        bare.append(begun[0] - begin)
        return loss(*step)

    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = folder
        accelerator = stage_accelerator(config, "denoiser")  # sets the number of threads
        bare_step = bare_steps(config, latents, loss)
        denoiser = LatentDenoiser(config, SIZE)
        run_stage(accelerator, config, "denoiser", denoiser, latents, with_a_bare_step, lambda *_: {"loss": 0.0})
    return ours[WARMUP:], bare[WARMUP:-1]


def bare_steps(config: TrainingConfig, latents: TensorDataset, loss) -> Callable[[], None]:
    """A training without anything around it; a call is a step."""
    denoiser = LatentDenoiser(config, SIZE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.denoiser_learning_rate, fused=True)
    loader = DataLoader(latents, batch_size=config.denoiser_batch_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        value, _ = loss(denoiser, next(batches), PLAIN_DRAWS)
        value.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
