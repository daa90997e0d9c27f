"""The optimisation loop of all stages: averaged weights, schedules, logs, validation, checkpoints, resumption."""

from __future__ import annotations

import copy
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from mechdiffusers.training import checkpoints
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.metrics import peak_memory, update_metrics
from mechdiffusers.training.moving_average import MovingAverage
from mechdiffusers.training.randomness import StepRandomness
from mechdiffusers.training.sharding import is_sharded, local_parameters

__all__ = ["LossFunction", "StopRequested", "run_stage"]

logger = logging.getLogger(__name__)

#: A step's batch and randomness to the loss and the quantities to log, all scalars.
LossFunction = Callable[[nn.Module, tuple[Tensor, ...], StepRandomness], tuple[Tensor, dict[str, Tensor]]]

#: Steps between two times that several processes agree on whether to stop, which makes them wait for each other.
_AGREE_STEPS = 10


class StopRequested(Exception):
    """The run was told to stop, and has saved its state."""


def run_stage(
    accelerator: Accelerator,
    config: TrainingConfig,
    name: str,
    module: nn.Module,
    train: Dataset,
    compute_loss: LossFunction,
    validate: Callable[[nn.Module, int], dict[str, float]],
) -> nn.Module:
    """Trains a module.

    Args:
        accelerator: From :func:`~mechdiffusers.training.accelerators.stage_accelerator`.
        config: Settings of the run.
        name: ``"autoencoder"``, ``"denoiser"`` or ``"predictor"``.
        module: What is trained; used up.
        train: Training samples, tuples of tensors.
        compute_loss: From module, batch and randomness to the loss and what to log.
        validate: From the module with averaged weights and the step to what to log, ``"loss"`` among it; may write
            pictures. The main process calls it.

    Returns:
        The module with averaged weights, on the CPU, in the main process; one of unknown weights in the others.

    Raises:
        FloatingPointError: If the loss is not finite.
        StopRequested: If the process got SIGTERM; the state is saved.
        OSError: If a checkpoint cannot be written; the earlier ones are intact.
    """
    settings = config.stage(name)  # type: ignore[arg-type]
    main = accelerator.is_main_process
    streamed = isinstance(train, IterableDataset)
    loader = DataLoader(train, batch_size=settings.batch_size, shuffle=not streamed, drop_last=True)
    averaged = copy.deepcopy(module)
    if not is_sharded(accelerator):  # what shards takes no other format
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.torch_compile:
        module.compile()
    optimizer = _optimizer(accelerator, config, module, settings.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.steps
    )
    module, optimizer, loader, schedule = accelerator.prepare(module, optimizer, loader, schedule)
    average = MovingAverage(local_parameters(module), decay=config.ema_decay)

    folder = Path(config.output_dir) / "checkpoints"
    start = checkpoints.load_newest(accelerator, average, folder, name) if config.resume_from_checkpoint else 0
    best = checkpoints.BestWeights(folder, name)
    batches = _batches(accelerator, loader, start * config.gradient_accumulation_steps)
    progress = tqdm(initial=start, total=settings.steps, desc=name, unit="step", disable=not main)
    sums: dict[str, Tensor] = {}
    logged, begin = start, time.perf_counter()
    with _sigterm_noticed() as stop:
        for step in range(start, settings.steps):
            for part in range(config.gradient_accumulation_steps):
                batch = next(batches)
                # a batch that is summed draws what it would as a part of the batch that they make together
                share = part * accelerator.num_processes + accelerator.process_index
                num_shares = config.gradient_accumulation_steps * accelerator.num_processes
                randomness = StepRandomness((config.seed, name, step), share, num_shares)
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
            if not accelerator.optimizer_step_was_skipped:  # as in float16 where the gradient has overflowed
                average.step(local_parameters(module))
            progress.update()

            done = step + 1
            last = done == settings.steps
            stopping = _all_agree(accelerator, stop, done, last)
            validation_due = done % config.validation_steps == 0 or last
            checkpoint_due = done % config.checkpointing_steps == 0 or last or stopping
            log_due = done % config.logging_steps == 0 or validation_due or checkpoint_due
            if log_due:  # before anything but steps takes time, and it waits for those that a GPU has not done yet
                num = done - logged
                logs = {key: accelerator.reduce(value, "mean").item() / num for key, value in sums.items()}
                seconds = (time.perf_counter() - begin) / num
                if not all(map(math.isfinite, logs.values())):
                    raise FloatingPointError(
                        f"{name}: the loss is not finite at step {done}: {logs}; lower the learning rate"
                    )
                progress.set_postfix({key: f"{value:.4g}" for key, value in logs.items()})
                logs |= {"learning_rate": schedule.get_last_lr()[0], "seconds_per_step": seconds}
                accelerator.log(logs, step=done)
                sums = {}
                if main and last:
                    cost = {"seconds_per_step": seconds, "peak_memory_gib": peak_memory()}
                    update_metrics(Path(config.output_dir), name, cost)
            if validation_due:
                _take_average(accelerator, module, average, averaged)
                if main:
                    metrics = validate(averaged.eval().to(accelerator.device), done)
                    accelerator.log({f"validation/{key}": value for key, value in metrics.items()}, step=done)
                    logger.info("%s step %d: %s", name, done, ", ".join(f"{k} {v:.5g}" for k, v in metrics.items()))
                    update_metrics(Path(config.output_dir), name, {"step": done, **metrics})
                    if config.load_best_model_at_end:
                        best.offer(averaged, metrics["loss"], done)
                accelerator.wait_for_everyone()
            if checkpoint_due:
                checkpoints.save(accelerator, average, folder, name, done, config.checkpoints_total_limit)
            if log_due:
                logged, begin = done, time.perf_counter()
            if stopping or (last and _all_agree(accelerator, stop, done, last)):  # it may have come in between
                raise StopRequested(f"{name} has stopped at step {done} of {settings.steps}, as SIGTERM asked")
    progress.close()
    for tracker in accelerator.trackers:  # not end_training, which ends the other processes' connection too
        tracker.finish()
    _take_average(accelerator, module, average, averaged)
    averaged.eval()
    if main and config.load_best_model_at_end:
        step = best.load_into(averaged.cpu())
        metrics = validate(averaged.to(accelerator.device), settings.steps)  # in place of the last weights' grid
        update_metrics(Path(config.output_dir), name, {"step": step, **metrics})
    return averaged.cpu()


