"""The stages one after the other, with the cached latents between the first two."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.mechanics.response_spec import ResponseSpec
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.training.accelerators import check_accelerators, process_state, stage_accelerator
from mechdiffusers.training.autoencoder import encode_all, measure_latents, train_autoencoder
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.data import Designs
from mechdiffusers.training.denoiser import train_denoiser
from mechdiffusers.training.predictor import symmetries, train_predictor

__all__ = ["check_stages", "run_stages"]


def run_stages(config: TrainingConfig, designs: Designs) -> LatentDDPMPipeline:
    """Trains the autoencoder, caches the latents, trains the denoiser and the predictor, saves ``output_dir/pipeline``.

    Args:
        config: Settings of the run, whose folder is there.
        designs: What to train on.

    Returns:
        The trained pipeline, on the CPU, in the main process.
    """
    output_dir = Path(config.output_dir)
    accelerator = stage_accelerator(config, "autoencoder")
    autoencoder = train_autoencoder(accelerator, config, designs)
    vae, scale = autoencoder.vae, autoencoder.decoder_scale
    decoder = {"_decoder_likelihood": autoencoder.likelihood, "_decoder_scale": None if scale is None else scale.item()}
    vae.register_to_config(**decoder)
    latents = _cached_latents(accelerator, config, vae, designs)
    measure_latents(vae, latents["train"])

    accelerator = stage_accelerator(config, "denoiser")
    pipe = train_denoiser(
        accelerator,
        config,
        vae,
        designs,
        TensorDataset(latents["train"], latents["response"]),
        latents["heldout"],
    )
    if _has_predictor(config, designs):
        accelerator = stage_accelerator(config, "predictor")
        predictor = train_predictor(accelerator, config, designs, latents["response"])
        pipe.register_modules(response_predictor=predictor)
    if accelerator.is_main_process:
        pipe.save_pretrained(output_dir / "pipeline")
    accelerator.wait_for_everyone()
    return pipe


def check_stages(config: TrainingConfig, designs: Designs) -> None:
    """Checks what all stages need of the designs before the first begins.

    Args:
        config: Settings of the run.
        designs: What to train on.

    Raises:
        ValueError: If there are fewer designs than a batch of a stage, the processes cannot share one evenly, an entry
            of the responses is known of no training design, half-turns or reflections are wanted of load cases of which
            nothing is known, or the launcher was told what does not go with the settings.
    """
    check_accelerators(config)
    num_processes = process_state().num_processes
    stages = ["autoencoder", "denoiser", *(["predictor"] if _has_predictor(config, designs) else [])]
    for stage in (f"{name}_batch_size" for name in stages):
        size = getattr(config, stage)
        if size % num_processes:
            raise ValueError(f"{stage} must be a multiple of the number of processes, got {size} for {num_processes}")
        if size > designs.num_train:
            raise ValueError(
                f"{stage} must be at most the number of training designs, got {size} for {designs.num_train} designs"
            )
    if designs.spec is not None:
        symmetries(config, designs.spec.load_cases, designs.size)
        _check_known(designs, designs.spec)


def _check_known(designs: Designs, spec: ResponseSpec) -> None:
    """Checks that some training design has a response at each strain of each load case."""
    unknown = torch.ones(spec.shape, dtype=torch.bool)
    samples = DataLoader(designs.train, batch_size=None, generator=torch.Generator())  # not the global one
    for _, response in islice(samples, designs.num_train):
        unknown &= response.isnan()
        if not unknown.any():  # after a design or two, as a rule
            return
    case, strain = unknown.nonzero()[0].tolist()
    raise ValueError(
        f"responses must be known of some training design in every entry, got only NaN for load case "
        f"{spec.load_cases[case]!r} at strain {spec.strains[case][strain]}: leave it out of the dataset"
    )


def _has_predictor(config: TrainingConfig, designs: Designs) -> bool:
    return designs.spec is not None and config.predictor_steps > 0


def _cached_latents(
    accelerator: Accelerator, config: TrainingConfig, vae: AutoencoderKL, designs: Designs
) -> dict[str, Tensor]:
    """The moments of all designs, encoded by the main process unless that is done already, and the responses."""
    path = Path(config.output_dir) / "checkpoints" / "latents.safetensors"
    if accelerator.is_main_process and not path.exists():
        device = accelerator.device
        train, response = encode_all(vae, designs.train, device, designs.num_train, config.random_half_turn)
        kept = TensorDataset(designs.heldout, designs.heldout_response)
        heldout, _ = encode_all(vae, kept, device, len(kept))
        with atomic_write(path) as unfinished:
            save_file({"train": train, "response": response, "heldout": heldout}, unfinished)
    accelerator.wait_for_everyone()
    return load_file(path)
