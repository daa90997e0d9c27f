"""Nested dissection beside dense factorisations."""

import pytest
import torch

from mechdiffusers.mechanics.elements import Grid
from mechdiffusers.mechanics.nested_dissection import NestedDissection


class Problem:
    """Random positive definite patches; the first row of nodes is prescribed."""

    def __init__(self, height, width, steps):
        self.free = torch.ones(steps * height + 1, steps * width + 1, 2, dtype=torch.bool)
        self.free[0] = False
        self.grid = Grid(height, width, steps, torch.device("cpu"))
        self.solver = NestedDissection(height, width, steps, self.free)
        dofs = 2 * (steps + 1) ** 2
        root = torch.randn(3, height, width, dofs, dofs, generator=torch.manual_seed(0), dtype=torch.float64)
        self.patches = root @ root.mT + torch.eye(dofs)

    def assembled(self, patches):
        """What is not prescribed, dense."""
        numbers = torch.arange(self.free.numel(), dtype=torch.float64).view(1, *self.free.shape)
        of_patch = self.grid.gathered(numbers).permute(2, 0, 1).flatten(1).long()
        dense = torch.zeros(len(patches), self.free.numel(), self.free.numel(), dtype=torch.float64)
        for index, block in zip(of_patch, patches.flatten(1, 2).unbind(1), strict=True):
            dense[:, index[:, None], index] += block
        kept = self.free.flatten().nonzero()[:, 0]
        return dense[:, kept[:, None], kept]


@pytest.mark.parametrize(
    ("height", "width", "steps"), [(1, 1, 1), (1, 1, 2), (4, 4, 1), (5, 3, 1), (1, 6, 2), (7, 2, 2), (6, 9, 1)]
)
def test_the_solution_is_that_of_a_dense_solver_whatever_the_size(height, width, steps):
    problem = Problem(height, width, steps)
    right = torch.randn(3, *problem.free.shape, generator=torch.manual_seed(1), dtype=torch.float64) * problem.free
    factor = problem.solver.factorise(problem.patches.clone())
    solution = problem.solver.solve(factor, right)
    expected = torch.linalg.solve(problem.assembled(problem.patches), right[:, problem.free])
    assert factor.definite.all()
    assert torch.allclose(solution[:, problem.free], expected, atol=1e-10)
    assert not solution[:, ~problem.free].any()


def test_a_matrix_is_told_to_be_indefinite_wherever_its_negative_direction_lies():
    problem = Problem(4, 2, 1)
    for row in range(4):
        for shift in (0.1, 1e3):
            patches = problem.patches.clone()
            patches[1, row, 1, 4, 4] -= shift  # the lower right corner of a pixel of the second design alone
            expected = torch.linalg.eigvalsh(problem.assembled(patches))[:, 0] > 0
            assert expected.tolist() == [True, shift < 1, True]
            assert torch.equal(problem.solver.factorise(patches).definite, expected)
