r"""The probability flow of a latent diffusion: log-density of latents, to noise and back.

With the angle :math:`\varphi = \arctan(\sigma / \alpha)` a noisy latent is :math:`x = \cos\varphi \, z + \sin\varphi \,
\epsilon`, and the ordinary differential equation whose solutions have the diffusion's densities reads

.. math:: \frac{dx}{d\varphi} = \hat v(x, \varphi), \qquad \frac{d \log p(x)}{d\varphi} = -\nabla_x \cdot \hat v,

where :math:`\hat v` is the predicted velocity :math:`\alpha \hat\epsilon - \sigma \hat x_0` (Song et al. 2021, section
4.3 and appendix D.2, in the variable of Salimans & Ho 2022, appendix D). Data of unit variance stand still in it, so
that equal steps of the angle suit latents, which are scaled to that. A standard normal stands at the noise's end; at
the data's end, timestep 0, the latent is :math:`z = x / \alpha`.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

__all__ = ["FlowLikelihood", "ProbabilityFlow", "flow_log_density"]


class Tableau(NamedTuple):
    """Explicit Runge-Kutta method; ``error`` are its weights less those of the embedded method of lower order."""

    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...] = ()


RK4 = Tableau(((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
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
#: A step's error cannot fall below the network's own, however short the step.
_MOST_STEPS = 1000
#: Of states (B, D) and angles (B,), their derivatives by the angle (B, D).
Slope = Callable[[Tensor, Tensor], Tensor]


def solve(slope: Slope, state: Tensor, ends: tuple[float, float], num_steps: int) -> Tensor:
    """The state at the second end, by equal steps of the classical Runge-Kutta method, four evaluations each."""
    length = (ends[1] - ends[0]) / num_steps
    for step in range(num_steps):
        angle = state.new_full((len(state),), ends[0] + step * length)
        slopes: list[Tensor] = []
        for stage in RK4.stages:
            slopes.append(slope(state + length * _weighted(stage, slopes), angle + length * sum(stage)))
        state = state + length * _weighted(RK4.weights, slopes)
    return state


def solve_adaptively(slope: Slope, state: Tensor, ends: tuple[float, float], tolerance: float) -> Tensor:
    """The state at the second end, each sample in steps of its own, whose estimated errors stay below ``tolerance``.

    An entry's error is measured against :math:`1 + |x|`, a sample's is the largest of its entries'.
    """
    angle = state.new_full((len(state),), ends[0])
    length = state.new_full((len(state),), (ends[1] - ends[0]) / 20)
    first = slope(state, angle)
    for _ in range(_MOST_STEPS):
        open_ = angle != ends[1]
        if not open_.any():
            return state
        length = torch.where((angle + length - ends[1]) * (ends[1] - ends[0]) > 0, ends[1] - angle, length)
        length = length * open_
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
        # a last step ends on the end itself, which a sum of steps may miss by rounding
        reached = torch.where(length == ends[1] - angle, torch.full_like(angle, ends[1]), angle + length)
        angle = torch.where(accepted, reached, angle)
        length = length * (0.9 * error.clamp(min=1e-8) ** -0.2).clamp(0.2, 5)
    raise ValueError(
        f"tolerance must be within reach of the network's precision in {_MOST_STEPS} steps, got {tolerance!r}"
    )


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor | float:
    return sum((weight * slope for weight, slope in zip(weights, slopes, strict=False) if weight != 0), 0.0)


class FlowLikelihood(NamedTuple):
    r"""Log-density of latents by the probability flow, in nats; every field has shape ``(B,)``.

    Args:
        noise_log_density: Log-density of the noise that the latents flow to.
        volume_change: What the flow's divergence and the scale :math:`z = x / \alpha` add to it.
        discretization_error: Distance to the value of half the steps, or of ten times the tolerance.
        probe_error: Standard error of the estimated divergence over its probes, zero where it is exact.
    """

    noise_log_density: Tensor
    volume_change: Tensor
    discretization_error: Tensor
    probe_error: Tensor


def flow_log_density(
    diffusion: Any,
    latents: Tensor,
    probes: Tensor | None,
    num_steps: int = 8,
    tolerance: float | None = None,
) -> FlowLikelihood:
    r"""Log-density of latents under the probability flow.

    Args:
        diffusion: Denoiser and noise schedule.
        latents: Shape ``(B, *)``, of D entries each.
        probes: Vectors :math:`e` of random signs, kept along the whole way, shape ``(B, P, D)``, at least two a sample:
            the divergence is estimated by the mean of :math:`e^T (\nabla \hat v) e` (Hutchinson 1989). ``None`` for the
            exact trace, at the cost of D probes.
        num_steps: Steps of the fourth-order Runge-Kutta method, even, of equal length in the angle.
        tolerance: Error of a step of the adaptive method, which replaces these steps if it is given.

    Returns:
        The log-density's parts and its errors.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix D.2
        | https://arxiv.org/abs/2011.13456
        | FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019)
        | https://arxiv.org/abs/1810.01367
    """
    dims = latents[0].numel()
    is_exact = probes is None
    directions = torch.eye(dims, dtype=torch.float64, device=latents.device)[None] if probes is None else probes
    alpha = math.cos(_angles(diffusion)[0])
    x = alpha * latents.double()

    def log_density(probes: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
        """Of the noise, (B,), and what each probe adds, (B, P), or the exact trace, (B, 1)."""

        def slope(state: Tensor, angle: Tensor) -> Tensor:
            velocity, divergence = _divergence(diffusion, state[:, :dims].reshape(x.shape), angle, probes)
            if is_exact:
                divergence = divergence.sum(1, keepdim=True)
            # the divergence a dimension, so that one tolerance suits it and the entries
            return torch.cat([velocity.flatten(1), divergence / dims], dim=1)

        start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1 if is_exact else probes.shape[1])], dim=1)
        if tolerance is None:
            end = solve(slope, start, _angles(diffusion), num_steps // 2 if coarse else num_steps)
        else:
            end = solve_adaptively(slope, start, _angles(diffusion), tolerance * (10 if coarse else 1))
        return -(end[:, :dims].square() + math.log(2 * math.pi)).sum(1) / 2, dims * end[:, dims:]

    noise, change = log_density(directions, coarse=False)
    # two probes are enough to see what the steps change
    coarse_noise, coarse_change = log_density(directions if is_exact else directions[:, :2], coarse=True)
    probe_error = torch.zeros_like(noise) if is_exact else change.std(1) / change.shape[1] ** 0.5
    fine = noise + change[:, : coarse_change.shape[1]].mean(1)
    discretization_error = (fine - coarse_noise - coarse_change.mean(1)).abs()
    return FlowLikelihood(noise, change.mean(1) + dims * math.log(alpha), discretization_error, probe_error)


def _divergence(diffusion: Any, x: Tensor, angle: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity, and of its Jacobian the quadratic form of each probe, (B, P)."""
    with torch.enable_grad():
        variable = x.detach().requires_grad_()
        velocity = diffusion.velocity(variable, _log_snr(angle))
        forms = []
        for i in range(probes.shape[1]):
            probe = probes[:, i].expand(len(x), -1).reshape(x.shape)
            (product,) = torch.autograd.grad(velocity, variable, probe, retain_graph=i + 1 < probes.shape[1])
            forms.append((product * probe).flatten(1).sum(1))
    return velocity.detach(), torch.stack(forms, dim=1)


