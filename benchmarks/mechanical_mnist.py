r"""Designs for the energies of held-out rows of Mechanical MNIST, by finite elements, beside the data themselves.

    python benchmarks/mechanical_mnist.py checkpoints/mechanical-mnist --dataset path/to/dataset \
      --num_candidates 4 --num_refinements 1

The dataset is what ``python -m mechdiffusers.microstructures.mechanical_mnist`` writes: the last 500 rows are held out,
and their published energies are the targets. The energies of one load are nearly one number, which many digits have, so
that two baselines stand beside the designs, neither of which simulates anything: as many training designs drawn at
random, and the nearest ones. Ten designs for each of 500 targets are 5,000 simulations of order 2; they are kept in
--run_dir, so that the same command goes on after an interruption.
"""

from pathlib import Path

import numpy as np
from candidates import (
    add_sampling,
    autoencoder,
    common_arguments,
    drawing,
    errors_of,
    kept,
    percent,
    summary,
)
from record import record

from mechdiffusers.evaluation import novelty
from mechdiffusers.evaluation.inverse_design import (
    designs_for,
    load_split,
    nearest_training_designs,
    response_error,
    save_verification_figure,
    stored_designs,
    stored_responses,
    verify,
)
from mechdiffusers.mechanics import ResponseSpec


def main() -> None:
    parser = common_arguments(__doc__, "mechanical_mnist", num_targets=500, dataset=None)
    # runs/mechanical_mnist is where the checkpoint is trained
    parser.set_defaults(num_designs=10, run_dir=Path("runs/mechanical_mnist_benchmark"))
    add_sampling(parser)
    parser.add_argument("--figure", type=Path, help="picture of the first target")
    arguments = parser.parse_args()

    train, heldout = load_split(arguments.dataset, "train"), load_split(arguments.dataset, "heldout")
    heldout = heldout.select(range(min(arguments.num_targets, len(heldout))))
    spec, targets, originals = ResponseSpec.of(heldout), stored_responses(heldout), stored_designs(heldout)
    num, folder = arguments.num_designs, arguments.run_dir / "responses"

    pipe, options, recipe = drawing(arguments)
    recipe += [arguments.seed, num, targets.tolist()]
    designs = kept(
        arguments.run_dir,
        recipe,
        lambda: designs_for(pipe, targets, num, seed=arguments.seed, progress=True, **options),
    )
    training_designs = stored_designs(train)
    figures = {
        "autoencoder": autoencoder(pipe, originals, targets, spec, folder, arguments.device),
        "designs": summary(errors_of(designs, targets, spec, folder, arguments.device)),
        "random_training_designs": summary(random_errors(targets, stored_responses(train), num, arguments.seed)),
        "nearest_training_designs": summary(nearest_training_designs(targets, train, num).error),
        "novelty": {
            "designs": float(novelty(designs, training_designs).mean()),
            "heldout_designs": float(novelty(originals, training_designs).mean()),
        },
        "training_designs": len(train),
        "scheduler": arguments.scheduler,
        **options,
    }
    if pipe.response_predictor is not None:
        figures["predictor_error_percent"] = percent(response_error(pipe.predict_response(originals).numpy(), targets))
    if arguments.figure:
        first = verify(designs[:num], targets[0], spec, binary=False, device=arguments.device)
        save_verification_figure(first, arguments.figure, name="energy of a held-out digit")
    record(figures, arguments.output)


def random_errors(targets: np.ndarray, stored: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Errors of stored responses that are drawn at random for each target, shape ``(T, num)``."""
    rng = np.random.default_rng(seed)
    return np.array([response_error(stored[rng.choice(len(stored), num, replace=False)], target) for target in targets])


if __name__ == "__main__":
    main()
