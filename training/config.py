"""Every setting of a training run, from a YAML file and the command line.

``--config FILE`` gives values, any ``--field value`` behind it takes precedence, and what neither names stands at the
default below. Both ways are checked by the same parser, so that a misspelt key is an error in either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import yaml
from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from mechdiffusers.schedulers import STOCK_SCHEDULERS

__all__ = ["StageConfig", "TrainingConfig", "parse_config"]


#: Those of diffusers that need nothing but the number of steps.
_LR_SCHEDULERS = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


#: Spellings under which other scripts take a token of the Hub.
_TOKEN_ARGUMENTS = {"__token", "__hub_token", "__hf_token", "__push_token", "__use_auth_token"}


@dataclass(frozen=True)
class StageConfig:
    """The settings that all stages have, each with its own value."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int


@dataclass
class TrainingConfig:
    """Settings of ``training/train.py``: of the autoencoder, the denoiser of its latents and, where the
    designs have responses, the predictor of these.
    """

    output_dir: str = field(metadata={"help": "Folder of the run: its checkpoints, logs and the trained pipeline."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'latest' goes on from the newest checkpoint in output_dir, or starts anew; "
            "the path of a run's checkpoint starts a new run from it."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Say what would be trained, its memory and its time, and leave nothing."}
    )

    dataset: str = field(
        default="random_composites",
        metadata={
            "help": "'random_composites', images or arrays in a folder or a file, a folder of parquet files named by "
            "their splits, a parquet file or the name of a dataset on the Hub."
        },
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on; designs of a split 'heldout' are held out."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images, single-channel or grey."})
    response_column: str | None = field(
        default=None,
        metadata={"help": "Column of the responses that the denoiser is conditioned on; it is unconditional if unset."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read a dataset as it is needed, not all of it first."})
    num_train_designs: int | None = field(
        default=None, metadata={"help": "Designs to train on; all there are if unset (needed for generated ones)."}
    )
    num_heldout_designs: int = field(default=512, metadata={"help": "Designs kept from training, for validation."})
    resolution: int = field(default=32, metadata={"help": "Pixels along a side of generated designs."})
    crop_size: int | None = field(
        default=None,
        metadata={"help": "Train on square crops of images, of so many pixels a side; held-out ones lie apart."},
    )
    num_crops: int | None = field(default=None, metadata={"help": "Crops to train on."})
    resize: int | None = field(
        default=None,
        metadata={"help": "Reduce images by area to so many pixels along the shorter side, before cropping."},
    )
    random_half_turn: bool = field(
        default=False,
        metadata={"help": "Turn half of the designs by 180 degrees at random: they respond alike in our load cases."},
    )
    random_reflections: bool = field(
        default=False,
        metadata={
            "help": "Mirror and transpose designs at random for the predictor, where a response follows from it."
        },
    )

    decoder_likelihood: Literal["bernoulli", "discretized_logistic"] = field(
        default="bernoulli", metadata={"help": "bernoulli for binary designs, discretized_logistic for 8-bit images."}
    )
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the KL term in the loss; 1 is the ELBO."})
    latent_channels: int = field(default=4, metadata={"help": "Channels of the latents."})
    autoencoder_block_out_channels: list[int] = field(
        default_factory=lambda: [16, 32, 64], metadata={"help": "Widths; the latents are 2^(n-1) times smaller."}
    )
    autoencoder_layers_per_block: int = field(default=1, metadata={"help": "Residual layers of a block."})
    autoencoder_steps: int = field(default=10_000, metadata={"help": "Optimiser steps of the autoencoder."})
    autoencoder_batch_size: int = field(default=32, metadata={"help": "Designs a step, all processes together."})
    autoencoder_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    autoencoder_warmup_steps: int = field(default=100, metadata={"help": "Steps to the peak learning rate."})

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = field(
        default="v_prediction", metadata={"help": "What the denoiser predicts."}
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = field(
        default="linear", metadata={"help": "Noise schedule of the diffusion, 1000 steps."}
    )
    denoiser_block_out_channels: list[int] = field(
        default_factory=lambda: [64, 128], metadata={"help": "Widths of the blocks."}
    )
    denoiser_layers_per_block: int = field(default=2, metadata={"help": "Residual layers of a block."})
    learned_noise_schedule: bool = field(
        default=False,
        metadata={"help": "Learn the log-SNR between the ends of beta_schedule, for the least variance of the bound."},
    )
    loss_weighting: Literal["prediction", "min_snr", "elbo"] = field(
        default="prediction",
        metadata={"help": "prediction: all errors of it alike; elbo: the objective of likelihood."},
    )
    snr_gamma: float = field(default=5.0, metadata={"help": "Highest weight of loss_weighting min_snr."})
    noise_offset: float = field(default=0.0, metadata={"help": "Standard deviation of noise common to all pixels."})
    response_dropout: float = field(
        default=0.1, metadata={"help": "Share of responses that are left out, for guidance and samples without one."}
    )
    response_masking: float = field(
        default=0.3, metadata={"help": "Share of responses of which some load cases or strains are masked."}
    )
    token_dim: int = field(default=32, metadata={"help": "Length of the response encoder's tokens."})
    denoiser_steps: int = field(default=20_000, metadata={"help": "Optimiser steps of the denoiser."})
    denoiser_batch_size: int = field(default=128, metadata={"help": "Latents a step, all processes together."})
    denoiser_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    denoiser_warmup_steps: int = field(default=200, metadata={"help": "Steps to the peak learning rate."})

    predictor_block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "Widths of the predictor of responses."}
    )
    predictor_layers_per_block: int = field(default=2, metadata={"help": "Residual layers of a block."})
    predictor_steps: int = field(
        default=10_000, metadata={"help": "Optimiser steps of the predictor, where there are responses; 0 for none."}
    )
    predictor_batch_size: int = field(default=64, metadata={"help": "Designs a step, all processes together."})
    predictor_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    predictor_warmup_steps: int = field(default=200, metadata={"help": "Steps to the peak learning rate."})

    lr_scheduler: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule by its name in diffusers.optimization."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    ema_decay: float = field(default=0.999, metadata={"help": "Largest decay of the averaged weights, after warm-up."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches summed for a step."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "As in Accelerate; what accelerate launch was told if unset."}
    )
    allow_tf32: bool = field(default=True, metadata={"help": "Let float32 products on a GPU round to TF32."})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute activations of autoencoder and denoiser again in the backward pass: less memory."},
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile all networks; takes minutes first."})
    use_8bit_adam: bool = field(default=False, metadata={"help": "8-bit Adam of bitsandbytes."})

    logging_steps: int = field(default=50, metadata={"help": "Steps between two entries of the log."})
    validation_steps: int = field(default=1000, metadata={"help": "Steps between two looks at held-out designs."})
    checkpointing_steps: int = field(default=1000, metadata={"help": "Steps between two checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Checkpoints of a stage that are kept."})
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "End with the weights of least held-out loss, not with the last."}
    )
    report_to: Literal["tensorboard", "wandb", "trackio"] = field(
        default="tensorboard", metadata={"help": "Tracker of the log; it has to be installed."}
    )
    validation_scheduler: str = field(
        default="dpmsolver++", metadata={"help": "Stock scheduler that samples the validation grids."}
    )
    validation_inference_steps: int = field(default=25, metadata={"help": "Its steps."})
    num_validation_images: int = field(
        default=64, metadata={"help": "Samples that are compared with the held-out designs at each look."}
    )

    push_to_hub: bool = field(
        default=False, metadata={"help": "Publish the finished run, with a card, on the Hub (log in by hf auth login)."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Its name there, or owner/name; the name of the run's folder if unset."}
    )
    hub_private: bool | None = field(
        default=None, metadata={"help": "Whether a repository that is made is private; as its owner has set if unset."}
    )

    def __post_init__(self) -> None:
        """Checks what a type cannot say.

        Raises:
            ValueError: If a number is out of its range or two settings contradict each other.
        """
        may_be_zero = {
            "seed",
            "kl_weight",
            "weight_decay",
            "noise_offset",
            "response_dropout",
            "response_masking",
            "autoencoder_warmup_steps",
            "denoiser_warmup_steps",
            "predictor_steps",
            "predictor_warmup_steps",
        }
        for name, value in asdict(self).items():
            for number in value if isinstance(value, list) else [value]:
                is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
                if is_number and not (number > 0 or (number == 0 and name in may_be_zero)):  # NaN is neither
                    raise ValueError(
                        f"{name} must be {'at least 0' if name in may_be_zero else 'positive'}, got {value!r}"
                    )
        accepted = {"validation_scheduler": sorted(STOCK_SCHEDULERS), "lr_scheduler": _LR_SCHEDULERS}
        for name, names in accepted.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        for name, package in {"report_to": self.report_to, "use_8bit_adam": "bitsandbytes"}.items():
            if (value := getattr(self, name)) and find_spec(package) is None:
                raise ValueError(f"{name} must ask for what is installed, got {value!r}: pip install {package} first")
        if self.mixed_precision == "fp16" and not torch.accelerator.is_available():
            raise ValueError("mixed_precision must be 'no' or 'bf16' without an accelerator, got 'fp16'")
        if self.dry_run and self.resume_from_checkpoint is not None:
            raise ValueError("dry_run must be left out with resume_from_checkpoint: it starts nothing to go on from")
        for name in ("hub_model_id", "hub_private"):
            if getattr(self, name) is not None and not self.push_to_hub:
                raise ValueError(f"{name} must be left out without push_to_hub, got {getattr(self, name)!r}")
        for name in ("response_dropout", "response_masking"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie inside (0, 1), got {self.ema_decay!r}")
        if self.streaming and self.num_train_designs is None:
            raise ValueError("num_train_designs must be set with streaming=True: a stream has no known end")
        if (self.crop_size is None) != (self.num_crops is None):
            raise ValueError(
                f"crop_size and num_crops must be given together, got {self.crop_size} and {self.num_crops}"
            )
        if self.num_crops is not None and self.num_train_designs is not None:
            raise ValueError(f"num_train_designs must be left out with num_crops, got {self.num_train_designs}")
        if self.dataset == "random_composites":
            for name in ("crop_size", "resize"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must be left out for random_composites, which have a resolution")
            if self.decoder_likelihood != "bernoulli":
                raise ValueError("decoder_likelihood must be 'bernoulli' for random_composites, which are binary")
            if self.num_train_designs is None or self.streaming:
                raise ValueError("random_composites need num_train_designs and streaming=False: they are generated")
            if self.response_column is not None:
                raise ValueError(
                    f"response_column must be left out for random_composites, which have no responses, got "
                    f"{self.response_column!r}: build_dataset makes a dataset of designs with theirs"
                )

    def stage(self, name: Literal["autoencoder", "denoiser", "predictor"]) -> StageConfig:
        """The settings of one stage."""
        return StageConfig(**{f.name: getattr(self, f"{name}_{f.name}") for f in fields(StageConfig)})


def parse_config(args: Sequence[str] | None = None) -> TrainingConfig:
    """Reads ``--config FILE`` and ``--field value`` arguments.

    Args:
        args: Arguments of the command line; those of the process if ``None``.

    Returns:
        The settings.

    Raises:
        ValueError: If the file cannot be read, is no mapping or has an unknown key, a setting is out of range, or
            a token is among the arguments.

    Example:
        >>> parse_config(["--output_dir", "runs/x", "--num_train_designs", "64", "--seed", "7"]).seed
        7
    """
    given = list(sys.argv[1:] if args is None else args)
    if any(argument.split("=")[0].replace("-", "_") in _TOKEN_ARGUMENTS for argument in given):
        raise ValueError(
            "a token must not stand on the command line, where every user of the machine and every tracker sees it: "
            "run hf auth login, or set HF_TOKEN"
        )
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    found, command_line = files.parse_known_args(given)
    parser = HfArgumentParser(
        TrainingConfig,
        description="Trains a latent diffusion model of microstructures. --config FILE reads settings from YAML.",
        allow_abbrev=False,
    )
    from_file = [] if found.config is None else _yaml_arguments(found.config)
    (config,) = parser.parse_args_into_dataclasses(args=[*from_file, *command_line], look_for_args_file=False)
    return config


def _yaml_arguments(path: Path) -> list[str]:
    """The settings of a YAML file as command-line arguments."""
    try:
        settings = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # strings, as the command line has them
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config must be a YAML file that can be read, got {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config must hold a mapping of settings, got {type(settings).__name__} in {path}")
    known = {f.name for f in fields(TrainingConfig)}
    if unknown := sorted(map(str, settings.keys() - known)):
        raise ValueError(f"config has unknown settings {unknown} in {path}; known are {sorted(known)}")
    if nested := sorted(name for name, value in settings.items() if isinstance(value, dict)):
        raise ValueError(f"config must have numbers, words and lists for settings, got mappings for {nested} in {path}")
    arguments: list[str] = []
    for name, value in settings.items():
        if value not in ("", "null"):
            arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return arguments
