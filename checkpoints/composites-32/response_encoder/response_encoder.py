r"""From a response to the tokens that a denoiser attends to.

A response is an array (B, L, S): L load cases, S strains, in physical units; NaN marks an entry that the user leaves
open. Each load case becomes one token: a small network sees its normalised values, zero where open, and the mask of
what is given. A response that is open everywhere becomes the learned null tokens, so that "no response" needs no
second denoiser: dropping a condition, as classifier-free guidance does, is leaving it open (Ho & Salimans 2021).

This file travels inside checkpoints: it imports torch, diffusers and its sibling alone.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .response_normalisation import NormalisedResponse

__all__ = ["ResponseEncoder"]


class ResponseEncoder(ModelMixin, ConfigMixin, NormalisedResponse):
    r"""Encodes responses, NaN where open, as tokens for cross-attention.

    Args:
        token_dim: D, the denoiser's ``cross_attention_dim``.
        hidden_dim: Width of the network that makes a token.
        meaning: What the entries of a response are: ``load_cases`` (L names), ``strains`` (L lists of S magnitudes)
            and whatever else travels with them (``quantity``, ``units``, ``element_order``, material). ``None`` makes
            an encoder of no response at all, for an unconditional model.
        scale: :math:`s` of each entry, L lists of S numbers in the units of the response, positive; this and the next
            two are what :func:`mechdiffusers.models.response_normalisation` gives.
        mean: :math:`m` of each entry.
        std: :math:`d` of each entry, positive.

    Raises:
        ValueError: If ``meaning``, ``scale``, ``mean`` and ``std`` do not fit together.

    Example:
        >>> meaning = {"quantity": "stress", "load_cases": ["shear"], "strains": [[0.1, 0.2, 0.3]]}
        >>> responses = torch.rand(100, 1, 3) + torch.tensor([1.0, 2.0, 3.0])
        >>> encoder = ResponseEncoder(16, meaning=meaning, **response_normalisation(responses))
        >>> encoder(responses[:4]).shape
        torch.Size([4, 1, 16])

    References:
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2021), section 3.2
        | https://arxiv.org/abs/2207.12598
    """

    @register_to_config
    def __init__(
        self,
        token_dim: int = 32,
        hidden_dim: int = 128,
        meaning: dict[str, Any] | None = None,
        scale: list[list[float]] | None = None,
        mean: list[list[float]] | None = None,
        std: list[list[float]] | None = None,
    ):
        super().__init__()
        if meaning is not None:
            self._check_normalisation()
        self.null_tokens = nn.Parameter(torch.randn(max(self.response_shape[0], 1), token_dim))
        if meaning is None:
            return
        self.case_embedding = nn.Parameter(torch.randn(self.response_shape[0], hidden_dim))
        self.proj_in = nn.Linear(2 * self.response_shape[1], hidden_dim)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU())
        self.proj_out = nn.Linear(hidden_dim, token_dim)

    def forward(self, response: Tensor) -> Tensor:
        """Tokens of a batch of responses.

        Args:
            response: Shape ``(B, L, S)``, NaN where open; ``(B, 0, 0)`` for an unconditional model.

        Returns:
            Tokens, shape ``(B, N, D)`` with one token a load case (one for an unconditional model), in the dtype of
            the weights.

        Raises:
            ValueError: If the response has another shape.
        """
        if response.shape[1:] != self.response_shape:
            raise ValueError(f"response must have shape (B, *{self.response_shape}), got {tuple(response.shape)}")
        null = self.null_tokens.expand(len(response), -1, -1)
        if self.config.meaning is None:
            return null
        given = ~response.isnan()
        values = torch.where(given, self.normalise(response), 0.0)
        features = torch.cat([values, given.float()], dim=-1).to(self.null_tokens.dtype)
        tokens = self.proj_out(self.layers(self.proj_in(features) + self.case_embedding))
        return torch.where(given.flatten(1).any(1)[:, None, None], tokens, null)
