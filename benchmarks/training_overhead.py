"""What the training loop costs beside a bare one: averaged weights, logs, checkpoints every 500 steps.

    python benchmarks/training_overhead.py --output benchmarks/training_overhead.json

The same network, batches, loss and optimiser, in turn: ``run_stage`` for 500 steps, one checkpoint among them, and a
loop of nothing but batch, loss, backward pass, clipping and step. The machine does nothing else meanwhile.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from mechdiffusers.training import TrainingConfig, parse_config
from mechdiffusers.training.accelerators import stage_accelerator
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.randomness import StepRandomness
from record import record
from torch.utils.data import DataLoader, TensorDataset

PRESET = Path(__file__).parents[1] / "training" / "configs" / "composites_32.yaml"
SIZE = (16, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="the steps are shared among so many turns")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/training_overhead.json"))
    arguments = parser.parse_args()

    config = parse_config(["--config", str(PRESET)])
    config.denoiser_steps = arguments.steps // arguments.rounds
    config.checkpointing_steps = config.validation_steps = 10**9
    moments = torch.randn(4096, 1, 2 * config.latent_channels, *SIZE, generator=torch.Generator().manual_seed(0))
    latents = TensorDataset(moments, torch.empty(len(moments), 0, 0))
    loss = denoising_loss(config, 0.0, 1.0)
    ours, bare = [], []
    for _ in range(arguments.rounds):
        ours.append(time_ours(config, latents, loss))
        bare.append(time_bare(config, latents, loss))
    ratio = sum(ours) / sum(bare)
    record(
        {
            "overhead": ratio - 1,
            "seconds": {"ours": ours, "bare": bare},
            "steps_a_turn": config.denoiser_steps,
            "median_of_turns": statistics.median(a / b for a, b in zip(ours, bare, strict=True)) - 1,
        },
        arguments.output,
    )


def time_ours(config: TrainingConfig, latents: TensorDataset, loss) -> float:
    """Seconds of a stage with its last checkpoint, from the first step on."""
    begin = []

    def timed(*step):
        if not begin:
            begin.append(time.perf_counter())
        return loss(*step)

    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = folder
        accelerator = stage_accelerator(config, "denoiser")
        denoiser = LatentDenoiser(config, SIZE)
        run_stage(accelerator, config, "denoiser", denoiser, latents, timed, lambda *_: {"loss": 0.0})
        return time.perf_counter() - begin[0]


def time_bare(config: TrainingConfig, latents: TensorDataset, loss) -> float:
    """Seconds of as many steps with nothing around them."""
    denoiser = LatentDenoiser(config, SIZE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.denoiser_learning_rate, fused=True)
    loader = DataLoader(latents, batch_size=config.denoiser_batch_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    begin = time.perf_counter()
    for step in range(config.denoiser_steps):
        value, _ = loss(denoiser, next(batches), StepRandomness((0, "bare", step)))
        value.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
