r"""The autoencoder as a latent-variable model: the posterior :math:`q(z \mid x)` and the decoder :math:`p(x \mid z)`.

The evidence lower bound is :math:`E_q[\log p(x \mid z)] - KL(q(z \mid x) \| p(z))` (Luo 2022, equation 19), so a
decoder has to be a probability mass function of the pixels it is trained on:

``bernoulli``
    Binary designs. The network's output is the logit of the pixel being stiff.
``discretized_logistic``
    8-bit images. The network's output, taken from [-1, 1] to [0, 1] as diffusers does, is the mean of a logistic
    distribution with one common ``scale``; a pixel value has the mass of its bin of width 1/255, and the bins at 0 and
    1 are open, so that the 256 masses sum to 1 (Salimans et al. 2017, section 2.1).

Designs need not be a multiple of the autoencoder's factor: they are padded before it and cropped behind it, and the
likelihood is of the real pixels alone.

This file travels inside checkpoints: it imports torch alone.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

__all__ = [
    "AutoencoderLikelihood",
    "DecoderLikelihood",
    "check_decoder_likelihood",
    "decoder_log_prob",
    "decoder_output",
    "image_size",
    "latent_size",
    "log_prob_given",
    "most_likely_images",
    "posterior_of",
]

DecoderLikelihood = Literal["bernoulli", "discretized_logistic"]

_LEVELS = 255
_POSSIBLE_WITHOUT = "without it only score, to_noise and from_noise are possible"


def check_decoder_likelihood(likelihood: str, scale: float | None) -> None:
    """Raises a ``ValueError`` unless ``likelihood`` is known and ``scale`` is given exactly where it is needed."""
    if likelihood not in get_args(DecoderLikelihood):
        raise ValueError(f"decoder_likelihood must be one of {get_args(DecoderLikelihood)}, got {likelihood!r}")
    if likelihood == "bernoulli" and scale is not None:
        raise ValueError(f"decoder_scale must be None for a bernoulli decoder, which has no scale, got {scale!r}")
    if likelihood == "discretized_logistic" and not (scale is not None and 0 < scale < math.inf):
        raise ValueError(f"decoder_scale must be a positive number for a discretized_logistic decoder, got {scale!r}")


def image_size(vae: Any) -> tuple[int, int]:
    """Height and width of the designs of an ``AutoencoderKL``."""
    size = vae.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def latent_size(vae: Any) -> tuple[int, int]:
    """Height and width of the latents of an ``AutoencoderKL``: its ``sample_size`` by its factor, rounded up."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = image_size(vae)
    return -(-height // factor), -(-width // factor)


def posterior_of(vae: Any, images: Tensor) -> Any:
    r"""The posterior :math:`q(z \mid x)` of images in [0, 1], shape ``(B, C, H, W)``, as diffusers' distribution."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (factor * side for side in latent_size(vae))
    padded = pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), mode="replicate")
    return vae.encode(2 * padded - 1).latent_dist


def decoder_output(vae: Any, codes: Tensor) -> Tensor:
    r"""The decoder's output for codes :math:`z`, shape ``(B, C, H, W)``, cropped to the size of the designs."""
    height, width = image_size(vae)
    return vae.decode(codes).sample[..., :height, :width]


def decoder_log_prob(
    decoded: Tensor, images: Tensor, likelihood: DecoderLikelihood, scale: Tensor | float | None = None
) -> Tensor:
    r"""Log-probability of every pixel of ``images`` under the decoder's output.

    Args:
        decoded: Output of the decoder network, shape ``(B, C, H, W)``.
        images: Pixel values in [0, 1], multiples of 1/255, shape ``(B, C, H, W)``; 0 or 1 for ``bernoulli``.
        likelihood: What the decoder's output means, see this module's text.
        scale: Scale of the logistic distribution on [0, 1]; ``discretized_logistic`` needs it.

    Returns:
        Log-probabilities in nats, shape ``(B, C, H, W)``.

    Raises:
        ValueError: If the likelihood is unknown.

    Example:
        >>> decoder_log_prob(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "bernoulli")
        tensor([[[[-0.6931]]]])

    References:
        | PixelCNN++ (Salimans et al., 2017), section 2.1
        | https://arxiv.org/abs/1701.05517
    """
    if likelihood == "bernoulli":
        return logsigmoid(torch.where(images > 0.5, decoded, -decoded))
    if likelihood != "discretized_logistic":
        raise ValueError(f"likelihood must be one of {get_args(DecoderLikelihood)}, got {likelihood!r}")
    if scale is None:
        raise ValueError("scale must be a positive number for a discretized_logistic decoder, got None")
    scale = torch.as_tensor(scale, dtype=decoded.dtype, device=decoded.device)
    offset = images - (decoded + 1) / 2
    below = logsigmoid((offset + 0.5 / _LEVELS) / scale)  # log-mass of all values up to this bin
    above = logsigmoid((0.5 / _LEVELS - offset) / scale)  # log-mass of all values from this bin on
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) keeps the digits that the difference loses
    inside = below + above + torch.log(-torch.expm1(-1 / (_LEVELS * scale)))
    half_bin = 0.5 / _LEVELS
    return torch.where(images < half_bin, below, torch.where(images > 1 - half_bin, above, inside))


