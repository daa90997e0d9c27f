"""Do two commits compute the same numbers, bit by bit? Images, predictions and likelihoods of released checkpoints.

Each commit computes the numbers once, in its own checkout and with its own package:

    python benchmarks/same_numbers.py checkpoints/composites-32 checkpoints/mechanical-mnist --numbers runs/new.npz
    cd path/to/the/other/checkout && PYTHONPATH=path/to/its/package \
      python path/to/this/benchmarks/same_numbers.py checkpoints/* --numbers path/to/runs/old.npz

Then they are compared:

    python benchmarks/same_numbers.py --compare runs/old.npz runs/new.npz --output benchmarks/same_numbers.json

Everything runs on one thread, in single precision, from fixed seeds. Bits depend on the machine and on the versions of
its packages, so both commits have to run on the same machine. The latents behind the images are compared too: an image
is rounded and hides small differences.

The designs are the first held-out ones of ``data/NAME`` where the checkpoint has such a dataset, and otherwise designs
that it generates. The designs and the responses are among the numbers: where they differ, all that follows may differ.
"""

import argparse
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from record import commit_of, record

import mechdiffusers
from mechdiffusers import LatentDDPMPipeline
from mechdiffusers.schedulers import PredictorCorrectorScheduler, ProbabilityFlowScheduler, stock_scheduler

NUM = 4
RESPONSES = ("without response", "with response")
logger = logging.getLogger("same_numbers")

if find_spec("mechdiffusers.likelihood"):
    from mechdiffusers.likelihood import (
        AncestralPrior,
        FlowPrior,
        LatentDiffusion,
        LatentLikelihood,
        StandardNormalPrior,
    )

    def bounds(pipe: Any) -> dict[str, Callable[..., Any]]:
        """The bounds beside ``pipe.log_likelihood``, as functions of images, a response and a generator."""
        normal, ancestral = LatentLikelihood(pipe, StandardNormalPrior()), LatentLikelihood(pipe, AncestralPrior(10))
        adaptive = LatentLikelihood(pipe, FlowPrior(num_probes=2, tolerance=0.1))
        return {
            "standard normal": partial(normal.elbo, num_samples=2),
            "ancestral": partial(ancestral.elbo, num_samples=2),
            "ancestral, importance weighted": partial(ancestral.iwae, num_samples=3),
            "flow": LatentLikelihood(pipe, FlowPrior(num_steps=2, num_probes=4)).elbo,
            "flow, adaptive": adaptive.elbo,
        }

    diffusion = LatentDiffusion
else:  # before the subpackage likelihood

    def bounds(pipe: Any) -> dict[str, Callable[..., Any]]:
        """The bounds beside ``pipe.log_likelihood``, as functions of images, a response and a generator."""
        bound = pipe.log_likelihood
        return {
            "standard normal": partial(bound, method="elbo", prior="standard_normal", num_samples=2),
            "ancestral": partial(bound, method="elbo", prior="ancestral", num_steps=10, num_samples=2),
            "ancestral, importance weighted": partial(
                bound, method="iwae", prior="ancestral", num_steps=10, num_samples=3
            ),
            "flow": partial(bound, method="ode", num_steps=2, num_probes=4),
            "flow, adaptive": partial(bound, method="ode", num_probes=2, tolerance=0.1),
        }

    def diffusion(pipe: Any, response: Any = None) -> Any:
        """What has the methods of ``LatentDiffusion(pipe, response)``."""
        names = ("score", "to_noise", "from_noise")
        return SimpleNamespace(**{name: partial(getattr(pipe, name), response=response) for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--numbers", type=Path, default=Path("runs/same_numbers.npz"), help="what a commit computed")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/same_numbers.json"), help="of the comparison")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.compare:
        record(comparison(*(dict(np.load(path)) for path in arguments.compare)), arguments.output)
        return
    if not arguments.checkpoints:
        parser.error("checkpoints must be given, or --compare")
    torch.set_num_threads(1)
    numbers = {"commit": np.array(commit_of(Path(mechdiffusers.__file__).parent) or "unknown")}
    logger.info("%s, commit %s", mechdiffusers.__file__, numbers["commit"])
    for checkpoint in arguments.checkpoints:
        start = time.perf_counter()
        for name, values in numbers_of(checkpoint):
            found = values.detach().numpy() if isinstance(values, torch.Tensor) else values
            numbers[f"{checkpoint.name}/{name}"] = found
        logger.info("%s: %.0f s", checkpoint.name, time.perf_counter() - start)
    arguments.numbers.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.numbers, **numbers)


