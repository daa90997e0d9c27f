"""A plain diffusers DDPM on pixels beside the latent model: same network, same responses, trained for as long.

    python benchmarks/pixel_baseline.py checkpoints/composites-32 --dataset data/composites-32 --minutes 60

The denoiser has the configuration of the checkpoint's, at the size of the designs instead of that of their latents, and
its encoder of responses; noise schedule and prediction type are the checkpoint's too. The loop is that of the diffusers
tutorials: AdamW, a warm-up, moving averages of the weights; a tenth of the responses is dropped, and half of the
designs are turned by 180 degrees, which leaves their responses as they are. Its samples are clipped to [-1, 1], as is
usual on pixels. Error and time at 1,000 ancestral steps and at 20 DDIM steps of three: the pixel model, the
checkpoint's denoiser by itself, and that with the checkpoint's predictor, which was trained beside it. One candidate a
design, no classifier-free guidance. What is trained and simulated is kept in --run_dir.
"""

import json
import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from candidates import common_arguments, errors_of, fingerprint, kept, summary
from diffusers import UNet2DConditionModel
from record import record
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation.inverse_design import designs_for, load_split, stored_designs, stored_responses
from mechdiffusers.mechanics import ResponseSpec
from mechdiffusers.models import ResponseEncoder
from mechdiffusers.pipelines import LatentDDPMPipeline
from mechdiffusers.schedulers import stock_scheduler
from mechdiffusers.training.moving_average import MovingAverage


