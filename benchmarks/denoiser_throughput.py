"""Images a second of denoiser training: ours beside a plain loop as the examples of diffusers write it, timed in turn.

    python benchmarks/denoiser_throughput.py --output benchmarks/denoiser_throughput.json

Both train the same UNet2DConditionModel, at the same batch size, from the same designs. The plain loop has the encoder
in it, the default memory format and the default optimiser, and no weight averaging; ours is ``run_stage`` with weight
averaging, between two entries of the log. The machine does nothing else meanwhile.
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
from mechdiffusers.microstructures import random_composites
from mechdiffusers.pipelines.latent_likelihood import latent_size
from mechdiffusers.training import parse_config
from mechdiffusers.training.autoencoder import LikelihoodAutoencoder, encode_all
from mechdiffusers.training.denoiser import LatentDenoiser, denoising_loss
from mechdiffusers.training.loop import run_stage, stage_accelerator
from record import record
from torch.utils.data import DataLoader, TensorDataset

CONFIG = Path(__file__).parents[1] / "training" / "configs" / "composites_32.yaml"
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round, behind the first few")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/denoiser_throughput.json"))
    arguments = parser.parse_args()

    config = parse_config(["--config", str(CONFIG), "--seed", "0"])
    designs, _ = random_composites(2048, size=config.resolution)
    images = torch.from_numpy(designs)[:, None]
    torch.manual_seed(0)
    vae = LikelihoodAutoencoder(config, (config.resolution, config.resolution)).vae.eval()
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    moments = encode_all(vae, TensorDataset((images * 255).to(torch.uint8)), torch.device("cpu"), len(images))

    ours, plain = [], []
    for _ in range(arguments.rounds):
        ours.append(time_ours(config, vae, moments, arguments.steps))
        plain.append(time_plain(config, vae, images, arguments.steps))
    record(
        {
            "images_a_second": {"ours": statistics.median(ours), "plain": statistics.median(plain)},
            "ratio": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
            "ratio_of_each_round": [a / b for a, b in zip(ours, plain, strict=True)],
            "batch_size": config.denoiser_batch_size,
        },
        arguments.output,
    )


def time_ours(config, vae, moments: torch.Tensor, steps: int) -> float:
    """Images a second of our stage."""
    scheduler = DDPMScheduler(prediction_type=config.prediction_type, clip_sample=False)
    loss = denoising_loss(scheduler, 0.0, 1.0)
    times = []

    def timed_loss(module, batch, randomness):
        times.append(time.perf_counter())
        return loss(module, batch, randomness)

    with tempfile.TemporaryDirectory() as folder:
        config.output_dir, config.denoiser_steps = folder, WARM_UP + steps + 1
        denoiser = LatentDenoiser(config, latent_size(vae)).to(memory_format=torch.channels_last)
        accelerator = stage_accelerator(config, "denoiser")
        run_stage(accelerator, config, "denoiser", denoiser, TensorDataset(moments), timed_loss, lambda *_: {})
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
