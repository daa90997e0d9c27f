r"""Batched direct solver for pixel grids: nested dissection with dense blocks.

Rectangular patches of elements are merged pairwise, neighbours first. What two patches share and nobody else touches,
the inside of their common side, is eliminated as soon as they are merged,

.. math:: \begin{pmatrix} A & B \\ B^T & C \end{pmatrix}, \quad A = L L^T, \quad W = L^{-1} B, \quad
          S = C - W^T W,

so that a patch is known by the stiffness :math:`S` of its boundary. All patches of a level and all designs of the batch
are one batched product. Boundary conditions enter at the very end alone, where the degrees of freedom left are those of
the last separator and of the domain's boundary. For ``n x n`` pixels this takes :math:`O(n^3)` operations, where a
factorisation by rows of nodes takes :math:`O(n^4)`.

A boundary is numbered around the patch (see :func:`mechdiffusers.mechanics.elements.loop`): then merging copies a few
contiguous slices. The stiffness is positive definite if and only if every :math:`A` and the last block are.

References:
    | Nested dissection of a regular finite element mesh (George, 1973)
    | https://doi.org/10.1137/0710032
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.mechanics.elements import loop, square

__all__ = ["Factor", "NestedDissection"]

#: A slice of a child's boundary and where it begins on the boundary of the merged patch, in degrees of freedom.
_Segment = tuple[slice, int]


@dataclass(frozen=True)
class _Merge:
    """Merging two neighbouring patches; numbers of a side are in degrees of freedom around the patch."""

    axis: int  #: 0: the second patch lies below the first, 1: to its right
    count: int  #: patches along the axis of which each group is merged, one after another
    turn: int  #: which of them is merged now
    shared: tuple[slice, slice]  #: the common side on the first patch and, in reverse order, on the second
    segments: tuple[list[_Segment], ...]  #: of the first and of the second patch
    size: int  #: degrees of freedom around the merged patch
    inside: Tensor  #: degrees of freedom to eliminate, shape (patches, s)
    around: Tensor  #: degrees of freedom around the merged patches, shape (patches, m)


@dataclass
class Factor:
    """A factorised stiffness: :math:`L^{-1}` and :math:`W` of each level, and the Cholesky factor of the rest."""

    levels: list[tuple[Tensor, Tensor]]  #: shapes (B, patches, s, s) and (B, patches, s, m)
    root: Tensor  #: shape (B, r, r)
    definite: Tensor  #: whether the stiffness is positive definite, shape (B,); elsewhere the rest is meaningless

    def __getitem__(self, index: Tensor) -> Factor:
        levels = [(inverse[index], coupling[index]) for inverse, coupling in self.levels]
        return Factor(levels, self.root[index], self.definite[index])

    def __setitem__(self, index: Tensor, other: Factor) -> None:
        for mine, its in zip(self.levels, other.levels, strict=True):
            for matrix, new in zip(mine, its, strict=True):
                matrix[index] = new.to(matrix.dtype)
        self.root[index], self.definite[index] = other.root.to(self.root.dtype), other.definite


class NestedDissection:
    """The order of elimination for designs of one size, and the two passes over it.

    Args:
        height: Patches to begin with, from top to bottom; pixels, or groups of them.
        width: The same from left to right.
        steps: Steps of the lattice of nodes along a patch to begin with.
        free: Which degrees of freedom are not prescribed, bool, shape ``(*lattice, 2)``.
    """

    def __init__(self, height: int, width: int, steps: int, free: Tensor):
        self._numbers = np.arange(free.numel()).reshape(free.shape)
        self._device = free.device
        patch, count = (steps, steps), (height, width)
        corners = np.stack(np.meshgrid(np.arange(height) * steps, np.arange(width) * steps, indexing="ij"), -1)
        self._inner = self._table(corners, square(steps)[4 * steps :])
        self._around = self._table(corners, loop(*patch))
        self._merges: list[_Merge] = []
        while count != (1, 1):
            axis = min((0, 1), key=lambda axis: (count[axis] == 1, patch[axis]))
            prime = next(p for p in range(2, count[axis] + 1) if count[axis] % p == 0)
            corners = corners[::prime] if axis == 0 else corners[:, ::prime]
            grown = patch
            for turn in range(1, prime):
                self._merges.append(self._merge(axis, prime, turn, grown, patch, corners))
                grown = (grown[0] + patch[0], grown[1]) if axis == 0 else (grown[0], grown[1] + patch[1])
            patch = grown
            count = (count[0] // prime, count[1]) if axis == 0 else (count[0], count[1] // prime)
        boundary = self._table(corners[:1, :1], loop(*patch))[0]
        self._kept = free.flatten()[boundary].nonzero()[:, 0]
        last = self._merges[-1].inside[0] if self._merges else boundary[:0]
        self._root = torch.cat([last, boundary[self._kept]])

    def _table(self, corners: np.ndarray, points: np.ndarray) -> Tensor:
        """Degrees of freedom of lattice ``points`` (n, 2) relative to each of ``corners`` (..., 2), shape (..., 2n)."""
        corners = corners.reshape(-1, 1, 2)
        at = corners + points
        numbers = self._numbers[at[..., 0], at[..., 1]].reshape(len(corners), -1)
        return torch.as_tensor(numbers, device=self._device)

    def _merge(
        self, axis: int, count: int, turn: int, first: tuple[int, int], second: tuple[int, int], corners: np.ndarray
    ) -> _Merge:
        """Tables for a patch of ``first`` lattice steps and its neighbour of ``second``; ``loop`` has the numbers."""
        if axis == 1:
            rows, one, two = first[0], first[1], second[1]
            merged = (rows, one + two)
            sides = (one + 1, one + rows), (rows + 2 * two + 1, 2 * rows + 2 * two)
            segments = (
                [(0, one + 1, 0), (rows + one, 2 * (rows + one), rows + one + 2 * two)],
                [(0, rows + 2 * two + 1, one)],
            )
            between = np.stack([np.arange(1, rows), np.full(rows - 1, one)], 1)
        else:
            columns, one, two = first[1], first[0], second[0]
            merged = (one + two, columns)
            sides = (one + columns + 1, one + 2 * columns), (1, columns)
            segments = (
                [(0, one + columns + 1, 0), (one + 2 * columns, 2 * (one + columns), one + 2 * two + 2 * columns)],
                [(columns, 2 * (two + columns), one + columns), (0, 1, one + 2 * two + 2 * columns)],
            )
            between = np.stack([np.full(columns - 1, one), np.arange(1, columns)[::-1]], 1)
        return _Merge(
            axis,
            count,
            turn,
            (_dofs(*sides[0]), _dofs(*sides[1])),
            tuple([(_dofs(start, stop), 2 * to) for start, stop, to in child] for child in segments),
            4 * sum(merged),
            self._table(corners, between),
            self._table(corners, loop(*merged)),
        )

    def factorise(self, stiffness: Tensor) -> Factor:
        """Eliminates everything.

        Args:
            stiffness: Stiffness of each patch to begin with, shape ``(B, height, width, 2n, 2n)``; the nodes as in
                :func:`mechdiffusers.mechanics.elements.square`.
        """
        definite = torch.ones(len(stiffness), dtype=torch.bool, device=stiffness.device)
        levels: list[tuple[Tensor, Tensor]] = []
        boundary = self._around.shape[1]
        patches = stiffness[..., :boundary, :boundary]
        if self._inner.shape[1]:
            level = stiffness[..., boundary:, boundary:], stiffness[..., boundary:, :boundary], patches.contiguous()
            patches = self._eliminate(*level, levels, definite)
        grown = patches
        for merge in self._merges:
            if merge.turn == 1:
                group = grown.unflatten(1 + merge.axis, (-1, merge.count)).movedim(2 + merge.axis, 0)
                grown = group[0]
            front = _front(merge, grown, group[merge.turn])
            if merge is not self._merges[-1]:
                grown = self._eliminate(*front, levels, definite)
        rest = (front[2] if self._merges else grown)[:, 0, 0][:, self._kept[:, None], self._kept]
        if self._merges:
            side = front[1][:, 0, 0][:, :, self._kept]
            rest = torch.cat([torch.cat([front[0][:, 0, 0], side], 2), torch.cat([side.mT, rest], 2)], 1)
        root, info = torch.linalg.cholesky_ex(rest)
        definite &= info == 0
        return Factor(levels, root, definite)

    @staticmethod
    def _eliminate(
        inside: Tensor, side: Tensor, around: Tensor, levels: list[tuple[Tensor, Tensor]], definite: Tensor
    ) -> Tensor:
        """The Schur complement of ``inside``, in the place of ``around``."""
        shape = around.shape
        if not inside.shape[-1]:
            return around
        lower, info = torch.linalg.cholesky_ex(inside.flatten(0, 2))
        definite &= (info == 0).view(len(definite), -1).all(1)
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        coupling = inverse @ side.flatten(0, 2)
        around.view(-1, *shape[3:]).baddbmm_(coupling.mT, coupling, alpha=-1)
        levels.append((inverse.unflatten(0, (shape[0], -1)), coupling.unflatten(0, (shape[0], -1))))
        return around

    def solve(self, factor: Factor, right: Tensor) -> Tensor:
        """Solution for right-hand sides ``(B, *lattice, 2)``; 0 where prescribed."""
        batch = len(right)
        residual = right.flatten(1).to(factor.root.dtype, copy=True)
        tables = [(self._inner, self._around)] if self._inner.shape[1] else []
        tables += [(merge.inside, merge.around) for merge in self._merges[:-1] if merge.inside.shape[1]]
        middle = []
        for (inside, around), (inverse, coupling) in zip(tables, factor.levels, strict=True):
            middle.append(_times(inverse, residual[:, inside]))
            update = _transposed_times(coupling, middle[-1])
            residual.scatter_add_(1, around.flatten().expand(batch, -1), -update.flatten(1))
        solution = torch.zeros_like(residual)
        solution[:, self._root] = torch.cholesky_solve(residual[:, self._root, None], factor.root)[..., 0]
        for (inside, around), (inverse, coupling), value in zip(
            reversed(tables), reversed(factor.levels), reversed(middle), strict=True
        ):
            value = _transposed_times(inverse, value - _times(coupling, solution[:, around]))
            solution[:, inside.flatten()] = value.flatten(1)
        return solution.view(right.shape).to(right.dtype)


def _front(merge: _Merge, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of two patches together: of what is to be eliminated, of its coupling, of the boundary around both."""
    ours = first[..., merge.shared[0], :]
    theirs = _reversed(second[..., merge.shared[1], :], -2)
    inside = ours[..., merge.shared[0]] + _reversed(theirs[..., merge.shared[1]], -1)
    side = first.new_zeros(*inside.shape[:-1], merge.size)
    around = first.new_zeros(*first.shape[:3], merge.size, merge.size)
    for child, common, segments in zip((first, second), (ours, theirs), merge.segments, strict=True):
        for columns, column in segments:
            here = slice(column, column + columns.stop - columns.start)
            side[..., here] += common[..., columns]
            for rows, row in segments:
                around[..., row : row + rows.stop - rows.start, here] += child[..., rows, columns]
    return inside, side, around


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of small matrices with one vector each, which batched matrix products are several times slower at."""
    return (matrix * vector[..., None, :]).sum(-1)


def _transposed_times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector[..., None]).sum(-2)


def _dofs(start: int, stop: int) -> slice:
    """The degrees of freedom of nodes ``start`` to ``stop``."""
    return slice(2 * start, 2 * stop)


def _reversed(block: Tensor, dim: int) -> Tensor:
    """The block with its nodes, but not their two components, in reverse order along a dimension from the end."""
    nodes = block.shape[dim] // 2
    return block.unflatten(dim, (nodes, 2)).flip(dim - 1).flatten(dim - 1, dim)
