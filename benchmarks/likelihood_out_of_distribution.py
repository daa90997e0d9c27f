r"""Does the likelihood tell strange designs from held-out ones?

    python benchmarks/likelihood_out_of_distribution.py

The weights that were released before, which knew no responses, are measured alike:

    mkdir -p runs/unconditional && git archive a7317a2 checkpoints/composites-32 | tar -x -C runs/unconditional
    python benchmarks/likelihood_out_of_distribution.py --checkpoint runs/unconditional/checkpoints/composites-32 \
      --output benchmarks/likelihood_out_of_distribution_before.json

For each family the area under the receiver operating characteristic between it and held-out designs, 0.5 for a score
that knows nothing, of four scores: a low likelihood, one far from the median of other held-out designs on either side
("atypical"), a large Mahalanobis distance of the two-point correlation at short lags, the simple baseline, and the
length of the interface, the simplest. Standard errors as Hanley & McNeil (1982) have them. The law of the data does not
change when its phases swap, so that inverted contrast must score 0.5.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from record import record

from mechdiffusers.evaluation.out_of_distribution import Roc, StatisticsDistance, receiver_operating_characteristic
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.likelihood import ContinuousPrior, LatentLikelihood
from mechdiffusers.microstructures import DESIGN_FAMILIES, random_composites
from mechdiffusers.pipelines import LatentDDPMPipeline

HELD_OUT_SEED = 1_000_000  # training configurations use small seeds
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "composites-32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--num", type=int, default=100, help="designs a family")
    parser.add_argument("--num_levels", type=int, default=16, help="noise levels a design")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/likelihood_out_of_distribution.json"))
    parser.add_argument("--figures", type=Path, help="folder for pictures")
    arguments = parser.parse_args()
    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
    pipe.unet.to(memory_format=torch.channels_last)
    num, size = arguments.num, pipe.vae.config.sample_size

    known, _ = random_composites(4096, size, seed=0)
    heldout, _ = random_composites(2 * num, size, seed=HELD_OUT_SEED)
    rng = np.random.default_rng(0)
    families = {name: make(num, size, rng).astype(np.float32) for name, make in DESIGN_FAMILIES.items()}
    likelihood = LatentLikelihood(pipe, ContinuousPrior(arguments.num_levels))
    generator = torch.Generator().manual_seed(0)

    def cost(designs: np.ndarray) -> tuple[np.ndarray, float]:
        """Bits a pixel of each design, and the root mean square error of these."""
        output = likelihood.elbo(designs, generator=generator)
        error = output.error.square().mean().sqrt() / (size**2 * np.log(2))
        return output.bits_per_dim.numpy(), float(error)

    bits, error = cost(heldout)
    calibration, usual = np.split(bits, 2)
    distance = StatisticsDistance(known)
    usual_scores = scores(heldout[num:], usual, calibration, distance)
    figures = {
        "num": num,
        "noise_levels_a_design": arguments.num_levels,
        "heldout_bits_per_dim": float(usual.mean()),
        "heldout_bits_per_dim_standard_deviation": float(bits.std()),
        "heldout_bits_per_dim_error": error,
        "families": {},
    }
    curves: dict[str, dict[str, Roc]] = {}
    for name, designs in families.items():
        bits, error = cost(designs)
        strange = scores(designs, bits, calibration, distance)
        curves[name] = {
            score: receiver_operating_characteristic(usual_scores[score], strange[score]) for score in strange
        }
        figures["families"][name] = {
            "bits_per_dim": float(bits.mean()),
            "bits_per_dim_error": error,
            **{
                score: {"area": roc.area, "standard_error": error_of(roc.area, num)}
                for score, roc in curves[name].items()
            },
        }
    if arguments.figures:
        shown = np.concatenate([designs[:4] for designs in (heldout[num:], *families.values())])
        save_image_grid(shown, arguments.figures / "out_of_distribution_designs.png", columns=20)
        plot(curves, arguments.figures / "out_of_distribution_roc.png")
    record(figures, arguments.output)


def scores(
    designs: np.ndarray, bits: np.ndarray, calibration: np.ndarray, distance: StatisticsDistance
) -> dict[str, np.ndarray]:
    """Scores that should be high for strange designs, each (B,)."""
    interface = np.abs(np.diff(designs, axis=1)).sum((1, 2)) + np.abs(np.diff(designs, axis=2)).sum((1, 2))
    return {
        "low_likelihood": bits,
        "atypical_likelihood": np.abs(bits - np.median(calibration)),
        "two_point_distance": distance(designs),
        "interface_length": interface,
    }


def error_of(area: float, num: int) -> float:
    """Standard error of an area between sets of ``num`` each (Hanley & McNeil 1982)."""
    both_above, one_above = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (num - 1) * (both_above + one_above - 2 * area**2)
    return float(np.sqrt(max(variance, 0.0)) / num)


def plot(curves: dict[str, dict[str, Roc]], path: Path) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (name, rocs) in zip(figure.subplots(2, 5).flat, curves.items(), strict=False):
        for score, roc in rocs.items():
            axes.plot(roc.false_positives, roc.true_positives, label=score.replace("_", " "))
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        axes.set(title=name, xticks=(0, 1), yticks=(0, 1))
    handles, labels = axes.get_legend_handles_labels()
    last = figure.axes[-1]
    last.axis("off")
    last.legend(handles, labels, loc="center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
