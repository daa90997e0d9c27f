r"""The third stage: a predictor of responses, for designs that have them.

The loss is the mean square of the error of the normalised response over the entries that are known. It sees the designs
themselves, nothing of the autoencoder or the denoiser. A turned, mirrored or transposed design responds as the design
itself under some load cases; the others are masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mechdiffusers.evaluation.inverse_design import response_error
from mechdiffusers.mechanics.load_cases import load_case, mirrored_cases, transposed_cases
from mechdiffusers.models import ResponsePredictor, normalise_response, response_normalisation
from mechdiffusers.models.response_predictor import SYMMETRIES
from mechdiffusers.training.config import TrainingConfig
from mechdiffusers.training.data import Designs
from mechdiffusers.training.loop import run_stage
from mechdiffusers.training.randomness import StepRandomness

__all__ = ["augment", "symmetries", "train_predictor"]

#: Share of the designs that each symmetry turns; half a turn leaves all of a response known, the others do not.
_SHARES = {"half_turn": 0.5, "mirror": 0.25, "transpose": 0.25}


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
    spec = designs.spec
    assert spec is not None  # where there is none there are no responses to predict
    normalisation = response_normalisation(responses, spec.signed)
    predictor = ResponsePredictor(
        block_out_channels=tuple(config.predictor_block_out_channels),
        layers_per_block=config.predictor_layers_per_block,
        spec=spec.to_dict(),
        symmetries=symmetries(config, spec.load_cases, designs.size),
        **normalisation,
    )

    def compute_loss(
        module: nn.Module, batch: tuple[Tensor, ...], randomness: StepRandomness
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, response = augment(batch[0].float() / 255, batch[1], predictor.config.symmetries, randomness)
        loss = _square_error(module(images), normalise_response(response, **normalisation)).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, ResponsePredictor)
        images, response = designs.heldout.to(module.device).float() / 255, designs.heldout_response.to(module.device)
        predicted = torch.cat([module.predict(batch) for batch in images.split(256)])
        found, wanted = (normalise_response(each, **normalisation) for each in (predicted, response))
        loss = _square_error(found, wanted).double().mean()
        metrics = {"loss": loss.item()}
        known = ~response.isnan().flatten(1).all(1)
        if known.any():
            error = response_error(predicted[known], response[known], signed=spec.signed)
            metrics["response_error"] = error.mean().item()
        return metrics

    trained = run_stage(accelerator, config, "predictor", predictor, designs.train, compute_loss, validate)
    assert isinstance(trained, ResponsePredictor)
    return trained


def symmetries(config: TrainingConfig, load_cases: Sequence[str], size: tuple[int, int]) -> dict[str, list[int | None]]:
    """What the predictor takes from turned designs.

    Args:
        config: Settings of the run.
        load_cases: L names.
        size: Height and width of the designs: only square ones keep their shape when they are transposed.

    Returns:
        As :class:`~mechdiffusers.models.ResponsePredictor` takes them.

    Raises:
        ValueError: If half-turns or reflections are wanted of load cases that ``simulate`` does not know.
    """
    for setting in ("random_half_turn", "random_reflections"):
        try:
            for name in load_cases if getattr(config, setting) else ():
                load_case(name)
        except ValueError as error:
            raise ValueError(f"{setting} must be left out where nothing is known of it: {error}") from error
    found: dict[str, list[int | None]] = {}
    if config.random_half_turn:
        found["half_turn"] = list(range(len(load_cases)))
    if config.random_reflections:
        found["mirror"] = mirrored_cases(load_cases)
        if size[0] == size[1]:
            found["transpose"] = transposed_cases(load_cases)
    # designs turned so that nothing is known of them would teach nothing
    return {name: cases for name, cases in found.items() if any(case is not None for case in cases)}


def augment(
    images: Tensor, response: Tensor, symmetries: Mapping[str, Sequence[int | None]], randomness: StepRandomness
) -> tuple[Tensor, Tensor]:
    """Transforms some designs by the symmetries, and their responses with them.

    Args:
        images: Shape ``(B, 1, H, W)``.
        response: Shape ``(B, L, S)``, NaN where unknown.
        symmetries: As :func:`symmetries` returns them.
        randomness: Of the step.

    Returns:
        Both, NaN where nothing is known of the transformed design.
    """
    for name, cases in symmetries.items():
        chosen = (randomness.uniform(len(images)) < _SHARES[name]).to(images.device)[:, None, None]
        images = torch.where(chosen[..., None], SYMMETRIES[name](images), images)
        unknown = torch.tensor([case is None for case in cases], device=response.device)
        found = response[:, [case or 0 for case in cases]].masked_fill(unknown[:, None], math.nan)
        response = torch.where(chosen, found, response)
    return images, response


def _square_error(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The mean over the known entries of each sample, 0 where none is known: shape ``(B,)``."""
    known = ~wanted.isnan()
    error = torch.where(known, predicted - torch.where(known, wanted, 0.0), 0.0)
    return error.square().flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
