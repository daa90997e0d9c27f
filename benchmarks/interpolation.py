"""What lies halfway between two designs: by a straight line of latents, on a sphere of latents, or by way of noise?

    python benchmarks/interpolation.py checkpoints/composites-32

The first held-out designs are paired with as many that follow. Each way gives one design a pair. ``straight`` is the
mean of the two latents. ``spherical`` is the middle of the arc between them. ``by_way_of_noise`` is
``LatentDiffusion(pipe).interpolate``: it goes along the arc between the noise of the two, and from there to latents.

Two numbers tell whether a design looks like the data. The interface density is the share of neighbouring pixels that
differ in phase. The bits a pixel are the cost of the design under the checkpoint, by the continuous-time bound.
Standard errors are over the designs measured.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from tqdm.auto import tqdm

from mechdiffusers import LatentDDPMPipeline
from mechdiffusers.evaluation.inverse_design import load_split, stored_designs
from mechdiffusers.likelihood import LatentDiffusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", type=Path, default=Path("data/composites-32"))
    parser.add_argument("--num_pairs", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/interpolation.json"))
    arguments = parser.parse_args()
    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    designs = stored_designs(load_split(arguments.dataset, "heldout").select(range(2 * arguments.num_pairs)))
    latents = pipe.encode(designs)
    a, b = latents.split(arguments.num_pairs)
    halfway = {"straight": (a + b) / 2, "spherical": spherical(a, b), "by_way_of_noise": by_way_of_noise(pipe, a, b)}
    sets = {"designs": designs}
    sets |= {name: pipe.decode(middle, output_type="np")[..., 0] for name, middle in halfway.items()}
    figures = {name: measure(pipe, each) for name, each in sets.items()}
    record({"pairs": arguments.num_pairs, **figures}, arguments.output)


def spherical(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""The middle of the arc between latents, :math:`(a + b) / (2 \cos(\varphi / 2))` at an angle :math:`\varphi`."""
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1))[:, None, None, None]
    return (a + b) / (2 * (1 + cosine)).sqrt()


def by_way_of_noise(pipe: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The middle of ``LatentDiffusion(pipe).interpolate`` for each pair of latents."""
    diffusion = LatentDiffusion(pipe)
    pairs = zip(a.split(1), b.split(1), strict=True)
    return torch.cat([diffusion.interpolate(*pair, num=3)[1:2] for pair in tqdm(pairs, total=len(a), unit="pair")])


def measure(pipe: Any, designs: np.ndarray) -> dict[str, dict[str, float]]:
    """Interface density and bits a pixel of designs."""
    bits = pipe.log_likelihood(designs, generator=torch.Generator().manual_seed(0)).bits_per_dim.numpy()
    return {"interface_density": with_error(interface_density(designs)), "bits_a_pixel": with_error(bits)}


def interface_density(designs: np.ndarray) -> np.ndarray:
    """Share of neighbouring pixels that differ in phase, of each of the designs ``(B, H, W)``."""
    down, right = designs[:, 1:] != designs[:, :-1], designs[:, :, 1:] != designs[:, :, :-1]
    return np.concatenate([down.reshape(len(designs), -1), right.reshape(len(designs), -1)], axis=1).mean(1)


def with_error(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


if __name__ == "__main__":
    main()
