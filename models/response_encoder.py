r"""From a response to the tokens that a denoiser attends to.

A response is an array (B, L, S): L load cases, S strains, in physical units; NaN marks an unspecified entry. Each load
case becomes one token: a small network sees its normalised values, zero where unspecified, and the mask of the others.
A response that is unspecified everywhere becomes the learned null tokens. So classifier-free guidance needs no second
denoiser (Ho & Salimans 2021).

An entry :math:`y` is normalised to :math:`(\operatorname{asinh}(y / s) - m) / d`, with :math:`m` and :math:`d` the
mean and the standard deviation of the first term over the training data. Without a sign, what counts is the relative
error, and responses of two-phase designs range over more than a decade: :math:`s` lies near the least of the training
data, so that the scale is logarithmic for them and still has a place for zero. With a sign, :math:`s` is the root mean
square, so that the scale is linear around zero.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

import math
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["ResponseEncoder", "normalise_response", "response_normalisation"]


def response_normalisation(response: Tensor, signed: bool = False) -> dict[str, list[list[float]]]:
    """What responses are normalised by, measured on training data.

    Args:
        response: Shape ``(B, L, S)``, NaN where unknown.
        signed: Whether the response may be negative.

    Returns:
        ``scale``, ``mean`` and ``std``, the arguments of the networks that see or predict responses. An entry that is
        the same for all designs has ``std`` 1.

    Raises:
        ValueError: If an entry is unknown of all designs.

    Example:
        >>> normalisation = response_normalisation(torch.rand(100, 2, 6))
        >>> encoder = ResponseEncoder(16, spec=spec.to_dict(), **normalisation)  # doctest: +SKIP
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
    known = magnitudes[:, with_some]
    scale[with_some] = np.sqrt(np.nanmean(known**2, 0)) if signed else np.nanquantile(known, 0.01, axis=0)
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
        spec: The specification of the responses, as ``ResponseSpec.to_dict`` gives it: ``load_cases`` (L names),
            ``strains`` (L lists of S), ``signed`` and whatever else travels with them. ``None`` makes an encoder of no
            response at all, for an unconditional model.
        scale: :math:`s` of each entry, L lists of S numbers in the units of the response, positive; this and the next
            two are what :func:`response_normalisation` gives.
        mean: :math:`m` of each entry.
        std: :math:`d` of each entry, positive.

    Raises:
        ValueError: If ``spec``, ``scale``, ``mean`` and ``std`` do not fit together.

    Example:
        >>> spec = {"quantity": "stress", "load_cases": ["shear"], "strains": [[0.1, 0.2, 0.3]]}
        >>> responses = torch.rand(100, 1, 3) + torch.tensor([1.0, 2.0, 3.0])
        >>> encoder = ResponseEncoder(16, spec=spec, **response_normalisation(responses))
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
        spec: dict[str, Any] | None = None,
        scale: list[list[float]] | None = None,
        mean: list[list[float]] | None = None,
        std: list[list[float]] | None = None,
    ):
        super().__init__()
        if spec is not None and not {"load_cases", "strains"} <= spec.keys():
            raise ValueError(f"spec must have 'load_cases' and 'strains', got {sorted(spec)}")
        strains = [] if spec is None else spec["strains"]
        #: (L, S), the shape of a response; (0, 0) for an unconditional model.
        self.response_shape = (len(strains), len(strains[0]) if strains else 0)
        self.null_tokens = nn.Parameter(torch.randn(max(len(strains), 1), token_dim))
        if spec is None:
            return
        shapes = {np.array(entries, dtype=float).shape for entries in (strains, scale, mean, std)}
        if shapes != {self.response_shape} or len(spec["load_cases"]) != len(strains):
            raise ValueError(
                f"scale, mean and std must be {self.response_shape[0]} lists of {self.response_shape[1]} numbers, as "
                f"the strains of the load cases {spec['load_cases']} are, got {scale!r}, {mean!r} and {std!r}"
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
        """As in diffusers, without its own entry for ``AutoModel``; ``meaning`` is what ``spec`` was called once."""
        known = {"spec" if key == "meaning" else key: config_dict[key] for key in config_dict if key != "auto_map"}
        return super().extract_init_dict(known, **kwargs)

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
        if self.config.spec is None:
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
        if self.config.spec is None:
            raise ValueError("response must be None: this checkpoint was trained without responses")
        try:
            # a copy, since torch takes no view that runs backwards
            wanted = torch.as_tensor(response if isinstance(response, Tensor) else np.array(response))
            if wanted.is_complex() or wanted.dtype == torch.bool:
                raise TypeError
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"response must be a tensor or array of numbers, got {type(response).__name__}") from None
        wanted, cases = wanted.float(), self.config.spec["load_cases"]
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
        if not self.config.spec.get("signed", False) and (wanted < 0).any():
            sample, case, strain = (wanted < 0).nonzero()[0].tolist()
            raise ValueError(
                "response must be non-negative, since this checkpoint was trained without a sign; got "
                f"{wanted[sample, case, strain].item():g} in sample {sample}, load case {cases[case]!r}"
            )
        return wanted

    def check_spec(self, spec: Any) -> None:
        """Raises a ``ValueError`` unless a ``ResponseSpec`` is of the responses that this encoder was trained for."""
        if self.config.spec is None:
            raise ValueError("spec must be None: this checkpoint was trained without responses")
        if not hasattr(spec, "difference"):
            raise ValueError(f"spec must be a ResponseSpec, as ResponseSpec.of(dataset) reads it, got {spec!r}")
        if (difference := spec.difference(spec.from_dict(self.config.spec))) is not None:
            raise ValueError(f"spec must agree with what response_encoder was trained for, got {difference}")


# for AutoModel.from_pretrained(checkpoint, subfolder="response_encoder", trust_remote_code=True)
ResponseEncoder.register_for_auto_class()
