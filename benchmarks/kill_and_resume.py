"""Runs that are killed at random and resumed, against one that is not: are the weights the same bit by bit?

    python benchmarks/kill_and_resume.py --output benchmarks/kill_and_resume.json

Each run is the training script in a process of its own, with designs of known responses, so that it has all three
stages. It gets SIGKILL at a random step of a random stage; every fourth run while it writes the next checkpoint,
another fourth a second time at a later step. It is started again until it ends.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from record import record
from safetensors.torch import load_file
from tqdm.auto import tqdm

from mechdiffusers.microstructures import build_dataset, random_composites

SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
STAGES = ("autoencoder", "denoiser", "predictor")
STEPS = 30
WRITING = ", writing a checkpoint"
DESIGNS = "designs.parquet"
SETTINGS = {
    "num_heldout_designs": 16,
    "response_column": "response",
    "random_half_turn": True,
    "random_reflections": True,
    "latent_channels": 2,
    "autoencoder_block_out_channels": [4, 8],
    "autoencoder_steps": STEPS,
    "autoencoder_batch_size": 16,
    "denoiser_block_out_channels": [8, 8],
    "denoiser_layers_per_block": 1,
    "denoiser_steps": STEPS,
    "denoiser_batch_size": 16,
    "predictor_block_out_channels": [8, 8],
    "predictor_steps": STEPS,
    "predictor_batch_size": 16,
    "token_dim": 8,
    "validation_steps": 10,
    "checkpointing_steps": 4,
    "validation_inference_steps": 2,
    "num_validation_images": 4,
    "resume_from_checkpoint": "latest",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/kill_and_resume.json"))
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        designs, _ = random_composites(64, size=8)
        build_dataset(designs, ["uniaxial_extension", "shear"], [0.1, 0.2], element_order=1, output=folder / DESIGNS)
        run_until(folder / "straight", None)
        runs = []
        for i in tqdm(range(arguments.runs), desc="runs", unit="run"):
            killed, unfinished = random_moments(rng, i), 0
            for moment in killed:
                if not run_until(folder / str(i), moment):
                    raise RuntimeError(f"run {i} ended before it could be killed at {moment}")
                unfinished += is_writing(folder / str(i))
            run_until(folder / str(i), None)
            same = identical(folder / str(i), folder / "straight")
            runs.append({"killed": killed, "half_written_checkpoints": unfinished, "identical": same})
    record(
        {
            "runs": len(runs),
            "identical": sum(run["identical"] for run in runs),
            "killed": sum(len(run["killed"]) for run in runs),
            "killed_twice": sum(len(run["killed"]) == 2 for run in runs),
            "half_written_checkpoints": sum(run["half_written_checkpoints"] for run in runs),
            "each": runs,
        },
        arguments.output,
    )


def random_moments(rng: random.Random, run: int) -> list[str]:
    """When a run is killed, in order: at a step of a stage, or when it writes the next checkpoint behind that."""
    steps = sorted(rng.sample(range(len(STAGES) * STEPS), 2 if run % 4 == 3 else 1))
    moments = [f"{STAGES[step // STEPS]}: step {step % STEPS + 1}/{STEPS}" for step in steps]
    return [f"{moment}{WRITING}" for moment in moments] if run % 4 == 1 else moments


def run_until(folder: Path, moment: str | None) -> bool:
    """Starts the script, kills it at a moment; returns whether that came before the end."""
    folder.with_suffix(".yaml").write_text(
        yaml.safe_dump({**SETTINGS, "dataset": str(folder.parent / DESIGNS), "output_dir": str(folder)})
    )
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(folder.with_suffix(".yaml"))],
        stderr=subprocess.PIPE,
        text=True,  # which also ends a line where the progress bar returns to its beginning
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "0"},  # every step is shown
    )
    assert process.stderr is not None
    for line in process.stderr:
        if moment is not None and is_at(line, moment.removesuffix(WRITING)):
            while moment.endswith(WRITING) and process.poll() is None:
                if is_writing(folder):
                    process.send_signal(signal.SIGSTOP)  # so that it is not done with it before it is killed
                    os.waitpid(process.pid, os.WUNTRACED)
                    if is_writing(folder):
                        break
                    process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode == -signal.SIGKILL:
                return True
            break
    if process.wait() != 0:
        raise RuntimeError(f"the training script failed in {folder}")
    return False


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint of a run is half-written."""
    return any((folder / "checkpoints").glob(".unfinished-*"))


def is_at(line: str, moment: str) -> bool:
    """Whether a progress bar shows the step of a moment."""
    stage, _, step = moment.partition(": step ")
    return line.startswith(f"{stage}:") and f" {step} " in line


def identical(one: Path, other: Path) -> bool:
    """Whether the weights of two runs' pipelines are the same bit by bit."""
    files = sorted(path.relative_to(other) for path in (other / "pipeline").rglob("*.safetensors"))
    pairs = [(load_file(one / file), load_file(other / file)) for file in files]
    return bool(files) and all(
        a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items()) for a, b in pairs
    )


if __name__ == "__main__":
    main()
