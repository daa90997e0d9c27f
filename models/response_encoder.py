r"""From a response to the tokens that a denoiser attends to.

A response is an array (B, L, S): L load cases, S strains, in physical units; NaN marks an unspecified entry. Each load
case becomes one token: a small network sees its normalised values, zero where unspecified, and the mask of the others.
A response that is unspecified everywhere becomes the learned null tokens. So classifier-free guidance needs no second
denoiser (Ho & Salimans 2021).

What counts of a response is its relative error in each load case, and responses of two-phase designs range over more
than a decade. So an entry :math:`y` is normalised on a logarithmic scale, but one that has a place for zero and below,
as a target may lie there: :math:`(\operatorname{asinh}(y / s) - m) / d`, with :math:`s` near the least of the training
data, and :math:`m` and :math:`d` the mean and the standard deviation of the first term.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["ResponseEncoder", "difference_of_meanings", "normalise_response", "response_normalisation"]


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


def normalise_response(
    response: Tensor, scale: list[list[float]], mean: list[list[float]], std: list[list[float]]
) -> Tensor:
    """Normalises responses ``(B, L, S)`` by what :func:`response_normalisation` measured: float32, NaN stays NaN."""
    response = response.float()  # units may need more digits than the weights have
    return (torch.asinh(response / response.new_tensor(scale)) - response.new_tensor(mean)) / response.new_tensor(std)


class ResponseEncoder(ModelMixin, ConfigMixin):
    r"""Encodes responses, NaN where unspecified, as tokens for cross-attention.

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

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers, which warns of the entry that it writes for ``AutoModel``."""
        return super().extract_init_dict({key: config_dict[key] for key in config_dict if key != "auto_map"}, **kwargs)

    def forward(self, response: Tensor) -> Tensor:
        """Tokens of a batch of responses.

        Args:
            response: Shape ``(B, L, S)``, NaN where unspecified; ``(B, 0, 0)`` for an unconditional model.

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

    def normalise(self, response: Tensor) -> Tensor:
        """Normalises responses ``(B, L, S)``, NaN where unspecified.

        Args:
            response: In physical units, shape ``(B, L, S)``.

        Returns:
            Same shape, float32.
        """
        return normalise_response(response, self.config.scale, self.config.mean, self.config.std)

    def prepare(self, response: Tensor | np.ndarray | None, batch_size: int = 1) -> Tensor:
        """A wanted response, checked against what this encoder was trained for.

        Args:
            response: Shape ``(B, L, S)``, NaN where unspecified; ``None`` is unspecified everywhere, ``batch_size``
                times.
            batch_size: Number of responses, or 1 for as many as there are.

        Returns:
            The response, float32, shape ``(B, L, S)``.

        Raises:
            ValueError: If the response does not fit the checkpoint.
        """
        num_cases, num_strains = self.response_shape
        if response is None:
            return torch.full((batch_size, num_cases, num_strains), math.nan)
        if self.config.meaning is None:
            raise ValueError("response must be None: this checkpoint was trained without responses")
        try:
            # a copy, since torch takes no view that runs backwards
            wanted = torch.as_tensor(response if isinstance(response, Tensor) else np.array(response))
            if wanted.is_complex() or wanted.dtype == torch.bool:
                raise TypeError
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"response must be a tensor or array of numbers, got {type(response).__name__}") from None
        wanted, cases = wanted.float(), self.config.meaning["load_cases"]
        if wanted.ndim != 3 or tuple(wanted.shape[1:]) != self.response_shape:
            raise ValueError(
                f"response must have shape (B, {num_cases}, {num_strains}): the load cases {cases} at {num_strains} "
                f"strains each; got shape {tuple(wanted.shape)}"
            )
        if batch_size not in (1, len(wanted)):
            raise ValueError(f"batch_size must be left out or be the {len(wanted)} responses, got {batch_size}")
        if not len(wanted) or wanted.isnan().flatten(1).all(1).any() or wanted.isinf().any():
            raise ValueError(
                "response must be finite somewhere in each sample, NaN only where unspecified, and never infinite"
            )
        if (wanted < 0).any():
            sample, case, strain = (wanted < 0).nonzero()[0].tolist()
            raise ValueError(
                "response must be non-negative, since it belongs to magnitudes of strain, in compression too; got "
                f"{wanted[sample, case, strain].item():g} in sample {sample}, load case {cases[case]!r}"
            )
        if ((wanted == 0).any(-1) & ~(wanted > 0).any(-1)).any():
            raise ValueError("response must not be zero all along a load case: NaN leaves it unspecified")
        return wanted

    def check_meaning(self, name: str, meaning: Mapping[str, Any]) -> None:
        """Raises a ``ValueError`` unless a meaning, named in the message, is what this encoder was trained for."""
        if self.config.meaning is None:
            raise ValueError(f"{name} must be None: this checkpoint was trained without responses")
        if not isinstance(meaning, Mapping):
            raise ValueError(
                f"{name} must be a dictionary as mechdiffusers.response_meaning reads it from a dataset, got "
                f"{meaning!r}"
            )
        if (other := difference_of_meanings(meaning, self.config.meaning)) is not None:
            raise ValueError(f"{name} must agree with what response_encoder was trained for, got {other}")


def difference_of_meanings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first entry in which two meanings differ, in words, ``None`` if there is none."""
    one, other = _as_saved(found), _as_saved(wanted)
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            return f"another {key}: {one.get(key)}, not {other.get(key)}"
    return None


def _as_saved(value: Any) -> Any:
    """A meaning as a file holds it, where tuples and arrays are lists, but not to the last digit."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _as_saved(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_saved(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


# for AutoModel.from_pretrained(checkpoint, subfolder="response_encoder", trust_remote_code=True)
ResponseEncoder.register_for_auto_class()
