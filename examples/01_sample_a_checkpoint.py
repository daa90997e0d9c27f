"""Draws designs from the released checkpoint, and walks from one to another through its latent space.

python examples/01_sample_a_checkpoint.py --output_dir runs/example
"""

import argparse
from pathlib import Path

import torch

from mechdiffusers import LatentDDPMPipeline
from mechdiffusers.evaluation.plots import save_image_grid
from mechdiffusers.schedulers import stock_scheduler

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--checkpoint", default=Path(__file__).parents[1] / "checkpoints" / "composites-32")
parser.add_argument("--output_dir", type=Path, default=Path("runs/example"))
arguments = parser.parse_args()

pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
pipe.scheduler = stock_scheduler("dpmsolver++", pipe.scheduler.config)
designs = pipe(batch_size=16, num_inference_steps=25, generator=torch.manual_seed(0), output_type="np").images[..., 0]
path = pipe.interpolate(designs[:1], designs[1:2], num=8, output_type="np")[..., 0]

save_image_grid(designs, arguments.output_dir / "samples.png")
save_image_grid(path, arguments.output_dir / "interpolation.png")
