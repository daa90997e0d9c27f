"""Equilibria of a batch of designs along a path of strains.

Each step starts from a polynomial through the last few states in equilibrium. What cannot be solved is tried in half
the step, a few times; each design halves its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mechdiffusers.mechanics.newton import Cell, Equilibrium, equilibrate
from torch import Tensor

__all__ = ["follow"]

MAX_HALVINGS = 6  #: of a step of the path


def follow(cell: Cell, modulus: Tensor, strains: Tensor) -> Iterator[Equilibrium]:
    """Equilibria of designs with moduli ``(B, H, W)`` at increasing ``strains`` (S,), one after another.

    What is not solved at one strain is not tried at the next. Each result holds until the next is asked for, which is
    written in its place.
    """
    batch = len(modulus)
    path = _Path(batch, cell)
    now = Equilibrium(
        path.displacements[0], modulus.new_zeros(batch), modulus.new_zeros(batch), modulus.new_ones(batch).bool()
    )
    for strain in strains.tolist():
        length = strain - path.strains[0]
        halvings = torch.zeros(batch, dtype=torch.long, device=modulus.device)
        while len(todo := (now.solved & (path.strains[0] < strain)).nonzero()[:, 0]):
            goal = (path.strains[0] + length)[todo]
            goal = torch.where(goal > strain * (1 - 1e-12), strain, goal)
            found = equilibrate(cell, modulus[todo], path.extrapolated(todo, goal, halvings[todo] > 0))
            reached = todo[found.solved]
            path.append(reached, goal[found.solved], found.displacement[found.solved])
            now.energy[reached], now.stress[reached] = found.energy[found.solved], found.stress[found.solved]
            failed = todo[~found.solved]
            length[failed] /= 2
            halvings[failed] += 1
            now.solved[failed[halvings[failed] > MAX_HALVINGS]] = False
        now.displacement = path.displacements[0]
        yield now


class _Path:
    """The last few states of each design, newest first, for polynomial extrapolation in the strain."""

    POINTS = 4

    def __init__(self, batch: int, cell: Cell):
        self.affine = cell.affine
        self.strains = cell.affine.new_zeros(self.POINTS, batch)
        self.displacements = cell.affine.new_zeros(self.POINTS, batch, *cell.affine.shape)
        self.known = torch.zeros(self.POINTS, batch, dtype=torch.bool, device=cell.affine.device)
        self.known[0] = True

    def append(self, index: Tensor, strain: Tensor, displacement: Tensor) -> None:
        """Adds a state to the paths of the designs in ``index``."""
        for values, new in ((self.strains, strain), (self.displacements, displacement), (self.known, True)):
            values[1:, index] = values[:-1, index]
            values[0, index] = new

    def extrapolated(self, index: Tensor, goal: Tensor, carefully: Tensor) -> Tensor:
        """Lagrange's polynomial through the known states at strains ``goal``; through the last two ``carefully``."""
        strains, known = self.strains[:, index], self.known[:, index].clone()
        known[2:] &= ~carefully
        start = (goal * ~known[1])[:, None, None, None] * self.affine
        for i in range(self.POINTS):
            weight = (known[i] & known[1]).to(goal.dtype)
            for j in range(self.POINTS):
                if j != i:
                    ratio = (goal - strains[j]) / (strains[i] - strains[j])
                    weight = torch.where(known[i] & known[j], weight * ratio, weight)
            start += weight[:, None, None, None] * self.displacements[i, index]
        return start
