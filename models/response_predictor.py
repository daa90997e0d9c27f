r"""From a design to its response, without a simulation: a network that learned from simulated designs.

It is wrong by some per cent where finite elements are not, but takes a thousandth of their time and has a gradient:
it draws samples towards a wanted response, and is no judge of them.

A symmetry of the cell and its loads tells the response of a turned or mirrored design. A prediction is the mean over
all that are known: networks see them differently, and their errors cancel in part.

It predicts normalised responses, :math:`(\operatorname{asinh}(y / s) - m) / d` of an entry :math:`y`, as
:mod:`response_encoder` sees them and explains.

Given noisy latents :math:`z_t`, the clean ones are about Gaussian, with the denoiser's :math:`\hat z_0` as mean and the
variance :math:`\sigma_t^2`. A response that is observed up to an error :math:`\varepsilon` moves that mean by

.. math:: \sigma_t^2 J^T (\sigma_t^2 J J^T + \varepsilon^2 I)^{-1} (y - f(\hat z_0)),

with :math:`J = \partial f / \partial z_0` through the decoder: the pseudo-inverse guidance of Song et al. (2023), the
observation linearised, and without the denoiser's own derivative, by which they multiply. The curve of a load case is
nearly one number, so :math:`y` and :math:`f` are means of normalised stresses, one for each load case.

This file travels inside checkpoints: it imports torch, numpy and diffusers alone.
"""

import copy
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

__all__ = ["SYMMETRIES", "ResponsePredictor"]

#: What may turn designs ``(..., H, W)`` into others of which as much is known.
SYMMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "half_turn": lambda designs: designs.flip(-1, -2),
    "mirror": lambda designs: designs.flip(-1),
    "transpose": lambda designs: designs.mT,
}

#: The error up to which a wanted response is observed, in standard deviations of the training data.
_TOLERANCE = 0.03

#: What is left of a design's height and width before the last layers, which tell places apart.
_COARSEST = 4


