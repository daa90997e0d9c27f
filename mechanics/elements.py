r"""Quadrilaterals of order 1 or 2, one a pixel, all at once.

Nodes form a lattice of :math:`(kH + 1) \times (kW + 1)` points for order :math:`k`, row 0 at the top like the
designs; displacements are ``(B, kH + 1, kW + 1, 2)`` with x to the right and y upwards, in units of a pixel. All pixels
are equal squares, so the shape functions' gradients are one small matrix, and everything over elements is a few matrix
products. Fields over elements have the elements last, ``(..., B * H * W)``: whatever is done point by point then runs
along contiguous memory.

Young's modulus enters as a factor per pixel. With the laws of :mod:`mechdiffusers.mechanics.materials` a point of
quadrature contributes to an element's stiffness :math:`g'` times a constant matrix and :math:`g''` times the ten
products of cofactors with constant matrices: the stiffness of all elements is one product of a feature matrix with a
constant one.

References:
    | Nonlinear Finite Elements for Continua and Structures (Belytschko, Liu, Moran, Elkhodary, 2014), chapter 4
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from mechdiffusers.mechanics.materials import Law
from torch import Tensor

__all__ = ["Elements", "loop"]

#: Pairs of components of F, of which the tangent has one coefficient each.
_PAIRS = [(c, d) for c in range(4) for d in range(c, 4)]


def loop(rows: int, columns: int) -> np.ndarray:
    """Lattice points around a rectangle of ``rows x columns`` steps, shape ``(2 * (rows + columns), 2)``.

    From (0, 0) along the first row, down the last column, back along the last row and up the first column.
    """
    there, down = np.arange(columns), np.arange(rows)
    return np.concatenate(
        [
            np.stack([np.zeros_like(there), there], 1),
            np.stack([down, np.full_like(down, columns)], 1),
            np.stack([np.full_like(there, rows), columns - there], 1),
            np.stack([rows - down, np.zeros_like(down)], 1),
        ]
    )


@lru_cache(maxsize=8)
def _gradients(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A unit square's nodes ``(n, 2)``, gradients of their shape functions ``(q, 2, n)``, quadrature weights ``(q,)``.

    The nodes go around the square, then come the inner ones.
    """
    inner = [(r, c) for r in range(1, order) for c in range(1, order)]
    nodes = np.concatenate([loop(order, order), np.array(inner, dtype=int).reshape(-1, 2)])
    points, weights = np.polynomial.legendre.leggauss(order + 1)
    points, weights = (points + 1) / 2, weights / 2
    # the monomials' coefficients of the Lagrange polynomials on the equally spaced nodes
    coefficients = np.linalg.inv(np.vander(np.arange(order + 1) / order, increasing=True))
    value = np.vander(points, order + 1, increasing=True) @ coefficients
    powers = np.arange(1, order + 1)
    slope = np.vander(points, order, increasing=True) @ (powers[:, None] * coefficients[1:])
    row, column = nodes.T
    along_x = value[:, None, row] * slope[None, :, column]
    along_y = -slope[:, None, row] * value[None, :, column]  # rows run downwards, y upwards
    gradients = np.stack([along_x, along_y], axis=2).reshape(-1, 2, len(nodes))
    return nodes, gradients, np.outer(weights, weights).ravel()


