"""What Accelerate is told: which processes there are, how a stage trains on them, and who keeps its log."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)

from mechdiffusers.training.config import TrainingConfig

__all__ = ["check_accelerators", "precision_of", "process_state", "stage_accelerator"]

#: What accelerate launch and torchrun set, which leave a process one thread.
_LAUNCHERS = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}


def process_state() -> PartialState:
    """This process among those that train together, however they were launched.

    Without an accelerator, processes talk by gloo; Accelerate has to be told so before anything else asks it.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # the main process encodes, validates and publishes while the others wait
    patience = timedelta(hours=12)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # with cpu=True Accelerate 1.15 leaves DeepSpeed out, and without it names no backend for CPUs
        return PartialState(backend="gloo" if on_cpu else None, timeout=patience)
    process = PartialState(cpu=on_cpu, timeout=patience)
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and process.distributed_type is DistributedType.MULTI_CPU:
        # Accelerate 1.15 turns only accelerators' processes to FSDP, which by itself runs on CPUs too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return process


def precision_of(mixed_precision: str | None) -> str:
    """What a setting of ``mixed_precision`` means: what accelerate launch was told, where it is unset."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def check_accelerators(config: TrainingConfig) -> None:
    """Checks that what the launcher was told and the settings go together.

    Args:
        config: Settings of the run.

    Raises:
        ValueError: If DeepSpeed should shard the weights too, or round them.
    """
    if process_state().distributed_type is not DistributedType.DEEPSPEED:
        return
    if (stage := DeepSpeedPlugin().zero_stage) > 2:
        raise ValueError(
            f"zero_stage of DeepSpeed must be at most 2, got {stage}: fsdp.yaml shards the weights themselves"
        )
    if (precision := precision_of(config.mixed_precision)) != "no":
        raise ValueError(
            f"mixed_precision must be 'no' with DeepSpeed, which rounds the weights themselves, got {precision!r}: "
            f"data parallel processes and fsdp.yaml keep them in float32"
        )


def stage_accelerator(config: TrainingConfig, name: str) -> Accelerator:
    """The Accelerator of one stage, its log in the run's ``logs`` folder.

    Args:
        config: Settings of the run.
        name: ``"autoencoder"``, ``"denoiser"`` or ``"predictor"``.
    """
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    process = process_state()
    accelerator = Accelerator(
        cpu=process.device.type == "cpu" and process.distributed_type is not DistributedType.DEEPSPEED,
        mixed_precision=config.mixed_precision,
        # an epoch may end between two steps: only the number of batches says when a step is due
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # a batch is shared among the processes, so that their number does not change what is trained
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=config.seed),
        log_with=config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "logs" / name)
        ),
    )
    if (deepspeed := accelerator.deepspeed_plugin) is not None:  # which has its own settings, of the stage before
        deepspeed.deepspeed_config |= {
            "gradient_clipping": config.max_grad_norm,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        }
    launched = not _LAUNCHERS.isdisjoint(os.environ)
    if accelerator.device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        # their default rather than the user's choice
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))
    accelerator.init_trackers(
        "mechdiffusers",
        config={
            key: value if isinstance(value, (int, float, str)) else str(value) for key, value in asdict(config).items()
        },
        init_kwargs={}
        if config.report_to == "tensorboard"
        else {config.report_to: {"name": f"{Path(config.output_dir).name}-{name}"}},
    )
    set_seed(config.seed)  # the stage's first weights, whether the stage before it ran just now or earlier
    return accelerator
