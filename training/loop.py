"""The optimisation loop that both stages run: averaged weights, schedules, logs, validation, checkpoints, resumption.

Random numbers of a step are a function of (seed, stage, step): each is drawn for the global batch, and a process takes
its share, so that neither an interruption nor the number of processes changes what is drawn.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from mechdiffusers.training.config import TrainingConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

__all__ = ["LossFunction", "StepRandomness", "run_stage", "stage_accelerator"]

logger = logging.getLogger(__name__)

#: A step's batch and randomness to the loss and the quantities to log, all scalars.
LossFunction = Callable[[nn.Module, tuple[Tensor, ...], "StepRandomness"], tuple[Tensor, dict[str, Tensor]]]


class StepRandomness:
    """The random numbers of one batch of one step, this process's share of them."""

    def __init__(self, key: tuple[int | str, ...], rank: int = 0, num_ranks: int = 1):
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
        self._generator = torch.Generator().manual_seed(seed)
        self._rank, self._num_ranks = rank, num_ranks

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, the first axis being the batch."""
        return self._share(torch.randn((shape[0] * self._num_ranks, *shape[1:]), generator=self._generator))

    def integers(self, high: int, num: int) -> Tensor:
        """Uniform integers in ``[0, high)``, one a sample of the batch."""
        return self._share(torch.randint(high, (num * self._num_ranks,), generator=self._generator))

    def _share(self, drawn: Tensor) -> Tensor:
        return drawn.chunk(self._num_ranks)[self._rank]


def stage_accelerator(config: TrainingConfig, name: str) -> Accelerator:
    """The Accelerator of one stage, logging to the run's ``logs`` folder."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # an epoch may end between two steps: only the number of batches says when a step is due
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        log_with="tensorboard",
        project_dir=config.output_dir,
    )
    if accelerator.device.type == "cpu":  # accelerate launch leaves a process one thread
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))
    accelerator.init_trackers(f"logs/{name}")
    set_seed(config.seed)  # the stage's first weights, whether the stage before it ran just now or earlier
    return accelerator


def run_stage(
    accelerator: Accelerator,
    config: TrainingConfig,
    name: str,
    module: nn.Module,
    train: Dataset,
    compute_loss: LossFunction,
    validate: Callable[[nn.Module, int], dict[str, float]],
) -> None:
    """Trains a module in place and leaves it with the averaged weights.

    Args:
        accelerator: From :func:`stage_accelerator`.
        config: Settings of the run.
        name: ``"autoencoder"`` or ``"denoiser"``.
        module: What is trained.
        train: Training samples, tuples of tensors.
        compute_loss: From module, batch and randomness to the loss and what to log.
        validate: From the module with averaged weights and the step to what to log; may write pictures.

    Raises:
        ValueError: If there are fewer samples than a batch.
        FloatingPointError: If the loss is not finite.
    """
    settings = config.stage(name)  # type: ignore[arg-type]
    streamed = isinstance(train, IterableDataset)
    loader = DataLoader(train, batch_size=settings.batch_size, shuffle=not streamed, drop_last=True)
    if not streamed and len(loader) < accelerator.num_processes:
        raise ValueError(
            f"{name}_batch_size must be at most the number of training designs a process, "
            f"got {settings.batch_size} for {len(train)} designs"  # type: ignore[arg-type]
        )
    optimizer = torch.optim.AdamW(
        module.parameters(), settings.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    # Accelerate advances the schedule once a process in every step
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.warmup_steps * accelerator.num_processes,
        num_training_steps=settings.steps * accelerator.num_processes,
    )
    module, optimizer, loader, schedule = accelerator.prepare(module, optimizer, loader, schedule)
    average = EMAModel(module.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
    accelerator.register_for_checkpointing(average)

    checkpoints = Path(config.output_dir) / "checkpoints"
    start = _resume(accelerator, checkpoints, name) if config.resume_from_checkpoint else 0
    average.to(accelerator.device)  # a loaded average is on the CPU
    batches = _batches(accelerator, loader, start * config.gradient_accumulation_steps)
    main = accelerator.is_main_process
    progress = tqdm(initial=start, total=settings.steps, desc=name, unit="step", disable=not main)
    sums: dict[str, Tensor] = {}
    num_summed = 0
    for step in range(start, settings.steps):
        for part in range(config.gradient_accumulation_steps):
            batch = next(batches)
            randomness = StepRandomness(
                (config.seed, name, step, part), accelerator.process_index, accelerator.num_processes
            )
            with accelerator.accumulate(module):
                loss, quantities = compute_loss(module, batch, randomness)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            for key, value in quantities.items():
                sums[key] = sums.get(key, 0) + value.detach() / config.gradient_accumulation_steps
        num_summed += 1
        average.step(module.parameters())
        progress.update()

        done = step + 1
        checkpoint_due = done % config.checkpointing_steps == 0 or done == settings.steps
        if done % config.logging_steps == 0 or checkpoint_due:
            logs = {key: accelerator.reduce(value, "mean").item() / num_summed for key, value in sums.items()}
            sums, num_summed = {}, 0
            if not all(map(math.isfinite, logs.values())):
                raise FloatingPointError(
                    f"{name}: the loss is not finite at step {done}: {logs}; lower the learning rate"
                )
            accelerator.log({**logs, "learning_rate": schedule.get_last_lr()[0]}, step=done)
            progress.set_postfix({key: f"{value:.4g}" for key, value in logs.items()})
        if done % config.validation_steps == 0 or done == settings.steps:
            average.store(module.parameters())
            average.copy_to(module.parameters())
            if main:
                module.eval()
                logs = validate(accelerator.unwrap_model(module), done)
                module.train()
                accelerator.log({f"validation/{key}": value for key, value in logs.items()}, step=done)
                logger.info("%s step %d: %s", name, done, ", ".join(f"{k} {v:.5g}" for k, v in logs.items()))
            average.restore(module.parameters())
            accelerator.wait_for_everyone()
        if checkpoint_due:
            _save(accelerator, checkpoints, name, done)
    progress.close()
    average.copy_to(module.parameters())
    for tracker in accelerator.trackers:  # not end_training, which ends the other processes' connection too
        tracker.finish()


def _batches(accelerator: Accelerator, loader: DataLoader, used: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches without end, from the one behind the first ``used``; each epoch of a dataset has its own order."""
    streamed = isinstance(loader.dataset, IterableDataset)
    epoch, skipped = (0, used) if streamed else divmod(used, len(loader))
    while True:
        loader.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from accelerator.skip_first_batches(loader, skipped) if skipped else loader
        epoch, skipped = epoch + 1, 0


def _checkpoints(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*"))


def _resume(accelerator: Accelerator, folder: Path, name: str) -> int:
    """Loads the newest checkpoint of a stage, if there is one; returns the number of steps done."""
    saved = _checkpoints(folder, name)
    if not saved:
        return 0
    accelerator.load_state(str(saved[-1]))
    step = int(saved[-1].name.rsplit("-", 1)[1])
    logger.info("%s goes on from step %d", name, step)
    return step


def _save(accelerator: Accelerator, folder: Path, name: str, step: int) -> None:
    """Writes a checkpoint aside and renames it, then removes the older ones of the stage."""
    final, unfinished = folder / f"{name}-{step:08d}", folder / f".unfinished-{name}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(final)
        for older in _checkpoints(folder, name)[:-1]:
            shutil.rmtree(older)
