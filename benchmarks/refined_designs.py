r"""How near do designs come that are simulated one after the other, and how plausible do they stay?

    python benchmarks/refined_designs.py checkpoints/composites-32 --num_candidates 4 --num_refinements 2
    python benchmarks/refined_designs.py checkpoints/composites-32 --num_candidates 4 --num_refinements 2 \
        --num_designs 8 --num_refined 2 --num_rounds 8 --output benchmarks/refined_designs_best_of_8.json

The first takes one design for each held-out target and seven rounds of ``mechdiffusers.refine``: eight simulations a
target, as many as the best of eight designs takes in ``inverse_design.py``, beside which these figures stand. The
second simulates eight designs and goes on with the two that are nearest, 24 simulations a target. Parts of four targets
are kept in --run_dir, so that the same command goes on after an interruption, and a second one may share the work.
"""

import hashlib
import json
import time
from typing import Any

import numpy as np
from candidates import add_sampling, bound, common_arguments, fingerprint, percent, sampling
from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation import (
    nearest_training_designs,
    novelty,
    refine,
    response_error,
    stored_designs,
    stored_responses,
)
from mechdiffusers.evaluation.design import designs_for
from mechdiffusers.evaluation.response import load_split
from mechdiffusers.microstructures import response_meaning
from mechdiffusers.microstructures.build_dataset.parts import simulated_response
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import stock_scheduler
from record import record
from tqdm.auto import tqdm

#: Targets of a part.
_PART = 4


def main() -> None:
    parser = common_arguments(__doc__, "refined_designs", num_targets=32)
    parser.set_defaults(num_designs=1)
    parser.add_argument("--num_refined", type=int, default=1, help="of a target's designs: those that are nearest")
    parser.add_argument("--num_rounds", type=int, default=7, help="simulations of a refined design after the first")
    add_sampling(parser)
    arguments = parser.parse_args()
    num_refined = arguments.num_refined
    if not 0 < num_refined <= arguments.num_designs:
        parser.error(f"num_refined must be between 1 and num_designs={arguments.num_designs}, got {num_refined}")

    train, heldout = load_split(arguments.dataset, "train"), load_split(arguments.dataset, "heldout")
    meaning, stored = response_meaning(heldout), stored_responses(heldout)
    rows = np.flatnonzero(np.isfinite(stored).all((1, 2)))[: arguments.num_targets]
    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = stock_scheduler(arguments.scheduler, pipe.scheduler.config)
    options = sampling(arguments)
    recipe = [fingerprint(arguments.checkpoint), arguments.scheduler, options, arguments.num_designs]
    recipe += [arguments.num_refined, arguments.num_rounds, arguments.seed]

    def part(chosen: np.ndarray) -> dict[str, np.ndarray]:
        name = hashlib.sha256(json.dumps([*recipe, chosen.tolist()]).encode()).hexdigest()[:32]
        path = arguments.run_dir / f"{name}.npz"
        if not path.exists():
            start, targets = time.perf_counter(), stored[chosen]
            seed = arguments.seed + int(chosen[0])
            designs = designs_for(pipe, targets, arguments.num_designs, seed=seed, meaning=meaning, **options)
            designs, response = nearest_of(designs, targets, num_refined, meaning, arguments.device)
            refined = refine(
                designs,
                targets,
                meaning,
                pipe.predict_response,
                response=response,
                num_rounds=arguments.num_rounds,
                seed=seed,
                device=arguments.device,
            )
            found = {"drawn": designs, "refined": refined.designs, "error": refined.error}
            with atomic_write(path) as unfinished, unfinished.open("wb") as file:
                np.savez_compressed(file, seconds=time.perf_counter() - start, **found)
        return dict(np.load(path))

    parts = [part(rows[i : i + _PART]) for i in tqdm(range(0, len(rows), _PART), desc="refine", unit="part")]
    drawn, refined, error = (np.concatenate([each[name] for each in parts]) for name in ("drawn", "refined", "error"))
    training_designs = stored_designs(train)
    best = np.where(np.isfinite(error), error, np.inf).reshape(len(rows), num_refined, -1).min(1)
    solved = best[np.isfinite(best).all(1)]
    figures = {
        "targets": len(rows),
        "designs_a_target": arguments.num_designs,
        "refined_designs_a_target": num_refined,
        "targets_without_a_solved_design": len(best) - len(solved),
        "simulations_a_target": [arguments.num_designs + num_refined * i for i in range(arguments.num_rounds + 1)],
        "best_percent": [percent(errors) for errors in solved.T],
        "best_median_percent": 100 * float(np.median(solved[:, -1])),
        "best_worst_percent": 100 * float(solved[:, -1].max()),
        "nearest_training_design_percent": percent(nearest_training_designs(stored[rows], train, 1).error[:, 0]),
        "pixels_changed": float((drawn != refined).mean()),
        "novelty": {
            "drawn": float(novelty(drawn, training_designs).mean()),
            "refined": float(novelty(refined, training_designs).mean()),
            "heldout_designs": float(novelty(stored_designs(heldout.select(rows)), training_designs).mean()),
        },
        "bound": {
            "drawn": bound(pipe, drawn, arguments.seed),
            "refined": bound(pipe, refined, arguments.seed),
            "heldout_designs": bound(pipe, stored_designs(heldout.select(rows)), arguments.seed),
        },
        "seconds_a_target": float(sum(each["seconds"] for each in parts) / len(rows)),
        "scheduler": arguments.scheduler,
        **options,
    }
    record(figures, arguments.output)


def nearest_of(
    designs: np.ndarray, targets: np.ndarray, num: int, meaning: dict[str, Any], device: str
) -> tuple[np.ndarray, np.ndarray]:
    """The ``num`` designs of each target that are nearest to it by finite elements, and their responses."""
    per_target = len(designs) // len(targets)
    response = simulated_response(designs, meaning, device)
    error = response_error(response, np.repeat(targets, per_target, axis=0)).reshape(-1, per_target)
    order = np.argsort(error, axis=1)[:, :num] + per_target * np.arange(len(targets))[:, None]
    return designs[order.ravel()], response[order.ravel()]


if __name__ == "__main__":
    main()