def _optimizer(
    accelerator: Accelerator, config: TrainingConfig, module: nn.Module, learning_rate: float
) -> torch.optim.Optimizer:
    if config.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(module.parameters(), learning_rate, weight_decay=config.weight_decay)
    # fused, it skips a step whose gradient has overflowed in float16 by itself, and Accelerate does not hear of it
    fused = accelerator.mixed_precision != "fp16"
    return torch.optim.AdamW(module.parameters(), learning_rate, weight_decay=config.weight_decay, fused=fused)


def _batches(accelerator: Accelerator, loader: DataLoader, used: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches without end, from the one behind the first ``used``; each epoch of a dataset has its own order."""
    streamed = isinstance(loader.dataset, IterableDataset)
    epoch, skipped = (0, used) if streamed else divmod(used, len(loader))
    while True:
        loader.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from accelerator.skip_first_batches(loader, skipped) if skipped else loader
        epoch, skipped = epoch + 1, 0


def _take_average(accelerator: Accelerator, module: nn.Module, average: MovingAverage, averaged: nn.Module) -> None:
    """Loads the averaged weights into a module that no wrapper, compiler or sharding has touched."""
    average.store(local_parameters(module))
    average.copy_to(local_parameters(module))
    weights = accelerator.get_state_dict(module)  # all processes take part where the model is sharded
    if accelerator.is_main_process:
        averaged.load_state_dict(weights)
    average.restore(local_parameters(module))


@contextmanager
def _sigterm_noticed() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as clusters send it some time before they kill."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _all_agree(accelerator: Accelerator, stop: threading.Event, done: int, last: bool) -> bool:
    """Whether any process was told to stop; the same answer in all of them."""
    if accelerator.num_processes == 1:
        return stop.is_set()
    if done % _AGREE_STEPS and not last:
        return False
    if stop.is_set():
        accelerator.set_trigger()
    return accelerator.check_trigger()
