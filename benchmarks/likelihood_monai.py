"""A likelihood whose truth is known, by MONAI's ``get_likelihood`` and by ours, with the same exact denoiser.

    pip install --no-deps monai==1.5.1
    python benchmarks/likelihood_monai.py

Data: 8-bit images of 8 x 8 independent pixels, Gaussian about one half with standard deviation 0.2, rounded to
multiples of 1/255, so that the probability of each is known. The denoiser is exact, the noise schedule is that of 1,000
linear betas. MONAI returns a negative log-likelihood a dimension; its sum over time steps has no term for the noise's
end, and a variance of 1e-20 at timestep 0. Ours is a density, and the bins are narrow: the logarithm of their width is
added.
"""

import argparse
import math
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDPMScheduler as MonaiScheduler
from record import record

from analytic_denoisers import GaussianMixture
from mechdiffusers.likelihood import ContinuousDiffusion
from mechdiffusers.likelihood.log_density import ancestral_terms, continuous_terms, flow_log_density
from mechdiffusers.schedulers.log_snr_curve import LogSnrCurve

DIMS, MEAN, STD = 64, 0.5, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/likelihood_monai.json"))
    arguments = parser.parse_args()
    covariance = STD**2 * torch.eye(DIMS, dtype=torch.float64)
    data = GaussianMixture([1.0], [[MEAN] * DIMS], covariance[None])
    scheduler = DDPMScheduler(clip_sample=False)
    images = (data.sample(arguments.num, torch.manual_seed(0)) * 255).round() / 255
    images = images.reshape(-1, 1, 8, 8)
    normal = torch.distributions.Normal(MEAN, STD)
    masses = normal.cdf(images + 0.5 / 255) - normal.cdf(images - 0.5 / 255)
    truth = masses.log().flatten(1).mean(1)

    def denoise(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        log_snr = diffusion.log_snr(timesteps).expand(len(x))
        return data.predict(x.flatten(1).double(), log_snr, "epsilon").reshape(x.shape)

    diffusion = ContinuousDiffusion(denoise, LogSnrCurve.of_scheduler(scheduler), "epsilon")
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...] | None = None) -> torch.Tensor:
        if shape is None:
            return torch.rand(len(images), generator=generator, dtype=torch.float64)
        return torch.randn(len(images), *shape, generator=generator, dtype=torch.float64)

    def a_dimension(log_density: torch.Tensor) -> torch.Tensor:
        return log_density / DIMS - math.log(255)

    chain = ancestral_terms(diffusion, images, torch.arange(1000).flip(0), torch.zeros(1000), draw)
    continuous, _ = continuous_terms(diffusion, images, 16, draw)
    flow = flow_log_density(diffusion, images, None)
    theirs = MonaiScheduler(
        num_train_timesteps=1000, schedule="linear_beta", beta_start=1e-4, beta_end=0.02, clip_sample=False
    )
    torch.manual_seed(0)
    cost = DiffusionInferer(theirs).get_likelihood(
        images.float(), lambda x, timesteps, context: denoise(x, timesteps).float(), verbose=False
    )
    values = {
        "monai_get_likelihood": -cost.double(),
        "ours_1000_step_chain_bound": a_dimension(sum(chain.values(), torch.zeros(()))),
        "ours_continuous_bound": a_dimension(sum(continuous.values(), torch.zeros(()))),
        "ours_probability_flow": a_dimension(sum(flow.terms.values(), torch.zeros(()))),
    }
    record(
        {
            "num": arguments.num,
            "truth_nats_per_dim": truth.mean().item(),
            **{
                name: {
                    "mean_error_nats_per_dim": (value - truth).mean().item(),
                    "standard_error": ((value - truth).std() / len(truth) ** 0.5).item(),
                }
                for name, value in values.items()
            },
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
