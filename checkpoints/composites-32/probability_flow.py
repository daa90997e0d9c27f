r"""The probability flow of a latent diffusion: log-density of latents, their score, to noise and back.

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

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

__all__ = ["ContinuousDiffusion", "FlowLikelihood", "ProbabilityFlow", "flow_log_density", "log_snr_table"]


class ContinuousDiffusion:
    r"""A denoiser and its noise schedule, read in continuous time: log-SNR straight between integer timesteps.

    Args:
        denoise: The network: noisy latents ``(B, *)`` and timesteps ``(B,)``, fractional, to its output ``(B, *)``.
        log_snr: At timesteps 0, 1, ..., T - 1, falling; see :func:`log_snr_table`.
        prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"score"``.

    Raises:
        ValueError: If ``prediction_type`` is unknown.
    """

    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor], log_snr: np.ndarray, prediction_type: str):
        if prediction_type not in ("epsilon", "v_prediction", "sample", "score"):
            raise ValueError(
                "prediction_type must be one of ('epsilon', 'v_prediction', 'sample', 'score'), got "
                + repr(prediction_type)
            )
        self.denoise, self.prediction_type = denoise, prediction_type
        self._log_snr = log_snr
        #: Log-SNR at timestep 0 and at the last.
        self.ends = (float(self._log_snr[0]), float(self._log_snr[-1]))

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """Log-SNR at timesteps of any shape, float64."""
        values = np.interp(timesteps.double().cpu().numpy(), np.arange(len(self._log_snr)), self._log_snr)
        return torch.as_tensor(values, device=timesteps.device)

    def timesteps(self, log_snr: Tensor) -> Tensor:
        """The inverse of :meth:`log_snr`, limited to the ends."""
        values = np.interp(-log_snr.double().cpu().numpy(), -self._log_snr, np.arange(len(self._log_snr)))
        return torch.as_tensor(values, device=log_snr.device)

    def velocity(self, x: Tensor, log_snr: Tensor) -> Tensor:
        r"""The predicted velocity :math:`\hat v = \alpha \hat\epsilon - \sigma \hat x_0`.

        The others follow from it: :math:`\hat x_0 = \alpha x - \sigma \hat v` and
        :math:`\hat\epsilon = \sigma x + \alpha \hat v`.

        Args:
            x: Noisy latents, shape ``(B, *)``.
            log_snr: Shape ``(B,)``.

        Returns:
            Shape ``(B, *)``, float64.
        """
        output = self.denoise(x, self.timesteps(log_snr)).double()
        alpha, sigma = alpha_sigma(log_snr, x.ndim)
        if self.prediction_type == "v_prediction":
            return output
        if self.prediction_type == "epsilon":
            return (output - sigma * x) / alpha
        if self.prediction_type == "sample":
            return (alpha * x - output) / sigma
        return -sigma / alpha * (output + x)


def log_snr_table(scheduler: Any) -> np.ndarray:
    """Log-SNR of a variance-preserving scheduler at its integer timesteps, shape ``(T,)``, float64."""
    if hasattr(scheduler, "curve"):  # ours know it to more digits than single-precision alphas_cumprod near 1 hold
        return scheduler.curve.at(np.arange(len(scheduler.alphas_cumprod)))
    table = scheduler.alphas_cumprod.double().cpu().numpy().copy()
    if table[-1] == 0:  # no signal at all, whose logarithm a curve cannot hold
        table[-1] = min(2**-24, table[-2] / 2)
    return np.log(table) - np.log1p(-table)


def alpha_sigma(log_snr: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    r""":math:`\alpha` and :math:`\sigma` of log-SNRs ``(B,)``, shaped to multiply samples of ``ndim`` dimensions."""
    log_snr = log_snr.reshape(-1, *(1,) * (ndim - 1))
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


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
    diffusion: ContinuousDiffusion,
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
    x = alpha_sigma(torch.tensor([diffusion.ends[0]], device=latents.device), latents.ndim)[0] * latents.double()

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
    log_alpha = 0.5 * torch.nn.functional.logsigmoid(torch.tensor(diffusion.ends[0], dtype=torch.float64)).item()
    return FlowLikelihood(
        noise, change.mean(1) + dims * log_alpha, (fine - coarse_noise - coarse_change.mean(1)).abs(), probe_error
    )


def _divergence(diffusion: ContinuousDiffusion, x: Tensor, angle: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
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


def _angles(diffusion: ContinuousDiffusion) -> tuple[float, float]:
    """The angles of timestep 0 and of the last."""
    data, noise = (math.atan(math.exp(-level / 2)) for level in diffusion.ends)
    return data, noise


def _log_snr(angle: Tensor) -> Tensor:
    return -2 * torch.log(torch.tan(angle))


class ProbabilityFlow(DiffusionPipeline):
    """The part of a latent diffusion pipeline that is about its score and its probability flow."""

    def score(self, latents: Tensor, timestep: float | Tensor, response: Any = None) -> Tensor:
        r"""The score :math:`\nabla \log p_t(x)` of noisy latents, :math:`-\hat\epsilon / \sigma_t`; differentiable.

        Args:
            latents: Noisy latents at that timestep, shape ``(B, C, h, w)``.
            timestep: In [0, T - 1], fractional allowed, 0 nearest the data; one for all, or shape ``(B,)``.
            response: Condition of the score, shape ``(B, L, S)``, NaN where open; none by default.

        Returns:
            Shape ``(B, C, h, w)``, float64.

        Raises:
            ValueError: If the latents have another shape, a timestep lies outside [0, T - 1], or the response or the
                scheduler does not suit.

        Example:
            >>> ascent = latents + 0.01 * pipe.score(latents, 20)  # doctest: +SKIP
        """
        diffusion = self._diffusion_of(latents, response)
        times = torch.as_tensor(timestep, dtype=torch.float64, device=latents.device)
        last = len(self.scheduler.alphas_cumprod) - 1
        if times.shape not in ((), (len(latents),)) or not ((times >= 0) & (times <= last)).all():
            raise ValueError(f"timestep must be one or {len(latents)} numbers in [0, {last}], got {timestep!r}")
        log_snr = diffusion.log_snr(times.expand(len(latents)))
        alpha, sigma = alpha_sigma(log_snr, latents.ndim)
        return -latents.double() - alpha / sigma * diffusion.velocity(latents, log_snr)

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

    def _continuous_diffusion(self, tokens: Tensor) -> ContinuousDiffusion:
        """The denoiser under these tokens, one a sample."""

        def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(x.to(self.unet.dtype), timesteps.float(), encoder_hidden_states=tokens).sample

        return ContinuousDiffusion(denoise, log_snr_table(self.scheduler), self.scheduler.config.prediction_type)

    def _diffusion_of(self, latents: Tensor, response: Any) -> ContinuousDiffusion:
        self._check_scheduler()
        if latents.ndim != 4 or latents.shape[1:] != self._latent_shape:
            raise ValueError(
                f"latents must have shape (B, {', '.join(map(str, self._latent_shape))}), got {tuple(latents.shape)}"
            )
        return self._continuous_diffusion(self._response_tokens(response, len(latents)))

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
        diffusion: ContinuousDiffusion,
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
