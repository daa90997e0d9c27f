r"""From a design to its response, without a simulation: a network that learned from simulated designs.

It is wrong by some per cent where finite elements are not, but takes a thousandth of their time and has a gradient:
it draws samples towards a wanted response (:mod:`predictor_guidance`), and is no judge of them.

It predicts normalised responses, :math:`(\operatorname{asinh}(y / s) - m) / d` of an entry :math:`y`, as
:mod:`response_encoder` sees them and explains. The two cannot share the lines that do so: diffusers downloads a single
file of code for a part with weights.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

import copy
import math
import os
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

__all__ = ["ResponsePredictor"]

#: What is left of a design's height and width before the last layers, which tell places apart.
_COARSEST = 4


class ResponsePredictor(ModelMixin, ConfigMixin):
    r"""Predicts the response of designs: a residual network, twice coarser in each block.

    Args:
        block_out_channels: Widths of the blocks.
        layers_per_block: Residual layers of a block.
        hidden_dim: Width of the last layers.
        meaning: What the entries of a response are: ``load_cases`` (L names), ``strains`` (L lists of S magnitudes)
            and whatever else travels with them.
        scale: :math:`s` of each entry, L lists of S numbers in the units of the response, positive; this and the next
            two are what :func:`mechdiffusers.models.response_normalisation` gives.
        mean: :math:`m` of each entry.
        std: :math:`d` of each entry, positive.

    Raises:
        ValueError: If ``meaning``, ``scale``, ``mean`` and ``std`` do not fit together.

    Example:
        >>> meaning = {"quantity": "stress", "load_cases": ["shear"], "strains": [[0.1, 0.2, 0.3]]}
        >>> responses = torch.rand(100, 1, 3) + torch.tensor([1.0, 2.0, 3.0])
        >>> predictor = ResponsePredictor(meaning=meaning, **response_normalisation(responses))
        >>> predictor.predict(torch.zeros(4, 1, 32, 32)).shape
        torch.Size([4, 1, 3])
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (24, 48, 96),
        layers_per_block: int = 1,
        hidden_dim: int = 256,
        meaning: dict[str, Any] | None = None,
        scale: list[list[float]] | None = None,
        mean: list[list[float]] | None = None,
        std: list[list[float]] | None = None,
    ):
        super().__init__()
        if meaning is None or not {"load_cases", "strains"} <= meaning.keys():
            raise ValueError(f"meaning must have 'load_cases' and 'strains', got {meaning and sorted(meaning)}")
        strains = meaning["strains"]
        #: (L, S), the shape of a response.
        self.response_shape = (len(strains), len(strains[0]) if strains else 0)
        shapes = {np.array(entries, dtype=float).shape for entries in (strains, scale, mean, std)}
        if shapes != {self.response_shape} or len(meaning["load_cases"]) != len(strains):
            raise ValueError(
                f"scale, mean and std must be {self.response_shape[0]} lists of {self.response_shape[1]} numbers, as "
                f"the strains of the load cases {meaning['load_cases']} are, got {scale!r}, {mean!r} and {std!r}"
            )
        for name, entries in (("scale", scale), ("std", std)):
            if not (np.array(entries) > 0).all():
                raise ValueError(f"{name} must be positive everywhere, got {entries!r}")
        widths = tuple(block_out_channels)
        groups = math.gcd(8, *widths)
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers.append(nn.Conv2d(before, width, 3 if layers else 4, stride=2, padding=1))
            layers += [_residual_layer(width, groups) for _ in range(layers_per_block)]
        layers.append(_residual_layer(widths[-1], groups))
        self.body = nn.ModuleList(layers)
        self.head = nn.Sequential(
            nn.GroupNorm(groups, widths[-1]),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(_COARSEST),
            nn.Flatten(),
            nn.Linear(widths[-1] * _COARSEST**2, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, math.prod(self.response_shape)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The normalised response of images.

        Args:
            images: In [0, 1], shape ``(B, 1, H, W)``; values between the phases are what a decoder is unsure of.

        Returns:
            Shape ``(B, L, S)``.
        """
        height, width = images.shape[-2:]
        # the clamped edges make places differ
        rows = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)[:, None]
        columns = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
        place = [coordinate.expand(len(images), 1, height, width) for coordinate in (rows, columns)]
        hidden = torch.cat([2 * images - 1, *place], dim=1)
        for layer in self.body:
            hidden = layer(hidden, None) if isinstance(layer, ResnetBlock2D) else layer(hidden)
        return self.head(hidden).unflatten(1, self.response_shape)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in diffusers, but in half precision: half the size, and rounded by far less than the predictor is wrong.

        Args:
            save_directory: Folder to write to.
            **kwargs: As in diffusers.
        """
        super(ResponsePredictor, copy.deepcopy(self).half()).save_pretrained(save_directory, **kwargs)

    def predict(self, images: Tensor) -> Tensor:
        """The response of images ``(B, 1, H, W)`` in physical units, float32, shape ``(B, L, S)``."""
        return self.denormalise(self(images.to(self.dtype)))

    def normalise(self, response: Tensor) -> Tensor:
        """Normalises responses ``(B, L, S)``, NaN where open; float32, as units may need more digits than weights."""
        scale, mean, std = self._normalisation(response.device)
        return (torch.asinh(response.float() / scale) - mean) / std

    def denormalise(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        scale, mean, std = self._normalisation(values.device)
        return torch.sinh(values.float() * std + mean) * scale

    def _normalisation(self, device: torch.device) -> list[Tensor]:
        return [torch.tensor(self.config[name], device=device) for name in ("scale", "mean", "std")]


def _residual_layer(width: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=width, out_channels=width, temb_channels=None, groups=groups, eps=1e-5)
