r"""A predictor of responses beside the denoiser: what a design does at a glance, and samples drawn towards a target.

A denoiser that is given a response has to find out from examples alone what a design does, and uses it loosely. A
network that predicts the response :math:`f(x)` of a design learns the same from far fewer examples. Given noisy latents
:math:`z_t`, the clean ones are about Gaussian, with the denoiser's :math:`\hat z_0` as mean and the variance
:math:`\sigma_t^2`; a response that is observed up to an error :math:`\varepsilon` moves their mean by

.. math:: w \, \sigma_t^2 J^T (\sigma_t^2 J J^T + \varepsilon^2 I)^{-1} (y - f(\hat z_0)),

with :math:`J = \partial f / \partial z_0` through the decoder: the pseudo-inverse guidance of Song et al. (2023), the
observation linearised, and without the denoiser's own derivative, by which they multiply. The curve of a load case is
nearly one number, so that :math:`y` and :math:`f` are the means of the normalised stresses over the strains that are
given, one for each load case.

As it changes what the denoiser says and not the step that follows, it serves every scheduler. What it leaves over is
chance, so that one does well to draw several candidates for an image and to keep the one that is predicted nearest, and
to take the last steps again from there: less is left to chance the nearer one begins (as in Meng et al. 2022, who call
the noising and denoising of a given image SDEdit).

This file travels inside checkpoints: it imports torch and diffusers alone.

References:
    | Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023)
    | https://openreview.net/forum?id=9_gsMA8MRKQ
    | SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (Meng et al., 2022)
    | https://arxiv.org/abs/2108.01073
"""

import math
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import Tensor

__all__ = ["PredictorGuidance"]

#: The error up to which a wanted response is observed, in standard deviations of the training data.
_TOLERANCE = 0.03
#: The log-SNR before which the decoder makes nothing of :math:`\hat z_0` that a predictor could tell of.
_LEAST_LOG_SNR = -2.5
#: The log-SNR from which a kept sample is drawn anew: a few in a hundred pixels change.
_REFINEMENT_LOG_SNR = 1.0
#: Samples whose activations are kept at once.
_BATCH = 64


