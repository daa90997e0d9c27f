r"""A denoiser in continuous time: its velocity and score at any log-SNR, and its probability flow.

The output of any network gives the velocity :math:`\hat v = \alpha \hat\epsilon - \sigma \hat x_0` (Salimans & Ho
2022, section 4 and appendix D), and the score :math:`-\hat\epsilon / \sigma` of the noisy latents (Luo 2022, equation
151). With the angle :math:`\varphi = \arctan(\sigma / \alpha)` a noisy latent is
:math:`x = \cos\varphi \, z + \sin\varphi \, \epsilon`. The probability flow :math:`dx / d\varphi = \hat v(x, \varphi)`
has the densities of the diffusion (Song et al. 2021, section 4.3, in the variable of Salimans & Ho 2022, appendix D).
It leaves data of unit variance in place, so equal steps of the angle suit scaled latents. It ends at a standard normal,
and at timestep 0 the latent is :math:`z = x / \alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.likelihood.runge_kutta import check_solver, solve
from mechdiffusers.pipelines.pipeline_latent_ddpm import check_choice, check_count, output_from_velocity
from mechdiffusers.schedulers.log_snr_curve import LogSnrCurve, alpha_sigma

__all__ = ["ContinuousDiffusion", "LatentDiffusion", "alpha_sigma_like", "as_float64", "log_snr_of_angle"]


class ContinuousDiffusion:
    r"""A denoiser and its noise schedule in continuous time, the log-SNR linear between integer timesteps.

    Args:
        denoise: The network: noisy latents ``(B, *)`` and timesteps ``(B,)``, fractional, to its output ``(B, *)``.
        curve: Its log-SNR, such as ``LogSnrCurve.of_scheduler(scheduler)``.
        prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"score"``; others are a ``ValueError``.
    """

    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor], curve: LogSnrCurve, prediction_type: str):
        check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample", "score"))
        self.denoise, self.curve, self.prediction_type = denoise, curve, prediction_type

    @property
    def angles(self) -> tuple[float, float]:
        r""":math:`\varphi` at timestep 0 and at the last."""
        data, noise = (math.atan(math.exp(-level / 2)) for level in self.curve.ends)
        return data, noise

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """Log-SNR at timesteps of any shape, float64."""
        return _like(timesteps, self.curve.at(timesteps.cpu().double().numpy()))

    def timesteps(self, log_snr: Tensor) -> Tensor:
        """The inverse of :meth:`log_snr`, limited to the ends."""
        return _like(log_snr, np.minimum(self.curve.timestep(log_snr.cpu().numpy()), self.curve.last))

    def velocity(self, x: Tensor, log_snr: Tensor) -> Tensor:
        r"""The predicted velocity :math:`\hat v` of noisy latents ``(B, *)`` at log-SNRs ``(B,)``, float64.

        It is differentiable in ``x``. The other predictions are :math:`\hat x_0 = \alpha x - \sigma \hat v` and
        :math:`\hat\epsilon = \sigma x + \alpha \hat v`.
        """
        # otherwise the weights' gradients would keep a graph
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            output = as_float64(self.denoise(x, self.timesteps(log_snr)))
            slope, offset = output_from_velocity(self.prediction_type, *alpha_sigma_like(log_snr, x))
            return (output - offset * x) / slope

    def score(self, latents: Tensor, timestep: float | Tensor) -> Tensor:
        r"""The score :math:`\nabla \log p_t(x) = -\hat\epsilon / \sigma_t`, differentiable, float64.

        It is Tweedie's formula: Luo 2022, equations 133 and 151; Kingma et al. 2021, equation 30.

        Args:
            latents: Noisy latents, shape ``(B, *)``, also that of the score.
            timestep: In [0, T - 1], fractional allowed, 0 nearest the data; one for all, or shape ``(B,)``.

        Raises:
            ValueError: If the latents have another shape, or a timestep lies outside [0, T - 1].

        Example:
            >>> ascent = latents + 0.01 * LatentDiffusion(pipe).score(latents, 20)  # doctest: +SKIP
        """
        x = self._checked(latents)
        times, last = torch.as_tensor(timestep, device=x.device).double(), self.curve.last
        if times.shape not in ((), (len(x),)) or not ((times >= 0) & (times <= last)).all():
            raise ValueError(f"timestep must be one or {len(x)} numbers in [0, {last:g}], got {timestep!r}")
        log_snr = self.log_snr(times.expand(len(x)))
        alpha, sigma = alpha_sigma_like(log_snr, x)
        return -x - alpha / sigma * self.velocity(x, log_snr)  # -(sigma x + alpha v) / sigma

    @torch.no_grad()
    def to_noise(self, latents: Tensor, num_steps: int = 16, tolerance: float | None = None) -> Tensor:
        """The noise that latents flow to, close to standard normal, float64: the inversion of sampling.

        Args:
            latents: Shape ``(B, *)``, also that of the noise.
            num_steps: Runge-Kutta steps of four evaluations each, even.
            tolerance: Error of a step of the adaptive method of Dormand & Prince, instead.

        Raises:
            ValueError: If the latents have another shape, or another argument is out of range.

        Example:
            >>> same = diffusion.from_noise(diffusion.to_noise(latents))  # doctest: +SKIP
        """
        x = self._checked(latents)
        return self._flow(math.cos(self.angles[0]) * x, self.angles, num_steps, tolerance)

    @torch.no_grad()
    def from_noise(self, noise: Tensor, num_steps: int = 16, tolerance: float | None = None) -> Tensor:
        """The latents that noise flows to: the inverse of :meth:`to_noise`, with its arguments."""
        x = self._checked(noise)
        return self._flow(x, self.angles[::-1], num_steps, tolerance) / math.cos(self.angles[0])

    def _flow(self, x: Tensor, ends: tuple[float, float], num_steps: int, tolerance: float | None) -> Tensor:
        check_solver(num_steps, tolerance)

        def slope(state: Tensor, angle: Tensor) -> Tensor:
            return self.velocity(state.reshape(x.shape), log_snr_of_angle(angle)).flatten(1)

        return solve(slope, x.flatten(1), ends, num_steps, tolerance).reshape(x.shape)

    def _checked(self, x: Tensor | np.ndarray) -> Tensor:
        return as_float64(torch.as_tensor(x))


class LatentDiffusion(ContinuousDiffusion):
    """The diffusion of a pipeline's latents, with a response or without.

    Args:
        pipe: A [`LatentDDPMPipeline`].
        response: Condition, shape ``(B, L, S)``, one for all latents or one for each, NaN where unspecified.

    Raises:
        ValueError: If the response or the pipeline's scheduler does not suit.

    Example:
        >>> diffusion = LatentDiffusion(pipe)  # doctest: +SKIP
        >>> noise = diffusion.to_noise(pipe.encode(designs))  # doctest: +SKIP
    """

    def __init__(self, pipe: Any, response: Any = None):
        pipe.check_scheduler()
        self.pipe = pipe
        with torch.no_grad():
            self.tokens = pipe.response_encoder(pipe.response_encoder.prepare(response).to(pipe._execution_device))
        curve = LogSnrCurve.of_scheduler(pipe.scheduler)
        super().__init__(self._denoiser(self.tokens), curve, pipe.scheduler.config.prediction_type)

    def rows(self, index: Tensor) -> ContinuousDiffusion:
        """The diffusion of the latents with these indices, shape ``(N,)``, and with their responses."""
        tokens = self.tokens if len(self.tokens) == 1 else self.tokens[index.to(self.tokens.device)]
        return ContinuousDiffusion(self._denoiser(tokens), self.curve, self.prediction_type)

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, num: int = 8, num_steps: int = 16) -> Tensor:
        """Latents between two by way of their noises, shape ``(num, C, h, w)``, float64.

        Halfway on a straight line between two latents lies no design. Spherical interpolation between their noises
        keeps the norm of noise (Song et al. 2021, section 5.3).

        Args:
            a: Latents to start from, shape ``(1, C, h, w)``.
            b: Latents to end at, same shape.
            num: Number of latents, ``a`` and ``b`` included, at least 2.
            num_steps: As in :meth:`to_noise`.

        Raises:
            ValueError: If the shapes differ, or ``num`` is below 2.

        References:
            | Denoising Diffusion Implicit Models (Song et al., 2021)
            | https://arxiv.org/abs/2010.02502
            | Deep generative modeling for mechanistic-based learning and design of metamaterial systems (Wang et al.,
              2020), on paths through the latent space
            | https://arxiv.org/abs/2006.15274
        """
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if len(a) != 1 or a.shape != b.shape:
            got = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(f"a and b must be one latent each, of one shape, got {got}")
        check_count("num", num, least=2)
        first, last = self.to_noise(torch.cat([a, b.to(a)]), num_steps).split(1)
        cosine = torch.nn.functional.cosine_similarity(first.flatten(), last.flatten(), dim=0)
        angle = torch.arccos(cosine.clamp(-1, 1))
        shares = torch.linspace(0, 1, num, dtype=first.dtype, device=first.device)[1:-1, None, None, None]
        if torch.sin(angle) < 1e-6:  # on one line: no arc is the shortest
            between = torch.lerp(first, last, shares)
        else:
            between = (torch.sin((1 - shares) * angle) * first + torch.sin(shares * angle) * last) / torch.sin(angle)
        inner = self.from_noise(between, num_steps) if len(between) else between
        return torch.cat([as_float64(a), inner, as_float64(b.to(a))])

    def _denoiser(self, tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        unet, device = self.pipe.unet, self.pipe._execution_device

        def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
            x, timesteps = x.to(device, unet.dtype), timesteps.float().to(device)
            return unet(x, timesteps, encoder_hidden_states=tokens.expand(len(x), -1, -1)).sample

        return denoise

    def _checked(self, x: Tensor | np.ndarray) -> Tensor:
        x, shape = torch.as_tensor(x), self.pipe.latent_shape
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"latents must have shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        if len(self.tokens) not in (1, len(x)):
            raise ValueError(f"response must be one, or one for each of {len(x)} samples, got {len(self.tokens)}")
        return as_float64(x)


def alpha_sigma_like(log_snr: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\alpha` and :math:`\sigma` at log-SNRs ``(B,)``, shaped to multiply samples ``x`` ``(B, *)``.

    Kingma et al. 2021, equations 3 and 4; Luo 2022, equations 113 and 114.
    """
    return alpha_sigma(log_snr.reshape(-1, *(1,) * (x.ndim - 1)))


def log_snr_of_angle(angle: Tensor) -> Tensor:
    r"""The log-SNR :math:`-2 \log \tan \varphi` of an angle :math:`\varphi = \arctan(\sigma / \alpha)`."""
    return -2 * torch.log(torch.tan(angle))


def as_float64(x: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _like(x: Tensor, values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu" if x.device.type == "mps" else x.device)
