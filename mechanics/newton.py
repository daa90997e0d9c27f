r"""Equilibrium of a batch of designs at one strain, by a quasi-Newton method.

The tangent at the start is factorised once. From there on the direction comes from limited-memory BFGS with that factor
as its initial Hessian, so that one factorisation and a few cheap solutions make a step; where that converges slowly the
tangent is factorised anew.
Every direction is one of descent of the strain energy, along which a line search keeps :math:`\det F > 0` at the points
of quadrature. A tangent that is not positive definite is shifted towards that of the unloaded state, so the iteration
follows the energy down to a stable state. The state it arrives at is checked, and a start that is balanced already.

All of that is decided for each design by itself; those that are done leave the batch once half of it is done.

References:
    | Numerical Optimization (Nocedal & Wright, 2006), sections 3.1, 3.4 and 7.2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mechdiffusers.mechanics.elements import Elements, State
from mechdiffusers.mechanics.load_cases import LoadCase
from mechdiffusers.mechanics.materials import Law
from mechdiffusers.mechanics.nested_dissection import Factor, NestedDissection

__all__ = ["Cell", "Equilibrium", "equilibrate"]

TOLERANCE = 1e-10  #: of the out-of-balance forces, relative to those that hold the boundary
MAX_EVALUATIONS = 60  #: of the energy, in one attempt at a step
MAX_HALVINGS = 6  #: of a step of the line search
SLOW = 0.3  #: a new factorisation pays where an iteration leaves more than this of the out-of-balance forces
SUFFICIENT = 1e-4  #: share of the predicted decrease of the energy that a step must make
ROUNDING = 1e-8  #: below this relative change of the energy the forces tell better whether a step is good
MEMORY = 8  #: pairs that BFGS remembers
SHIFTS = (0.05, 0.2, 1.0, 5.0)  #: of a tangent that is not positive definite, in tangents of the unloaded state


class Cell:
    """Designs of one size under one load case, and what does not depend on the design.

    Args:
        height: Pixels from top to bottom.
        width: Pixels from left to right.
        order: Polynomial order of the elements.
        case: The load case.
        law: The hyperelastic law.
        device: Where to compute.
    """

    def __init__(self, height: int, width: int, order: int, case: LoadCase, law: Law, device: torch.device):
        self.elements = Elements(height, width, order, law, device)
        self.free = case.free(self.elements.lattice, device)
        self.affine = case.affine(self.elements.lattice, (height, width), device)
        patches = self.elements.patches
        self.solver = NestedDissection(patches.height, patches.width, patches.steps, self.free)
        self.area = height * width

    def evaluate(self, displacement: Tensor, modulus: Tensor) -> Evaluation:
        """Energy and forces at displacements ``(B, *lattice, 2)`` for moduli ``(B, H, W)``."""
        state = self.elements.state(displacement)
        energy = (self.elements.energy(state) * modulus).sum((1, 2))
        stress = self.elements.stress(state) * modulus.flatten()
        forces = self.elements.grid.assembled(self.elements.nodal_forces(stress))
        return Evaluation(energy, forces, self.elements.least_jacobian(state) > 0)

    def path_tangent(self, state: State, modulus: Tensor) -> Tensor:
        """Derivative of the displacements in equilibrium with respect to the strain, shape ``(B, *lattice, 2)``.

        NaN where the equilibrium is not stable: beyond a limit point there is no such path.
        """
        stiffness = self.elements.stiffness(state, modulus)
        patches = self.elements.patches
        affine = patches.gathered(self.affine[None]).permute(2, 0, 1).reshape(1, *stiffness.shape[1:3], -1, 1)
        forces = (stiffness @ affine).reshape(-1, len(patches.nodes), 2).permute(1, 2, 0).contiguous()
        unbalanced = patches.assembled(forces) * self.free
        factor = self.solver.factorise(stiffness)
        tangent = self.affine - self.solver.solve(factor, unbalanced)
        return torch.where(_per_node(factor.definite), tangent, math.nan)


@dataclass
class Evaluation:
    """Energy (B,) and nodal forces (B, *lattice, 2) of a state, and whether it is admissible (B,)."""

    energy: Tensor
    forces: Tensor
    admissible: Tensor


@dataclass
class Equilibrium:
    """Designs at one strain."""

    displacement: Tensor  #: shape (B, *lattice, 2)
    energy: Tensor  #: shape (B,)
    forces: Tensor  #: on the nodes; what is out of balance too, shape (B, *lattice, 2)
    solved: Tensor  #: bool, shape (B,); what is not solved is meaningless


@dataclass
class _Iterate:
    """Designs on their way to equilibrium; every field has the batch first."""

    index: Tensor  #: place in the batch that was started with
    modulus: Tensor
    displacement: Tensor
    energy: Tensor
    forces: Tensor
    gradient: Tensor  #: out-of-balance forces, (B, *lattice, 2)
    direction: Tensor
    step: Tensor  #: of the line search
    factor: Factor
    shifted: Tensor  #: whether some tangent was not positive definite
    left: Tensor  #: whether it is done, or given up
    pairs: list[tuple[Tensor, Tensor, Tensor]]  #: BFGS: changes of place and gradient, and 1 over their product or 0

    def __getitem__(self, index: Tensor) -> _Iterate:
        chosen = {name: value[index] for name, value in vars(self).items() if name != "pairs"}
        pairs = [(place[index], change[index], weight[index]) for place, change, weight in self.pairs]
        return _Iterate(**chosen, pairs=pairs)


def equilibrate(cell: Cell, modulus: Tensor, start: Tensor, tolerance: float = TOLERANCE) -> Equilibrium:
    """Finds the equilibrium near ``start``, whose prescribed displacements hold.

    Args:
        cell: The designs' size and load case.
        modulus: Young's moduli, shape ``(B, H, W)``.
        start: Displacements, shape ``(B, *lattice, 2)``.
        tolerance: Norm of the forces out of balance over that of the forces that hold the boundary.
    """
    now = cell.evaluate(start, modulus)
    result = Equilibrium(start.clone(), now.energy, now.forces, torch.zeros_like(now.admissible))
    index = now.admissible.nonzero()[:, 0]
    modulus, start = modulus[index], start[index]
    energy, forces = now.energy[index], now.forces[index]
    gradient = forces * cell.free
    balanced = _balanced(cell, forces, gradient, tolerance)
    at = balanced.nonzero()[:, 0]
    balanced[at] = _stable(cell, start[at], modulus[at])
    _store(result, index[balanced], start[balanced], energy[balanced], forces[balanced])
    left = (~balanced).nonzero()[:, 0]
    if not len(left):
        return result
    factor, shifted = _factorise(cell, start[left], modulus[left])
    work = _Iterate(
        index=index[left],
        modulus=modulus[left],
        displacement=start[left],
        energy=energy[left],
        forces=forces[left],
        gradient=gradient[left],
        direction=-cell.solver.solve(factor, gradient[left]),
        step=torch.ones_like(energy[left]),
        factor=factor,
        shifted=shifted,
        left=torch.zeros_like(shifted),
        pairs=[],
    )
    for _ in range(MAX_EVALUATIONS):
        trial = work.displacement + _per_node(work.step) * work.direction
        now = cell.evaluate(trial, work.modulus)
        slope = _dot(work.gradient, work.direction)
        gradient = now.forces * cell.free
        decreased = now.energy <= work.energy + SUFFICIENT * work.step * slope
        near = (slope.abs() <= ROUNDING * work.energy) & (_norm(gradient) < _norm(work.gradient))
        accepted = now.admissible & (decreased | near) & ~work.left
        work.step = torch.where(accepted, 1.0, work.step / 2)
        # nothing of a trial that was not accepted, whose forces need not be finite
        place = torch.where(_per_node(accepted), trial - work.displacement, 0.0)
        change = torch.where(_per_node(accepted), gradient - work.gradient, 0.0)
        product = _dot(place, change)
        work.pairs = [*work.pairs[1 - MEMORY :], (place, change, torch.where(product > 0, 1 / product, 0.0))]
        slow = accepted & (_norm(gradient) > SLOW * _norm(work.gradient))
        for name, value in (("displacement", trial), ("forces", now.forces), ("gradient", gradient)):
            setattr(work, name, torch.where(_per_node(accepted), value, getattr(work, name)))
        work.energy = torch.where(accepted, now.energy, work.energy)

        balanced = accepted & _balanced(cell, work.forces, work.gradient, tolerance)
        stable = torch.ones_like(balanced)
        check = (balanced & work.shifted).nonzero()[:, 0]
        stable[check] = _stable(cell, work.displacement[check], work.modulus[check])
        done = (balanced & stable).nonzero()[:, 0]
        _store(result, work.index[done], work.displacement[done], work.energy[done], work.forces[done])
        work.left |= balanced | (work.step < 0.5**MAX_HALVINGS) | work.direction.isnan().flatten(1).any(1)
        staying = (~work.left).nonzero()[:, 0]
        if not len(staying):
            break
        if 2 * len(staying) <= len(work.left):  # copying the factors of those that stay costs about one iteration
            work, accepted, slow = work[staying], accepted[staying], slow[staying]

        anew = slow.nonzero()[:, 0]
        if len(anew):
            work.factor[anew], shifted = _factorise(cell, work.displacement[anew], work.modulus[anew])
            work.shifted[anew] |= shifted
            for _, _, weight in work.pairs:
                weight[anew] = 0
        work.direction = torch.where(_per_node(accepted), _direction(cell, work), work.direction)
    return result


def _direction(cell: Cell, work: _Iterate) -> Tensor:
    """The direction of limited-memory BFGS (Nocedal & Wright 2006, algorithm 7.4), from the factorised tangent."""
    q = work.gradient.clone()
    projections = []
    for place, change, weight in reversed(work.pairs):
        projections.append(weight * _dot(place, q))
        q -= _per_node(projections[-1]) * change
    r = cell.solver.solve(work.factor, q)
    for (place, change, weight), projection in zip(work.pairs, reversed(projections), strict=True):
        r += _per_node(projection - weight * _dot(change, r)) * place
    return -r


def _factorise(cell: Cell, displacement: Tensor, modulus: Tensor) -> tuple[Factor, Tensor]:
    """A positive definite tangent, shifted where it has to be, and where that was.

    It only leads the way, so single precision serves, at half the cost; what is indefinite by rounding alone is shifted
    as well.
    """
    state = cell.elements.state(displacement)
    stiffness = cell.elements.stiffness(state, modulus, torch.float32)
    factor = cell.solver.factorise(stiffness)
    shifted = ~factor.definite
    bad = shifted.nonzero()[:, 0]
    if len(bad):
        unloaded = cell.elements.stiffness(cell.elements.state(0 * displacement), modulus, torch.float32)
    for shift in SHIFTS:
        if not len(bad):
            break
        factor[bad] = cell.solver.factorise(stiffness[bad] + shift * unloaded[bad])
        bad = (~factor.definite).nonzero()[:, 0]
    return factor, shifted


def _stable(cell: Cell, displacement: Tensor, modulus: Tensor) -> Tensor:
    """Whether the tangent is positive definite, shape ``(B,)``; B may be 0."""
    if not len(displacement):
        return torch.ones(0, dtype=torch.bool, device=displacement.device)
    stiffness = cell.elements.stiffness(cell.elements.state(displacement), modulus)
    return cell.solver.factorise(stiffness).definite


def _store(result: Equilibrium, index: Tensor, displacement: Tensor, energy: Tensor, forces: Tensor) -> None:
    """Writes what is in equilibrium to its place in the result."""
    result.displacement[index], result.energy[index], result.forces[index] = displacement, energy, forces
    result.solved[index] = True


def _balanced(cell: Cell, forces: Tensor, gradient: Tensor, tolerance: float) -> Tensor:
    """Whether nothing is out of balance that counts beside the forces on the boundary."""
    return _norm(gradient) <= tolerance * _norm(forces * ~cell.free)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.flatten(1), dim=1)


def _per_node(value: Tensor) -> Tensor:
    return value[:, None, None, None]
