"""Designs for three targets, verified by finite elements: a picture a target and a table.

python examples/06_design_for_a_response.py --output_dir runs/designed
"""

import argparse
import logging
from pathlib import Path

import torch

from mechdiffusers import LatentDDPMPipeline, ResponseSpec, verify
from mechdiffusers.evaluation.inverse_design import read_targets
from mechdiffusers.schedulers import stock_scheduler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", default=Path(__file__).parents[1] / "checkpoints" / "composites-32")
parser.add_argument("--targets", type=Path, default=Path(__file__).parent / "targets.csv")
parser.add_argument("--output_dir", type=Path, default=Path("runs/designed"))
parser.add_argument("--steps", type=int, default=25)
arguments = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")

pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
pipe.scheduler = stock_scheduler("dpmsolver++", pipe.scheduler.config)
spec = ResponseSpec.of(pipe)
names, targets = read_targets(arguments.targets, spec)
options = {"num_inference_steps": arguments.steps, "num_candidates": 4, "num_refinements": 2}
generator = torch.manual_seed(0)
images = pipe(response=targets, num_images_per_response=4, generator=generator, output_type="np", **options).images
designs = images[..., 0]
report = verify(designs, targets, spec, progress=True)
report.save(arguments.output_dir, names)
for row in report.rows(names):
    logging.info("%(target)s, design %(design)d: error %(error).4f, rank %(rank)d", row)
