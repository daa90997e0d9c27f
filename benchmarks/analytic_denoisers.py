r"""Densities whose denoiser is known exactly, to prove schedulers and likelihoods on.

Data from a mixture of Gaussians stay one under the diffusion: noisy at log-SNR :math:`\lambda`, component :math:`k` is
:math:`N(\alpha \mu_k, \alpha^2 C_k + \sigma^2 I)`. So density, score and every prediction that a network could make
have closed forms (Tweedie's formula: :math:`E[x_0 \mid x_t] = (x_t + \sigma^2 \nabla \log p(x_t)) / \alpha`; Luo 2022,
"Three Equivalent Interpretations").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["GaussianMixture", "two_moons"]


class GaussianMixture:
    r"""A mixture of Gaussians and all of its diffusion, in float64.

    Args:
        weights: Weights of the components, shape ``(K,)``, positive, summing to 1.
        means: Shape ``(K, D)``.
        covariances: Shape ``(K, D, D)``, symmetric, positive definite.

    Raises:
        ValueError: If the shapes do not fit together or the weights are none.

    Example:
        >>> gaussian = GaussianMixture([1.0], [[2.0]], [[[1.0]]])
        >>> half_way = gaussian.predict(torch.tensor([[0.0]]), torch.tensor(0.0), "sample")
        >>> round(half_way.item(), 6)
        1.0
    """

    def __init__(self, weights: Tensor | list, means: Tensor | list, covariances: Tensor | list):
        self.weights, self.means, self.covariances = (
            torch.as_tensor(values, dtype=torch.float64) for values in (weights, means, covariances)
        )
        num, dims = self.means.shape if self.means.ndim == 2 else (0, 0)
        if self.weights.shape != (num,) or self.covariances.shape != (num, dims, dims):
            raise ValueError(
                "weights, means and covariances must have shapes (K,), (K, D) and (K, D, D), got "
                f"{tuple(self.weights.shape)}, {tuple(self.means.shape)} and {tuple(self.covariances.shape)}"
            )
        if not ((self.weights > 0).all() and math.isclose(self.weights.sum().item(), 1, abs_tol=1e-9)):
            raise ValueError(f"weights must be positive and sum to 1, got {self.weights.tolist()}")
        self._variances, self._axes = torch.linalg.eigh(self.covariances)

    @property
    def mean(self) -> Tensor:
        """Mean of the data, shape ``(D,)``."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Covariance of the data, shape ``(D, D)``."""
        centred = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Clean samples, shape ``(num, D)``."""
        component = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        draw = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        stretched = torch.einsum("bij,bj->bi", self._axes[component], self._variances[component].sqrt() * draw)
        return self.means[component] + stretched

    def log_prob(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Log-density of noisy samples.

        Args:
            x: Shape ``(B, D)``.
            log_snr: Shape ``()`` or ``(B,)``; ``inf`` for clean samples.

        Returns:
            Shape ``(B,)``, nats.
        """
        coordinates, variances = self._in_axes(x, log_snr)
        return torch.logsumexp(self._log_joint(coordinates, variances), dim=1)

    def responsibilities(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Probability of each component given noisy samples, shape ``(B, K)``; arguments as in :meth:`log_prob`."""
        return torch.softmax(self._log_joint(*self._in_axes(x, log_snr)), dim=1)

    def score(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Gradient of :meth:`log_prob` by ``x``, shape ``(B, D)``."""
        coordinates, variances = self._in_axes(x, log_snr)
        share = torch.softmax(self._log_joint(coordinates, variances), dim=1)
        return -torch.einsum("bk,kij,bkj->bi", share, self._axes, coordinates / variances)

    def predict(self, x: Tensor, log_snr: Tensor, prediction_type: str = "epsilon") -> Tensor:
        """What a perfect network says of noisy samples.

        Args:
            x: Shape ``(B, D)``.
            log_snr: Shape ``()`` or ``(B,)``.
            prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"score"``.

        Returns:
            Shape ``(B, D)``.

        Raises:
            ValueError: If ``prediction_type`` is unknown.
        """
        log_snr = torch.as_tensor(log_snr, dtype=torch.float64).reshape(-1, 1)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        score = self.score(x, log_snr)
        if prediction_type == "epsilon":
            return -sigma * score
        if prediction_type == "sample":
            return (x + sigma**2 * score) / alpha
        if prediction_type == "v_prediction":  # alpha epsilon - sigma x0
            return -(sigma / alpha) * (x + score)
        if prediction_type == "score":
            return score
        raise ValueError(
            "prediction_type must be one of ('epsilon', 'v_prediction', 'sample', 'score'), got "
            + repr(prediction_type)
        )

    def _in_axes(self, x: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of noisy samples in the components' principal axes, and the variances along these, (B, K, D)."""
        log_snr = torch.as_tensor(log_snr, dtype=torch.float64).reshape(-1, 1, 1)
        alpha_squared, sigma_squared = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        centred = x[:, None, :] - alpha_squared.sqrt() * self.means
        coordinates = torch.einsum("kij,bki->bkj", self._axes, centred)
        return coordinates, alpha_squared * self._variances + sigma_squared

    def _log_joint(self, coordinates: Tensor, variances: Tensor) -> Tensor:
        """Log of weight times density of each component, (B, K)."""
        quadratic = coordinates**2 / variances + torch.log(2 * math.pi * variances)
        return self.weights.log() - quadratic.sum(dim=-1) / 2


def two_moons(num_components: int = 24, width: float = 0.08) -> GaussianMixture:
    """Two interleaved half circles as a mixture of small round Gaussians along them, near unit variance.

    Args:
        num_components: Gaussians on each half circle.
        width: Their standard deviation.

    Returns:
        A mixture in the plane.
    """
    angle = torch.linspace(0, math.pi, num_components, dtype=torch.float64)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    means = 1.3 * torch.cat([upper, -upper])
    covariance = width**2 * torch.eye(2, dtype=torch.float64)
    num = 2 * num_components
    return GaussianMixture([1 / num] * num, means, covariance.expand(num, 2, 2))
