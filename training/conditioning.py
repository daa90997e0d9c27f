r"""The response that a denoiser is trained under: mostly the whole one, sometimes a part, sometimes none.

Dropping the whole response teaches the denoiser to do without one. Classifier-free guidance needs that (Ho & Salimans
2021, section 3.2). Masking some load cases or some strains teaches it targets that are unspecified in parts. A masked
entry is NaN, like one that the data do not have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mechdiffusers.training.randomness import StepRandomness

__all__ = ["mask_responses"]


def mask_responses(response: Tensor, randomness: StepRandomness, dropout: float, masking: float) -> Tensor:
    """Drops some responses, and masks a part of others.

    Args:
        response: Shape ``(B, L, S)``, NaN where unknown.
        randomness: Of the step.
        dropout: Probability that a response is dropped as a whole.
        masking: Probability, apart from that, that a part of it is masked: as often some load cases as some entries,
            half of them on average, never all that is known.

    Returns:
        The responses, NaN where masked or unknown.
    """
    num, num_cases, _ = response.shape
    dropped, in_part, by_case = randomness.uniform(num, 3).unbind(1)
    of_cases = randomness.uniform(num, num_cases, 1).expand(response.shape)
    of_entries = randomness.uniform(num, *response.shape[1:])
    unknown = response.isnan().cpu()
    lots = torch.where(by_case[:, None, None] < 0.5, of_cases, of_entries).masked_fill(unknown, math.inf)
    kept = (lots < 0.5) | (lots == lots.amin((1, 2), keepdim=True))
    masked = (dropped < dropout)[:, None, None] | ((in_part < masking)[:, None, None] & ~kept)
    return response.masked_fill(masked.to(response.device), math.nan)