def _angles(diffusion: Any) -> tuple[float, float]:
    """The angles of timestep 0 and of the last."""
    data, noise = (math.atan(math.exp(-level / 2)) for level in diffusion.ends)
    return data, noise


def _log_snr(angle: Tensor) -> Tensor:
    return -2 * torch.log(torch.tan(angle))


class ProbabilityFlow(DiffusionPipeline):
    """The part of a latent diffusion pipeline that is about its probability flow."""

    @torch.no_grad()
    def to_noise(
        self, latents: Tensor, response: Any = None, num_steps: int = 16, tolerance: float | None = None
    ) -> Tensor:
        """The noise that latents flow to: the inversion of sampling.

        Args:
            latents: Shape ``(B, C, h, w)``, as ``encode`` gives them.
            response: As in :meth:`score`.
            num_steps: Runge-Kutta steps of four evaluations each.
            tolerance: Error of a step of the adaptive method, instead.

        Returns:
            Noise, close to standard normal, shape ``(B, C, h, w)``, float64.

        Raises:
            ValueError: If the latents have another shape, or another argument is out of range.

        Example:
            >>> same = pipe.from_noise(pipe.to_noise(latents))  # doctest: +SKIP
        """
        return self._flow(latents, response, num_steps, tolerance, to_noise=True)

    @torch.no_grad()
    def from_noise(
        self, noise: Tensor, response: Any = None, num_steps: int = 16, tolerance: float | None = None
    ) -> Tensor:
        """The latents that noise flows to, for ``decode``; arguments as in :meth:`to_noise`, whose inverse it is."""
        return self._flow(noise, response, num_steps, tolerance, to_noise=False)

    def _flow(self, x: Tensor, response: Any, num_steps: int, tolerance: float | None, to_noise: bool) -> Tensor:
        self._check_solver(num_steps, tolerance)
        diffusion = self._diffusion_of(x, response)
        scale = math.cos(_angles(diffusion)[0])
        ends = _angles(diffusion) if to_noise else _angles(diffusion)[::-1]

        def slope(state: Tensor, angle: Tensor) -> Tensor:
            return diffusion.velocity(state.reshape(x.shape), _log_snr(angle)).flatten(1)

        start = x.double().flatten(1) * (scale if to_noise else 1)
        if tolerance is None:
            end = solve(slope, start, ends, num_steps)
        else:
            end = solve_adaptively(slope, start, ends, tolerance)
        return (end if to_noise else end / scale).reshape(x.shape)

    def _flow_log_density(
        self,
        diffusion: Any,
        latents: Tensor,
        probes: Tensor | None,
        num_steps: int,
        tolerance: float | None,
    ) -> FlowLikelihood:
        return flow_log_density(diffusion, latents, probes, num_steps, tolerance)

    @staticmethod
    def _check_solver(num_steps: int, tolerance: float | None) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2 or num_steps % 2:
            raise ValueError(
                f"num_steps must be an even integer of at least 2 for the probability flow, got {num_steps!r}"
            )
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"tolerance must lie inside (0, 1) or be None, got {tolerance!r}")
