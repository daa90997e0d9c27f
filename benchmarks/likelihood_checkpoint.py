"""How likely are held-out designs under the released checkpoint, and what does a value cost?

    python benchmarks/likelihood_checkpoint.py value
    python benchmarks/likelihood_checkpoint.py flow
    python benchmarks/likelihood_checkpoint.py mean
    python benchmarks/likelihood_checkpoint.py cost

``value``: nats and bits a pixel of the latent model by the continuous-time bound, beside the same autoencoder with its
own N(0, I) prior, a pixel-space diffusion model's bound (a small ``UNet2DModel`` of ours, trained here) and an
autoregressive baseline (each pixel given those before it within a few rows, by a small perceptron trained here). The
last is no bound but the exact likelihood. Differences have the standard error of pairs.

``flow``: the latent model's value by the probability flow, both parts of its error, and how far it lies above the
continuous-time bound of the same draws from the encoder; and the errors of the flow's defaults.

``mean``: the mean bound over 10,000 designs, its standard error, how long it takes and how much memory, which it had
after a tenth of the designs.

``cost``: evaluations of the network and error of a flow's value by our equal steps in the angle, beside RK45 of scipy
at 1e-5 in the log-SNR, all with the same probe, against 32 equal steps.

A conditional checkpoint is measured without a response.
"""

import argparse
import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from likelihood_baselines import NUM_LEVELS, autoregressive, pixel_diffusion_bound
from record import record
from scipy.integrate import solve_ivp

from mechdiffusers.likelihood import (
    ContinuousDiffusion,
    ContinuousPrior,
    FlowPrior,
    LatentDiffusion,
    LatentLikelihood,
    LikelihoodOutput,
    StandardNormalPrior,
)
from mechdiffusers.likelihood.log_density import LogDensity, flow_log_density
from mechdiffusers.microstructures import random_composites
from mechdiffusers.pipelines import LatentDDPMPipeline

