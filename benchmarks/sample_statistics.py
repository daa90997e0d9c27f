"""Do samples of a checkpoint have the statistics of random composites? With two baselines beside them.

    python benchmarks/sample_statistics.py checkpoints/composites-32 --output benchmarks/sample_statistics.json

Every set is compared with the same held-out designs, which no training saw. The baselines: the autoencoder decoded
from its N(0, I) prior, which says what the diffusion adds, and two halves of the held-out designs, which says how far
finite sets of real designs are apart. The sets being twice as large as the halves, a perfect model would show about
0.71 of that.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from record import record
from scipy.stats import wasserstein_distance
from tqdm.auto import tqdm

from mechdiffusers.evaluation import (
    bootstrap_interval,
    distance_of_means,
    two_point_correlation,
    volume_fraction_distance,
)
from mechdiffusers.evaluation.plots import save_image_grid, save_statistics_figure
from mechdiffusers.microstructures import random_composites
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import STOCK_SCHEDULERS, stock_scheduler

HELD_OUT_SEED = 1_000_000  # training configurations use small seeds
BATCH = 256
SPLITS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--num", type=int, default=2048, help="samples, and held-out designs")
    parser.add_argument("--scheduler", choices=STOCK_SCHEDULERS, default="dpmsolver++")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/sample_statistics.json"))
    parser.add_argument("--figures", type=Path, help="folder for pictures")
    arguments = parser.parse_args()

    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = stock_scheduler(arguments.scheduler, pipe.scheduler.config)
    size = pipe.vae.config.sample_size
    heldout, _ = random_composites(arguments.num, size=size, seed=HELD_OUT_SEED)

    start = time.perf_counter()
    samples = sample(pipe, arguments.num, arguments.num_inference_steps, arguments.seed)
    seconds = time.perf_counter() - start
    prior = decode_prior(pipe, arguments.num, arguments.seed)
    wrong = np.mean([np.mean(decoded != design) for decoded, design in reconstructions(pipe, heldout)])

    correlations = {name: two_point_correlation(x) for name, x in (("s", samples), ("p", prior), ("h", heldout))}
    halves, fractions = half_errors(heldout, correlations["h"])
    half = float(np.mean(halves))
    errors = {name: distance_of_means(correlations[name], correlations["h"]) for name in "sp"}
    intervals = {name: bootstrap_interval(distance_of_means, correlations[name], correlations["h"]) for name in "sp"}
    volume_fractions = {name: x.mean((1, 2)) for name, x in (("s", samples), ("p", prior), ("h", heldout))}
    figures = {
        "num": arguments.num,
        "heldout_pixels_reconstructed": 1 - float(wrong),
        "two_point_error": {
            "samples": errors["s"],
            "samples_95_percent": intervals["s"],
            "vae_prior": errors["p"],
            "vae_prior_95_percent": intervals["p"],
            "two_halves_of_the_data": half,
            "two_halves_of_the_data_95_percent": np.quantile(halves, [0.025, 0.975]).tolist(),
            "samples_over_halves": errors["s"] / half,
            "samples_over_halves_95_percent": [end / half for end in intervals["s"]],
            "samples_over_vae_prior": errors["s"] / errors["p"],
            "samples_over_vae_prior_95_percent": [
                intervals["s"][0] / intervals["p"][1],
                intervals["s"][1] / intervals["p"][0],
            ],
        },
        "volume_fraction_distance": {
            "samples": volume_fraction_distance(samples, heldout),
            "samples_95_percent": bootstrap_interval(
                wasserstein_distance, volume_fractions["s"], volume_fractions["h"]
            ),
            "vae_prior": volume_fraction_distance(prior, heldout),
            "vae_prior_95_percent": bootstrap_interval(
                wasserstein_distance, volume_fractions["p"], volume_fractions["h"]
            ),
            "two_halves_of_the_data": float(np.mean(fractions)),
            "two_halves_of_the_data_95_percent": np.quantile(fractions, [0.025, 0.975]).tolist(),
        },
        "scheduler": arguments.scheduler,
        "num_inference_steps": arguments.num_inference_steps,
        "samples_a_second": arguments.num / seconds,
    }
    if arguments.figures:
        save_image_grid(samples[:24], arguments.figures / "samples.png", columns=12)
        save_image_grid(heldout[:24], arguments.figures / "heldout.png", columns=12)
        sets = {"held-out designs": heldout, "samples": samples, "VAE prior": prior}
        save_statistics_figure(sets, arguments.figures / "statistics.png")
    record(figures, arguments.output)


def sample(pipe: LatentDDPMPipeline, num: int, steps: int, seed: int) -> np.ndarray:
    """Designs (num, H, W) of the pipeline."""
    batches = []
    for start in tqdm(range(0, num, BATCH), desc="sampling", unit="batch"):
        generators = [torch.Generator().manual_seed(seed * num + i) for i in range(start, min(start + BATCH, num))]
        drawn = pipe(batch_size=len(generators), num_inference_steps=steps, generator=generators, output_type="np")
        batches.append(drawn.images[..., 0])
    return np.concatenate(batches)


def decode_prior(pipe: LatentDDPMPipeline, num: int, seed: int) -> np.ndarray:
    """Designs (num, H, W) of the autoencoder alone, its codes drawn from N(0, I)."""
    codes = torch.randn((num, *pipe.latent_shape), generator=torch.Generator().manual_seed(seed))
    latents = (codes - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return np.concatenate([pipe.decode(batch, output_type="np")[..., 0] for batch in latents.split(BATCH)])


def reconstructions(pipe: LatentDDPMPipeline, designs: np.ndarray):
    """Pairs of a batch of designs decoded from their latents and the designs."""
    for start in range(0, len(designs), BATCH):
        batch = designs[start : start + BATCH]
        yield pipe.decode(pipe.encode(batch), output_type="np")[..., 0], batch


def half_errors(heldout: np.ndarray, correlations: np.ndarray) -> tuple[list[float], list[float]]:
    """Both errors between two halves of the held-out designs, for many ways to halve them."""
    rng = np.random.default_rng(0)
    two_point, volume_fraction = [], []
    for _ in range(SPLITS):
        one, other = np.array_split(rng.permutation(len(heldout)), 2)
        two_point.append(distance_of_means(correlations[one], correlations[other]))
        volume_fraction.append(volume_fraction_distance(heldout[one], heldout[other]))
    return two_point, volume_fraction


if __name__ == "__main__":
    main()
