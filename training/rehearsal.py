"""A dry run: the whole of a training on a few designs and for a few steps, to say what the real one will take."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch.utils.data import IterableDataset, Subset

from mechdiffusers.training.accelerators import process_state
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.metrics import read_metrics
from mechdiffusers.training.stages import check_stages, run_stages

__all__ = ["rehearse"]

#: Steps of a rehearsed stage; the time is that of the second half, behind whatever the first step sets up.
_STEPS = 8


def rehearse(config: TrainingConfig) -> str:
    """Runs all stages small in a temporary folder.

    Args:
        config: Settings of the run; ``output_dir`` is not touched.

    Returns:
        In the main process: what would be trained, the memory and the time that it takes, as a text.

    Raises:
        ValueError: If a setting or the data are unfit.
        OSError: If the folder in which ``output_dir`` would be made cannot be written.
    """
    designs = load_designs(config)
    num = min(
        designs.num_train, max(config.autoencoder_batch_size, config.denoiser_batch_size, config.predictor_batch_size)
    )
    check_stages(config, designs)
    few = designs.train if isinstance(designs.train, IterableDataset) else Subset(designs.train, range(num))
    process = process_state()
    cost: dict[str, dict[str, float]] = {}
    existing = next(folder for folder in Path(config.output_dir).absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=existing) as own_folder:
        folder = broadcast_object_list([own_folder])[0]  # the main process's
        short = replace(
            config,
            output_dir=folder,
            autoencoder_steps=_STEPS,
            denoiser_steps=_STEPS,
            predictor_steps=min(_STEPS, config.predictor_steps),
            logging_steps=_STEPS // 2,
            checkpointing_steps=_STEPS,
            report_to="tensorboard",
        )
        pipe = run_stages(short, replace(designs, train=few, num_train=num))
        if process.is_main_process:
            cost = {name: read_metrics(Path(folder), name) for name in ("autoencoder", "denoiser", "predictor")}
        process.wait_for_everyone()
    if not process.is_main_process:
        return ""
    height, width = designs.size
    lines = [f"{designs.num_train} training designs of {height} x {width} pixels, {len(designs.heldout)} held out"]
    modules = {"autoencoder": pipe.vae, "denoiser": pipe.unet, "predictor": pipe.response_predictor}
    for name, module in ((name, module) for name, module in modules.items() if module is not None):
        stage, seconds = config.stage(name), cost[name]["seconds_per_step"]  # type: ignore[arg-type]
        lines.append(
            f"{name}: {module.num_parameters() / 1e6:.2f} million parameters, {stage.steps} steps of "
            f"{stage.batch_size}, {seconds:.3f} s a step, {stage.steps * seconds / 60:.1f} minutes, "
            f"{cost[name]['peak_memory_gib']:.2f} GiB"
        )
    return "\n".join(lines)
