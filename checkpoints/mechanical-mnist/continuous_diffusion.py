r"""A denoiser of latents read in continuous time: what it predicts at any log-SNR, and the score.

Whatever a network was trained to predict, it says the velocity :math:`\hat v = \alpha \hat\epsilon - \sigma \hat x_0`
(Salimans & Ho 2022, section 4 and appendix D), and with it the score :math:`-\hat\epsilon / \sigma` of the noisy
latents (Luo 2022, equation 151).

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

__all__ = ["ContinuousDiffusion", "ContinuousTime", "log_snr_table", "of_velocity"]


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
        slope, offset = of_velocity(self.prediction_type, *self.alpha_sigma(log_snr, x))
        return (output - offset * x) / slope

    @staticmethod
    def alpha_sigma(log_snr: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\alpha` and :math:`\sigma` at log-SNRs ``(B,)``, shaped to multiply samples ``x`` ``(B, *)``.

        Kingma et al. 2021, equations 3 and 4; Luo 2022, equations 113 and 114.
        """
        log_snr = log_snr.reshape(-1, *(1,) * (x.ndim - 1))
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def of_velocity(prediction_type: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    r"""The :math:`a` and :math:`b` with which a network says :math:`a \hat v + b x` of noisy latents :math:`x`."""
    return {
        "epsilon": (alpha, sigma),
        "v_prediction": (1.0, 0.0),
        "sample": (-sigma, alpha),
        "score": (-alpha / sigma, -1.0),
    }[prediction_type]


def log_snr_table(scheduler: Any) -> np.ndarray:
    """Log-SNR of a variance-preserving scheduler at its integer timesteps, shape ``(T,)``, float64."""
    if hasattr(scheduler, "curve"):  # ours know it to more digits than single-precision alphas_cumprod near 1 hold
        return scheduler.curve.at(np.arange(len(scheduler.alphas_cumprod)))
    table = scheduler.alphas_cumprod.cpu().double().numpy().copy()
    if table[-1] == 0:  # no signal at all, whose logarithm a curve cannot hold
        table[-1] = min(2**-24, table[-2] / 2)
    return np.log(table) - np.log1p(-table)


class ContinuousTime(DiffusionPipeline):
    """The part of a latent diffusion pipeline that reads its denoiser in continuous time."""

    def score(self, latents: Tensor, timestep: float | Tensor, response: Any = None) -> Tensor:
        r"""The score :math:`\nabla \log p_t(x)` of noisy latents, :math:`-\hat\epsilon / \sigma_t`; differentiable.

        Tweedie's formula, Luo 2022, equations 133 and 151; Kingma et al. 2021, equation 30.

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
        alpha, sigma = diffusion.alpha_sigma(log_snr, latents)
        # -(sigma x + alpha v) / sigma
        return -latents.double() - alpha / sigma * diffusion.velocity(latents, log_snr)

    def _log_snr(self, timestep: Any) -> float:
        """Log-SNR of the scheduler at one timestep, fractional allowed."""
        table = log_snr_table(self.scheduler)
        return float(np.interp(float(timestep), np.arange(len(table)), table))

    def _of_velocity(self, alpha: float, sigma: float) -> tuple[float, float]:
        """What the denoiser says of a velocity, see :func:`of_velocity`."""
        return of_velocity(self.scheduler.config.prediction_type, alpha, sigma)

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
