r"""How near do designs come that are chosen by the shape of their curves and refined, and how plausible do they stay?

    python benchmarks/refined_designs.py checkpoints/composites-32
    python benchmarks/refined_designs.py checkpoints/composites-32 --num_designs 64 --num_targets 64 \
      --output benchmarks/refined_designs_64.json
    python benchmarks/refined_designs.py checkpoints/composites-32 --from_training_designs \
      --num_targets 28 --num_finer 8 --output benchmarks/refined_training_designs.json

For each held-out target 128 designs are drawn, guided by the predictor but not chosen by it. The two whose curves are
nearest in shape by first-order elements are taken, and ``mechdiffusers.refine`` goes on with these. With three rounds
that is eight simulations of a target at the dataset's order, and 160 with first-order elements, which are counted too.
The third command is what that gives without a generative model: in place of the designs drawn it takes as many
training designs, those nearest to the target by their stored responses. Some refined designs are compared with the
targets' own on a finer mesh as well, of four elements a pixel. Seconds are of one core if OMP_NUM_THREADS is 1. Parts
of four targets are kept in --run_dir, so that the same command goes on after an interruption.
"""

import hashlib
import json
import time
from dataclasses import replace

import numpy as np
from candidates import add_sampling, bound, common_arguments, drawing, percent
from datasets import Dataset
from record import record
from tqdm.auto import tqdm

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation import novelty
from mechdiffusers.evaluation.inverse_design import (
    curve_shape_error,
    designs_for,
    load_split,
    nearest_in_curve_shape,
    nearest_training_designs,
    refine,
    response_error,
    stored_designs,
    stored_responses,
)
from mechdiffusers.mechanics import ResponseSpec

#: Targets of a part.
_PART = 4


