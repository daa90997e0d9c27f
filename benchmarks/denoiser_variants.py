r"""What the settings of a conditional denoiser give, each by a short training of its own.

    python benchmarks/denoiser_variants.py checkpoints/composites-32

A variant is the second stage of training/train.py with the settings of --config, fewer steps and the options that name
it, on the latents of the checkpoint's autoencoder. Of each: the bound of held-out designs, with and without their
responses, and the error of designs for held-out targets, by the denoiser alone and with the checkpoint's predictor. One
candidate a design, no classifier-free guidance, the same random numbers for all. Each is trained once, so that the
standard errors, which are over designs and targets, know nothing of the training. What is trained and simulated is kept
in --run_dir; the same command goes on after an interruption.
"""

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from candidates import bound, common_arguments, errors_of, fingerprint, kept, summary
from record import record
from torch.utils.data import TensorDataset

from mechdiffusers.evaluation.inverse_design import designs_for, load_split, stored_designs, stored_responses
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import stock_scheduler
from mechdiffusers.training.accelerators import precision_of, stage_accelerator
from mechdiffusers.training.autoencoder import encode_all
from mechdiffusers.training.config import TrainingConfig, parse_config
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.denoiser import train_denoiser

VARIANTS = (
    "",
    "--prediction_type epsilon",
    "--loss_weighting min_snr",
    "--token_dim 128",
    "--denoiser_block_out_channels 48 96 192",
)


def main() -> None:
    parser = common_arguments(__doc__, "denoiser_variants", num_targets=32)
    parser.set_defaults(num_designs=2)
    parser.add_argument("--config", type=Path, default=Path("training/configs/composites_32.yaml"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="options of training/train.py, each quoted")
    parser.add_argument("--denoiser_steps", type=int, default=1200)
    parser.add_argument("--num_bounded", type=int, default=128, help="held-out designs whose likelihood is bounded")
    arguments = parser.parse_args()

    heldout = load_split(arguments.dataset, "heldout")
    spec, stored = ResponseSpec.of(heldout), stored_responses(heldout)
    rows = np.flatnonzero(np.isfinite(stored).all((1, 2)))
    targets, bounded = stored[rows[: arguments.num_targets]], rows[: arguments.num_bounded]
    originals = stored_designs(heldout.select(bounded))
    released = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)

    figures: dict[str, Any] = {"denoiser_steps": arguments.denoiser_steps, "variants": {}}
    for options in arguments.variants:
        config = configured(arguments, options)
        folder = Path(config.output_dir)
        if not (folder / "pipeline").exists():
            train(released, config)
        pipe = LatentDDPMPipeline.from_pretrained(folder / "pipeline").to(arguments.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = stock_scheduler("dpmsolver++", pipe.scheduler.config)
        found = {
            "parameters": sum(weight.numel() for weight in pipe.unet.parameters()),
            "bound": bound(pipe, originals, arguments.seed),
            "bound_given_the_response": bound(pipe, originals, arguments.seed, response=stored[bounded]),
        }
        for name, scale in {"denoiser_alone": 0.0, "with_predictor": 4.0}.items():
            sampling = {"num_inference_steps": 25, "predictor_guidance_scale": scale, "seed": arguments.seed}
            recipe = [fingerprint(folder / "pipeline"), sampling, targets.tolist(), arguments.num_designs]
            draw = partial(designs_for, pipe, targets, arguments.num_designs, spec=spec, **sampling)
            designs = kept(arguments.run_dir, recipe, draw)
            errors = errors_of(designs, targets, spec, arguments.run_dir / "responses", arguments.device)
            found[name] = summary(errors)
        figures["variants"][options or "as released"] = found
    record(figures, arguments.output)


def configured(arguments: Any, options: str) -> TrainingConfig:
    """The settings of a variant, in a folder of its own for all that its weights depend on."""
    steps = str(arguments.denoiser_steps)
    given = ["--config", str(arguments.config), "--dataset", str(arguments.dataset), "--denoiser_steps", steps]
    given += ["--validation_steps", steps, "--resume_from_checkpoint", "latest", "--output_dir", str(arguments.run_dir)]
    config = parse_config([*given, *options.split()])
    config = replace(config, mixed_precision=precision_of(config.mixed_precision))
    data = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(arguments.dataset.glob("*.parquet"))]
    recipe = json.dumps([fingerprint(arguments.checkpoint), data, asdict(config)])
    name = "-".join(options.replace("--", "").split() or ["as_released"])
    folder = arguments.run_dir / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    return replace(config, output_dir=str(folder))


def train(released: LatentDDPMPipeline, config: TrainingConfig) -> None:
    """Trains the denoiser of a variant and saves it with the autoencoder and the predictor of the checkpoint."""
    designs, accelerator = load_designs(config), stage_accelerator(config, "denoiser")
    turned = config.random_half_turn
    train, responses = encode_all(released.vae, designs.train, accelerator.device, designs.num_train, turned)
    held = TensorDataset(designs.heldout, designs.heldout_response)
    heldout, _ = encode_all(released.vae, held, accelerator.device, len(held))
    latents = TensorDataset(train, responses)
    pipe = train_denoiser(accelerator, config, released.vae, designs, latents, heldout)
    pipe.register_modules(response_predictor=released.response_predictor)
    unfinished = Path(config.output_dir) / "unfinished"
    pipe.save_pretrained(unfinished)
    unfinished.rename(Path(config.output_dir) / "pipeline")


if __name__ == "__main__":
    main()
