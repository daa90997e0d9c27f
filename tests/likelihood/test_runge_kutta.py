"""The solvers of the flow, on equations whose solutions are known."""

import math

import pytest
import torch

from mechdiffusers.likelihood.runge_kutta import check_solver, solve

ENDS = (0.2, 1.5)


def growth(state, angle):
    """Of exp(sin(angle)), each sample times its own factor."""
    return state * angle.cos()[:, None]


def start(num=3):
    return torch.arange(1, num + 1, dtype=torch.float64)[:, None].expand(-1, 2) * math.exp(math.sin(ENDS[0]))


def known(num=3):
    return torch.arange(1, num + 1, dtype=torch.float64)[:, None].expand(-1, 2) * math.exp(math.sin(ENDS[1]))


def test_the_error_of_equal_steps_falls_with_their_fourth_power():
    coarse, fine = ((solve(growth, start(), ENDS, num) - known()).abs().max() for num in (16, 32))
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_the_error_of_adaptive_steps_follows_the_tolerance_in_both_directions(tolerance):
    there = solve(growth, start(), ENDS, 2, tolerance)
    assert (there - known()).abs().max() < 20 * tolerance * known().max()
    back = solve(growth, there, ENDS[::-1], 2, tolerance)
    assert (back - start()).abs().max() < 40 * tolerance * known().max()


def test_a_tighter_tolerance_takes_more_steps():
    calls = []

    def counted(state, angle):
        calls[-1] += 1
        return growth(state, angle)

    for tolerance in (1e-3, 1e-6, 1e-9):
        calls.append(0)
        solve(counted, start(), ENDS, 2, tolerance)
    assert calls == sorted(set(calls))


def test_a_tolerance_below_the_networks_precision_is_refused_instead_of_never_ending():
    generator = torch.manual_seed(0)

    def noisy(state, angle):
        return 1e-3 * torch.randn(state.shape, generator=generator, dtype=state.dtype)

    with pytest.raises(ValueError, match="^tolerance must be within reach .*, got 1e-09"):
        solve(noisy, torch.ones(1, 2, dtype=torch.float64), (0.0, 1.5), 2, tolerance=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, None), "num_steps must be an even integer of at least 2 .*, got 0"),
        ((3, None), "num_steps must be an even integer"),
        ((2.0, None), "num_steps must be an even integer"),
        ((True, None), "num_steps must be an even integer"),
        ((8, 0.0), "tolerance must lie inside"),
        ((8, 1.0), "tolerance must lie inside"),
        ((8, math.nan), "tolerance must lie inside"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_solver(*options)
