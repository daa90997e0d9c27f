r"""From a response to the tokens that a denoiser attends to.

A response is an array (B, L, S): L load cases, S strains, in physical units; NaN marks an entry that the user leaves
open. Each load case becomes one token: a small network sees its normalised values, zero where open, and the mask of
what is given. A response that is open everywhere becomes the learned null tokens, so that "no response" needs no
second denoiser: dropping a condition, as classifier-free guidance does, is leaving it open (Ho & Salimans 2021).

What counts of a response is its relative error in each load case, and responses of two-phase designs range over more
than a decade. So an entry :math:`y` is normalised on a logarithmic scale, but one that has a place for zero and below,
as a target may lie there: :math:`(\operatorname{asinh}(y / s) - m) / d`, with :math:`s` near the least of the training
data, and :math:`m` and :math:`d` the mean and the standard deviation of the first term.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["ResponseEncoder", "response_normalisation"]


def response_normalisation(response: Tensor) -> dict[str, list[list[float]]]:
    """What responses are normalised by, measured on training data.

    Args:
        response: Shape ``(B, L, S)``, NaN where unknown.

    Returns:
        ``scale``, ``mean`` and ``std``, the arguments of the networks that see or predict responses. An entry that is
        the same for all designs has ``std`` 1.

    Raises:
        ValueError: If an entry is unknown of all designs.

    Example:
        >>> normalisation = response_normalisation(torch.rand(100, 2, 6))
        >>> encoder = ResponseEncoder(16, meaning=meaning, **normalisation)  # doctest: +SKIP
    """
    values = response.double().numpy()
    if unknown := np.argwhere(np.isnan(values).all(0)).tolist():
        raise ValueError(
            f"response must be known of some design in every entry, got none in load case {unknown[0][0]} at strain "
            f"{unknown[0][1]}"
        )
    magnitudes = np.where(values == 0, np.nan, np.abs(values))
    with_some = ~np.isnan(magnitudes).all(0)
    scale = np.ones(values.shape[1:])
    scale[with_some] = np.nanquantile(magnitudes[:, with_some], 0.01, axis=0)
    logarithms = np.arcsinh(values / scale)
    mean, std = np.nanmean(logarithms, 0), np.nanstd(logarithms, 0)
    std[std <= 1e-6 * np.abs(mean)] = 1
    return {"scale": scale.tolist(), "mean": mean.tolist(), "std": std.tolist()}


class ResponseEncoder(ModelMixin, ConfigMixin):
    r"""Encodes responses, NaN where open, as tokens for cross-attention.

    Args:
        token_dim: D, the denoiser's ``cross_attention_dim``.
        hidden_dim: Width of the network that makes a token.
        meaning: What the entries of a response are: ``load_cases`` (L names), ``strains`` (L lists of S magnitudes)
            and whatever else travels with them (``quantity``, ``units``, ``element_order``, material). ``None`` makes
            an encoder of no response at all, for an unconditional model.
        scale: :math:`s` of each entry, L lists of S numbers in the units of the response, positive; this and the next
            two are what :func:`response_normalisation` gives.
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
        if meaning is not None and not {"load_cases", "strains"} <= meaning.keys():
            raise ValueError(f"meaning must have 'load_cases' and 'strains', got {sorted(meaning)}")
        strains = [] if meaning is None else meaning["strains"]
        #: (L, S), the shape of a response; (0, 0) for an unconditional model.
        self.response_shape = (len(strains), len(strains[0]) if strains else 0)
        self.null_tokens = nn.Parameter(torch.randn(max(len(strains), 1), token_dim))
        if meaning is None:
            return
        shapes = {np.array(entries, dtype=float).shape for entries in (strains, scale, mean, std)}
        if shapes != {self.response_shape} or len(meaning["load_cases"]) != len(strains):
            raise ValueError(
                f"scale, mean and std must be {self.response_shape[0]} lists of {self.response_shape[1]} numbers, as "
                f"the strains of the load cases {meaning['load_cases']} are, got {scale!r}, {mean!r} and {std!r}"
            )
        for name, entries in (("scale", scale), ("std", std)):
            if not (np.array(entries) > 0).all():
                raise ValueError(f"{name} must be positive everywhere, got {entries!r}")
        self.case_embedding = nn.Parameter(torch.randn(len(strains), hidden_dim))
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
        response = response.float()  # units may need more digits than the weights have
        scale, mean, std = (response.new_tensor(self.config[name]) for name in ("scale", "mean", "std"))
        values = torch.where(given, (torch.asinh(response / scale) - mean) / std, 0.0)
        features = torch.cat([values, given.float()], dim=-1).to(self.null_tokens.dtype)
        tokens = self.proj_out(self.layers(self.proj_in(features) + self.case_embedding))
        return torch.where(given.flatten(1).any(1)[:, None, None], tokens, null)
