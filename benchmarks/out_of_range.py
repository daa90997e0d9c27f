"""Are impossible targets told from possible ones? p-values of held-out designs beside those of impossible targets.

    python benchmarks/out_of_range.py --dataset data/composites-32

Half of the held-out designs calibrate; the other half are the possible targets, and the impossible ones are made of
them. The area under the receiver operating characteristic is the chance that an impossible target has a smaller p-value
than a possible one; "found" is the share of impossible targets whose p-value is at most 0.01, the level of the warning,
or 0.05. By one score alone that is where as many of the possible targets are called out of range as at 0.05.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from record import record

from mechdiffusers.evaluation.inverse_design import TargetRange, load_split, stored_responses
from mechdiffusers.mechanics import ResponseSpec

LEVELS = (0.01, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data/composites-32"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/out_of_range.json"))
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()

    heldout = load_split(arguments.dataset, "heldout")
    training, others = stored_responses(load_split(arguments.dataset, "train")), stored_responses(heldout)
    others = others[np.isfinite(others).all((1, 2))]
    calibration, possible = np.array_split(others, 2)
    reach = TargetRange(training, calibration)

    # of the stiff phase alone, on a coarse mesh, which is too stiff by per cents at most: the safe side
    spec = ResponseSpec.of(heldout)
    stiff = spec.simulator()(np.ones((1, 8, 8)))[0]
    targets = impossible(possible, stiff, np.random.default_rng(arguments.seed))
    inside = reach.check(possible, level=0)
    p_possible = inside.p_value
    called = {f"{level}": float((p_possible <= level).mean()) for level in LEVELS}
    figures: dict[str, object] = {
        "training_designs": len(training),
        "calibration_designs": len(calibration),
        "possible_targets": len(possible),
        "possible_called_out_of_range_at": called,
    }
    curves = {}
    for name, wild in targets.items():
        check = reach.check(wild, level=0)
        p_value = check.p_value
        curves[name] = [(p_possible <= p).mean() for p in P_VALUES], [(p_value <= p).mean() for p in P_VALUES]
        ties = (p_value[:, None] == p_possible).mean() / 2
        figures[name] = {
            "area": float((p_value[:, None] < p_possible).mean() + ties),
            "found_at": {f"{level}": float((p_value <= level).mean()) for level in LEVELS},
            "found_by_the_nearest_error_alone": found(check.nearest_error, inside.nearest_error, called["0.05"]),
            "found_by_the_shape_alone": found(check.shape_distance, inside.shape_distance, called["0.05"]),
            "targets": len(wild),
        }
    if arguments.figure:
        figure = Figure(figsize=(4.5, 4), layout="constrained")
        axes = figure.subplots()
        for i, (name, (false, true)) in enumerate(curves.items()):  # those that lie on each other are thinner on top
            axes.plot(false, true, label=name, linewidth=2 * (len(curves) - i), zorder=2 + i)
        axes.set(xlabel="possible targets called out of range", ylabel="impossible targets found")
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(arguments.figure, dpi=150)
    record(figures, arguments.output)


def found(scores: np.ndarray, possible: np.ndarray, called: float) -> float:
    """Share of scores above the level that a share ``called`` of the possible targets exceeds."""
    return float((scores > np.quantile(possible, 1 - called)).mean())


#: Where the characteristic is drawn.
P_VALUES = np.linspace(0, 1, 201)


def impossible(possible: np.ndarray, stiff: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Targets that no design can meet, by what is wrong with them.

    Args:
        possible: Responses of designs, shape ``(N, L, S)``.
        stiff: Response of the stiff phase alone, shape ``(L, S)``.
        rng: Source of the random choices.
    """
    num, cases, strains = possible.shape
    which = rng.integers(cases, size=num)
    falling = possible.copy()
    last = strains - strains // 3
    for i, case in enumerate(which):  # the last third of a curve falls by 5 % a step
        falling[i, case, last:] = falling[i, case, last - 1] * 0.95 ** np.arange(1, strains - last + 1)
    beyond = possible * (1.2 * stiff[:, -1] / possible[:, :, -1]).max(1)[:, None, None]
    order = possible[:, :, -1].prod(1).argsort()
    soft, hard = possible[order[: num // 4]], possible[order[::-1][: num // 4]]
    contradictory = hard.copy()
    contradictory[:, -1] = soft[:, -1]  # stiff in all cases but the last, where soft
    return {
        "negative hardening": falling,
        "stiffer than the stiff phase": beyond,
        "contradictory load cases": contradictory,
        "zigzag of 5 per cent": possible * (1 + 0.05 * (-1.0) ** np.arange(strains)),
        "one load case at half or double, some of it possible": possible
        * np.where(np.arange(cases) == which[:, None], rng.choice([0.5, 2.0], (num, 1)), 1.0)[:, :, None],
    }


if __name__ == "__main__":
    main()
