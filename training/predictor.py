r"""The third stage: a predictor of responses, for designs that have them.

The loss is the mean square of the error of the normalised response over the entries that are known. It sees the designs
themselves, nothing of the autoencoder or the denoiser. A mirror image or a transposed design responds as the design
itself under some load cases; the others are left open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from mechdiffusers.evaluation import response_error
from mechdiffusers.mechanics.load_cases import mirrored_cases, transposed_cases
from mechdiffusers.models import ResponsePredictor, response_normalisation
from mechdiffusers.training.autoencoder import half_turn
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.data import Designs
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.randomness import StepRandomness
from torch import Tensor, nn

__all__ = ["reflected", "train_predictor"]

#: Share of the designs that are mirrored, and share that are transposed; the others keep all of their response.
_REFLECTED = 0.25


def train_predictor(
    accelerator: Accelerator, config: TrainingConfig, designs: Designs, responses: Tensor
) -> ResponsePredictor:
    """Trains the predictor.

    Args:
        accelerator: From :func:`~mechdiffusers.training.accelerators.stage_accelerator`.
        config: Settings of the run.
        designs: What to train on, with responses.
        responses: Those of the training designs, shape ``(N, L, S)``, NaN where unknown: what to normalise by.

    Returns:
        The predictor with averaged weights, on the CPU, in the main process.
    """
    predictor = ResponsePredictor(
        block_out_channels=tuple(config.predictor_block_out_channels),
        layers_per_block=config.predictor_layers_per_block,
        meaning=designs.meaning,
        **response_normalisation(responses),
    )

    load_cases = predictor.config.meaning["load_cases"]

    def compute_loss(
        module: nn.Module, batch: tuple[Tensor, ...], randomness: StepRandomness
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, response = batch[0].float() / 255, batch[1]
        if config.random_half_turn:
            turned = randomness.integers(2, len(images)).bool().to(images.device)
            images = torch.where(turned[:, None, None, None], half_turn(images), images)
        if config.random_reflections:
            images, response = reflected(images, response, load_cases, randomness)
        loss = _square_error(module(images), predictor.normalise(response)).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, ResponsePredictor)
        images, response = designs.heldout.to(module.device).float() / 255, designs.heldout_response.to(module.device)
        predicted = torch.cat([module(batch) for batch in images.split(256)])
        loss = _square_error(predicted, module.normalise(response)).double().mean()
        metrics = {"loss": loss.item()}
        known = ~response.isnan().flatten(1).all(1)
        if known.any():
            error = response_error(module.denormalise(predicted)[known], response[known])
            metrics["response_error"] = error.mean().item()
        return metrics

    trained = run_stage(accelerator, config, "predictor", predictor, designs.train, compute_loss, validate)
    assert isinstance(trained, ResponsePredictor)
    return trained


def reflected(
    images: Tensor, response: Tensor, load_cases: Sequence[str], randomness: StepRandomness
) -> tuple[Tensor, Tensor]:
    """Mirrors and transposes some designs, with the response that follows from theirs.

    Args:
        images: Shape ``(B, 1, H, W)``; only square ones are transposed.
        response: Shape ``(B, L, S)``, NaN where unknown.
        load_cases: L names.
        randomness: Of the step.

    Returns:
        Both, NaN where nothing is known of the reflected design.
    """
    reflections = [(lambda x: x.flip(-1), mirrored_cases(load_cases))]
    if images.shape[-1] == images.shape[-2]:
        reflections.append((lambda x: x.mT, transposed_cases(load_cases)))
    for reflect, cases in reflections:
        chosen = (randomness.uniform(len(images)) < _REFLECTED).to(images.device)[:, None, None]
        images = torch.where(chosen[..., None], reflect(images), images)
        unknown = torch.tensor([case is None for case in cases], device=response.device)
        found = response[:, [case or 0 for case in cases]].masked_fill(unknown[:, None], math.nan)
        response = torch.where(chosen, found, response)
    return images, response


def _square_error(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The mean over the known entries of each sample, 0 where none is known: shape ``(B,)``."""
    known = ~wanted.isnan()
    error = torch.where(known, predicted - torch.where(known, wanted, 0.0), 0.0)
    return error.square().flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
