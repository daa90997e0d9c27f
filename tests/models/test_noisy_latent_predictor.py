import math

import pytest
import torch

from mechdiffusers.models import NoisyLatentPredictor
from mechdiffusers.schedulers import VDMScheduler


def test_it_learns_what_noisy_latents_tell_and_how_surely():
    """The mean of latents N(y, 1) a pixel: known in the data, and no better than its prior in pure noise."""
    torch.manual_seed(0)
    scheduler, predictor = VDMScheduler(), NoisyLatentPredictor(in_channels=1, hidden_dim=16)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)

    def batch(num: int, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        target = torch.randn(num, 1)
        clean = target[:, :, None, None] + 0.1 * torch.randn(num, 1, 4, 4)
        return scheduler.add_noise(clean, torch.randn_like(clean), timesteps), target

    for _ in range(300):
        timesteps = 999 * torch.rand(64)
        latents, target = batch(64, timesteps)
        optimizer.zero_grad()
        (-predictor.log_likelihood(latents, timesteps, target).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        latents, target = batch(500, torch.tensor(20.0))
        mean, log_variance = predictor(latents, torch.tensor(20.0))
        assert (mean - target).std() < 0.3
        assert log_variance.exp().mean() < 0.1
        _, log_variance = predictor(batch(500, torch.tensor(990.0))[0], torch.tensor(990.0))
        assert 0.5 < log_variance.exp().mean() < 2


def test_its_log_likelihood_is_that_of_a_gaussian_and_open_targets_count_nothing():
    predictor = NoisyLatentPredictor(in_channels=2, num_targets=2, hidden_dim=8)
    latents, timestep = torch.randn(3, 2, 4, 4), torch.tensor(100.0)
    mean, log_variance = predictor(latents, timestep)
    target = torch.tensor([0.4, -0.2])
    each = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(target)
    torch.testing.assert_close(predictor.log_likelihood(latents, timestep, target), each.sum(1))
    half_open = torch.tensor([0.4, math.nan])
    torch.testing.assert_close(predictor.log_likelihood(latents, timestep, half_open), each[:, 0])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 2), ()])
def test_a_target_that_would_be_spread_over_the_batch_is_refused(shape):
    predictor = NoisyLatentPredictor(in_channels=2, num_targets=2, hidden_dim=8)
    with pytest.raises(ValueError, match=r"^target must have shape \(3, 2\) or \(2,\), got"):
        predictor.log_likelihood(torch.zeros(3, 2, 4, 4), torch.tensor(100.0), torch.zeros(shape))


def test_it_can_be_saved_and_loaded(tmp_path):
    predictor = NoisyLatentPredictor(in_channels=2, hidden_dim=8)
    predictor.save_pretrained(tmp_path)
    loaded = NoisyLatentPredictor.from_pretrained(tmp_path)
    latents = torch.randn(2, 2, 4, 4)
    assert torch.equal(loaded(latents, torch.tensor(3.0))[0], predictor(latents, torch.tensor(3.0))[0])
