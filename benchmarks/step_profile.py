"""Where the time of a denoiser's training step goes, beside what its convolutions and products take alone.

    python benchmarks/step_profile.py --output benchmarks/step_profile.json

PyTorch's profiler on one thread sums each operator's own time over some steps of the composites_32 preset. The
machine's limit is the rate of a large float32 matrix product; the step's operations are counted by PyTorch.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from record import record
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from mechdiffusers.training import parse_config
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.randomness import StepRandomness

PRESET = Path(__file__).parents[1] / "training" / "configs" / "composites_32.yaml"
#: The first name that an operator's name contains says what it is.
KINDS = {
    "convolutions": ("convolution",),
    "matrix products": ("aten::mm", "addmm", "bmm", "scaled_dot_product"),
    "normalisation": ("group_norm", "layer_norm"),
    "activations": ("silu", "gelu"),
    "optimiser and clipping": ("_fused_adamw", "linalg_vector_norm", "_foreach", "Optimizer", "clamp", "stack"),
    "copies and layout": ("copy_", "clone", "contiguous", "cat", "_to_copy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/step_profile.json"))
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # operators of several threads hide their waiting from the profiler
    config = parse_config(["--config", str(PRESET)])
    denoiser = LatentDenoiser(config, (16, 16)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.denoiser_learning_rate, fused=True)
    moments = torch.randn(config.denoiser_batch_size, 1, 2 * config.latent_channels, 16, 16)
    batch = moments, torch.empty(len(moments), 0, 0)
    loss = denoising_loss(config, 0.0, 1.0)

    def step() -> None:
        value, _ = loss(denoiser, batch, StepRandomness(("profile",)))
        value.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    begin = time.perf_counter()
    for _ in range(arguments.steps):
        step()
    seconds = (time.perf_counter() - begin) / arguments.steps
    with profile() as profiled:
        begin = time.perf_counter()
        for _ in range(arguments.steps):
            step()
        profiled_seconds = (time.perf_counter() - begin) / arguments.steps
    with FlopCounterMode(display=False) as counted:
        step()

    own = defaultdict(float)
    for event in profiled.key_averages():
        own[kind(event.key)] += event.self_cpu_time_total
    total = sum(own.values())
    # microseconds of all profiled steps; what Python takes between operators belongs to none of them
    arithmetic = (own["convolutions"] + own["matrix products"]) / 1e6 / arguments.steps
    record(
        {
            "seconds_a_step": seconds,
            "share_of_the_time": {name: value / total for name, value in sorted(own.items(), key=lambda x: -x[1])},
            "seconds_a_profiled_step": profiled_seconds,
            "seconds_of_its_convolutions_and_products": arithmetic,
            "step_over_its_convolutions_and_products": profiled_seconds / arithmetic,
            "gigaflop_a_step": counted.get_total_flops() / 1e9,
            "gigaflops_reached": counted.get_total_flops() / 1e9 / seconds,
            "gigaflops_in_convolutions_and_products": counted.get_total_flops() / 1e9 / arithmetic,
            "gigaflops_of_a_large_product": rate_of_a_product(),
        },
        arguments.output,
    )


def kind(operator: str) -> str:
    """What an operator does, for the reader."""
    return next((name for name, parts in KINDS.items() if any(part in operator for part in parts)), "the rest")


def rate_of_a_product(size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of a square float32 matrix product, the best of some."""
    a = torch.randn(size, size)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times) / 1e9


if __name__ == "__main__":
    main()
