"""Random numbers that depend on the step and the sample, not on the way to them.

Those of a sample are a function of (seed, stage, step, index in the step's batch), so that neither an interruption, nor
the number of processes, nor summing a batch in parts changes what is drawn.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["StepRandomness"]


class StepRandomness:
    """The random numbers of the samples of one step, or of a share of them.

    Args:
        key: What they are a function of besides the sample, such as ``(seed, stage, step)``.
        share: Index of the share, when the step's samples are shared evenly, in order.
        num_shares: Number of shares.
    """

    def __init__(self, key: tuple[int | str, ...], share: int = 0, num_shares: int = 1):
        self._key, self._share, self._num_shares = key, share, num_shares
        self._generators: list[torch.Generator] = []

    def normal(self, num: int, *shape: int) -> Tensor:
        """Standard normal numbers for each of ``num`` samples, shape ``(num, *shape)``."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._of_samples(num)])

    def uniform(self, num: int, *shape: int) -> Tensor:
        """Uniform numbers in ``[0, 1)`` for each of ``num`` samples, shape ``(num, *shape)``."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._of_samples(num)])

    def stratified(self, num: int) -> Tensor:
        """Uniform numbers in ``[0, 1)``, those of all the step's samples equally spaced (modulo 1), shape ``(num,)``.

        Each for itself is uniform; a smooth function's mean over them varies far less than over independent ones.
        """
        first = torch.rand((), generator=_generator((*self._key, "stratified")), dtype=torch.float64)
        places = torch.arange(self._share * num, (self._share + 1) * num, dtype=torch.float64)
        return ((first + places / (num * self._num_shares)) % 1).float().clamp(max=1 - 2**-24)

    def integers(self, high: int, num: int) -> Tensor:
        """A uniform integer in ``[0, high)`` for each of ``num`` samples, shape ``(num,)``."""
        return torch.cat([torch.randint(high, (1,), generator=generator) for generator in self._of_samples(num)])

    def _of_samples(self, num: int) -> list[torch.Generator]:
        """The generators of the share, which has ``num`` samples in every draw."""
        if not self._generators:
            first = self._share * num
            self._generators = [_generator((*self._key, index)) for index in range(first, first + num)]
        return self._generators


def _generator(key: tuple[int | str, ...]) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
