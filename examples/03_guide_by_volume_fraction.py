"""Guides the released checkpoint to a volume fraction it was never conditioned on, by a predictor trained here.

python examples/03_guide_by_volume_fraction.py --output_dir runs/guided
"""

import argparse
import logging
from pathlib import Path

import torch
from tqdm.auto import trange

from mechdiffusers import ClassifierGuidance, LatentDDPMPipeline
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.microstructures import random_composites
from mechdiffusers.models import NoisyLatentPredictor
from mechdiffusers.schedulers import VDMScheduler

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--checkpoint", default=Path(__file__).parents[1] / "checkpoints" / "composites-32")
parser.add_argument("--output_dir", type=Path, default=Path("runs/guided"))
parser.add_argument("--volume_fraction", type=float, default=0.3)
parser.add_argument("--guidance_scale", type=float, default=1.0)
parser.add_argument("--steps", type=int, default=1000, help="of the predictor's training")
arguments = parser.parse_args()
logging.basicConfig(level=logging.INFO)
torch.manual_seed(0)

pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config)
designs, _ = random_composites(min(2048, 16 * arguments.steps), size=pipe.vae.config.sample_size, seed=1)
latents = torch.cat([pipe.encode(batch) for batch in torch.from_numpy(designs).split(256)])
fractions = torch.from_numpy(designs).mean((1, 2))[:, None]

predictor = NoisyLatentPredictor(in_channels=latents.shape[1])
optimizer = torch.optim.Adam(predictor.parameters(), lr=2e-3)
for _ in trange(arguments.steps, desc="predictor"):
    chosen = torch.randint(len(latents), (64,))
    timesteps = torch.rand(64) * (len(pipe.scheduler) - 1)
    noisy = pipe.scheduler.add_noise(latents[chosen], torch.randn_like(latents[chosen]), timesteps)
    loss = -predictor.log_likelihood(noisy, timesteps, fractions[chosen]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

wanted = torch.tensor([arguments.volume_fraction])
guidance = ClassifierGuidance(
    lambda noisy, t: predictor.log_likelihood(noisy, t, wanted), guidance_scale=arguments.guidance_scale
)
for name, callback in (("free", None), ("guided", guidance)):
    generator = torch.Generator().manual_seed(0)
    samples = pipe(
        batch_size=16,
        num_inference_steps=min(50, arguments.steps),
        generator=generator,
        callback_on_step_end=callback,
        output_type="np",
    ).images[..., 0]
    found = samples.mean((1, 2))
    logging.info("%s: volume fraction %.3f +- %.3f, wanted %.3f", name, found.mean(), found.std(), wanted)
    save_image_grid(samples, arguments.output_dir / f"{name}.png")
