r"""How near do designs come to held-out targets? Everything by finite elements, beside retrieval.

    python benchmarks/inverse_design.py checkpoints/composites-32 --num_candidates 4 --num_refinements 2
    python benchmarks/inverse_design.py checkpoints/composites-32 --num_candidates 4 --num_refinements 2 \
      --num_targets 32 --num_designs 64 --num_timed 0 --output benchmarks/inverse_design_64.json

The targets are the responses of held-out designs. Best of 8 on 256 of them takes 2,048 simulations, as best of 64 on 32
does, the autoencoder up to 256: an hour each on two cores, kept in --run_dir, so that the same command goes on after an
interruption. The time from a target to eight verified designs is measured at the end, with nothing kept.
"""

import time
from functools import partial
from typing import Any

import numpy as np
from candidates import (
    add_sampling,
    autoencoder,
    best_of,
    bound,
    common_arguments,
    drawing,
    errors_of,
    kept,
    summary,
)
from record import record

from mechdiffusers.evaluation import diversity, novelty, stiff_connectivity
from mechdiffusers.evaluation.inverse_design import (
    designs_for,
    load_split,
    nearest_training_designs,
    stored_designs,
    stored_responses,
    verify,
)
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.pipelines import LatentDDPMPipeline

#: Targets whose designs are generated and kept at once.
_PART = 64


def main() -> None:
    parser = common_arguments(__doc__, "inverse_design", num_targets=256)
    parser.add_argument("--num_timed", type=int, default=3, help="targets whose designs are timed")
    add_sampling(parser)
    arguments = parser.parse_args()

    train, heldout = load_split(arguments.dataset, "train"), load_split(arguments.dataset, "heldout")
    spec = ResponseSpec.of(heldout)
    stored = stored_responses(heldout)
    rows = np.flatnonzero(np.isfinite(stored).all((1, 2)))[: arguments.num_targets]
    targets, originals = stored[rows], stored_designs(heldout.select(rows))
    training_designs = stored_designs(train)

    pipe, options, recipe = drawing(arguments)

    parts = []
    for start in range(0, len(targets), _PART):
        chosen, seed = slice(start, start + _PART), arguments.seed + start
        part = kept(
            arguments.run_dir,
            [*recipe, seed, targets[chosen].tolist(), arguments.num_designs],
            partial(designs_for, pipe, targets[chosen], arguments.num_designs, seed=seed, progress=True, **options),
        )
        parts.append(part)
    designs = np.concatenate(parts)
    errors = errors_of(designs, targets, spec, arguments.run_dir / "responses", arguments.device)
    nearest = nearest_training_designs(targets, train, arguments.num_designs)
    figures = {
        "designs": {**summary(errors), "best_of_percent": best_of(errors)},
        "retrieval": {"training_designs": len(train), **summary(nearest.error)},
        "novelty": {
            "designs": float(novelty(designs, training_designs).mean()),
            "heldout_designs": float(novelty(originals, training_designs).mean()),
        },
        "diversity_within_a_target": {
            "designs": mean_diversity(designs.reshape(len(targets), -1, *designs.shape[1:])),
            "retrieved": mean_diversity(nearest.designs),
        },
        "stiff_connectivity": {
            "designs": float(np.nanmean(stiff_connectivity(designs))),
            "heldout_designs": float(np.nanmean(stiff_connectivity(originals))),
        },
        "log_likelihood": {
            "designs": bounds(pipe, designs[:: arguments.num_designs], targets, arguments.seed),
            "heldout_designs": bounds(pipe, originals, targets, arguments.seed),
        },
        "autoencoder": autoencoder(pipe, originals, targets, spec, arguments.run_dir / "responses", arguments.device),
        "scheduler": arguments.scheduler,
        **options,
    }
    if arguments.num_timed:
        figures["from_target_to_verified"] = timed(pipe, targets[: arguments.num_timed], spec, arguments, options)
    record(figures, arguments.output)


def mean_diversity(groups: np.ndarray) -> float | None:
    """Mean over targets of the diversity of the designs ``(T, n, H, W)`` of each."""
    return float(np.mean([diversity(group) for group in groups])) if groups.shape[1] > 1 else None


def bounds(
    pipe: LatentDDPMPipeline, designs: np.ndarray, targets: np.ndarray, seed: int
) -> dict[str, dict[str, float]]:
    """Lower bounds in nats of a design for each target, without a response and given the target."""
    return {
        "unconditional": bound(pipe, designs, seed),
        "given_the_target": bound(pipe, designs, seed, response=targets),
    }


def timed(
    pipe: LatentDDPMPipeline, targets: np.ndarray, spec: ResponseSpec, arguments: Any, options: dict[str, Any]
) -> dict[str, float]:
    """Seconds from one target to its verified designs, the mean over targets, after one call to warm up."""
    designs_for(pipe, targets[:1], 1, **options)
    seconds = {"generation": 0.0, "verification": 0.0}
    for target in targets:
        start = time.perf_counter()
        designs = designs_for(pipe, target[None], arguments.num_designs, seed=arguments.seed + 1, **options)
        middle = time.perf_counter()
        verify(designs, target, spec, device=arguments.device)
        seconds["generation"] += (middle - start) / len(targets)
        seconds["verification"] += (time.perf_counter() - middle) / len(targets)
    return {"designs": arguments.num_designs, **seconds, "seconds": sum(seconds.values())}


if __name__ == "__main__":
    main()