def numbers_of(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """All numbers of a checkpoint by name."""
    pipe = LatentDDPMPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    designs, response = designs_and_response(pipe, Path("data") / checkpoint.name / "heldout.parquet")
    yield from {"designs": designs, "response": response}.items()
    yield from images(pipe, response)
    yield "predicted response", pipe.predict_response(images=designs)
    latents = pipe.encode(images=designs)
    yield "latents, mean", latents
    yield "latents, sampled", pipe.encode(images=designs, sample_posterior=True, generator=seeded())
    yield "decoded latents", pipe.decode(latents=latents, output_type="np")
    for name, condition in zip(RESPONSES, (None, response), strict=True):
        for kind, values in continuous_time(pipe, latents[:2], None if condition is None else condition[:2]):
            yield f"{kind}, {name}", values
        for kind, values in likelihoods(pipe, designs[:NUM], condition):
            yield f"{kind}, {name}", values


def designs_and_response(pipe: Any, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Eight designs, and the responses of the first of them."""
    if not file.exists():
        designs = pipe(batch_size=2 * NUM, num_inference_steps=20, generator=seeded(), output_type="np").images[..., 0]
        return designs, pipe.predict_response(images=designs[:NUM]).numpy()
    rows = Dataset(pq.read_table(file)).select(range(2 * NUM)).with_format("numpy")[:]
    return rows["image"].astype(np.float32), rows["response"][:NUM]  # pixels are stored as bool


def images(pipe: Any, response: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Images, and their latents before they are decoded: by each scheduler, and by each way to use a response."""
    own = pipe.scheduler
    fast = stock_scheduler("dpmsolver++", own.config)
    guided = {"guidance_scale": 2.0, "guidance_rescale": 0.5, "guidance_start": 0.2, "guidance_stop": 0.8}
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "VDM": (own, {"num_inference_steps": 20}),
        "DPM-Solver++": (fast, {}),
        "DDIM": (stock_scheduler("ddim", own.config), {}),
        "probability flow, Heun": (ProbabilityFlowScheduler.from_config(own.config, solver="heun"), {}),
        "predictor-corrector": (PredictorCorrectorScheduler.from_config(own.config), {}),
        "with response": (fast, {"response": response}),
        "with response, guided": (fast, {"response": response, **guided}),
        "with response, refined": (fast, {"response": response, "num_candidates": 3, "num_refinements": 1}),
    }
    for name, (scheduler, options) in calls.items():
        pipe.scheduler = scheduler
        last: dict[str, torch.Tensor] = {}

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict, last: dict = last) -> dict:
            last.update(tensors)
            return tensors

        options = {"num_inference_steps": 10, "batch_size": NUM, "callback_on_step_end": keep, **options}
        yield f"images, {name}", pipe(generator=seeded(), output_type="np", **options).images[..., 0]
        yield f"latents of images, {name}", last["latents"]
    pipe.scheduler = own


def continuous_time(pipe: Any, latents: torch.Tensor, response: np.ndarray | None) -> Iterator[tuple[str, Any]]:
    """Scores of latents, their noise by the probability flow, and what the flow makes of latents as if of noise."""
    found = diffusion(pipe, response)
    for timestep in (20, 500.5):
        yield f"score at timestep {timestep}", found.score(latents=latents, timestep=timestep)
    yield "noise of latents", found.to_noise(latents=latents, num_steps=2)
    yield "latents of noise", found.from_noise(noise=latents, num_steps=2)


def likelihoods(pipe: Any, designs: np.ndarray, response: np.ndarray | None) -> Iterator[tuple[str, Any]]:
    """Log-likelihoods, their errors and their terms in the order of their names, by each bound."""
    for name, bound in {"continuous": partial(pipe.log_likelihood, num_samples=2), **bounds(pipe)}.items():
        num = 1 if name == "flow, adaptive" else NUM
        condition = None if response is None else response[:num]
        output = bound(images=designs[:num], response=condition, generator=seeded())
        yield f"log-likelihood, {name}", output.log_likelihood
        yield f"error of log-likelihood, {name}", output.error
        yield f"terms of log-likelihood, {name}", torch.stack([output.terms[term] for term in sorted(output.terms)])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def comparison(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, Any]:
    """Which numbers are identical, and how far the others are apart."""
    commits = {"old_commit": str(old.pop("commit")), "new_commit": str(new.pop("commit"))}
    both = [name for name in old if name in new]
    differing = {name: difference(old[name], new[name]) for name in both if digest(old[name]) != digest(new[name])}
    means = {name: {"mean": float(new[name].mean(dtype=np.float64)), "sha256": digest(new[name])} for name in both}
    return {
        **commits,
        "identical": len(both) - len(differing),
        "differing": differing,
        "only_in_one": sorted(old.keys() ^ new.keys()),
        "numbers": means,
    }


def difference(old: np.ndarray, new: np.ndarray) -> dict[str, Any]:
    if old.shape != new.shape or old.dtype != new.dtype:
        return {"old": f"{old.dtype} {old.shape}", "new": f"{new.dtype} {new.shape}"}
    return {
        "entries_differing": int((old != new).sum()),
        "entries": old.size,
        "largest_difference": float(np.abs(new.astype(np.float64) - old).max()),
        "largest_entry": float(np.abs(old).max()),
        "old_sha256": digest(old),
    }


def digest(values: np.ndarray) -> str:
    """SHA-256 of an array's dtype, shape and bytes."""
    return hashlib.sha256(f"{values.dtype} {values.shape} ".encode() + values.tobytes()).hexdigest()


if __name__ == "__main__":
    main()
