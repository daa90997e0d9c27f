"""Trains on a folder of images: here laminates, painted on the spot in the place of yours, for a minute.

python examples/02_train_on_a_folder.py --output_dir runs/laminates
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from mechdiffusers.training import TrainingConfig
from mechdiffusers.training.train import train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output_dir", type=Path, default=Path("runs/laminates"))
parser.add_argument("--steps", type=int, default=200, help="of each stage")
arguments = parser.parse_args()
logging.basicConfig(level=logging.INFO)

images = arguments.output_dir / "images"
images.mkdir(parents=True, exist_ok=True)
y, x = np.mgrid[:16, :16] / 16
rng = np.random.default_rng(0)
for i in range(256):
    angle, phase, width = rng.uniform(0, np.pi), rng.uniform(0, 1), rng.uniform(0.3, 0.7)
    layers = (3 * (x * np.cos(angle) + y * np.sin(angle)) + phase) % 1 < width
    Image.fromarray((layers * 255).astype(np.uint8)).save(images / f"{i:04d}.png")

config = TrainingConfig(
    output_dir=str(arguments.output_dir / "run"),
    dataset=str(images),
    num_heldout_designs=32,
    kl_weight=0.01,
    latent_channels=2,
    autoencoder_block_out_channels=[16, 32],
    autoencoder_steps=arguments.steps,
    autoencoder_warmup_steps=arguments.steps // 10,
    denoiser_block_out_channels=[16, 32],
    denoiser_steps=arguments.steps,
    denoiser_warmup_steps=arguments.steps // 10,
    denoiser_batch_size=32,
)
pipe = train(config)
for i, image in enumerate(pipe(batch_size=4, num_inference_steps=50).images):
    image.save(arguments.output_dir / f"sample_{i}.png")
