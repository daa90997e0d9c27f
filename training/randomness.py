"""Random numbers that depend on the step, not on the way to it.

Those of a step are a function of (seed, stage, step): they are drawn for all its samples, and a process takes its
share, so that neither an interruption, nor the number of processes, nor summing a batch in parts changes what is drawn.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["StepRandomness"]


class StepRandomness:
    """The random numbers of one step, or a share of them.

    Args:
        key: What they are a function of, such as ``(seed, stage, step)``.
        share: Index of the share.
        num_shares: Number of equal shares: that of the processes, times that of the batches that a step sums.
    """

    def __init__(self, key: tuple[int | str, ...], share: int = 0, num_shares: int = 1):
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
        self._generator = torch.Generator().manual_seed(seed)
        self._index, self._num_shares = share, num_shares

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, the first axis being this share of the samples."""
        return self._share(torch.randn((shape[0] * self._num_shares, *shape[1:]), generator=self._generator))

    def integers(self, high: int, num: int) -> Tensor:
        """Uniform integers in ``[0, high)``, one a sample of this share."""
        return self._share(torch.randint(high, (num * self._num_shares,), generator=self._generator))

    def _share(self, drawn: Tensor) -> Tensor:
        return drawn.chunk(self._num_shares)[self._index]
