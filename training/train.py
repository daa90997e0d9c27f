"""Trains a latent diffusion model of microstructures, from designs to a portable checkpoint.

    accelerate launch training/train.py --config training/configs/quick.yaml --output_dir runs/quick

The run's folder holds, when it is done: ``pipeline/``, the checkpoint that plain diffusers loads; ``validation/``,
grids of held-out designs and of samples; ``logs/``, for TensorBoard; ``checkpoints/``, what an interrupted run goes on
from; ``metrics.json``, the newest figures; ``config.yaml``, every setting.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import diffusers
import transformers
from safetensors import SafetensorError

from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.pipelines.portable_checkpoint import claim_repository
from mechdiffusers.training.accelerators import precision_of, process_state
from mechdiffusers.training.config import TrainingConfig, parse_config
from mechdiffusers.training.data import load_designs
from mechdiffusers.training.loop import StopRequested
from mechdiffusers.training.output_folder import claim, copy_start
from mechdiffusers.training.publish import publish
from mechdiffusers.training.rehearsal import rehearse
from mechdiffusers.training.stages import check_stages, run_stages

__all__ = ["train"]

logger = logging.getLogger(__name__)


def train(config: TrainingConfig) -> LatentDDPMPipeline:
    """Trains all stages and saves the pipeline in ``output_dir/pipeline``.

    Args:
        config: Settings of the run.

    Returns:
        The trained pipeline, on the CPU, in the main process.

    Raises:
        ValueError: If a setting or the data are unfit, ``output_dir`` cannot be written, holds another run or has one
            at work in it, or the Hub refuses the repository that the run should be published in.
        FloatingPointError: If a loss is not finite.
        OSError: If a checkpoint cannot be written, the earlier ones being intact, or the upload to the Hub breaks off.
        StopRequested: If the process got SIGTERM; the state is saved.
    """
    if config.dry_run:
        raise ValueError("dry_run must be left out of what train is given, which trains: rehearse is the dry run")
    process, repo_id = process_state(), None
    # what accelerate launch was told is a setting too, which a run must not change as it goes on
    config = replace(config, mixed_precision=precision_of(config.mixed_precision))  # type: ignore[arg-type]
    with ExitStack() as held:
        start = held.enter_context(claim(config)) if process.is_main_process else []
        process.wait_for_everyone()
        designs = load_designs(config)
        check_stages(config, designs)
        if config.push_to_hub and process.is_main_process:  # before any work is done for it
            name = config.hub_model_id or Path(config.output_dir).absolute().name
            with _failures_explained("nothing was trained"):
                repo_id = claim_repository(name, private=config.hub_private)
        copy_start(start, Path(config.output_dir))  # with what it starts from, the folder is this run's for good
        process.wait_for_everyone()
        pipe = run_stages(config, designs)
        logger.info("the pipeline is in %s", Path(config.output_dir) / "pipeline")
        if repo_id is not None:
            again = "the run itself is complete, --resume_from_checkpoint latest --push_to_hub true publishes it again"
            with _failures_explained(again):
                logger.info("published: %s", publish(config.output_dir, repo_id, private=config.hub_private))
        process.wait_for_everyone()
    return pipe


@contextmanager
def _failures_explained(standing: str) -> Iterator[None]:
    """Makes whatever the network raises, of whichever library, an ``OSError`` that says how things stand."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise OSError(f"the Hub could not be reached: {error}; {standing}") from error


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpx2", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_warning()
    try:
        config = parse_config()
        if not process_state().is_main_process:
            logging.getLogger().setLevel(logging.WARNING)
        if config.dry_run:
            logger.info("a dry run; the real one would be:\n%s", rehearse(config))
        else:
            train(config)
    except (ValueError, FloatingPointError, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except StopRequested as stopped:
        logger.warning("%s; --resume_from_checkpoint latest goes on", stopped)
        sys.exit(128 + signal.SIGTERM)
    finally:
        process_state().destroy_process_group()


if __name__ == "__main__":
    main()
