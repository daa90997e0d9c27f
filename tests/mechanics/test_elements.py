"""Elements: their forces and tangent belong to one energy, for any law of the family, and no rotation is seen."""

import pytest
import torch

from mechdiffusers.mechanics.elements import Elements
from mechdiffusers.mechanics.materials import CompressibleNeoHookean

CPU = torch.device("cpu")
LAW = CompressibleNeoHookean(0.3)
ORDERS = pytest.mark.parametrize("order", [1, 2])


class Logarithmic:
    """A second law: the volumetric energy that other codes use, lame / 2 ln(J)^2."""

    a, lame = 0.4, 0.6

    def volumetric(self, dilation):
        jacobian, logarithm = 1 + dilation, torch.log1p(dilation)
        energy = self.a * (dilation - logarithm) + self.lame / 2 * logarithm**2
        first = self.a * (1 - 1 / jacobian) + self.lame * logarithm / jacobian
        second = (self.a + self.lame * (1 - logarithm)) / jacobian**2
        return energy, first, second


@ORDERS
@pytest.mark.parametrize(("width", "law"), [(2, LAW), (3, LAW), (2, Logarithmic())])
def test_forces_and_tangent_are_derivatives_of_the_energy(order, width, law):
    elements = Elements(2, width, order, law, CPU)
    displacement = 0.05 * torch.randn(1, *elements.lattice, 2, generator=torch.manual_seed(0)).double()
    modulus = 1 + 99 * torch.rand(1, 2, width, generator=torch.manual_seed(1)).double()

    def energy(displacement):
        return (elements.energy(elements.state(displacement)) * modulus).sum()

    state = elements.state(displacement)
    forces = elements.grid.assembled(elements.nodal_forces(elements.stress(state) * modulus.flatten()))
    assert torch.allclose(forces, torch.func.grad(energy)(displacement), atol=1e-12)
    numbers = torch.arange(displacement.numel(), dtype=torch.float64).view_as(displacement)
    dofs = elements.patches.gathered(numbers).permute(2, 0, 1).flatten(1).long()
    tangent = torch.zeros(displacement.numel(), displacement.numel(), dtype=torch.float64)
    for index, block in zip(dofs, elements.stiffness(state, modulus).flatten(0, 2), strict=True):
        tangent[index[:, None], index] += block
    expected = torch.autograd.functional.hessian(energy, displacement).view_as(tangent)
    assert torch.allclose(tangent, expected, atol=1e-11)


def test_energy_and_stress_do_not_see_a_rotation():
    elements = Elements(2, 2, 2, LAW, CPU)
    displacement = 0.1 * torch.randn(1, *elements.lattice, 2, generator=torch.manual_seed(0)).double()
    rows, columns = elements.lattice
    y, x = torch.meshgrid(torch.linspace(2, 0, rows).double(), torch.linspace(0, 2, columns).double(), indexing="ij")
    place = torch.stack([x, y], -1)
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turned = (place + displacement) @ turn.T - place
    assert torch.allclose(elements.energy(elements.state(turned)), elements.energy(elements.state(displacement)))
    stresses = [elements.mean_stress(elements.stress(elements.state(u))) for u in (displacement, turned)]
    assert torch.allclose(stresses[1], turn @ stresses[0])
