"""The pictures of docs/schedulers.md: what each scheduler does to noise on its way to two moons.

    python benchmarks/scheduler_pictures.py

The denoiser is exact, so that whatever is wrong in a picture is the scheduler's.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analytic_denoisers import two_moons
from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.schedulers import (
    PredictorCorrectorScheduler,
    ProbabilityFlowScheduler,
    VDMScheduler,
    estimate_velocity_error,
    optimize_steps,
    stock_scheduler,
)

MOONS = two_moons()
CURVE = VDMScheduler().curve
NUM = 1500


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return MOONS.predict(x, CURVE(t))


def noise(num: int = NUM, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def way(scheduler: Any, start: torch.Tensor) -> np.ndarray:
    """Samples before every evaluation and at the end, shape (evaluations + 1, B, 2)."""
    generator, x = torch.Generator().manual_seed(1), start
    states = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x, **_draws(scheduler, generator)).prev_sample
        states.append(x)
    return torch.stack(states).numpy()


def _draws(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    return {} if type(scheduler).__module__.startswith("diffusers") else {"generator": generator}


def scatter(axes: Axes, points: np.ndarray, title: str, colour: Any = "#1f6f8b") -> Any:
    axes.set(title=title, xlim=(-2.9, 2.9), ylim=(-2.3, 2.3), aspect="equal", xticks=[], yticks=[])
    return axes.scatter(points[:, 0], points[:, 1], s=2, c=colour, linewidths=0)


def paths(axes: Axes, states: np.ndarray, num: int) -> None:
    axes.plot(states[:, :num, 0], states[:, :num, 1], color="#c8553d", linewidth=0.7, alpha=0.8)


def ancestral(panels: list[Axes]) -> None:
    errors = estimate_velocity_error(
        denoiser, VDMScheduler(), MOONS.sample(2000, torch.Generator().manual_seed(2)), 50, torch.Generator()
    )
    few = {}
    for kind in ("fixed_small", "optimal"):
        few[kind] = VDMScheduler(variance_type=kind, velocity_error=errors, timestep_spacing="log_snr")
        few[kind].set_timesteps(10)
    fine = VDMScheduler(timestep_spacing="log_snr")
    fine.set_timesteps(250)
    states = way(fine, noise())
    scatter(panels[0], states[-1], "250 steps, and the paths of 3")
    paths(panels[0], states, 3)
    scatter(panels[1], way(few["fixed_small"], noise())[-1], "10 steps")
    scatter(panels[2], way(few["optimal"], noise())[-1], "10 steps, optimal variance")


def probability_flow(panels: list[Axes]) -> None:
    scheduler = ProbabilityFlowScheduler(solver="rk4", timestep_spacing="log_snr", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(61)
    states = way(scheduler, noise())
    scatter(panels[0], states[-1], "60 Runge-Kutta steps, the paths of 12")
    paths(panels[0], states, 12)
    scheduler.set_timesteps(61, inverse=True)
    x = MOONS.sample(NUM, torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        log_snr = scheduler.curve(t)
        derivative = torch.func.vmap(torch.func.jacrev(lambda p, at=log_snr: MOONS.predict(p[None], at)[0]))(x)
        divergence = derivative.diagonal(dim1=1, dim2=2).sum(1)
        out = scheduler.step(denoiser(x, t), t, x, divergence=divergence)
        x = out.prev_sample
    normal = -(x**2).sum(1) / 2 - np.log(2 * np.pi)
    colours = (normal - out.log_density_change).numpy()
    data = MOONS.sample(NUM, torch.Generator().manual_seed(0)).numpy()
    shown = scatter(panels[1], data, "data: log-density found on the way back", colours)
    panels[1].figure.colorbar(shown, ax=panels[1], shrink=0.7)
    scatter(panels[2], x.numpy(), "the noise that these data come from", colours)


def predictor_corrector(panels: list[Axes]) -> None:
    for panel, corrections in zip(panels, (0, 1, 8), strict=True):
        scheduler = PredictorCorrectorScheduler(
            timestep_spacing="log_snr", num_corrector_steps=corrections, corrector_snr=0.3
        )
        scheduler.set_timesteps(12)
        scatter(
            panel,
            way(scheduler, noise())[-1],
            f"{corrections} corrections a level, {len(scheduler.timesteps)} evaluations",
        )


def few_steps(panels: list[Axes]) -> None:
    config = VDMScheduler(timestep_spacing="trailing").config
    scheduler = ProbabilityFlowScheduler.from_config(config, solver="adams_bashforth", timestep_spacing="log_snr")
    optimized = optimize_steps(denoiser, scheduler, noise(64, seed=3), 5)
    stock = stock_scheduler("dpmsolver++", config)
    for panel, solver, title in zip(
        panels,
        (stock, scheduler, optimized),
        ("DPM-Solver++ 2M, trailing spacing", "DEIS, log-SNR spacing", "DEIS, the best 5 steps for this model"),
        strict=True,
    ):
        solver.set_timesteps(5)
        scatter(panel, way(solver, noise())[-1], title)


PICTURES: dict[str, Callable[[list[Axes]], None]] = {
    "vdm": ancestral,
    "probability_flow": probability_flow,
    "predictor_corrector": predictor_corrector,
    "few_steps": few_steps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    for name, draw in PICTURES.items():
        with matplotlib.rc_context({"font.size": 8}):
            figure = Figure(figsize=(10, 2.9), layout="constrained")
            draw(list(figure.subplots(1, 3)))
            path = arguments.output_dir / f"scheduler_{name}.png"
            with atomic_write(path) as unfinished:
                figure.savefig(unfinished, format="png", dpi=110)


if __name__ == "__main__":
    main()
