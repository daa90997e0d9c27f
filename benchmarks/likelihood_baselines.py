"""Beside what a latent model stands: a diffusion model of the pixels, and a perceptron that takes one after the other.

Both are small, and trained here on as many designs as there is time for.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, pad, unfold
from tqdm.auto import tqdm

from mechdiffusers.likelihood import ContinuousDiffusion
from mechdiffusers.likelihood.log_density import continuous_terms
from mechdiffusers.microstructures import random_composites
from mechdiffusers.schedulers.log_snr_curve import LogSnrCurve
from mechdiffusers.training.moving_average import MovingAverage

TRAINING_SEED = 0
NUM_LEVELS = 8  # noise levels of a bound
REACH = 6  # rows and columns that the autoregressive baseline looks back


def pixel_diffusion_bound(designs: np.ndarray, seconds: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """The bound of a diffusion model of pixels -1 and 1, which timestep 0 tells apart without error."""
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    net = UNet2DModel(
        32, 1, 1, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, add_attention=False, **blocks
    ).to(memory_format=torch.channels_last)

    def denoise(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return net(x.float(), timesteps.float()).sample

    diffusion = ContinuousDiffusion(denoise, LogSnrCurve([8.0, -10.0], 1000), "v_prediction")
    train = torch.from_numpy(random_composites(8192, seed=TRAINING_SEED)[0])[:, None].double() * 2 - 1
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    average = MovingAverage(net.parameters(), decay=0.99)
    steps = 0
    for share in timed(seconds, "pixel diffusion"):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - share)
        clean = train[torch.randint(len(train), (32,))]
        level = 8 - 18 * (torch.arange(32) + torch.rand(())).double() / 32
        alpha, sigma = (torch.sigmoid(sign * level).sqrt()[:, None, None, None] for sign in (1, -1))
        noise = torch.randn_like(clean)
        velocity = denoise(alpha * clean + sigma * noise, diffusion.timesteps(level)).double()
        error = (velocity - alpha * noise + sigma * clean).square()
        loss = (error.mean((1, 2, 3)) * (0.1 + torch.sigmoid(level))).mean()  # the bound's weight, and a floor
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.step(net.parameters())
        steps += 1
    average.copy_to(net.parameters())
    net.eval()
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...] | None = None) -> torch.Tensor:
        if shape is None:
            return torch.rand(len(images), generator=generator, dtype=torch.float64)
        return torch.randn(len(images), *shape, generator=generator, dtype=torch.float64)

    values = []
    with torch.no_grad():
        for images in torch.from_numpy(designs)[:, None].double().mul(2).sub(1).split(64):
            terms, _ = continuous_terms(diffusion, images, NUM_LEVELS, draw)
            alpha, sigma = math.sqrt(1 / (1 + math.exp(-8))), math.sqrt(1 / (1 + math.exp(8)))
            noisy = alpha * images + sigma * draw(images.shape[1:])
            told = logsigmoid(2 * alpha / sigma**2 * noisy * images).sum((1, 2, 3))
            values.append(told + terms["diffusion"] + terms["noise_prior"])
    described = f"UNet2DModel, widths 16, 32, 64, one layer a block, no attention, {steps} steps of 32 designs"
    return torch.cat(values), {"model": described, "parameters": sum(p.numel() for p in net.parameters())}


def autoregressive(designs: np.ndarray, seconds: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """The exact likelihood of a perceptron that sees the pixels before each, row by row, and where the edges are."""
    torch.manual_seed(0)
    inputs = 2 * (REACH * (2 * REACH + 1) + REACH)
    net = torch.nn.Sequential(
        torch.nn.Linear(inputs, 128), torch.nn.SiLU(), torch.nn.Linear(128, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)
    )
    train = torch.from_numpy(random_composites(8192, seed=TRAINING_SEED)[0])
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    steps = 0
    for share in timed(seconds, "autoregressive"):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - share)
        before, pixel = causal_windows(train[torch.randint(len(train), (4,))])
        loss = binary_cross_entropy_with_logits(net(before)[..., 0], pixel)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    values = []
    with torch.no_grad():
        for batch in torch.from_numpy(designs).split(64):
            before, pixel = causal_windows(batch)
            cost = binary_cross_entropy_with_logits(net(before)[..., 0].double(), pixel.double(), reduction="none")
            values.append(-cost.sum(1))
    described = (
        f"perceptron 128, 64 of the {inputs // 2} pixels before, within {REACH} rows, {steps} steps of 4 designs"
    )
    return torch.cat(values), {"model": described, "parameters": sum(p.numel() for p in net.parameters())}


def causal_windows(designs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels before each, and whether they exist, (B, pixels, inputs); and the pixels themselves (B, pixels)."""
    known = torch.stack([2 * designs - 1, torch.ones_like(designs)], dim=1)
    width = 2 * REACH + 1
    windows = unfold(pad(known, (REACH, REACH, REACH, 0)), (REACH + 1, width))  # (B, 2 (REACH + 1) width, pixels)
    windows = windows.reshape(len(designs), 2, -1, designs[0].numel())[:, :, : REACH * width + REACH]
    return windows.flatten(1, 2).mT, designs.flatten(1)


def timed(seconds: float, what: str) -> Iterator[float]:
    """The share of the time that is used, until all of it is."""
    start = time.perf_counter()
    with tqdm(total=round(seconds), desc=what, unit="s") as progress:
        while (spent := time.perf_counter() - start) < seconds:
            progress.update(int(spent) - progress.n)
            yield spent / seconds
