"""A checkpoint whose predictor has learned from fewer simulated designs, for ``inverse_design_sweeps.py``.

    python benchmarks/predictor_of_fewer.py checkpoints/composites-32 --num_train_designs 1500

What a wanted response does to a design, it does nearly all of it through the predictor: so the number of designs that
it learned from is what simulations are spent on. It is trained by the stage and the settings that the checkpoint's was,
for as many epochs; autoencoder and denoiser are the checkpoint's, which learned from all designs. The checkpoint is
written to --output_dir; the same command goes on after an interruption.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.training.accelerators import precision_of, stage_accelerator
from mechdiffusers.training.config import parse_config
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.predictor import train_predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--config", type=Path, default=Path("training/configs/composites_32.yaml"))
    parser.add_argument("--num_train_designs", type=int, required=True)
    parser.add_argument("--output_dir", type=Path, help="by default runs/predictor_of_NUMBER")
    arguments = parser.parse_args()
    number = arguments.num_train_designs
    output_dir = arguments.output_dir or Path(f"runs/predictor_of_{number}")

    config = parse_config(["--config", str(arguments.config), "--num_train_designs", str(number)])
    config = replace(config, output_dir=str(output_dir), resume_from_checkpoint="latest")
    config = replace(config, mixed_precision=precision_of(config.mixed_precision))
    everything = load_designs(replace(config, num_train_designs=None)).num_train
    if number > everything:
        parser.error(f"num_train_designs must be at most the {everything} of the dataset, got {number}")
    config = replace(config, predictor_steps=round(config.predictor_steps * number / everything))
    designs = load_designs(config)
    responses = torch.stack([response for _, response in designs.train])
    predictor = train_predictor(stage_accelerator(config, "predictor"), config, designs, responses)

    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
    pipe.register_modules(response_predictor=predictor)
    pipe.save_pretrained(output_dir / "pipeline")


if __name__ == "__main__":
    main()