class ResponsePredictor(ModelMixin, ConfigMixin):
    r"""Predicts the response of designs: a residual network, twice coarser in each block.

    Args:
        block_out_channels: Widths of the blocks.
        layers_per_block: Residual layers of a block.
        spec: The specification of the responses, as ``ResponseSpec.to_dict`` gives it: ``load_cases`` (L names),
            ``strains`` (L lists of S) and whatever else travels with them.
        scale: :math:`s` of each entry, L lists of S numbers in the units of the response, positive; this and the next
            two are what :func:`mechdiffusers.models.response_normalisation` gives.
        mean: :math:`m` of each entry.
        std: :math:`d` of each entry, positive.
        symmetries: Which load case of a design is each of the L of the turned one: for names among :data:`SYMMETRIES`,
            the index of that under which the design itself responds alike, ``None`` where there is none.

    Raises:
        ValueError: If ``spec``, ``scale``, ``mean`` and ``std`` do not fit together, or ``symmetries`` are unknown.

    Example:
        >>> spec = {"quantity": "stress", "load_cases": ["shear"], "strains": [[0.1, 0.2, 0.3]]}
        >>> responses = torch.rand(100, 1, 3) + torch.tensor([1.0, 2.0, 3.0])
        >>> predictor = ResponsePredictor(spec=spec, **response_normalisation(responses))
        >>> predictor.predict(torch.zeros(4, 1, 32, 32)).shape
        torch.Size([4, 1, 3])
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 2,
        spec: dict[str, Any] | None = None,
        scale: list[list[float]] | None = None,
        mean: list[list[float]] | None = None,
        std: list[list[float]] | None = None,
        symmetries: dict[str, list[int | None]] | None = None,
    ):
        super().__init__()
        if spec is None or not {"load_cases", "strains"} <= spec.keys():
            raise ValueError(f"spec must have 'load_cases' and 'strains', got {spec and sorted(spec)}")
        strains = spec["strains"]
        #: (L, S), the shape of a response.
        self.response_shape = (len(strains), len(strains[0]) if strains else 0)
        shapes = {np.array(entries, dtype=float).shape for entries in (strains, scale, mean, std)}
        if shapes != {self.response_shape} or len(spec["load_cases"]) != len(strains):
            raise ValueError(
                f"scale, mean and std must be {self.response_shape[0]} lists of {self.response_shape[1]} numbers, as "
                f"the strains of the load cases {spec['load_cases']} are, got {scale!r}, {mean!r} and {std!r}"
            )
        for name, entries in (("scale", scale), ("std", std)):
            if not (np.array(entries) > 0).all():
                raise ValueError(f"{name} must be positive everywhere, got {entries!r}")
        for name, cases in (symmetries or {}).items():
            known = [None, *range(len(strains))]
            if name not in SYMMETRIES or len(cases) != len(strains) or any(case not in known for case in cases):
                raise ValueError(
                    f"symmetries must be among {', '.join(SYMMETRIES)}, with an index of a load case or None for each "
                    f"of {spec['load_cases']}, got {name!r}: {cases!r}"
                )
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
            nn.Linear(widths[-1] * _COARSEST**2, 2 * widths[-1]),
            nn.SiLU(),
            nn.Linear(2 * widths[-1], math.prod(self.response_shape)),
        )

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers, without its own entry for ``AutoModel``; ``meaning`` is what ``spec`` was called once."""
        known = {"spec" if key == "meaning" else key: config_dict[key] for key in config_dict if key != "auto_map"}
        return super().extract_init_dict(known, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """The normalised response of images, as the network alone sees them.

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

    @functools.wraps(ModelMixin.save_pretrained)  # whose signature tells diffusers what it may pass on
    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """As in diffusers, but in half precision: half the size, and a rounding far below the predictor's error."""
        super(ResponsePredictor, copy.deepcopy(self).half()).save_pretrained(save_directory, **options)

    def predict(self, images: Tensor) -> Tensor:
        """The response of images, the mean over what the symmetries tell of it.

        Args:
            images: Shape ``(B, 1, H, W)``.

        Returns:
            In physical units, float32, shape ``(B, L, S)``.
        """
        seen: list[tuple[Tensor, list[int | None]]] = [(images.to(self.dtype), list(range(self.response_shape[0])))]
        for name, cases in (self.config.symmetries or {}).items():
            turned = [[None if case is None else of[case] for case in cases] for _, of in seen]
            seen += [(SYMMETRIES[name](view), of) for (view, _), of in zip(seen, turned, strict=True)]
        told: list[list[Tensor]] = [[] for _ in range(self.response_shape[0])]
        for view, of in seen:
            for case, values in zip(of, self(view).unbind(1), strict=True):
                if case is not None:
                    told[case].append(values)
        return self.denormalise(torch.stack([torch.stack(values).mean(0) for values in told], dim=1))

    def denormalise(self, values: Tensor) -> Tensor:
        """Normalised responses ``(B, L, S)`` in physical units, float32: inverts ``ResponseEncoder.normalise``."""
        scale, mean, std = (torch.tensor(self.config[name], device=values.device) for name in ("scale", "mean", "std"))
        return torch.sinh(values.float() * std + mean) * scale

    def posterior_mean_shift(
        self, decode: Callable[[Tensor], Tensor], latents: Tensor, target: Tensor, variance: float
    ) -> Tensor:
        r"""By how much the mean of clean latents moves, given a wanted response.

        Args:
            decode: The mean image of latents ``(B, C, h, w)``, differentiable.
            latents: Their mean, :math:`\hat z_0`.
            target: Normalised responses, shape ``(B, L, S)``, NaN where unspecified.
            variance: :math:`\sigma_t^2`.

        Returns:
            Of the shape of ``latents``, float32.

        References:
            | Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023)
            | https://openreview.net/forum?id=9_gsMA8MRKQ
        """
        # enable_grad does not undo an inference_mode around the call, whose tensors have no gradient: hence a copy
        with torch.inference_mode(False), torch.enable_grad():
            given = ~target.isnan()
            variable = latents.detach().clone().requires_grad_()
            # the target has single precision, whatever the networks run in, and so has the difference
            excess = torch.where(given, self(decode(variable).to(self.dtype)) - target, 0.0).sum(-1)
            excess = excess / given.sum(-1).clamp(min=1)
            rows = [torch.autograd.grad(mean.sum(), variable, retain_graph=True)[0] for mean in excess.unbind(1)]
        jacobian = torch.stack(rows, 1).flatten(2).to(excess.dtype)
        # a number a load case: double precision costs nothing on the CPU, and some devices have none
        gram = (variance * jacobian @ jacobian.mT).cpu().double()
        noise = _TOLERANCE**2 * torch.eye(gram.shape[1], dtype=gram.dtype)
        change = torch.linalg.solve(gram + noise, -excess.detach().cpu().double()[..., None])
        return (variance * jacobian.mT @ change.to(jacobian)).reshape(latents.shape)

    def response_error(self, found: Tensor, wanted: Tensor) -> Tensor:
        r"""Mean of :math:`\|y - y^*\| / \|y^*\|` over the load cases.

        All load cases of a signed response, and those that are to be zero, are measured against the root mean square
        of :math:`\|y^*\|`; a target of zeros in units of the response.

        Args:
            found: Responses in physical units, shape ``(*, L, S)``.
            wanted: Their targets, NaN where unspecified.

        Returns:
            Shape ``(*)``, infinite for a response that is not finite.
        """
        given = ~wanted.isnan()
        distance, size = (torch.where(given, values, 0.0).norm(dim=-1) for values in (found - wanted, wanted))
        cases = given.any(-1)
        typical = (size.square().sum(-1, keepdim=True) / cases.sum(-1, keepdim=True).clamp(min=1)).sqrt()
        typical = torch.where(typical > 0, typical, 1.0)
        relative = (size > 1e-6 * typical) & (not self.config.spec.get("signed", False))
        size = torch.where(relative, size, typical)
        error = torch.where(cases, distance / size, 0.0).sum(-1) / cases.sum(-1).clamp(min=1)
        return torch.where(found.isfinite().flatten(-2).all(-1), error, math.inf)


def _residual_layer(width: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=width, out_channels=width, temb_channels=None, groups=groups, eps=1e-5)


# for AutoModel.from_pretrained("checkpoint/response_predictor", trust_remote_code=True), of the folder itself
ResponsePredictor.register_for_auto_class()
