"""Ranks designs by how likely a checkpoint finds them, and sends one to noise and back.

    python examples/05_rank_by_likelihood.py --output_dir runs/ranked

Leaves ``ranked.png``: held-out designs, laminates and noise, the likeliest first; and ``there_and_back.png``.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from mechdiffusers import LatentDDPMPipeline, random_composites
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.likelihood import ContinuousPrior, LatentDiffusion, LatentLikelihood
from mechdiffusers.microstructures import DESIGN_FAMILIES

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "composites-32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ranked"))
    parser.add_argument("--steps", type=int, default=16, help="noise levels for each design")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = LatentDDPMPipeline.from_pretrained(CHECKPOINT)

    rng = np.random.default_rng(0)
    sets = {
        "held out": random_composites(4, seed=1_000_000)[0],
        "laminate": DESIGN_FAMILIES["laminates"](2, 32, rng),
        "noise": DESIGN_FAMILIES["noise"](2, 32, rng),
    }
    names = [name for name, designs in sets.items() for _ in designs]
    designs = np.concatenate(list(sets.values())).astype(np.float32)
    likelihood = LatentLikelihood(pipe, ContinuousPrior(num_levels=arguments.steps))
    output = likelihood.elbo(designs, generator=torch.Generator().manual_seed(0))
    order = output.log_likelihood.argsort(descending=True).tolist()
    for index in order:
        nats, error = output.log_likelihood[index], output.error[index]
        logging.info(
            "%-9s %8.1f +- %.1f nats, %.2f bits a pixel", names[index], nats, error, output.bits_per_dim[index]
        )
    save_image_grid(designs[order], arguments.output_dir / "ranked.png")

    latents = pipe.encode(designs[:2])
    diffusion = LatentDiffusion(pipe)
    back = diffusion.from_noise(diffusion.to_noise(latents, num_steps=4), num_steps=4)
    logging.info("to noise and back the latents move by %.2g at most", (back - latents).abs().max())
    images = pipe.decode(back, output_type="np")[..., 0]
    save_image_grid(np.concatenate([designs[:2], images]), arguments.output_dir / "there_and_back.png")


if __name__ == "__main__":
    main()
