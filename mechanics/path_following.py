r"""Equilibria of a batch of designs along a path of strains.

Each step starts from a polynomial through the last few states in equilibrium. What cannot be solved is tried in half
the step, a few times; each design halves its own.

The stress is the power of all nodal forces along the path, :math:`f \cdot du / d\varepsilon`, with that polynomial's
derivative. In equilibrium it is the power of the forces on the boundary. Where a little is out of balance, these alone
are wrong in proportion to it. What is left over, times the derivative, makes that good to first order: like that of the
energy, the error of the stress is a product of two small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mechdiffusers.mechanics.newton import TOLERANCE, Cell, equilibrate

__all__ = ["RESPONSE_TOLERANCE", "PathState", "follow"]

RESPONSE_TOLERANCE = 3e-8  #: of the forces out of balance, where stress and energy alone are wanted, to about 1e-9
MAX_HALVINGS = 6  #: of a step of the path


@dataclass
class PathState:
    """Designs at one strain of their path."""

    displacement: Tensor  #: shape (B, *lattice, 2)
    energy: Tensor  #: shape (B,)
    stress: Tensor  #: conjugate to the strain per unit area, shape (B,)
    solved: Tensor  #: bool, shape (B,); what is not solved is meaningless


def follow(cell: Cell, modulus: Tensor, strains: Tensor, tolerance: float = TOLERANCE) -> Iterator[PathState]:
    """Equilibria of designs with moduli ``(B, H, W)`` at increasing ``strains`` (S,), one after another.

    What is not solved at one strain is not tried at the next. Each result holds until the next is asked for, which is
    written in its place.
    """
    batch = len(modulus)
    path = _Path(batch, cell)
    now = PathState(
        path.displacements[0], modulus.new_zeros(batch), modulus.new_zeros(batch), modulus.new_ones(batch).bool()
    )
    for strain in strains.tolist():
        length = strain - path.strains[0]
        halvings = torch.zeros(batch, dtype=torch.long, device=modulus.device)
        while len(todo := (now.solved & (path.strains[0] < strain)).nonzero()[:, 0]):
            goal = (path.strains[0] + length)[todo]
            goal = torch.where(goal > strain * (1 - 1e-12), strain, goal)
            start = path.extrapolated(todo, goal, halvings[todo] > 0)
            found = equilibrate(cell, modulus[todo], start, tolerance)
            reached = todo[found.solved]
            path.append(reached, goal[found.solved], found.displacement[found.solved])
            now.energy[reached] = found.energy[found.solved]
            now.stress[reached] = (found.forces[found.solved] * path.rate(reached)).sum((1, 2, 3)) / cell.area
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

    def rate(self, index: Tensor) -> Tensor:
        """Derivative of the same polynomial with respect to the strain, at the newest of its states."""
        strains, known = self.strains[:, index], self.known[:, index]
        newest = self.displacements[0, index]
        rate = torch.zeros_like(newest)
        for i in range(1, self.POINTS):
            weight = known[i] / (strains[0] - strains[i])
            for j in range(1, self.POINTS):
                if j != i:
                    ratio = (strains[0] - strains[j]) / (strains[i] - strains[j])
                    weight = torch.where(known[i] & known[j], weight * ratio, weight)
            rate += weight[:, None, None, None] * (newest - self.displacements[i, index])
        return rate
