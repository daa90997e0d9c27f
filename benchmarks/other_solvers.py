"""Two other ways to pull a square design: torch-fem, on one mesh of many designs, and Newton with SciPy's sparse LU.

Both are independent of the solver of this package. The SciPy one shares its element matrices, which are a small part of
its time, so that it is as fast as can be; torch-fem shares nothing. torch-fem has no nine-node quadrilateral, which is
given to it here as one class.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import MagicMock

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from mechdiffusers.mechanics.load_cases import LOAD_CASES
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.mechanics.newton import Cell
from mechdiffusers.mechanics.path_following import RESPONSE_TOLERANCE

POISSON = 0.3


@contextmanager
def float64() -> Iterator[None]:
    """torch-fem computes in torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def extend_with_torch_fem(designs: Tensor, order: int, strains: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Uniaxial extension of designs (B, N, N) of contrast 100, all in one mesh.

    Returns:
        Displacements ``(B, S, (kN + 1)^2, 2)``, row 0 at the top, stress ``(B, S)`` and energy ``(B, S)``.
    """
    for drawing in ("pyvista", "pyvista.plotting"):  # of three dimensions, which torch-fem imports at once
        sys.modules.setdefault(drawing, MagicMock())
    from torchfem import Planar
    from torchfem.elements import Quad1
    from torchfem.materials import HyperelasticPlaneStrain

    class Quad9(Quad1):
        """The nine-node quadrilateral: corners, then sides, then the middle."""

        nodes = 9
        iso_coords = torch.tensor(
            [[-1, -1], [1, -1], [1, 1], [-1, 1], [0, -1], [1, 0], [0, 1], [-1, 0], [0, 0]]
        ).double()
        points, weights = (torch.tensor(values) for values in np.polynomial.legendre.leggauss(3))
        ipoints = torch.cartesian_prod(points, points)
        iweights = torch.outer(weights, weights).flatten()

        @classmethod
        def N(cls, xi: Tensor) -> Tensor:
            def lagrange(x: Tensor, node: Tensor) -> Tensor:
                return torch.where(node == 0, 1 - x**2, x * (x + node) / 2)

            return lagrange(xi[..., None, 0], cls.iso_coords[:, 0]) * lagrange(xi[..., None, 1], cls.iso_coords[:, 1])

    class Plane(Planar):
        element_types = (Quad1, Quad9)

    def density(gradient: Tensor, young: Tensor) -> Tensor:
        mu = young[0] / (2 * (1 + POISSON))
        lame = young[0] * POISSON / ((1 + POISSON) * (1 - 2 * POISSON))
        jacobian = gradient[0, 0] * gradient[1, 1] - gradient[0, 1] * gradient[1, 0]
        logarithm = torch.log(jacobian)  # NaN where an element is inverted, so that the step is not taken
        invariant = (gradient**2).sum()
        return mu / 2 * (invariant - 3 - 2 * logarithm) + lame / 2 * ((jacobian**2 - 1) / 2 - logarithm)

    with float64():
        batch, size, _ = designs.shape
        side = order * size + 1
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        nodes = torch.stack([columns.flatten(), order * size - rows.flatten()], 1).double() / order
        around = (Quad9 if order == 2 else Quad1).iso_coords
        offset = ((1 - around[:, 1]) / 2 * order).long() * side + ((1 + around[:, 0]) / 2 * order).long()
        first = (torch.arange(size)[:, None] * side + torch.arange(size)).flatten() * order
        elements = first[:, None] + offset
        shift = torch.arange(batch)[:, None, None] * len(nodes)
        young = (1 + 99 * designs.double()).reshape(-1, 1)
        mesh = Plane(nodes.repeat(batch, 1), (elements + shift).flatten(0, 1), HyperelasticPlaneStrain(density, young))
        top, bottom = mesh.nodes[:, 1] == size, mesh.nodes[:, 1] == 0
        mesh.constraints[top | bottom] = True
        mesh.displacements[top, 1] = size * strains[-1]
        increments = torch.tensor([0.0, *strains]) / strains[-1]
        displacement, force, _, gradient, _ = mesh.solve(
            increments,
            max_iter=30,
            rtol=RESPONSE_TOLERANCE,
            atol=1e-8,
            stol=1e-11,
            return_intermediate=True,
            aggregate_integration_points=False,
        )
        shape = (len(strains), batch, len(nodes), 2)
        reaction = (force[1:] * top[:, None]).reshape(shape)[..., 1].sum(-1)
        # torch-fem has no energy: it is its law's, at the points of its elements and by their weights
        densities = torch.vmap(torch.vmap(torch.vmap(density), (0, None)), (0, None))(gradient, young)
        weights = mesh.etype.iweights[:, None] * mesh.eval_shape_functions(mesh.etype.ipoints)[2]
        energy = (weights * (densities[1:] - densities[0])).sum(1).reshape(len(strains), batch, -1).sum(-1)
        return displacement[1:].reshape(shape).transpose(0, 1), reaction.T / size, energy.T


class SciPyNewton:
    """Newton's method on one design (N, N) of contrast 100 at a time, each tangent factorised by SuperLU."""

    def __init__(self, size: int, order: int):
        case = LOAD_CASES["uniaxial_extension"]
        self.cell = Cell(size, size, order, case, CompressibleNeoHookean(POISSON), torch.device("cpu"))
        free = self.cell.free.flatten()
        numbers = torch.where(free, free.cumsum(0) - 1, -1).double().view(1, *self.cell.free.shape)
        dofs = self.cell.elements.patches.gathered(numbers).permute(2, 0, 1).flatten(1).long().numpy()
        row = np.repeat(dofs, dofs.shape[1], axis=1).ravel()
        column = np.tile(dofs, (1, dofs.shape[1])).ravel()
        self.kept = (row >= 0) & (column >= 0)
        count = int(free.sum())
        keys = column[self.kept] * count + row[self.kept]
        entries, self.place = np.unique(keys, return_inverse=True)
        self.rows = entries % count
        self.starts = np.searchsorted(entries, np.arange(count + 1) * count)
        self.iterations = 0

    def extended(self, design: Tensor, strains: Sequence[float]) -> list[float]:
        """Stress at each strain; the last solution scaled is the first guess of the next.

        Updates are halved until det F > 0 everywhere, steps until it is so for the guess.
        """
        modulus = (1 + 99 * design.double())[None]
        cell = self.cell
        displacement, stress, before = cell.affine[None] * strains[0], [], strains[0]
        ahead = [*reversed(strains)]
        while ahead:
            strain = ahead.pop()
            guess = displacement * (strain / before)
            now = cell.evaluate(guess, modulus)
            if not now.admissible:
                ahead += [strain, (before + strain) / 2]
                continue
            displacement, before = guess, strain
            while True:
                gradient = now.forces[0][cell.free]
                held = now.forces[0] * ~cell.free
                if gradient.norm() <= RESPONSE_TOLERANCE * held.norm():
                    break
                state = cell.elements.state(displacement)
                values = cell.elements.stiffness(state, modulus).flatten().numpy()[self.kept]
                sums = np.bincount(self.place, values, len(self.rows))
                matrix = scipy.sparse.csc_array((sums, self.rows, self.starts), shape=(len(gradient),) * 2)
                factor = splu(matrix, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
                update = torch.zeros_like(displacement)
                update[0, cell.free] = torch.from_numpy(factor.solve(gradient.numpy()))
                now = cell.evaluate(displacement - update, modulus)
                while not now.admissible:
                    update /= 2
                    now = cell.evaluate(displacement - update, modulus)
                displacement = displacement - update
                self.iterations += 1
            if strain in strains:
                stress.append(float((held * cell.affine).sum() / cell.area))
        return stress
