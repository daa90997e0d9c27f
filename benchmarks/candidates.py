"""Candidates for targets and their errors by finite elements, kept in a run folder so that nothing is done twice."""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation.inverse_design import response_error
from mechdiffusers.likelihood import ContinuousPrior, LatentLikelihood
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.microstructures.build_dataset.columns import designs_of, grey_levels
from mechdiffusers.microstructures.build_dataset.parts import compute_by_parts
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import STOCK_SCHEDULERS, stock_scheduler


def common_arguments(
    doc: str | None, name: str, num_targets: int, dataset: Path | None = Path("data/composites-32")
) -> argparse.ArgumentParser:
    """The arguments of every measurement of designs for held-out targets, under the docstring of its script.

    Args:
        doc: The docstring.
        name: Of the record, and of the run folder.
        num_targets: How many targets unless told.
        dataset: Which dataset unless told; ``None`` where it has to be told.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", type=Path, default=dataset, required=dataset is None)
    parser.add_argument("--num_targets", type=int, default=num_targets, help="the first solved held-out rows")
    parser.add_argument("--num_designs", type=int, default=8, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run_dir", type=Path, default=Path("runs") / name)
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/{name}.json"))
    return parser


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds how the designs are drawn, as :func:`sampling` reads it."""
    parser.add_argument("--scheduler", choices=STOCK_SCHEDULERS, default="dpmsolver++")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--predictor_guidance_scale", type=float, default=4.0)
    parser.add_argument("--num_candidates", type=int, default=1, help="for each design; a predictor keeps the best")
    parser.add_argument("--num_refinements", type=int, default=0, help="times that the last steps are taken again")


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the pipeline among the arguments."""
    names = ("num_inference_steps", "guidance_scale", "predictor_guidance_scale", "num_candidates", "num_refinements")
    return {name: getattr(arguments, name) for name in names}


def drawing(arguments: argparse.Namespace) -> tuple[LatentDDPMPipeline, dict[str, Any], list[Any]]:
    """The checkpoint with its scheduler, the options to draw with, and the recipe that all of these make."""
    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = stock_scheduler(arguments.scheduler, pipe.scheduler.config)
    options = sampling(arguments)
    return pipe, options, [fingerprint(arguments.checkpoint), arguments.scheduler, options]


def fingerprint(checkpoint: Path) -> str:
    """Of a checkpoint's files, so that no run takes the designs of another."""
    digest = hashlib.sha256()
    for path in sorted(path for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".json")):
        digest.update(str(path.relative_to(checkpoint)).encode() + path.read_bytes())
    return digest.hexdigest()


def kept(folder: Path, recipe: list[Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """The designs that ``make`` gives; they are read where those of the same recipe were made before."""
    path = folder / f"designs-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]}.npz"
    if not path.exists():
        with atomic_write(path) as unfinished:
            np.savez_compressed(unfinished, grey_levels(make()))
    return designs_of(np.load(path)["arr_0"]).astype(np.float32)


def errors_of(
    designs: np.ndarray, targets: np.ndarray, spec: ResponseSpec, folder: Path, device: str | None = None
) -> np.ndarray:
    """Errors by finite elements, shape ``(T, n)``, of designs ``(T n, H, W)`` for targets ``(T, L, S)``.

    Parts of 16 designs are kept in ``folder``: after a kill the same call goes on where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    response = compute_by_parts(grey_levels(designs), spec, folder, device, progress=True)
    per_target = len(designs) // len(targets)
    return response_error(response, np.repeat(targets, per_target, axis=0)).reshape(len(targets), per_target)


def autoencoder(
    pipe: LatentDDPMPipeline,
    designs: np.ndarray,
    targets: np.ndarray,
    spec: ResponseSpec,
    folder: Path,
    device: str | None = None,
) -> dict[str, Any]:
    """Error of designs behind the autoencoder; what comes out unchanged has none and is not simulated."""
    batches = torch.from_numpy(designs).split(256)
    decoded = np.concatenate([pipe.decode(pipe.encode(batch), output_type="np")[..., 0] for batch in batches])
    changed = (decoded != designs).any((1, 2))
    errors = np.zeros(len(designs))
    if changed.any():
        errors[changed] = errors_of(decoded[changed], targets[changed], spec, folder, device)[:, 0]
    return {
        "error_percent": percent(errors),
        "worst_percent": 100 * float(errors.max()),
        "unchanged": float(1 - changed.mean()),
        "pixels_reconstructed": float((decoded == designs).mean()),
        "soft_pixels_reconstructed": float((decoded == 0)[designs == 0].mean()),
    }


def summary(errors: np.ndarray) -> dict[str, Any]:
    """Single designs and the best of each target, in per cent, with the standard error over targets."""
    best = np.nanmin(errors, axis=1)
    single = np.nanmean(errors, axis=1)
    return {
        "targets": len(errors),
        "designs_a_target": errors.shape[1],
        "single_percent": percent(single),
        "best_percent": percent(best),
        "best_median_percent": 100 * float(np.median(best)),
        "unsolved": int(np.isnan(errors).sum()),
    }


def best_of(errors: np.ndarray) -> dict[int, dict[str, float]]:
    """Least of 1, 2, 4, ... errors of a row of ``(T, n)``, the mean over all ways to draw them from it, in per cent.

    Of n sorted errors, the i-th from 0 is the least of k in as many ways as the others are drawn from the n - 1 - i
    above it. NaN is above all others.
    """
    found, num, ordered = {}, errors.shape[1], np.sort(errors, axis=1)
    for k in (2**i for i in range(num.bit_length())):
        ways = np.array([math.comb(num - 1 - i, k - 1) for i in range(num)], dtype=float)
        ways = np.where(np.isfinite(ordered), ways, 0.0)
        some = ways.any(1)
        found[k] = percent((np.nan_to_num(ordered) * ways)[some].sum(1) / ways[some].sum(1))
    return found


def bound(
    pipe: LatentDDPMPipeline,
    designs: np.ndarray,
    seed: int,
    response: np.ndarray | None = None,
    num_designs: int = 1,
) -> dict[str, float]:
    """The continuous-time bound of designs, ``num_designs`` for each target: mean in nats, its error over targets."""
    generator = torch.Generator().manual_seed(seed)
    likelihood = LatentLikelihood(pipe, ContinuousPrior(num_levels=64))
    output = likelihood.elbo(designs, response=response, generator=generator)
    values = np.asarray(output.log_likelihood.cpu(), dtype=np.float64)
    values = values.reshape(-1, num_designs).mean(1)
    return {"mean_nats": float(values.mean()), "standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def percent(values: np.ndarray) -> dict[str, float]:
    """Mean and its standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return {"mean": 100 * float(values.mean()), "standard_error": 100 * float(error)}
