r"""How near do designs come where a target leaves something open, and what do they do there?

    python benchmarks/open_targets.py checkpoints/composites-32 --num_candidates 4 --num_refinements 2

The targets are the responses of held-out designs, whole and without every second strain, without the last load case,
and without all load cases but the first. The error is by finite elements: where the target is given, which is what was
asked for, and everywhere, which says how much the rest was told by it. Retrieval takes as many training designs,
nearest where the target is given. Designs and simulations are kept in --run_dir, so that the same command goes on after
an interruption.
"""

from functools import partial
from typing import Any

import numpy as np
from candidates import add_sampling, common_arguments, drawing, errors_of, kept, summary
from record import record

from mechdiffusers.evaluation.inverse_design import (
    designs_for,
    load_split,
    nearest_training_designs,
    response_error,
    stored_responses,
)
from mechdiffusers.mechanics import ResponseSpec


def main() -> None:
    parser = common_arguments(__doc__, "open_targets", num_targets=32)
    add_sampling(parser)
    arguments = parser.parse_args()
    train, heldout = load_split(arguments.dataset, "train"), load_split(arguments.dataset, "heldout")
    spec, stored = ResponseSpec.of(heldout), stored_responses(heldout)
    whole = stored[np.isfinite(stored).all((1, 2))][: arguments.num_targets]
    pipe, options, recipe = drawing(arguments)
    recipe += [arguments.seed, arguments.num_designs]
    figures: dict[str, Any] = {}
    for name, target in left_open(whole).items():
        make = partial(designs_for, pipe, target, arguments.num_designs, seed=arguments.seed, progress=True, **options)
        designs = kept(arguments.run_dir, [*recipe, target.tolist()], make)
        errors = partial(errors_of, designs, spec=spec, folder=arguments.run_dir / "responses")
        nearest = nearest_training_designs(target, train, arguments.num_designs)
        everywhere = [response_error(found, wanted) for found, wanted in zip(nearest.response, whole, strict=True)]
        figures[name] = {
            "where_given": summary(errors(target, device=arguments.device)),
            "everywhere": summary(errors(whole, device=arguments.device)),
            "retrieval_where_given": summary(nearest.error),
            "retrieval_everywhere": summary(np.stack(everywhere)),
        }
    record({"open": figures, "scheduler": arguments.scheduler, **options}, arguments.output)


def left_open(targets: np.ndarray) -> dict[str, np.ndarray]:
    """The targets ``(T, L, S)``, whole and with parts of them open."""
    strains, last, others = targets.copy(), targets.copy(), targets.copy()
    strains[:, :, 1::2] = np.nan
    last[:, -1] = np.nan
    others[:, 1:] = np.nan
    return {
        "nothing": targets,
        "every_second_strain": strains,
        "last_load_case": last,
        "all_load_cases_but_the_first": others,
    }


if __name__ == "__main__":
    main()
