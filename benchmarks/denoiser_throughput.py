"""Images a second of denoiser training: ours beside a plain loop as the examples of diffusers write it, timed in turn.

    python benchmarks/denoiser_throughput.py --output benchmarks/denoiser_throughput.json

All train the same UNet2DConditionModel, at the same batch size, from the same designs. The plain loop has the encoder
in it, the default memory format and the default optimiser, and no weight averaging. It is timed twice: with one thread,
which is what `accelerate launch` leaves a process on a CPU, and with all cores. Ours is ``run_stage``, which takes all
cores and averages weights, between two entries of the log. The machine does nothing else meanwhile.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from record import record
from torch.utils.data import DataLoader, TensorDataset

from mechdiffusers.microstructures import random_composites
from mechdiffusers.pipelines.pipeline_latent_ddpm import latent_size
from mechdiffusers.training import parse_config
from mechdiffusers.training.accelerators import stage_accelerator
from mechdiffusers.training.autoencoder import LikelihoodAutoencoder, encode_all
from mechdiffusers.training.denoiser import denoising_loss
from mechdiffusers.training.latent_denoiser import LatentDenoiser
from mechdiffusers.training.loop import run_stage

CONFIG = Path(__file__).parents[1] / "training" / "configs" / "composites_32.yaml"
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round, behind the first few")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, help="by default the preset's")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/denoiser_throughput.json"))
    arguments = parser.parse_args()

    config = parse_config(["--config", str(CONFIG), "--seed", "0"])
    config.denoiser_batch_size = arguments.batch_size or config.denoiser_batch_size
    designs, _ = random_composites(2048, size=config.resolution)
    images = torch.from_numpy(designs)[:, None]
    torch.manual_seed(0)
    vae = LikelihoodAutoencoder(config, (config.resolution, config.resolution)).vae.eval()
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    unconditional = TensorDataset((images * 255).to(torch.uint8), torch.empty(len(images), 0, 0))
    latents = TensorDataset(*encode_all(vae, unconditional, torch.device("cpu"), len(images)))

    rates: dict[str, list[float]] = {"ours": [], "plain, as launched": [], "plain, all cores": []}
    for _ in range(arguments.rounds):
        rates["ours"].append(time_ours(config, vae, latents, arguments.steps))
        all_cores = torch.get_num_threads()  # as our stage has set it
        rates["plain, all cores"].append(time_plain(config, vae, images, arguments.steps))
        torch.set_num_threads(1)
        rates["plain, as launched"].append(time_plain(config, vae, images, arguments.steps))
        torch.set_num_threads(all_cores)
    record(
        {
            "images_a_second": {name: statistics.median(values) for name, values in rates.items()},
            "ratio": {name: ratio(rates["ours"], values) for name, values in rates.items() if name != "ours"},
            "rounds": rates,
            "batch_size": config.denoiser_batch_size,
        },
        arguments.output,
    )


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of the ratio of two rates timed in turn."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def time_ours(config, vae, latents: TensorDataset, steps: int) -> float:
    """Images a second of our stage."""
    loss = denoising_loss(config, 0.0, 1.0)
    times = []

    def timed_loss(module, batch, randomness):
        times.append(time.perf_counter())
        return loss(module, batch, randomness)

    with tempfile.TemporaryDirectory() as folder:
        config.output_dir, config.denoiser_steps = folder, WARM_UP + steps + 1
        denoiser = LatentDenoiser(config, latent_size(vae))
        accelerator = stage_accelerator(config, "denoiser")
        run_stage(accelerator, config, "denoiser", denoiser, latents, timed_loss, lambda *_: {"loss": 0.0})
    return steps * config.denoiser_batch_size / (times[WARM_UP + steps] - times[WARM_UP])


def time_plain(config, vae, images: torch.Tensor, steps: int) -> float:
    """Images a second of a loop that encodes every batch."""
    denoiser = LatentDenoiser(config, latent_size(vae))
    unet, tokens = denoiser.unet, denoiser.response_encoder.null_tokens.detach()
    scheduler = DDPMScheduler(prediction_type=config.prediction_type)
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.denoiser_learning_rate)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=1000)
    loader = DataLoader(TensorDataset(images), batch_size=config.denoiser_batch_size, shuffle=True, drop_last=True)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    times = []
    for _ in range(WARM_UP + steps + 1):
        times.append(time.perf_counter())
        (pixels,) = next(batches)
        with accelerator.accumulate(unet):
            with torch.no_grad():
                latents = vae.encode(2 * pixels - 1).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),)).long()
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, tokens.expand(len(latents), -1, -1)).sample
            target = scheduler.get_velocity(latents, noise, timesteps)
            loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return steps * config.denoiser_batch_size / (times[WARM_UP + steps] - times[WARM_UP])


if __name__ == "__main__":
    main()