HELD_OUT_SEED = 1_000_000  # training configurations use small seeds
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "composites-32"
NUM = {"value": 256, "flow": 32, "mean": 10_000, "cost": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(NUM))
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--num", type=int, help=f"held-out designs, unless given {NUM}")
    parser.add_argument(
        "--baseline_minutes",
        type=float,
        default=3.0,
        help="training time of the pixel diffusion; a quarter of it for the perceptron",
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(desc=arguments.part)
    num = arguments.num or NUM[arguments.part]
    designs, _ = random_composites(num, size=pipe.vae.config.sample_size, seed=HELD_OUT_SEED)
    if arguments.part == "value":
        figures = value(pipe, designs, 60 * arguments.baseline_minutes)
    else:
        figures = {"flow": flow, "mean": mean_bound, "cost": cost}[arguments.part](pipe, designs)
    record(figures, arguments.output or Path(f"benchmarks/likelihood_{arguments.part}.json"))


def value(pipe: LatentDDPMPipeline, designs: np.ndarray, seconds: float) -> dict[str, Any]:
    generator = torch.Generator()
    bound = LatentLikelihood(pipe, ContinuousPrior(NUM_LEVELS)).elbo(designs, generator=generator.manual_seed(0))
    own = LatentLikelihood(pipe, StandardNormalPrior()).elbo(designs, generator=generator.manual_seed(0))
    pixels, pixel_description = pixel_diffusion_bound(designs, seconds)
    causal, causal_description = autoregressive(designs, seconds / 4)
    num_pixels = designs[0].size
    return {
        "num": len(designs),
        "noise_levels_a_design": NUM_LEVELS,
        "latent_diffusion_continuous_bound": of_values(bound.log_likelihood, num_pixels),
        "autoencoder_with_its_standard_normal_prior": of_values(own.log_likelihood, num_pixels),
        "diffusion_less_standard_normal_prior_nats": pair(bound.log_likelihood - own.log_likelihood),
        "pixel_diffusion_continuous_bound": {**of_values(pixels, num_pixels), **pixel_description},
        "autoregressive_exact": {**of_values(causal, num_pixels), **causal_description},
        "terms_of_the_bound_nats": {name: term.mean().item() for name, term in bound.terms.items()},
        "latent_dims": math.prod(pipe.latent_shape),
    }


def flow(pipe: LatentDDPMPipeline, designs: np.ndarray) -> dict[str, Any]:
    """Values of few enough error to stand, beside the bound at so many noise levels that its own noise is small."""
    generator = torch.Generator().manual_seed(0)
    bound = LatentLikelihood(pipe, ContinuousPrior(64)).elbo(designs, generator=generator).log_likelihood
    found, errors_found = flow_values(pipe, designs, num_steps=10, num_probes=32)
    peak = peak_memory()
    few = designs[: max(1, len(designs) // 4)]
    return {
        "num": len(designs),
        **of_values(found.log_likelihood, designs[0].size),
        **errors_found,
        "peak_memory_mebibytes": peak,
        "continuous_bound": {"noise_levels_a_design": 64, **of_values(bound, designs[0].size)},
        "less_continuous_bound_nats": pair(found.log_likelihood - bound),
        "defaults": {"num": len(few), **flow_values(pipe, few, num_steps=8, num_probes=8)[1]},
    }


@dataclass(frozen=True)
class RecordedFlow(FlowPrior):
    """Keeps the errors of every batch, which an output has the sum of."""

    errors: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def log_density(self, *arguments: Any) -> LogDensity:  # noqa: D102
        found = super().log_density(*arguments)
        self.errors.append(found.errors)
        return found


def flow_values(
    pipe: LatentDDPMPipeline, designs: np.ndarray, num_steps: int, num_probes: int
) -> tuple[LikelihoodOutput, dict[str, Any]]:
    """The flow's likelihoods, and their errors a latent dimension: those of the steps, of the probes and of both."""
    prior = RecordedFlow(num_steps, num_probes)
    output = LatentLikelihood(pipe, prior).elbo(designs, generator=torch.Generator().manual_seed(0))
    dims = math.prod(pipe.latent_shape)
    of = {"both": output.error, **{name: torch.cat([part[name] for part in prior.errors]) for name in prior.errors[0]}}
    return output, {
        "num_steps": num_steps,
        "num_probes": num_probes,
        "is_lower_bound": output.is_lower_bound,
        "error_nats_per_latent_dim": {
            name: {"largest": error.max().item() / dims, "mean": error.mean().item() / dims}
            for name, error in of.items()
        },
    }


def of_values(nats: torch.Tensor, num_pixels: int) -> dict[str, float]:
    error = nats.std() / len(nats) ** 0.5
    per_bit = num_pixels * math.log(2)
    return {
        "nats": nats.mean().item(),
        "nats_standard_error": error.item(),
        "bits_per_dim": -nats.mean().item() / per_bit,
        "bits_per_dim_standard_error": error.item() / per_bit,
    }


def pair(difference: torch.Tensor) -> dict[str, float]:
    error = difference.std() / len(difference) ** 0.5
    return {
        "mean": difference.mean().item(),
        "standard_error": error.item(),
        "ratio": (difference.mean() / error).item(),
    }


def mean_bound(pipe: LatentDDPMPipeline, designs: np.ndarray) -> dict[str, Any]:
    generator, likelihood = torch.Generator(), LatentLikelihood(pipe, ContinuousPrior(num_levels=1))
    likelihood.elbo(designs[: len(designs) // 10], generator=generator.manual_seed(0))
    early_peak = peak_memory()
    start = time.perf_counter()
    output = likelihood.elbo(designs, generator=generator.manual_seed(0))
    seconds = time.perf_counter() - start
    dims = math.prod(pipe.latent_shape)
    return {
        "num": len(designs),
        "noise_levels_a_design": 1,
        **of_values(output.log_likelihood, designs[0].size),
        "standard_error_nats_per_latent_dim": (output.log_likelihood.std() / len(designs) ** 0.5 / dims).item(),
        "minutes": seconds / 60,
        "peak_memory_mebibytes": peak_memory(),
        "peak_memory_mebibytes_after_a_tenth": early_peak,
    }


def peak_memory() -> float:
    """Of this process since it began, PyTorch, the checkpoint and the designs included, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost(pipe: LatentDDPMPipeline, designs: np.ndarray) -> dict[str, Any]:
    """Of values with one fixed probe, the evaluations and the largest and root mean square error a latent dimension."""
    generator = torch.Generator().manual_seed(0)
    latents = pipe.encode(designs, sample_posterior=True, generator=generator).double()
    diffusion = LatentDiffusion(pipe)
    calls = [0]
    denoise = diffusion.denoise

    def counted(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return denoise(x, timesteps)

    diffusion.denoise = counted
    dims = latents[0].numel()
    probes = torch.randn(len(latents), 2, dims, generator=generator, dtype=torch.float64).sign()
    probes[:, 1] = probes[:, 0]

    def ours(**options: Any) -> tuple[torch.Tensor, int]:
        calls[0] = 0
        found = flow_log_density(diffusion, latents, probes, **options)
        return (found.terms["noise_log_density"] + found.terms["volume_change"]) / dims, calls[0]

    reference, _ = ours(num_steps=32)
    figures: dict[str, Any] = {"num": len(designs)}
    for num_steps in (2, 4, 8):
        found, evaluations = ours(num_steps=num_steps)
        figures[f"ours_{num_steps}_steps"] = errors(found - reference, evaluations)
    found, evaluations = ours(tolerance=1e-3)
    figures["ours_adaptive_1e-3"] = errors(found - reference, evaluations)
    calls[0] = 0
    found = scipy_rk45(diffusion, latents, probes[:, 0])
    figures["rk45_1e-5"] = errors(found - reference, calls[0])
    for name in ("ours_2_steps", "ours_4_steps", "ours_8_steps"):
        figures[name]["rk45_evaluations_over_ours"] = calls[0] / figures[name]["evaluations_with_error_estimate"]
    return figures


def errors(difference: torch.Tensor, evaluations: int) -> dict[str, float]:
    return {
        "evaluations_with_error_estimate": evaluations,
        "largest_error_nats_per_latent_dim": difference.abs().max().item(),
        "rms_error_nats_per_latent_dim": difference.square().mean().sqrt().item(),
    }


def scipy_rk45(diffusion: ContinuousDiffusion, latents: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    """Log-densities a dimension by RK45 at 1e-5, the batch as one state, as score-based codes have it."""
    high, low = diffusion.curve.ends
    dims = latents[0].numel()
    log_alpha = 0.5 * math.log(1 / (1 + math.exp(-high)))

    def slope(level: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[: latents.numel()]).reshape(latents.shape).requires_grad_()
        log_snr = torch.full((len(latents),), level, dtype=torch.float64)
        velocity = diffusion.velocity(x, log_snr)
        (product,) = torch.autograd.grad(velocity, x, probe.reshape(x.shape))
        divergence = (product.flatten(1) * probe).sum(1)
        by_level = -0.5 / (2 * math.cosh(level / 2))  # d angle / d log-SNR
        return by_level * torch.cat([velocity.detach().flatten(), divergence]).numpy()

    start = np.concatenate([math.exp(log_alpha) * latents.flatten().numpy(), np.zeros(len(latents))])
    end = torch.from_numpy(solve_ivp(slope, (high, low), start, method="RK45", rtol=1e-5, atol=1e-5).y[:, -1])
    noise, change = end[: latents.numel()].reshape(len(latents), -1), end[latents.numel() :]
    density = -(noise.square() + math.log(2 * math.pi)).sum(1) / 2 + change
    return density / dims + log_alpha


if __name__ == "__main__":
    main()