@dataclass(frozen=True)
class State:
    """What the elements know of a displacement, for a Young's modulus of 1; quadrature points first, elements last."""

    gradient: tuple[Tensor, Tensor, Tensor, Tensor]  #: xx, xy, yx and yy of F - I, shape (q, N) each
    dilation: Tensor  #: J - 1, shape (q, N)
    volumetric: tuple[Tensor, Tensor, Tensor]  #: g, g' and g'', shape (q, N) each

    @property
    def cofactor(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The derivative of J with respect to F."""
        xx, xy, yx, yy = self.gradient
        return 1 + yy, -yx, -xy, 1 + xx


class Elements:
    """All elements of a batch of designs of one size.

    Args:
        height: Pixels from top to bottom.
        width: Pixels from left to right.
        order: Polynomial order of the elements, 1 or 2.
        law: The hyperelastic law.
        device: Where to compute.
    """

    def __init__(self, height: int, width: int, order: int, law: Law, device: torch.device):
        self.height, self.width, self.order, self.law = height, width, order, law
        nodes, gradients, weights = _gradients(order)
        self.lattice = (order * height + 1, order * width + 1)
        self._nodes = [(int(row), int(column)) for row, column in nodes]
        self._position = torch.as_tensor(nodes[:, 0] * (order + 1) + nodes[:, 1], device=device)
        self._gradients = torch.as_tensor(gradients.reshape(-1, len(nodes)), device=device)
        self._weights = torch.as_tensor(weights, device=device)[:, None]
        self._divergence = torch.as_tensor(
            (gradients * weights[:, None, None]).reshape(-1, len(nodes)).T, device=device
        )
        self._stiffness = torch.as_tensor(_stiffness_features(gradients, weights, law.a), device=device)

    def nodal_values(self, field: Tensor) -> Tensor:
        """Values of a field ``(B, *lattice, 2)`` at the nodes of each element, shape ``(n, 2, N)``."""
        k = self.order
        windows = field.unfold(1, k + 1, k).unfold(2, k + 1, k)  # (B, H, W, 2, k + 1, k + 1)
        return windows.permute(4, 5, 3, 0, 1, 2).reshape((k + 1) ** 2, 2, -1)[self._position]

    def state(self, displacement: Tensor) -> State:
        """Deformation gradient and its law at all quadrature points of displacements ``(B, *lattice, 2)``."""
        rows = (self._gradients @ self.nodal_values(displacement).flatten(1)).view(len(self._weights), 2, 2, -1)
        xx, xy, yx, yy = rows[:, 0, 0], rows[:, 1, 0], rows[:, 0, 1], rows[:, 1, 1]
        dilation = xx + yy + (xx * yy - xy * yx)
        return State((xx, xy, yx, yy), dilation, self.law.volumetric(dilation))

    def least_jacobian(self, state: State) -> Tensor:
        """The smallest Jacobian of each design, shape ``(B,)``."""
        return 1 + state.dilation.amin(0).view(-1, self.height * self.width).amin(1)

    def energy(self, state: State) -> Tensor:
        """Strain energy of each pixel for a Young's modulus of 1, shape ``(B, H, W)``."""
        xx, xy, yx, yy = state.gradient
        density = self.law.a / 2 * ((xx - yy) ** 2 + (xy + yx) ** 2) + state.volumetric[0]  # F : F - 2 J is a square
        return (self._weights * density).sum(0).view(-1, self.height, self.width)

    def stress(self, state: State) -> Tensor:
        """First Piola-Kirchhoff stress P_iJ for a Young's modulus of 1, shape ``(q, 2, 2, N)``: J, then i."""
        xx, xy, yx, yy = state.gradient
        stretch, shear = self.law.a * (xx - yy), self.law.a * (xy + yx)  # of F - cof F
        first = state.volumetric[1]
        xx, xy, yx, yy = (first * cofactor for cofactor in state.cofactor)
        return torch.stack([xx + stretch, yx + shear, xy + shear, yy - stretch], dim=1).view(len(xx), 2, 2, -1)

    def mean_stress(self, stress: Tensor) -> Tensor:
        """Mean over each pixel of ``stress``, shape ``(B, H, W, 2, 2)``: i, then J, of P_iJ."""
        mean = (self._weights[:, :, None, None] * stress).sum(0)
        return mean.permute(2, 1, 0).reshape(-1, self.height, self.width, 2, 2)

    def nodal_forces(self, stress: Tensor) -> Tensor:
        """Forces on the nodes of each element, shape ``(n, 2, N)``."""
        return (self._divergence @ stress.view(2 * len(stress), -1)).view(-1, 2, stress.shape[-1])

    def assembled(self, forces: Tensor) -> Tensor:
        """Sum over elements of nodal forces ``(n, 2, N)``, shape ``(B, *lattice, 2)``."""
        k, height, width = self.order, self.height, self.width
        by_node = forces.view(len(forces), 2, -1, height, width).permute(0, 2, 3, 4, 1)
        total = forces.new_zeros(by_node.shape[1], *self.lattice, 2)
        for (row, column), force in zip(self._nodes, by_node, strict=True):
            total[:, row : row + k * (height - 1) + 1 : k, column : column + k * (width - 1) + 1 : k] += force
        return total

    def stiffness(self, state: State, modulus: Tensor) -> Tensor:
        """Tangent stiffness of each element, shape ``(B, H, W, 2n, 2n)``; the two components of a node are neighbours.

        Args:
            state: Where to take the tangent.
            modulus: Young's moduli, shape ``(B, H, W)``.
        """
        factor = modulus.reshape(1, -1)
        _, first, second = state.volumetric
        cofactor = state.cofactor
        weighted = [second * factor * c for c in cofactor]
        products = [weighted[c] * cofactor[d] for c, d in _PAIRS]
        features = torch.cat([factor, first * factor, *products])
        dofs = 2 * len(self._nodes)
        return (features.T @ self._stiffness).view(*modulus.shape, dofs, dofs)


def _stiffness_features(gradients: np.ndarray, weights: np.ndarray, a: float) -> np.ndarray:
    """Constant matrices of an element's stiffness, a row each: of E, of E g', and of E g'' times pairs of cofactors."""
    points, _, nodes = gradients.shape
    strain = np.zeros((points, 4, nodes, 2))  # components xx, xy, yx, yy of F by nodal displacement
    for i in range(2):
        for j in range(2):
            strain[:, 2 * i + j, :, i] = gradients[:, j]
    flat = strain.reshape(points, 4, 2 * nodes)
    outer = np.einsum("q,qcm,qdn->cdqmn", weights, flat, flat)
    geometric = outer[0, 3] + outer[3, 0] - outer[1, 2] - outer[2, 1]  # the second derivative of J
    linear = a * (sum(outer[c, c] for c in range(4)) - geometric).sum(0, keepdims=True)
    material = [outer[c, d] + (outer[d, c] if c != d else 0) for c, d in _PAIRS]
    return np.concatenate([linear, geometric, *material]).reshape(-1, (2 * nodes) ** 2)