class PredictorGuidance(DiffusionPipeline):
    """The part of a latent diffusion pipeline that predicts responses, if its checkpoint has a predictor."""

    @torch.no_grad()
    def predict_response(self, images: PipelineImageInput) -> Tensor:
        """Predicts the response of images without a simulation.

        Args:
            images: Images of the checkpoint's size, see the class.

        Returns:
            Shape ``(B, L, S)``, float32, in the units of the checkpoint.

        Raises:
            ValueError: If the checkpoint has no predictor, or the images have another size or lie outside [0, 1].

        Example:
            >>> pipe.predict_response(images)  # doctest: +SKIP
        """
        if self.response_predictor is None:
            raise ValueError("response_predictor must be part of the checkpoint to predict a response, got none")
        return self._predicted(self._prepare_images(images))

    def _nearest(self, images: Tensor, latents: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Of the candidates for each target the one that is predicted nearest.

        Args:
            images: Decoded candidates, ``(B, 1, H, W)``, those for a target being neighbours.
            latents: What they were decoded from, ``(B, C, h, w)``.
            wanted: The targets, shape ``(T, L, S)``, NaN where open; T divides B.

        Returns:
            T images and their latents.
        """
        predicted = self._predicted(images).unflatten(0, (len(wanted), -1))
        error = _error(predicted.flatten(0, 1), wanted.repeat_interleave(predicted.shape[1], dim=0))
        best = error.unflatten(0, predicted.shape[:2]).argmin(1)
        best = best + predicted.shape[1] * torch.arange(len(best), device=best.device)
        return images[best.to(images.device)], latents[best.to(latents.device)]

    def _refinement_begin(self) -> int:
        """From which of the scheduler's timesteps on a kept sample is drawn anew."""
        timesteps = self.scheduler.timesteps
        late = [i for i, t in enumerate(timesteps) if self._log_snr(t) >= _REFINEMENT_LOG_SNR]
        begin = late[0] if late else len(timesteps) - 1
        begin -= begin % self.scheduler.order  # where a solver of more stages begins a step
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return begin

    def _predicted(self, images: Tensor) -> Tensor:
        """Responses of images ``(B, 1, H, W)``, however many, in physical units."""
        batches = (batch.to(self._execution_device) for batch in images.split(_BATCH))
        return torch.cat([self.response_predictor.predict(batch) for batch in batches])

    def _drawn_towards(self, prediction: Tensor, noisy: Tensor, timestep: Any, wanted: Tensor, scale: float) -> Tensor:
        r"""What the denoiser says, its :math:`\hat z_0` moved towards a wanted response.

        Args:
            prediction: Output of the denoiser, shape ``(B, C, h, w)``.
            noisy: What it saw, same shape.
            timestep: One for all.
            wanted: Responses, shape ``(B, L, S)``, NaN where open.
            scale: :math:`w`.

        Returns:
            Shape ``(B, C, h, w)``, of the dtype of ``prediction``.
        """
        log_snr = self._log_snr(timestep)
        if log_snr < _LEAST_LOG_SNR:
            return prediction
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))
        slope, offset = self._of_velocity(alpha, sigma)
        clean = alpha * noisy - sigma * (prediction - offset * noisy) / slope
        pairs = zip(clean.split(_BATCH), wanted.split(_BATCH), strict=True)
        moves = torch.cat([self._move(latents, response, sigma**2) for latents, response in pairs])
        return prediction - (scale * slope / sigma * moves).to(prediction)

    def _move(self, latents: Tensor, wanted: Tensor, variance: float) -> Tensor:
        """By how much clean latents of this variance have to move for a wanted response."""
        # enable_grad does not undo an inference_mode around the call, whose tensors have no gradient: hence a copy
        with torch.inference_mode(False), torch.enable_grad():
            given = ~wanted.isnan()
            variable = latents.detach().to(self.vae.dtype, copy=True).requires_grad_()
            found = self.response_predictor(self._expected_images(variable).to(self.response_predictor.dtype))
            # normalise gives single precision, whatever the networks run in, and the difference has it
            excess = _levels(found - self.response_predictor.normalise(wanted), given)
            rows = [torch.autograd.grad(level.sum(), variable, retain_graph=True)[0] for level in excess.unbind(1)]
        jacobian = torch.stack(rows, 1).flatten(2).to(excess.dtype)
        # a number a load case: double precision costs nothing on the CPU, and some devices have none
        gram = (variance * jacobian @ jacobian.mT).cpu().double()
        noise = _TOLERANCE**2 * torch.eye(gram.shape[1], dtype=gram.dtype)
        change = torch.linalg.solve(gram + noise, -excess.detach().cpu().double()[..., None])
        return (variance * jacobian.mT @ change.to(jacobian)).reshape(latents.shape)


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    r"""What designs are judged by: mean of :math:`\|y - y^*\| / \|y^*\|` over the load cases, those of zeros left out.

    Args:
        found: Responses in physical units, shape ``(B, L, S)``.
        wanted: Their targets, same shape, NaN where open.

    Returns:
        Shape ``(B,)``, infinite for a response that is not finite.
    """
    given = ~wanted.isnan()
    distance, size = (torch.where(given, values, 0.0).norm(dim=-1) for values in (found - wanted, wanted))
    error = torch.where(size > 0, distance / size, 0.0).sum(-1) / (size > 0).sum(-1).clamp(min=1)
    return torch.where(found.isfinite().flatten(1).all(1), error, math.inf)


def _levels(values: Tensor, given: Tensor) -> Tensor:
    """Means over the given strains of each load case, 0 where none is: shape ``(B, L)`` from ``(B, L, S)``."""
    return torch.where(given, values, 0.0).sum(-1) / given.sum(-1).clamp(min=1)
