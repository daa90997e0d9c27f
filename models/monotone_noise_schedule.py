r"""A learned log-SNR curve: the noise schedule that makes the variance of the diffusion loss least.

In continuous time the diffusion loss is :math:`L = E_t[-\lambda'(t) \, e(\lambda(t))]`, :math:`t` uniform on [0, 1] and
:math:`e = \tfrac12 \|\epsilon - \hat\epsilon\|^2`. Between fixed ends it does not depend on the curve, but the variance
of its estimate at random times does (Kingma et al. 2021, section 5; Luo 2022, "Learning Diffusion Noise Parameters").
With :math:`m(\lambda) = E[e^2]` the variance falls with :math:`\int \lambda'^2 m(\lambda) \, dt`, whose variation is,
after an integration by parts that leaves nothing at the fixed ends,

.. math:: \delta \int \lambda'^2 m \, dt = E_t\left[m \, (\lambda' \delta\lambda' - \lambda'' \delta\lambda)\right],

an expectation of :math:`e^2` itself and not of its derivative: no gradient has to go through the denoiser.

The network is used in training alone; :meth:`MonotoneNoiseSchedule.table` is what a scheduler stores. This file imports
torch and diffusers alone.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["MonotoneNoiseSchedule"]


class MonotoneNoiseSchedule(ModelMixin, ConfigMixin):
    r"""A strictly falling log-SNR on [0, 1] between fixed ends: a line and a sum of sigmoids, all weights positive.

    Args:
        log_snr_max: Log-SNR at the data's end, time 0.
        log_snr_min: Log-SNR at the noise's end, time 1.
        hidden_dim: Number of sigmoids.

    Raises:
        ValueError: If ``log_snr_min`` is not below ``log_snr_max``.

    Example:
        >>> schedule = MonotoneNoiseSchedule(10.0, -6.0)
        >>> [round(value, 3) for value in schedule(torch.tensor([0.0, 1.0])).tolist()]
        [10.0, -6.0]
        >>> scheduler = VDMScheduler(log_snr=schedule.table())  # doctest: +SKIP

    References:
        | Variational Diffusion Models (Kingma et al., 2021), section 5.3 and appendix I.2
        | https://arxiv.org/abs/2107.00630
    """

    @register_to_config
    def __init__(self, log_snr_max: float = 13.3, log_snr_min: float = -5.0, hidden_dim: int = 32):
        super().__init__()
        if not log_snr_min < log_snr_max:
            raise ValueError(f"log_snr_min must be below log_snr_max={log_snr_max!r}, got {log_snr_min!r}")
        # near a line at first: the sigmoids together weigh less than half of it
        self.log_slope = nn.Parameter(torch.ones(1))  # of one dimension, as what is sharded has to be
        self.log_heights = nn.Parameter(torch.full((hidden_dim,), -4.0))
        self.log_steepness = nn.Parameter(torch.full((hidden_dim,), float(hidden_dim) / 3))
        self.centres = nn.Parameter(torch.linspace(0, 1, hidden_dim))

    def forward(self, times: Tensor) -> Tensor:
        """Log-SNR at times in [0, 1], of any shape, float64."""
        return self._value_and_derivatives(times)[0]

    def variance_loss(self, times: Tensor, squared_error: Tensor) -> Tensor:
        r"""A loss whose gradient makes the variance of the diffusion loss fall; its value means nothing.

        Args:
            times: Times of a batch, uniform on [0, 1], shape ``(B,)``.
            squared_error: :math:`\|\epsilon - \hat\epsilon\|^2` of each sample at these times, summed over its entries,
                shape ``(B,)``; no gradient flows into it.

        Returns:
            A number, to be added to the denoiser's loss.

        Raises:
            ValueError: If the shapes differ.
        """
        if times.shape != squared_error.shape or times.ndim != 1:
            raise ValueError(
                f"times and squared_error must both have shape (B,), got {tuple(times.shape)} and "
                f"{tuple(squared_error.shape)}"
            )
        value, slope, curvature = self._value_and_derivatives(times)
        second_moment = (squared_error.detach().double() / 2) ** 2
        return (second_moment * (slope.detach() * slope - curvature.detach() * value)).mean()

    @torch.no_grad()
    def table(self, num: int = 1000) -> list[float]:
        """The curve as a scheduler's ``log_snr``: its values at ``num`` equally spaced times from 0 to 1.

        Args:
            num: Length of the table, at least 2.

        Returns:
            Log-SNR, strictly falling.
        """
        return self(torch.linspace(0, 1, num, dtype=torch.float64, device=self.centres.device)).tolist()

    def _value_and_derivatives(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log-SNR and its first and second derivative by time."""
        times = times.to(torch.float64)
        slope, heights, steepness = (
            softplus(weights.double()) for weights in (self.log_slope[0], self.log_heights, self.log_steepness)
        )

        def rise(at: Tensor) -> tuple[Tensor, Tensor]:
            bump = torch.sigmoid(steepness * (at[..., None] - self.centres.double()))
            return slope * at + bump @ heights, bump

        first, last = rise(times.new_zeros(()))[0], rise(times.new_ones(()))[0]
        scale = (self.config.log_snr_min - self.config.log_snr_max) / (last - first)
        height, bump = rise(times)
        bump_slope = bump * (1 - bump)
        value = self.config.log_snr_max + scale * (height - first)
        derivative = scale * (slope + bump_slope @ (heights * steepness))
        curvature = scale * ((bump_slope * (1 - 2 * bump)) @ (heights * steepness**2))
        return value, derivative, curvature
