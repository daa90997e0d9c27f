"""The moving average of the weights, which is what validates, samples and is published."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

__all__ = ["MovingAverage"]


class MovingAverage(EMAModel):
    """diffusers' average, without the temporary copies of all weights that its step makes and takes longest for.

    After step t + 1 the decay is 1 - (1 + t)^(-3/4), until it reaches its largest.

    Args:
        parameters: The weights; the average begins with them.
        decay: Largest decay.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        super().__init__(parameters, decay=decay, use_ema_warmup=True, power=3 / 4, foreach=True)

    @torch.no_grad()
    def step(self, parameters: Iterable[Tensor]) -> None:
        """Takes the weights after a step of the optimiser into the average."""
        self.optimization_step += 1
        decay = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - decay)
