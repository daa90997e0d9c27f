"""How good are samples at equal numbers of network evaluations, our schedulers beside the stock ones?

    python benchmarks/scheduler_quality.py analytic
    python benchmarks/scheduler_quality.py checkpoint

``analytic``: the sliced Wasserstein distance to exact samples of two densities whose denoiser is exact; ``exact`` is
that between sets of exact samples, the least and the greatest of twelve pairs.

``checkpoint``: the released denoiser, all schedulers from the same noise. The root mean square distance of the latents
to the same noise solved with 1,000 steps (of the probability flow: stochastic schedulers go elsewhere and have none),
the share of pixels that differ from the design that solution decodes to, and the two-point and volume-fraction errors
against held-out designs. The distance is what ranks the solvers: the statistics of few designs do not tell them apart.
A conditional checkpoint is asked for no response.

Deterministic schedulers of higher order, stock or ours, run in trailing spacing, as the released checkpoint has, and in
equal steps of log-SNR (``-log-snr``).

What is measured is kept in ``--work`` scheduler by scheduler, so that an interrupted run goes on; what another version
of the schedulers or of this file measured is not taken.

``IPNDMScheduler`` of diffusers has a noise schedule of its own and no prediction type. What it makes of a sample and an
output, sigma x + alpha v, is the noise of a network that predicts the velocity, so that it samples these models where
it is given their noise levels.
"""

import argparse
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import IPNDMScheduler, PNDMScheduler
from record import record
from tqdm.auto import tqdm

from analytic_denoisers import GaussianMixture, two_moons
from mechdiffusers.evaluation import sliced_wasserstein_distance, two_point_error, volume_fraction_distance
from mechdiffusers.microstructures import random_composites
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import (
    PredictorCorrectorScheduler,
    ProbabilityFlowScheduler,
    VDMScheduler,
    estimate_velocity_error,
    optimize_steps,
    stock_scheduler,
)

EVALUATIONS = {"analytic": (4, 8, 16, 32, 64), "checkpoint": (4, 8, 16, 32, 64)}
OPTIMIZED = {"analytic": (4, 8, 16), "checkpoint": (4, 8, 16)}
STOCK = ("deis", "dpmsolver++", "dpmsolver++3m", "unipc", "ddim", "heun", "euler-karras", "pndm", "ipndm", "ddpm")
#: Stock schedulers in equal steps of log-SNR: the one whose noise schedule they keep, and what it takes.
STOCK_LOG_SNR: dict[str, tuple[str, dict[str, Any]]] = {
    "deis-3-log-snr": ("deis", {"solver_order": 3, "use_exponential_sigmas": True}),
    "dpmsolver++-log-snr": ("dpmsolver++", {"use_lu_lambdas": True}),
    "dpmsolver++3m-log-snr": ("dpmsolver++3m", {"use_lu_lambdas": True}),
    "unipc-log-snr": ("unipc", {"use_exponential_sigmas": True}),
    "ipndm-log-snr": ("ipndm", {"timestep_spacing": "log_snr"}),
}
LOG_SNR = {"timestep_spacing": "log_snr"}
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow-adams-optimized": (ProbabilityFlowScheduler, {"solver": "adams_bashforth", **LOG_SNR}),
    "vdm": (VDMScheduler, {"variance_type": "fixed_small"}),
    "vdm-optimal-variance": (VDMScheduler, {"variance_type": "optimal"}),
    "flow-euler": (ProbabilityFlowScheduler, {"solver": "euler"}),
    "flow-heun": (ProbabilityFlowScheduler, {"solver": "heun"}),
    "flow-heun-log-snr": (ProbabilityFlowScheduler, {"solver": "heun", **LOG_SNR}),
    "flow-rk4": (ProbabilityFlowScheduler, {"solver": "rk4"}),
    "flow-rk4-log-snr": (ProbabilityFlowScheduler, {"solver": "rk4", **LOG_SNR}),
    "flow-adams": (ProbabilityFlowScheduler, {"solver": "adams_bashforth"}),
    "flow-adams-log-snr": (ProbabilityFlowScheduler, {"solver": "adams_bashforth", **LOG_SNR}),
    "predictor-corrector": (PredictorCorrectorScheduler, {}),
}
STOCHASTIC = ("ddpm", "vdm", "vdm-optimal-variance", "predictor-corrector")
Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class IPNDM:
    """``IPNDMScheduler`` at the noise levels of a model that predicts the velocity."""

    init_noise_sigma = 1.0

    def __init__(self, config: Any, **options: Any):
        if config["prediction_type"] != "v_prediction":
            raise ValueError(f"config must have the prediction_type 'v_prediction', got {config['prediction_type']!r}")
        self._grid = ProbabilityFlowScheduler.from_config(config, solver="euler", **options)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Lays the grid."""
        self._grid.set_timesteps(num_inference_steps)
        self.timesteps = self._grid.timesteps
        sigmas = torch.sigmoid(-self._grid.curve(self.timesteps)).sqrt()
        self._stock = IPNDMScheduler(trained_betas=[*sigmas.tolist(), 0.0])
        self._stock.set_timesteps(num_inference_steps)
        self._places = iter(self._stock.timesteps)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The sample itself."""
        return sample

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Any:
        """The stock step, at the stock scheduler's own name for the timestep."""
        return self._stock.step(model_output, next(self._places), sample)


