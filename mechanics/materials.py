r"""Hyperelastic laws in plane strain, for energies linear in the first invariant.

Such a law has the energy density

.. math:: \psi(F) = E \left( a \left( \tfrac{1}{2} F : F - J \right) + g(J) \right), \qquad J = \det F,

with the in-plane deformation gradient :math:`F`, Young's modulus :math:`E`, and a number :math:`a` and a function
:math:`g` that depend on Poisson's ratio alone; the first bracket vanishes for rotations, and :math:`g` and :math:`g'`
vanish at :math:`J = 1`. With the cofactor :math:`\operatorname{cof} F = \partial J / \partial F`, which in the plane is
linear in :math:`F`, the first Piola-Kirchhoff stress and the tangent are

.. math:: P = E \left( a (F - \operatorname{cof} F) + g' \operatorname{cof} F \right), \qquad
          \mathbb{A} = E \left( a (\mathbb{I} - \mathbb{D}) + g' \mathbb{D}
                     + g'' \operatorname{cof} F \otimes \operatorname{cof} F \right),

where :math:`\mathbb{D} = \partial^2 J / \partial F^2` is constant. So a second law costs one short class: ``a`` and
``volumetric``. (In plane strain the second invariant is :math:`F : F + J^2`, so Mooney-Rivlin laws are of this form.)
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
        """The factor of the part of the energy that no rotation changes and no volume enters: the shear modulus."""

    def volumetric(self, dilation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``g``, ``g'`` and ``g''`` where ``J - 1`` is ``dilation``, shape ``(*)`` each; not finite for ``J <= 0``."""


@dataclass(frozen=True)
class CompressibleNeoHookean:
    r"""The law of the Mechanical MNIST data.

    .. math:: \psi = \frac{\mu}{2} (F : F - 2 - 2 \ln J)
                   + \frac{\lambda}{2} \left( \frac{J^2 - 1}{2} - \ln J \right),
              \quad \mu = \frac{E}{2 (1 + \nu)}, \quad \lambda = \frac{E \nu}{(1 + \nu)(1 - 2 \nu)}.

    This vanishes unloaded; the published density has a constant beside it, which changes in energy do not show.

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

    def volumetric(self, dilation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``g``, ``g'`` and ``g''``, written so that small strains keep their digits."""
        logarithmic, quadratic = self.a + self.lame / 2, self.lame / 2
        inverse = 1 / (1 + dilation)
        energy = logarithmic * (dilation - torch.log1p(dilation)) + quadratic / 2 * dilation**2
        first = (logarithmic * inverse + quadratic) * dilation
        second = logarithmic * inverse**2 + quadratic
        return energy, first, second