def main() -> None:
    parser = common_arguments(__doc__, "refined_designs", num_targets=128)
    parser.set_defaults(num_designs=128)
    parser.add_argument("--num_refined", type=int, default=2, help="of a target's designs: those nearest in shape")
    parser.add_argument("--num_rounds", type=int, default=3, help="simulations of a refined design after the first")
    parser.add_argument("--num_coarse_steps", type=int, default=5, help="with first-order elements, in each round")
    parser.add_argument("--from_training_designs", action="store_true", help="draw nothing: refine the nearest known")
    parser.add_argument("--num_finer", type=int, default=16, help="targets that the finer mesh is for")
    add_sampling(parser)
    arguments = parser.parse_args()
    num_refined = arguments.num_refined
    if not 0 < num_refined <= arguments.num_designs:
        parser.error(f"num_refined must be between 1 and num_designs={arguments.num_designs}, got {num_refined}")

    train, heldout = load_split(arguments.dataset, "train"), load_split(arguments.dataset, "heldout")
    spec, stored = ResponseSpec.of(heldout), stored_responses(heldout)
    rows = np.flatnonzero(np.isfinite(stored).all((1, 2)))[: arguments.num_targets]
    pipe, options, recipe = drawing(arguments)
    recipe += [arguments.num_designs]
    rounds = {"num_rounds": arguments.num_rounds, "num_coarse_steps": arguments.num_coarse_steps}
    recipe += [num_refined, rounds, arguments.seed, spec.to_dict()]
    training_designs = stored_designs(train)
    if arguments.from_training_designs:
        recipe.append(hashlib.sha256(training_designs.tobytes() + stored_responses(train).tobytes()).hexdigest())

    def part(chosen: np.ndarray) -> dict[str, np.ndarray]:
        name = hashlib.sha256(json.dumps([*recipe, chosen.tolist(), stored[chosen].tolist()]).encode()).hexdigest()[:32]
        path = arguments.run_dir / f"{name}.npz"
        if not path.exists():
            start, targets = time.perf_counter(), stored[chosen]
            seed = arguments.seed + int(chosen[0])
            if arguments.from_training_designs:
                drawn = start
                few = known_in_curve_shape(targets, train, arguments.num_designs, num_refined)
            else:
                designs = designs_for(pipe, targets, arguments.num_designs, seed=seed, spec=spec, **options)
                drawn = time.perf_counter()
                few = nearest_in_curve_shape(designs, targets, spec, num_refined, device=arguments.device)
            chosen_at = time.perf_counter()
            refined = refine(few, targets, spec, pipe.predict_response, **rounds, seed=seed, device=arguments.device)
            end = time.perf_counter()
            found = {"chosen": few, "refined": refined.designs, "error": refined.error}
            found["seconds"] = np.diff([start, drawn, chosen_at, end])
            with atomic_write(path) as unfinished, unfinished.open("wb") as file:
                np.savez_compressed(file, **found)
        return dict(np.load(path))

    parts = [part(rows[i : i + _PART]) for i in tqdm(range(0, len(rows), _PART), desc="refine", unit="part")]
    chosen, refined, error = (np.concatenate([each[name] for each in parts]) for name in ("chosen", "refined", "error"))
    of_targets = np.where(np.isfinite(error), error, np.inf).reshape(len(rows), num_refined, -1)
    best = of_targets.min(1)
    solved = best[np.isfinite(best).all(1)]
    nearest = refined.reshape(*of_targets.shape[:2], *refined.shape[1:])[
        np.arange(len(rows)), of_targets[..., -1].argmin(1)
    ]
    originals = stored_designs(heldout.select(rows))
    coarse = spec.simulator(element_order=1, device=arguments.device)(originals)
    followed = np.isfinite(coarse).all((1, 2))
    coarse, fine = coarse[followed], stored[rows][followed]
    finer = slice(arguments.num_finer)
    on_finer_mesh = error_on_a_finer_mesh(nearest[finer], originals[finer], spec, arguments.device)
    drawn = 0 if arguments.from_training_designs else arguments.num_designs
    steps = arguments.num_coarse_steps if spec.solver["element_order"] > 1 else 0
    seconds = sum(each["seconds"] for each in parts) / len(rows)
    figures = {
        "targets": len(rows),
        "designs_a_target": drawn,
        "refined_designs_a_target": num_refined,
        "targets_without_a_solved_design": len(best) - len(solved),
        "simulations_a_target": [num_refined * (1 + i) for i in range(arguments.num_rounds + 1)],
        "coarse_simulations_a_target": [
            drawn + num_refined * (1 + i * steps) if steps else drawn for i in range(arguments.num_rounds + 1)
        ],
        "best_percent": [percent(errors) for errors in solved.T],
        "best_percent_of_each_target": [round(100 * value, 3) for value in solved[:, -1].tolist()],
        "best_median_percent": 100 * float(np.median(solved[:, -1])),
        "best_worst_percent": 100 * float(solved[:, -1].max()),
        "nearest_training_design_percent": percent(nearest_training_designs(stored[rows], train, 1).error[:, 0]),
        "first_order_elements_on_heldout_designs": {
            "error_percent": percent(response_error(coarse, fine)),
            "curve_shape_error_percent": percent(curve_shape_error(coarse, fine)),
        },
        "on_a_finer_mesh": {"targets": len(on_finer_mesh), "best_percent": percent(on_finer_mesh)},
        "pixels_changed": float((chosen != refined).mean()),
        "novelty": {
            "chosen": float(novelty(chosen, training_designs).mean()),
            "refined": float(novelty(refined, training_designs).mean()),
            "heldout_designs": float(novelty(originals, training_designs).mean()),
        },
        "bound": {
            "chosen": bound(pipe, chosen, arguments.seed, num_designs=num_refined),
            "refined": bound(pipe, refined, arguments.seed, num_designs=num_refined),
            "heldout_designs": bound(pipe, originals, arguments.seed),
        },
        "seconds_a_target": dict(zip(("drawing", "choosing", "refining"), seconds.tolist(), strict=True)),
        "scheduler": arguments.scheduler,
        **options,
    }
    record(figures, arguments.output)


def known_in_curve_shape(targets: np.ndarray, train: Dataset, num_known: int, num_designs: int) -> np.ndarray:
    """Of the training designs nearest to each target those nearest in shape, ``(T * num_designs, H, W)``."""
    known = nearest_training_designs(targets, train, num_known)
    shape = [curve_shape_error(*each) for each in zip(known.response, targets, strict=True)]
    designs = np.take_along_axis(known.designs, np.argsort(shape, axis=1)[:, :num_designs, None, None], 1)
    return designs.reshape(-1, *designs.shape[2:]).astype(np.float32)


def error_on_a_finer_mesh(designs: np.ndarray, originals: np.ndarray, spec: ResponseSpec, device: str) -> np.ndarray:
    """Errors of designs ``(B, H, W)`` against those that their targets are of, with 2 x 2 elements a pixel for both."""
    pixels = np.kron(np.concatenate([designs, originals]), np.ones((1, 2, 2)))
    finer = replace(spec, solver={**spec.solver, "pixel_size": spec.solver["pixel_size"] / 2}).simulator(device=device)(
        pixels
    )
    found, wanted = finer[: len(designs)], finer[len(designs) :]
    solved = np.isfinite(finer).all((1, 2)).reshape(2, -1).all(0)
    return response_error(found[solved], wanted[solved])


if __name__ == "__main__":
    main()
