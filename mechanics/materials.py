r"""Hyperelastic laws in plane strain, for energies linear in the first invariant.

Such a law has the energy density

.. math:: \psi(F) = E \left( \frac{a}{2} F : F + h(J) \right), \qquad J = \det F,

with the in-plane deformation gradient :math:`F`, Young's modulus :math:`E`, and a number :math:`a` and a function
:math:`h` that depend on Poisson's ratio alone. With the cofactor :math:`\operatorname{cof} F = \partial J / \partial F`,
which in the plane is linear in :math:`F`, the first Piola-Kirchhoff stress and the tangent are

.. math:: P = E \left( a F + h' \operatorname{cof} F \right), \qquad
          \mathbb{A} = E \left( a \mathbb{I} + h' \mathbb{D} + h'' \operatorname{cof} F \otimes \operatorname{cof} F \right),

where :math:`\mathbb{D} = \partial^2 J / \partial F^2` is constant. So a second law costs one short class: ``a`` and
``volumetric``. (In plane strain the second invariant is :math:`F : F + J^2`, so Mooney-Rivlin laws are of this form too.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CompressibleNeoHookean", "Law"]


class Law(Protocol):
    """What the finite elements ask of a law; everything is for a Young's modulus of 1."""

    @property
    def a(self) -> float:
        """Factor of ``F : F / 2`` in the energy density."""

    def volumetric(self, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``h``, its first and its second derivative at ``jacobian``, shape ``(*)`` each; NaN where undefined."""


@dataclass(frozen=True)
class CompressibleNeoHookean:
    r"""The law of the Mechanical MNIST data.

    .. math:: \psi = \frac{\mu}{2} (F : F - 2 - 2 \ln J)
                   + \frac{\lambda}{2} \left( \frac{J^2 - 1}{2} - \ln J \right),
              \quad \mu = \frac{E}{2 (1 + \nu)}, \quad \lambda = \frac{E \nu}{(1 + \nu)(1 - 2 \nu)},

    which vanishes unloaded. (The published energies have the constant that the third direction brings, and are given
    as changes.)

    Args:
        poisson: Poisson's ratio of the small-strain limit, within (0, 0.5).

    References:
        | Mechanical MNIST: a benchmark dataset for mechanical metamodels (Lejeune, 2020)
        | https://doi.org/10.1016/j.eml.2020.100659
    """

    poisson: float

    @property
    def a(self) -> float:
        """The shear modulus."""
        return 1 / (2 * (1 + self.poisson))

    @property
    def lame(self) -> float:
        """Lamé's first parameter."""
        return self.poisson / ((1 + self.poisson) * (1 - 2 * self.poisson))

    def volumetric(self, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``h``, ``h'`` and ``h''``; the energy is shifted so that the density vanishes unloaded."""
        mu, lame = self.a, self.lame
        inverse = 1 / jacobian
        logarithm = torch.log(jacobian)
        energy = lame / 4 * (jacobian**2 - 1) - (mu + lame / 2) * logarithm - mu
        first = lame / 2 * jacobian - (mu + lame / 2) * inverse
        second = lame / 2 + (mu + lame / 2) * inverse**2
        return energy, first, second
