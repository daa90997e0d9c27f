r"""Error of designs against number of steps, guidance scale and number of training designs.

    python benchmarks/inverse_design_sweeps.py checkpoints/composites-32 --num_targets 16 --num_designs 2 \
      --trained_on 750=runs/predictor_of_750/pipeline 6000=checkpoints/composites-32

Every point is as many designs for as many held-out targets, by finite elements, one candidate a design, the same random
numbers for all points. ``predictor_of_fewer.py`` makes checkpoints for --trained_on. All is kept in --run_dir; the same
command goes on after an interruption.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from candidates import common_arguments, errors_of, fingerprint, kept, percent, summary
from matplotlib.figure import Figure
from record import record

from mechdiffusers.evaluation.inverse_design import (
    designs_for,
    load_split,
    nearest_training_designs,
    response_error,
    stored_designs,
    stored_responses,
)
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import (
    STOCK_SCHEDULERS,
    PredictorCorrectorScheduler,
    ProbabilityFlowScheduler,
    VDMScheduler,
    stock_scheduler,
)

#: Each with one evaluation a step, but the last, which has two.
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vdm": (VDMScheduler, {}),
    "adams-bashforth": (ProbabilityFlowScheduler, {"solver": "adams_bashforth", "timestep_spacing": "log_snr"}),
    "predictor-corrector": (PredictorCorrectorScheduler, {}),
}


def main() -> None:
    parser = common_arguments(__doc__, "inverse_design_sweeps", num_targets=32)
    parser.set_defaults(run_dir=Path("runs/inverse_design"))  # some points are simulated there already
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 1000])
    parser.add_argument("--schedulers", nargs="+", default=[*OURS, "ddpm", "ddim", "dpmsolver++", "unipc"])
    parser.add_argument("--guidance_scales", type=float, nargs="*", default=[0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
    parser.add_argument(
        "--trained_on", nargs="*", default=[], help="NUMBER=CHECKPOINT, its predictor trained on so many"
    )
    parser.add_argument("--scheduler", default="dpmsolver++", help="of guidance and of the number of training designs")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="likewise")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if unknown := {*arguments.schedulers, arguments.scheduler} - {*OURS, *STOCK_SCHEDULERS}:
        parser.error(f"schedulers must be among {[*OURS, *STOCK_SCHEDULERS]}, got {sorted(unknown)}")

    train, heldout = load_split(arguments.dataset, "train"), load_split(arguments.dataset, "heldout")
    stored = stored_responses(heldout)
    solved = np.flatnonzero(np.isfinite(stored).all((1, 2)))
    targets = stored[solved[: arguments.num_targets]]
    point = points(targets, ResponseSpec.of(heldout), arguments)

    number, chosen = arguments.num_inference_steps, arguments.scheduler
    figures: dict[str, Any] = {
        "steps": {
            name: {steps: point(arguments.checkpoint, name, steps) for steps in arguments.steps}
            for name in arguments.schedulers
        },
        "guidance_scale": {
            scale: point(arguments.checkpoint, chosen, number, guidance_scale=scale)
            for scale in arguments.guidance_scales
        },
        "training_designs": {},
        "predictor_error_percent": {},
        "retrieval": {},
    }
    for pair in arguments.trained_on:
        num, checkpoint = pair.split("=", 1)
        figures["training_designs"][int(num)] = point(Path(checkpoint), chosen, number)
        pipe = LatentDDPMPipeline.from_pretrained(checkpoint).to(arguments.device)
        predicted = np.asarray(pipe.predict_response(stored_designs(heldout.select(solved))).cpu())
        figures["predictor_error_percent"][int(num)] = percent(response_error(predicted, stored[solved]))
        nearest = nearest_training_designs(targets, train.select(range(int(num))), arguments.num_designs)
        figures["retrieval"][int(num)] = summary(nearest.error)
    if arguments.figure:
        save_figure(figures, arguments.figure)
    record(figures, arguments.output)


def points(targets: np.ndarray, spec: ResponseSpec, arguments: Any) -> Callable[..., dict[str, Any]]:
    """A function that gives the summary of the errors of a checkpoint with a scheduler, steps and other options."""
    pipes: dict[Path, tuple[LatentDDPMPipeline, Mapping[str, Any], str]] = {}

    def point(checkpoint: Path, scheduler: str, steps: int, **options: Any) -> dict[str, Any]:
        if checkpoint not in pipes:
            pipe = LatentDDPMPipeline.from_pretrained(checkpoint).to(arguments.device)
            pipe.set_progress_bar_config(disable=True)
            pipes[checkpoint] = pipe, pipe.scheduler.config, fingerprint(checkpoint)
        pipe, config, files = pipes[checkpoint]
        if scheduler in OURS:
            ours, settings = OURS[scheduler]
            pipe.scheduler = ours.from_config(config, **settings)
        else:
            pipe.scheduler = stock_scheduler(scheduler, config)
        designs = kept(
            arguments.run_dir,
            [files, scheduler, steps, options, arguments.seed, targets.tolist(), arguments.num_designs],
            lambda: designs_for(
                pipe,
                targets,
                arguments.num_designs,
                seed=arguments.seed,
                num_inference_steps=steps,
                spec=spec,
                **options,
            ),
        )
        return summary(errors_of(designs, targets, spec, arguments.run_dir / "responses", arguments.device))

    return point


def save_figure(figures: dict[str, Any], path: Path) -> None:
    """Best and single error along each sweep."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    steps, guidance, size = figure.subplots(1, 3, sharey=True)
    for name, found in figures["steps"].items():
        draw(steps, found, name, "single_percent", linestyle="-" if name in OURS else "--")
    draw(guidance, figures["guidance_scale"], "single designs", "single_percent")
    draw(guidance, figures["guidance_scale"], "best of a target", "best_percent")
    draw(size, figures["training_designs"], "best of a target", "best_percent")
    draw(size, figures["retrieval"], "nearest training design", "best_percent")
    for axes, label in ((steps, "steps"), (guidance, "guidance scale"), (size, "designs the predictor learned from")):
        axes.set(xlabel=label, yscale="log")
        axes.legend(frameon=False, fontsize=7)
    for axes, places in ((steps, next(iter(figures["steps"].values()))), (size, figures["training_designs"])):
        axes.set_xscale("log")
        axes.set_xticks(list(places), labels=[str(place) for place in places])
    steps.set(ylabel="error of the response in per cent")
    steps.set_yticks([4, 6, 10, 20, 40], labels=["4", "6", "10", "20", "40"])
    for axes in (steps, guidance, size):
        axes.minorticks_off()
    figure.savefig(path, dpi=150)


def draw(axes: Any, found: Mapping[float, dict[str, Any]], label: str, which: str, **style: Any) -> None:
    """A line with its standard errors."""
    values = [summary[which] for summary in found.values()]
    means, errors = [value["mean"] for value in values], [value["standard_error"] for value in values]
    axes.errorbar(list(found), means, errors, label=label, marker="o", markersize=3, **style)


if __name__ == "__main__":
    main()