def log_prob_given(
    vae: Any, latents: Tensor, pixels: Tensor, likelihood: DecoderLikelihood, scale: float | None = None
) -> Tensor:
    r"""Log-probability of images given their latents, in nats.

    Args:
        vae: Autoencoder, its shift and scale measured.
        latents: In the space that the diffusion works in, shape ``(B, C, h, w)``.
        pixels: As in :func:`decoder_log_prob`, shape ``(B, C, H, W)``.
        likelihood: What the decoder's output means.
        scale: Scale of the logistic distribution on [0, 1]; ``discretized_logistic`` needs it.

    Returns:
        Shape ``(B,)``, float64.
    """
    codes = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    decoded = decoder_output(vae, codes.to(vae.dtype)).double()
    return decoder_log_prob(decoded, pixels.to(decoded), likelihood, scale).flatten(1).sum(1)


def most_likely_images(decoded: Tensor, likelihood: DecoderLikelihood, scale: Tensor | float | None = None) -> Tensor:
    """The most likely image of a decoder's output: binary for ``bernoulli``, multiples of 1/255 otherwise.

    The open bins at 0 and 1 count in full, so that a background close to 0 comes out as exactly 0, which a response
    depends on.

    Args:
        decoded: Output of the decoder network, shape ``(B, C, H, W)``.
        likelihood: What the decoder's output means.
        scale: Scale of the logistic distribution on [0, 1]; ``discretized_logistic`` needs it.

    Returns:
        Images in [0, 1], same shape and dtype.
    """
    if likelihood == "bernoulli":
        return (decoded > 0).to(decoded.dtype)
    nearest = torch.round((decoded + 1) / 2 * _LEVELS).clamp(1, _LEVELS - 1) / _LEVELS  # best of the closed bins
    candidates = torch.stack([torch.zeros_like(decoded), nearest, torch.ones_like(decoded)])
    log_probs = torch.stack([decoder_log_prob(decoded, image, likelihood, scale) for image in candidates])
    return candidates.gather(0, log_probs.argmax(0, keepdim=True))[0]


class AutoencoderLikelihood:
    """The part of a latent diffusion pipeline that is about its autoencoder as a latent-variable model."""

    vae: Any
    config: Any
    _execution_device: Any

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return (self.vae.config.latent_channels, *latent_size(self.vae))

    @property
    def _shift(self) -> float:
        return self.vae.config.shift_factor or 0.0

    def _check_mass(self, pixels: Tensor) -> None:
        """Raises a ``ValueError`` unless the decoder gives a probability to pixels in [0, 1]."""
        try:
            check_decoder_likelihood(self.config.decoder_likelihood, self.config.decoder_scale)
        except ValueError as error:
            raise ValueError(f"{error}: {_POSSIBLE_WITHOUT}") from None
        levels = 1 if self.config.decoder_likelihood == "bernoulli" else _LEVELS
        # in parts, as there may be far more images than go through the networks at once
        if any(((part * levels).round() - part * levels).abs().max() > 1e-3 for part in pixels.split(1024)):
            accepted = "0 or 1" if levels == 1 else "multiples of 1/255"
            raise ValueError(
                f"images must have pixels of {accepted}, to which alone a {self.config.decoder_likelihood} decoder "
                "gives a probability, got others"
            )

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pixels, float64: those of the codes, shifted and scaled."""
        posterior = posterior_of(self.vae, pixels.to(self._execution_device, self.vae.dtype))
        if posterior.deterministic or not (posterior.std > 0).all():
            raise ValueError(
                "vae must have a posterior of positive variance for a likelihood of images, got a deterministic one: "
                + _POSSIBLE_WITHOUT
            )
        scale = self.vae.config.scaling_factor
        return (posterior.mean.double() - self._shift) * scale, posterior.std.double() * abs(scale)

    def _expected_images(self, latents: Tensor) -> Tensor:
        """The decoder's mean image of each of the latents, differentiable: shape ``(B, C, H, W)``, in [0, 1]."""
        decoded = decoder_output(self.vae, latents / self.vae.config.scaling_factor + self._shift)
        if self.config.decoder_likelihood == "bernoulli":
            return torch.sigmoid(decoded)
        return ((decoded + 1) / 2).clamp(0, 1)

    def _most_likely_images(self, latents: Tensor) -> Tensor:
        """The most likely image of each of the latents: shape ``(B, C, H, W)``, in [0, 1]."""
        codes = latents.to(self._execution_device, self.vae.dtype) / self.vae.config.scaling_factor + self._shift
        # a logistic tail needs more digits than a half-precision decoder has
        decoded = decoder_output(self.vae, codes).float()
        return most_likely_images(decoded, self.config.decoder_likelihood, self.config.decoder_scale)

    def _log_prob_given(self, latents: Tensor, pixels: Tensor) -> Tensor:
        return log_prob_given(self.vae, latents, pixels, self.config.decoder_likelihood, self.config.decoder_scale)