def make(
    part: str, name: str, config: Any, denoiser: Denoiser, noise: torch.Tensor, clean: Callable[[], torch.Tensor]
) -> Any:
    """A scheduler by name; what has to be learned of the denoiser is learned from ``noise`` and ``clean``."""
    if name == "pndm":  # not among our stock schedulers, as it cannot take a network that predicts the sample
        return PNDMScheduler.from_config(config, skip_prk_steps=True)
    if name.startswith("ipndm"):
        return IPNDM(config, **STOCK_LOG_SNR.get(name, ("", {}))[1])
    if name in STOCK:
        return stock_scheduler(name, config)
    if name in STOCK_LOG_SNR:
        base, options = STOCK_LOG_SNR[name]
        scheduler = stock_scheduler(base, config)
        return type(scheduler).from_config(scheduler.config, **options)
    scheduler_class, options = OURS[name]
    if name == "vdm-optimal-variance":
        generator = torch.Generator().manual_seed(2)
        options = {**options, "velocity_error": estimate_velocity_error(denoiser, _vdm(config), clean(), 20, generator)}
    scheduler = scheduler_class.from_config(config, **options)
    if name == "flow-adams-optimized":
        for num in OPTIMIZED[part]:
            scheduler = optimize_steps(denoiser, scheduler, noise, num, iterations=4 if num < 16 else 2)
    return scheduler


def _vdm(config: Any) -> VDMScheduler:
    return VDMScheduler.from_config(config)


def num_steps(name: str, evaluations: int) -> int | None:
    """Timesteps that cost so many evaluations, one too few if there is no such number; None if that is too coarse."""
    steps = {
        "heun": (evaluations + 1) // 2,
        "rk4": (evaluations + 3) // 4,
        "pndm": evaluations - 1,
        "predictor-corrector": evaluations // 2,
    }.get(name.removeprefix("flow-").removesuffix("-log-snr"), evaluations)
    return steps if steps >= 2 else None


def solve(scheduler: Any, denoiser: Denoiser, noise: torch.Tensor, steps: int) -> tuple[torch.Tensor, int]:
    """The end of the way and the number of evaluations."""
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(3)} if takes_generator else {}
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x, len(scheduler.timesteps)


def analytic(name: str, num: int) -> dict[str, Any]:
    """Sliced Wasserstein distances of a scheduler's samples of both densities, by evaluations."""
    mixture = GaussianMixture(
        [0.2, 0.3, 0.5], [[-1.5, 0.0], [1.0, 1.2], [0.8, -1.0]], (0.06 * torch.eye(2)).expand(3, 2, 2)
    )
    config = VDMScheduler(timestep_spacing="trailing", prediction_type="v_prediction").config
    curve = _vdm(config).curve
    figures: dict[str, Any] = {}
    for kind, density in (("mixture", mixture), ("moons", two_moons())):
        if name == "exact":
            sets = [density.sample(num, torch.Generator().manual_seed(seed)).numpy() for seed in range(24)]
            distances = [sliced_wasserstein_distance(*pair) for pair in zip(sets[::2], sets[1::2], strict=True)]
            figures[kind] = {"least": min(distances), "greatest": max(distances)}
            continue

        def denoiser(x: torch.Tensor, t: torch.Tensor, density: GaussianMixture = density) -> torch.Tensor:
            return density.predict(x, curve(t), "v_prediction")

        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(num, 2, generator=generator, dtype=torch.float64)
        exact = density.sample(num, generator)
        learning = torch.randn(64, 2, generator=generator, dtype=torch.float64)
        clean = density.sample(1000, generator)
        scheduler = make("analytic", name, config, denoiser, learning, lambda clean=clean: clean)
        figures[kind] = {}
        for evaluations in EVALUATIONS["analytic"]:
            steps = num_steps(name, evaluations)
            if steps is not None:
                samples, used = solve(scheduler, denoiser, noise, steps)
                figures[kind][str(evaluations)] = {
                    "evaluations": used,
                    "sliced_wasserstein": sliced_wasserstein_distance(samples.numpy(), exact.numpy()),
                }
    return figures


