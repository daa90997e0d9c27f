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
from torch import Tensor

from mechdiffusers.mechanics.materials import Law

__all__ = ["Elements", "Grid", "loop", "square"]

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


def square(steps: int) -> np.ndarray:
    """Lattice points of a square of ``steps x steps``, the inner ones last, shape ``((steps + 1)^2, 2)``."""
    inner = [(r, c) for r in range(1, steps) for c in range(1, steps)]
    return np.concatenate([loop(steps, steps), np.array(inner, dtype=int).reshape(-1, 2)])


class Grid:
    """Equal squares of nodes that cover the lattice and share their borders.

    Args:
        height: Squares from top to bottom.
        width: Squares from left to right.
        steps: Steps of the lattice along a square.
        device: Where the fields are.
    """

    def __init__(self, height: int, width: int, steps: int, device: torch.device):
        self.height, self.width, self.steps = height, width, steps
        self.nodes = square(steps)
        self._position = torch.as_tensor(self.nodes[:, 0] * (steps + 1) + self.nodes[:, 1], device=device)

    def gathered(self, field: Tensor) -> Tensor:
        """Values of a field ``(B, *lattice, 2)`` at the nodes of each square, shape ``(n, 2, N)``."""
        k = self.steps
        windows = field.unfold(1, k + 1, k).unfold(2, k + 1, k)  # (B, H, W, 2, k + 1, k + 1)
        return windows.permute(4, 5, 3, 0, 1, 2).reshape((k + 1) ** 2, 2, -1)[self._position]

    def assembled(self, forces: Tensor) -> Tensor:
        """Sum over squares of forces on their nodes ``(n, 2, N)``, shape ``(B, *lattice, 2)``."""
        k, height, width = self.steps, self.height, self.width
        by_node = forces.view(len(forces), 2, -1, height, width).permute(0, 2, 3, 4, 1)
        total = forces.new_zeros(by_node.shape[1], k * height + 1, k * width + 1, 2)
        for (row, column), force in zip(self.nodes.tolist(), by_node, strict=True):
            total[:, row : row + k * (height - 1) + 1 : k, column : column + k * (width - 1) + 1 : k] += force
        return total


@lru_cache(maxsize=8)
def _gradients(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients ``(q, 2, n)`` of a unit square's shape functions, and quadrature weights ``(q,)``."""
    nodes = square(order)
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
    return gradients, np.outer(weights, weights).ravel()


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
        gradients, weights = _gradients(order)
        self.lattice = (order * height + 1, order * width + 1)
        self.grid = Grid(height, width, order, device)
        # at order 1 four elements at once: one larger product costs less than two levels of small merges
        self._side = 2 if order == 1 and height % 2 == width % 2 == 0 else 1
        self.patches = Grid(height // self._side, width // self._side, order * self._side, device)
        nodes = (order + 1) ** 2
        self._gradients = torch.as_tensor(gradients.reshape(-1, nodes), device=device)
        self._weights = torch.as_tensor(weights, device=device)[:, None]
        weighted = gradients * weights[:, None, None]
        self._divergence = torch.as_tensor(weighted.reshape(-1, nodes).T, device=device)
        stiffness = _of_patches(_stiffness_features(gradients, weights, law.a), order, self._side)
        self._stiffness = torch.as_tensor(stiffness, device=device)

    def state(self, displacement: Tensor) -> State:
        """Deformation gradient and its law at all quadrature points of displacements ``(B, *lattice, 2)``."""
        rows = (self._gradients @ self.grid.gathered(displacement).flatten(1)).view(len(self._weights), 2, 2, -1)
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

    def stiffness(self, state: State, modulus: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Tangent stiffness of each of ``patches``, shape ``(B, rows, columns, 2m, 2m)``, a node's components together.

        Args:
            state: Where to take the tangent.
            modulus: Young's moduli, shape ``(B, H, W)``.
            dtype: Precision of the products and of the result.
        """
        factor = modulus.reshape(1, -1)
        _, first, second = state.volumetric
        cofactor = state.cofactor
        weighted = [second * factor * c for c in cofactor]
        products = [weighted[c] * cofactor[d] for c, d in _PAIRS]
        features = torch.cat([factor, first * factor, *products]).to(dtype)
        side, grid = self._side, self.patches
        grouped = features.view(len(features), -1, grid.height, side, grid.width, side).permute(3, 5, 0, 1, 2, 4)
        dofs = 2 * len(grid.nodes)
        stiffness = grouped.reshape(side * side * len(features), -1).T @ self._stiffness.to(dtype)
        return stiffness.view(-1, grid.height, grid.width, dofs, dofs)


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
    return np.concatenate([linear, geometric, *material])


def _of_patches(element: np.ndarray, order: int, side: int) -> np.ndarray:
    """The same for a patch of ``side x side`` elements: matrices ``(f, 2n, 2n)`` to ``(side * side * f, (2m)^2)``."""
    place = {tuple(node): number for number, node in enumerate(square(order * side).tolist())}
    nodes = 2 * len(place)
    patch = np.zeros((side, side, len(element), nodes, nodes))
    for row in range(side):
        for column in range(side):
            at = [place[r + row * order, c + column * order] for r, c in square(order).tolist()]
            dofs = (2 * np.array(at)[:, None] + np.arange(2)).ravel()
            patch[row, column][:, dofs[:, None], dofs] = element
    return patch.reshape(-1, nodes**2)
