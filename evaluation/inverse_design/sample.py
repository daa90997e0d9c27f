"""Samples designs for targets from a checkpoint, in batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechdiffusers.evaluation.inverse_design.checks import checked_count
from mechdiffusers.evaluation.inverse_design.response import as_array

__all__ = ["designs_for"]

#: Images that the denoiser sees at once.
_BATCH = 256


def designs_for(
    pipe: Any,
    targets: np.ndarray | Tensor,
    num_designs: int = 8,
    *,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> np.ndarray:
    """Generates designs for many targets, in batches; a design does not depend on those that follow.

    Args:
        pipe: A pipeline with a response, such as :class:`mechdiffusers.LatentDDPMPipeline`.
        targets: Shape ``(T, L, S)``, or ``(L, S)`` for one, in the units of the checkpoint, NaN where unspecified.
        num_designs: For each target, at least 1.
        seed: Of all random numbers, at least 0.
        progress: Whether to show a progress bar.
        **options: Of the pipeline, such as ``num_inference_steps`` and ``guidance_scale``.

    Returns:
        Shape ``(T * num_designs, H, W)``; those of a target are neighbours.

    Raises:
        ValueError: If ``num_designs`` is no integer of at least 1, ``seed`` is not one from 0 to 2**64 - 1, or a target
            or an option does not suit the pipeline.

    Example:
        >>> designs = designs_for(pipe, targets, 8, num_candidates=4, num_refinements=2)  # doctest: +SKIP
    """
    array = as_array(targets, "targets")
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"targets must have shape (T, L, S) or (L, S), none of them 0, got {array.shape}")
    each = torch.from_numpy(array.copy()).float()  # a copy, since torch takes no view that runs backwards
    wanted = (each[None] if each.ndim == 2 else each).repeat_interleave(checked_count(num_designs), dim=0)
    if checked_count(seed, "seed", least=0) >= 2**64:  # the most that torch takes
        raise ValueError(f"seed must be below 2**64, got {seed}")
    drawn = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(wanted),), generator=drawn).tolist()
    images = []
    candidates = options.get("num_candidates", 1)
    # the pipeline refuses a number that is none
    at_once = max(1, _BATCH // candidates) if isinstance(candidates, (int, np.integer)) and candidates > 0 else 1
    for start in tqdm(range(0, len(wanted), at_once), desc="generate", unit="batch", disable=not progress):
        rows = slice(start, start + at_once)
        generators = [torch.Generator().manual_seed(number) for number in seeds[rows]]
        images.append(pipe(response=wanted[rows], generator=generators, output_type="np", **options).images[..., 0])
    return np.concatenate(images)