class Checkpoint:
    """The released model, noise to start from, and what the samples are compared with."""

    def __init__(self, folder: Path, num: int, reference: Path):
        self.pipe = LatentDDPMPipeline.from_pretrained(folder)
        self.config = self.pipe.scheduler.config
        no_response = torch.full((1, *self.pipe.response_encoder.response_shape), float("nan"))
        self.tokens = self.pipe.response_encoder(no_response).detach()
        generator = torch.Generator().manual_seed(0)
        channels, size = self.pipe.unet.config.in_channels, self.pipe.unet.config.sample_size
        self.noise = torch.randn(num, channels, size, size, generator=generator)
        self.learning = torch.randn(8, channels, size, size, generator=generator)
        self.heldout, _ = random_composites(2048, size=self.pipe.vae.config.sample_size, seed=1_000_000)
        if not reference.exists():
            fine = ProbabilityFlowScheduler.from_config(
                self.config, solver="adams_bashforth", timestep_spacing="log_snr"
            )
            np.save(reference, solve(fine, self.denoiser, self.noise, 1000)[0].numpy())
        self.reference = torch.from_numpy(np.load(reference))
        self.reference_designs = self.designs(self.reference)

    @torch.no_grad()
    def denoiser(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network predicts."""
        return self.pipe.unet(x, t, encoder_hidden_states=self.tokens.expand(len(x), -1, -1)).sample

    def designs(self, latents: torch.Tensor) -> np.ndarray:
        """Designs (B, H, W) that latents decode to."""
        return self.pipe.decode(latents, output_type="np")[..., 0]

    def clean(self) -> torch.Tensor:
        """Latents that no training saw."""
        designs, _ = random_composites(32, size=self.pipe.vae.config.sample_size, seed=2_000_000)
        return self.pipe.encode(designs)

    def measure(self, name: str) -> dict[str, Any]:
        """Figures of a scheduler, by evaluations."""
        scheduler = make("checkpoint", name, self.config, self.denoiser, self.learning, self.clean)
        figures: dict[str, Any] = {}
        for number in EVALUATIONS["checkpoint"]:
            steps = num_steps(name, number)
            if steps is None:
                continue
            latents, used = solve(scheduler, self.denoiser, self.noise, steps)
            designs = self.designs(latents)
            figures[str(number)] = {"evaluations": used, **self.statistics(designs)}
            if name not in STOCHASTIC:
                figures[str(number)]["distance_to_1000_steps"] = float(
                    (latents - self.reference).square().mean().sqrt()
                )
                figures[str(number)]["pixels_differing"] = float(np.mean(designs != self.reference_designs))
        return figures

    def statistics(self, designs: np.ndarray) -> dict[str, float]:
        """Errors against the held-out designs."""
        return {
            "two_point_error": two_point_error(designs, self.heldout),
            "volume_fraction_distance": volume_fraction_distance(designs, self.heldout),
        }


def version(checkpoint: Path | None) -> str:
    """A hash of what the figures come from: this file, the schedulers and a checkpoint's weights."""
    sources = [Path(__file__), *sorted(Path(inspect.getfile(ProbabilityFlowScheduler)).parent.glob("*.py"))]
    if checkpoint:
        sources += sorted(checkpoint.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("analytic", "checkpoint"))
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/composites-32"))
    parser.add_argument("--num", type=int, help="samples; 4,000 analytic ones and 64 designs unless given")
    names = [*OURS, *STOCK, *STOCK_LOG_SNR]
    parser.add_argument("--schedulers", nargs="+", default=names, choices=names)
    parser.add_argument("--work", type=Path, default=Path("runs/scheduler_quality"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    num = arguments.num or (4000 if arguments.part == "analytic" else 64)
    model = None
    of_version = version(arguments.checkpoint if arguments.part == "checkpoint" else None)
    if arguments.part == "checkpoint":
        model = Checkpoint(arguments.checkpoint, num, arguments.work / f"reference-{num}-{of_version}.npy")
    figures: dict[str, Any] = {"num": num}
    chosen = arguments.schedulers if model else ["exact", *arguments.schedulers]
    for name in tqdm(chosen, desc=arguments.part, unit="scheduler"):
        kept = arguments.work / f"{arguments.part}-{num}-{name}-{of_version}.json"
        if not kept.exists():
            measured = model.measure(name) if model else analytic(name, num)
            kept.write_text(json.dumps(measured))
        figures[name] = json.loads(kept.read_text())
    if model:
        figures["1,000 steps"] = model.statistics(model.reference_designs)
        figures["as many held-out designs"] = model.statistics(random_composites(num, size=32, seed=3_000_000)[0])
    record(figures, arguments.output or Path(f"benchmarks/scheduler_quality_{arguments.part}.json"))


if __name__ == "__main__":
    main()
