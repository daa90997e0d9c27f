"""Random numbers that depend on the step, not on the way to it.

Those of a step are a function of (seed, stage, step): they are drawn for the whole batch, and a process takes its
share, so that neither an interruption nor the number of processes changes what is drawn.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["StepRandomness"]


class StepRandomness:
    """The random numbers of one batch of one step, this process's share of them.

    Args:
        key: What they are a function of, such as ``(seed, stage, step)``.
        rank: Index of this process.
        num_ranks: Number of processes, which share the batch evenly.
    """

    def __init__(self, key: tuple[int | str, ...], rank: int = 0, num_ranks: int = 1):
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
        self._generator = torch.Generator().manual_seed(seed)
        self._rank, self._num_ranks = rank, num_ranks

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, the first axis being this process's share of the batch."""
        return self._share(torch.randn((shape[0] * self._num_ranks, *shape[1:]), generator=self._generator))

    def integers(self, high: int, num: int) -> Tensor:
        """Uniform integers in ``[0, high)``, one a sample of this process's share of the batch."""
        return self._share(torch.randint(high, (num * self._num_ranks,), generator=self._generator))

    def _share(self, drawn: Tensor) -> Tensor:
        return drawn.chunk(self._num_ranks)[self._rank]