def main() -> None:
    parser = common_arguments(__doc__, "pixel_baseline", num_targets=32)
    parser.add_argument("--minutes", type=float, default=60, help="of training: as long as the checkpoint's")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ancestral_steps", type=int, default=1000)
    parser.add_argument("--ddim_steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    pipe = LatentDDPMPipeline.from_pretrained(arguments.checkpoint).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    heldout = load_split(arguments.dataset, "heldout")
    spec, stored = ResponseSpec.of(heldout), stored_responses(heldout)
    targets = stored[np.isfinite(stored).all((1, 2))][: arguments.num_targets]
    unet, encoder, training = trained(pipe, arguments)

    def pixels(wanted: np.ndarray, num: int, name: str, steps: int) -> np.ndarray:
        scheduler = stock_scheduler(name, pipe.scheduler.config)
        scheduler.register_to_config(clip_sample=True)
        return sampled(unet, encoder, scheduler, wanted, num, steps, arguments)

    def latents(scale: float, wanted: np.ndarray, num: int, name: str, steps: int) -> np.ndarray:
        pipe.scheduler = stock_scheduler(name, pipe.scheduler.config)
        options = {"num_inference_steps": steps, "predictor_guidance_scale": scale, "spec": spec}
        return designs_for(pipe, wanted, num, seed=arguments.seed, **options)

    figures: dict[str, Any] = {"pixel_training": training}
    latent, pixel = fingerprint(arguments.checkpoint), fingerprint(arguments.run_dir)
    models = {
        "pixel": (pixel, pixels),
        "latent": (latent, partial(latents, 0.0)),
        "latent with predictor": (latent, partial(latents, 4.0)),
    }
    samplers = {"ancestral": ("ddpm", arguments.ancestral_steps), "DDIM": ("ddim", arguments.ddim_steps)}
    for label, sampler in samplers.items():
        for model, (files, make) in models.items():
            recipe = [model, files, sampler, arguments.num_designs, arguments.seed, targets.tolist()]
            designs = kept(arguments.run_dir, recipe, partial(make, targets, arguments.num_designs, *sampler))
            start = time.perf_counter()
            make(targets[:1], arguments.num_designs, *sampler)
            figures[f"{model}, {sampler[1]} {label} steps"] = {
                "seconds_for_the_designs_of_a_target": time.perf_counter() - start,
                **summary(errors_of(designs, targets, spec, arguments.run_dir / "responses", arguments.device)),
            }
    record(figures, arguments.output)


def trained(pipe: LatentDDPMPipeline, arguments: Any) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Denoiser and encoder, from the run's folder or trained into it, and how long that took."""
    size = pipe.vae.config.sample_size
    config = {**pipe.unet.config, "sample_size": size, "in_channels": 1, "out_channels": 1}
    unet = UNet2DConditionModel.from_config(config).to(arguments.device, memory_format=torch.channels_last)
    encoder = ResponseEncoder.from_config(pipe.response_encoder.config).to(arguments.device)
    both = nn.ModuleList([unet, encoder])
    file = arguments.run_dir / "weights.safetensors"
    if not file.exists():
        training = train(both, stock_scheduler("ddpm", pipe.scheduler.config), arguments)
        weights = {name: weight.contiguous() for name, weight in both.state_dict().items()}
        with atomic_write(file) as unfinished:
            save_file(weights, unfinished, metadata={"training": json.dumps(training)})
    with safe_open(file, "pt") as stored:
        both.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        training = json.loads(stored.metadata()["training"])
    parameters = {"pixel": count(both), "latent": count(pipe.unet) + count(pipe.response_encoder) + count(pipe.vae)}
    return unet.eval(), encoder.eval(), {**training, "parameters": parameters}


def train(both: nn.ModuleList, scheduler: Any, arguments: Any) -> dict[str, Any]:
    """Trains for the given time, to the averaged weights; returns what it took."""
    unet, encoder = both
    rows = load_split(arguments.dataset, "train")
    response = torch.from_numpy(stored_responses(rows)).float()
    solved = response.isfinite().all(-1).all(-1)
    designs = 2 * torch.from_numpy(stored_designs(rows))[solved, None] - 1
    response = response[solved]
    optimizer = torch.optim.AdamW(both.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    average = MovingAverage(both.parameters(), decay=0.9995)
    losses: list[float] = []
    start, spent, steps = time.perf_counter(), 0.0, 0
    with tqdm(total=1.0, desc="train", bar_format="{desc}: {percentage:.0f} % {postfix}") as bar:
        while spent < 1:
            warm = min(1.0, (steps + 1) / 200)
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * warm * (1 + math.cos(math.pi * spent)) / 2
            chosen = torch.randint(len(designs), (arguments.batch_size,))
            clean, wanted = designs[chosen].to(arguments.device), response[chosen]
            turned = torch.rand(len(clean), 1, 1, 1, device=clean.device) < 0.5
            clean = torch.where(turned, clean.flip(2, 3), clean)
            wanted[torch.rand(len(wanted)) < 0.1] = math.nan  # dropped
            noise = torch.randn_like(clean)
            timesteps = torch.randint(len(scheduler), (len(clean),), device=clean.device)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            prediction = unet(noisy, timesteps, encoder_hidden_states=encoder(wanted.to(clean.device))).sample
            loss = mse_loss(prediction, aim(scheduler, clean, noise, timesteps))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            average.step(both.parameters())
            losses.append(loss.item())
            steps += 1
            now = (time.perf_counter() - start) / (60 * arguments.minutes)
            bar.update(min(now, 1.0) - min(spent, 1.0))
            bar.set_postfix_str(f"{steps} steps, loss {np.mean(losses[-100:]):.4f}", refresh=False)
            spent = now
    average.copy_to(both.parameters())
    last = float(np.mean(losses[-max(1, steps // 10) :]))
    return {"minutes": spent * arguments.minutes, "steps": steps, "last_loss": last}


def aim(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser is to predict."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return {"epsilon": noise, "sample": clean}[kind]


@torch.no_grad()
def sampled(
    unet: nn.Module, encoder: nn.Module, scheduler: Any, targets: np.ndarray, num: int, steps: int, arguments: Any
) -> np.ndarray:
    """Designs of the pixel model, shape ``(T num, H, W)``, thresholded."""
    generator = torch.Generator().manual_seed(arguments.seed)
    wanted = torch.from_numpy(targets).float().repeat_interleave(num, dim=0)
    designs = []
    for batch in tqdm(wanted.split(256), desc=f"{steps} steps on pixels", unit="batch"):
        tokens = encoder(batch.to(arguments.device))
        size = unet.config.sample_size
        x = torch.randn(len(batch), 1, size, size, generator=generator).to(arguments.device)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, encoder_hidden_states=tokens).sample, t, x, generator=generator).prev_sample
        designs.append((x[:, 0] > 0).float().cpu().numpy())
    return np.concatenate(designs)


def count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
