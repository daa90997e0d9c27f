import math

import pytest
import torch

from mechdiffusers.models import MonotoneNoiseSchedule
from mechdiffusers.schedulers import VDMScheduler

#: Of data N(0, 0.01): a denoiser's error has its maximum in a narrow range of log-SNR.
VARIANCE, DIMS = 0.01, 4


def squared_error(log_snr: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """|epsilon - E[epsilon | x]|^2 of a draw at each log-SNR, the denoiser exact."""
    alpha, sigma = torch.sigmoid(log_snr).sqrt()[:, None], torch.sigmoid(-log_snr).sqrt()[:, None]
    clean = VARIANCE**0.5 * torch.randn(len(log_snr), DIMS, generator=generator).double()
    noise = torch.randn(len(log_snr), DIMS, generator=generator).double()
    x = alpha * clean + sigma * noise
    return (noise - sigma * x / (alpha**2 * VARIANCE + sigma**2)).square().sum(1)


def mean_square_of_the_loss(schedule: MonotoneNoiseSchedule) -> torch.Tensor:
    r"""E[loss^2] by quadrature, differentiable in the schedule: the error is (1 - g) chi^2 in DIMS dimensions."""
    times = ((torch.arange(20_000) + 0.5) / 20_000).double()
    log_snr, slope, _ = schedule._value_and_derivatives(times)
    snr = log_snr.exp()
    share = VARIANCE * snr / (1 + VARIANCE * snr)
    second_moment = share**2 * (DIMS**2 + 2 * DIMS) / 4
    return (slope**2 * second_moment).mean()


def measured_variance(table: list[float], num: int = 200_000) -> tuple[float, float]:
    """Mean and variance of the diffusion loss's estimate at uniform times."""
    generator = torch.Generator().manual_seed(1)
    scheduler = VDMScheduler(log_snr=table)
    timesteps = 999 * torch.rand(num, generator=generator, dtype=torch.float64)
    losses = scheduler.loss_weights(timesteps) * squared_error(scheduler.curve(timesteps), generator)
    return losses.mean().item(), losses.var().item()


def bent() -> MonotoneNoiseSchedule:
    """A schedule away from its start, so that its curvature matters."""
    torch.manual_seed(0)
    schedule = MonotoneNoiseSchedule(12.0, -6.0, hidden_dim=8)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return schedule


def test_it_falls_strictly_between_its_ends_whatever_the_weights():
    for scale in (0.1, 3.0):
        schedule = bent()
        with torch.no_grad():
            for parameter in schedule.parameters():
                parameter *= scale
        table = torch.tensor(schedule.table(500), dtype=torch.float64)
        assert (table.diff() < 0).all()
        torch.testing.assert_close(table[[0, -1]], torch.tensor([12.0, -6.0]).double())


def test_its_derivatives_are_those_of_the_value():
    schedule, times = bent(), torch.linspace(0.01, 0.99, 9, dtype=torch.float64, requires_grad=True)
    value, slope, curvature = schedule._value_and_derivatives(times)
    (first,) = torch.autograd.grad(value.sum(), times, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), times)
    torch.testing.assert_close(slope, first)
    torch.testing.assert_close(curvature, second)


def test_the_gradient_is_that_of_the_losss_mean_square_without_one_through_the_denoiser():
    schedule = bent()
    expected = torch.autograd.grad(mean_square_of_the_loss(schedule), list(schedule.parameters()))
    times = ((torch.arange(400_000) + 0.5) / 400_000).double()
    error = squared_error(schedule(times).detach(), torch.Generator().manual_seed(0))
    got = torch.autograd.grad(schedule.variance_loss(times, error), list(schedule.parameters()))
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.02 * exact.abs().max().item() + 1e-3)


def test_learning_it_lowers_the_measured_variance_of_the_loss_and_leaves_its_mean():
    schedule = MonotoneNoiseSchedule(12.0, -6.0)
    before = measured_variance(schedule.table())
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    for _ in range(300):
        times = torch.rand(256, generator=generator, dtype=torch.float64)
        error = squared_error(schedule(times).detach(), generator)
        optimizer.zero_grad()
        schedule.variance_loss(times, error).backward()
        optimizer.step()
    after = measured_variance(schedule.table())
    line = measured_variance(torch.linspace(12, -6, 1000, dtype=torch.float64).tolist())
    assert after[0] == pytest.approx(before[0], abs=4.5 * math.sqrt(2 * before[1] / 200_000))
    assert after[1] < min(line[1], before[1]) / 3


def test_it_can_be_saved_and_loaded(tmp_path):
    schedule = bent()
    schedule.save_pretrained(tmp_path)
    assert MonotoneNoiseSchedule.from_pretrained(tmp_path).table(7) == schedule.table(7)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^log_snr_min must be below log_snr_max=1.0, got 1.0"):
        MonotoneNoiseSchedule(1.0, 1.0)
    with pytest.raises(
        ValueError, match=r"^times and squared_error must both have shape \(B,\), got \(2,\) and \(3,\)"
    ):
        MonotoneNoiseSchedule().variance_loss(torch.zeros(2), torch.zeros(3))
