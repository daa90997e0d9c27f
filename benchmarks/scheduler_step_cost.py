"""What does a step of each scheduler cost, beside its stock counterpart's?

    python benchmarks/scheduler_step_cost.py

Stochastic schedulers beside ``DDPMScheduler``, deterministic ones beside ``DDIMScheduler``: the two loops run in turn
on the same tensors, with a network that costs nothing; a ratio is the median over the rounds.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from record import record
from tqdm.auto import trange

from mechdiffusers.schedulers import PredictorCorrectorScheduler, ProbabilityFlowScheduler, VDMScheduler

STEPS = 50
SHAPES = {"one_latent": (1, 4, 16, 16), "64_latents": (64, 4, 16, 16)}
#: Name: ours, its options, its stock counterpart.
PAIRS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "vdm": (VDMScheduler, {}, DDPMScheduler),
    "predictor-corrector": (PredictorCorrectorScheduler, {}, DDPMScheduler),
    "flow-churn": (ProbabilityFlowScheduler, {"solver": "euler", "s_churn": 10.0}, DDPMScheduler),
    "flow-euler": (ProbabilityFlowScheduler, {"solver": "euler"}, DDIMScheduler),
    "flow-heun": (ProbabilityFlowScheduler, {"solver": "heun"}, DDIMScheduler),
    "flow-rk4": (ProbabilityFlowScheduler, {"solver": "rk4"}, DDIMScheduler),
    "flow-adams": (ProbabilityFlowScheduler, {"solver": "adams_bashforth"}, DDIMScheduler),
}


def seconds_a_step(scheduler: Any, sample: torch.Tensor, output: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS)
    start = time.perf_counter()
    for t in scheduler.timesteps:
        scheduler.step(output, t, sample, generator=generator)
    return (time.perf_counter() - start) / len(scheduler.timesteps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/scheduler_step_cost.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for shape_name, shape in SHAPES.items():
        sample, output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        figures[shape_name] = {}
        for name, (ours, options, stock) in PAIRS.items():
            pair = (ours(prediction_type="v_prediction", **options), stock(prediction_type="v_prediction"))
            pair[1].register_to_config(clip_sample=False)
            times = np.array(
                [
                    [seconds_a_step(scheduler, sample, output) for scheduler in pair]
                    for _ in trange(arguments.rounds, desc=f"{name}, {shape_name}", leave=False)
                ]
            )
            figures[shape_name][name] = {
                "microseconds": 1e6 * float(np.median(times[:, 0])),
                "stock": stock.__name__,
                "stock_microseconds": 1e6 * float(np.median(times[:, 1])),
                "ratio": float(np.median(times[:, 0] / times[:, 1])),
            }
    record(figures, arguments.output)


if __name__ == "__main__":
    main()
