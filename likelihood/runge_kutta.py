"""Solves the probability flow by explicit Runge-Kutta methods, in equal or in adaptive steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mechdiffusers.schedulers.probability_flow_tableaux import TABLEAUX, Tableau

__all__ = ["check_solver", "solve"]

#: Dormand & Prince 1980, the pair of orders 5 and 4; its last stage is the first of the next step.
DORMAND_PRINCE = Tableau(
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
_MOST_STEPS = 1000  #: No step, however short, has a smaller error than the network.
Slope = Callable[[Tensor, Tensor], Tensor]  #: Of states (B, D) and angles (B,), their derivatives (B, D).


def check_solver(num_steps: int, tolerance: float | None) -> None:
    """Raises a ``ValueError`` unless ``num_steps`` is even and ``tolerance`` is inside (0, 1) or None."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2 or num_steps % 2:
        raise ValueError(f"num_steps must be an even integer of at least 2 for the probability flow, got {num_steps!r}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie inside (0, 1) or be None, got {tolerance!r}")


def solve(
    slope: Slope, state: Tensor, ends: tuple[float, float], num_steps: int, tolerance: float | None = None
) -> Tensor:
    """The state at the second end, shape ``(B, D)``.

    Args:
        slope: The equation.
        state: The state at the first end, shape ``(B, D)``, float64.
        ends: Angles.
        num_steps: Number of equal steps of the classical Runge-Kutta method, four evaluations each.
        tolerance: Largest error of a step of the adaptive method, which replaces these: each sample has steps of its
            own. The error of an entry is relative to :math:`1 + |x|`, that of a sample is the largest of its entries.
    """
    if tolerance is not None:
        return _solve_adaptively(slope, state, ends, tolerance)
    method, length = TABLEAUX["rk4"], (ends[1] - ends[0]) / num_steps
    for step in range(num_steps):
        angle = state.new_full((len(state),), ends[0] + step * length)
        slopes: list[Tensor] = []
        for stage in method.stages:
            slopes.append(slope(state + length * _weighted(stage, slopes), angle + length * sum(stage)))
        state = state + length * _weighted(method.weights, slopes)
    return state


def _solve_adaptively(slope: Slope, state: Tensor, ends: tuple[float, float], tolerance: float) -> Tensor:
    angle = state.new_full((len(state),), ends[0])
    length = state.new_full((len(state),), (ends[1] - ends[0]) / 20)
    first = slope(state, angle)
    for _ in range(_MOST_STEPS):
        unfinished = angle != ends[1]
        if not unfinished.any():
            return state
        length = torch.where((angle + length - ends[1]) * (ends[1] - ends[0]) > 0, ends[1] - angle, length)
        length = length * unfinished
        h = length[:, None]
        slopes = [first]
        for stage in DORMAND_PRINCE.stages[1:]:
            slopes.append(slope(state + h * _weighted(stage, slopes), angle + length * sum(stage)))
        proposal = state + h * _weighted(DORMAND_PRINCE.weights, slopes)
        scale = tolerance * (1 + torch.maximum(state.abs(), proposal.abs()))
        error = (h * _weighted(DORMAND_PRINCE.error, slopes) / scale).abs().amax(1)
        accepted = error <= 1
        state, first = (
            torch.where(accepted[:, None], new, old) for new, old in ((proposal, state), (slopes[-1], first))
        )
        # the last step ends on the end itself: a sum of steps has rounding errors
        reached = torch.where(length == ends[1] - angle, torch.full_like(angle, ends[1]), angle + length)
        angle = torch.where(accepted, reached, angle)
        length = length * (0.9 * error.clamp(min=1e-8) ** -0.2).clamp(0.2, 5)
    reach = f"within reach of the network's precision in {_MOST_STEPS} steps"
    raise ValueError(f"tolerance must be {reach}, got {tolerance!r}")


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor | float:
    return sum((weight * slope for weight, slope in zip(weights, slopes, strict=False) if weight != 0), 0.0)
