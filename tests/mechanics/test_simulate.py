"""Truth of the finite elements: closed forms, patch tests, published data, an independent code, and contracts."""

import gc
import os
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdiffusers.mechanics import ResponseSpec, simulate
from mechdiffusers.mechanics.elements import Elements
from mechdiffusers.mechanics.load_cases import LOAD_CASES, LoadCase
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.mechanics.newton import Cell, equilibrate
from mechdiffusers.microstructures import load_mechanical_mnist, random_composites
from mechdiffusers.microstructures.build_dataset.columns import designs_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAW = CompressibleNeoHookean(0.3)
ORDERS = pytest.mark.parametrize("order", [1, 2])
ALL_CASES = [*LOAD_CASES, *(f"{name}_x" for name in LOAD_CASES)]
PUBLISHED = Path(os.environ.get("MECHANICAL_MNIST_DIR", Path(__file__).parents[3] / "shared/data/mechanical_mnist"))


def energy_density(gradient: torch.Tensor, young: float = 1.0, poisson: float = 0.3) -> torch.Tensor:
    """The published energy density as it is written in the paper, less its value unloaded."""
    mu = young / (2 * (1 + poisson))
    lame = young * poisson / ((1 + poisson) * (1 - 2 * poisson))
    jacobian = torch.linalg.det(gradient)
    invariant = (gradient**2).sum((-1, -2)) + 1
    logarithm = torch.log(jacobian)
    return mu / 2 * (invariant - 3 - 2 * logarithm) + lame / 2 * ((jacobian**2 - 1) / 2 - logarithm)


def composites(num: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(random_composites(num, size=size, seed=seed)[0]).double()


@ORDERS
@pytest.mark.parametrize(
    ("case", "stretches"),
    [
        ("equibiaxial_extension", lambda e: (1 + e, 1 + e)),
        ("confined_compression", lambda e: (1, 1 - e)),
        ("confined_compression_x", lambda e: (1, 1 - e)),
    ],
)
def test_a_homogeneous_cell_follows_the_closed_form(order, case, stretches):
    strains = [0.05, 0.2, 0.4]
    result = simulate(torch.zeros(1, 4, 6), [case], strains, element_order=order, young_soft=7.0, pixel_size=0.5)
    for step, value in enumerate(strains):
        strain = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        one = torch.ones((), dtype=torch.float64)
        density = energy_density(torch.diag(torch.stack([one * s for s in stretches(strain)])), young=7.0)
        (stress,) = torch.autograd.grad(density, strain)
        assert abs(result.energy[0, 0, step] / (density * 24 * 0.25) - 1) < 1e-10
        assert abs(result.stress[0, 0, step] / stress - 1) < 1e-10


@ORDERS
@pytest.mark.parametrize(
    "gradient",
    [*((0.2 * np.array(case.gradient)).tolist() for case in LOAD_CASES.values()), [[0.2, 0.1], [-0.05, -0.1]]],
)
def test_an_affine_boundary_gives_a_homogeneous_field(order, gradient):
    every_edge = LoadCase(gradient, dict.fromkeys(("top", "bottom", "left", "right"), "xy"))
    cell = Cell(5, 4, order, every_edge, LAW, CPU)
    modulus = torch.full((1, 5, 4), 3.0, dtype=torch.float64)
    start = cell.affine[None] + 0.02 * cell.free * torch.randn(1, *cell.affine.shape, generator=torch.manual_seed(0))
    found = equilibrate(cell, modulus, start)
    assert found.solved
    assert torch.allclose(found.displacement[0], cell.affine, atol=1e-9)
    density = energy_density(torch.eye(2) + torch.tensor(gradient, dtype=torch.float64), young=3.0)
    assert abs(found.energy / (20 * density) - 1) < 1e-10


@ORDERS
@pytest.mark.parametrize("case", ALL_CASES)
def test_stress_is_the_derivative_of_the_energy_by_the_strain(order, case):
    h = 1e-4
    result = simulate(composites(2)[:, :6], [case], [0.05 - h, 0.05, 0.05 + h], element_order=order)
    slope = (result.energy[..., 2] - result.energy[..., 0]) / (2 * h) / 48
    assert torch.allclose(slope, result.stress[..., 1], rtol=1e-6)
    assert (result.stress > 0).all()


@ORDERS
def test_the_mean_stress_of_the_pixels_is_the_stress(order):
    cases, component = (
        ["uniaxial_extension", "uniaxial_extension_x", "shear", "shear_x"],
        [(1, 1), (0, 0), (0, 1), (1, 0)],
    )
    result = simulate(composites(2)[:, :6], cases, [0.1], element_order=order, return_fields=True)
    for index, (i, j) in enumerate(component):
        mean = result.pixel_stress[:, index, :, :, :, i, j].mean((-1, -2))
        assert torch.allclose(mean, result.stress[:, index], rtol=1e-8)


@pytest.mark.parametrize("case", LOAD_CASES)
def test_a_load_along_x_is_that_of_the_transposed_design(case):
    designs = composites(2)[:, :6]
    along_x = simulate(designs, [f"{case}_x"], [0.05, 0.1], element_order=1, return_fields=True)
    along_y = simulate(designs.mT, [case], [0.05, 0.1], element_order=1, return_fields=True)
    assert torch.allclose(along_x.stress, along_y.stress)
    length = torch.linalg.vector_norm
    assert torch.allclose(length(along_x.displacement, dim=-1), length(along_y.displacement, dim=-1).transpose(3, 4))
    modulus = 1 + 99 * designs[0]
    elements = Elements(6, 8, 1, LAW, CPU)  # the fields are in the design's own frame: they have its energy
    energy = (elements.energy(elements.state(along_x.displacement[:1, 0, -1])) * modulus).sum()
    assert abs(energy / along_x.energy[0, 0, -1] - 1) < 1e-9


def test_a_half_turn_of_a_design_changes_no_response_and_a_mirror_none_but_that_of_shear():
    designs = composites(2)[:, :6].numpy()
    responses = simulate(designs, ALL_CASES, [0.05], element_order=1)
    turned = simulate(designs[:, ::-1, ::-1], ALL_CASES, [0.05], element_order=1)
    assert np.allclose(turned.stress, responses.stress, rtol=1e-8, atol=0)
    mirrored = simulate(designs[:, :, ::-1], ALL_CASES, [0.05], element_order=1)
    same = np.isclose(mirrored.stress, responses.stress, rtol=1e-8, atol=0).all((0, 2))
    assert [case for case, equal in zip(ALL_CASES, same, strict=True) if not equal] == ["shear", "shear_x"]


@ORDERS
@pytest.mark.parametrize("case", ["uniaxial_extension", "uniaxial_compression", "shear_x", "equibiaxial_extension"])
def test_gradients_agree_with_central_differences(order, case):
    designs = (0.1 + 0.8 * composites(2)[:, :6]).requires_grad_()
    direction = torch.randn(designs.shape, generator=torch.manual_seed(0)).double()
    response = simulate(designs, [case], [0.05, 0.1], element_order=order)
    h = 1e-4
    ahead, behind = (
        simulate(designs.detach() + sign * h * direction, [case], [0.05, 0.1], element_order=order) for sign in (1, -1)
    )
    weight = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    for name in ("stress", "energy"):
        value = (weight * getattr(response, name)).sum()
        (gradient,) = torch.autograd.grad(value, designs, retain_graph=True)
        expected = (weight * (getattr(ahead, name) - getattr(behind, name))).sum() / (2 * h)
        assert abs((gradient * direction).sum() / expected - 1) < 1e-5


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published data: set MECHANICAL_MNIST_DIR to their folder")
@pytest.mark.slow
@pytest.mark.parametrize(("order", "mean", "worst"), [(1, 1.7e-2, 3e-2), (2, 5e-4, 1.5e-3)])
def test_energies_are_those_that_were_published(order, mean, worst):
    dataset = load_mechanical_mnist(PUBLISHED, "uniaxial_extension")
    rows, strains = dataset.with_format("numpy")[:8], ResponseSpec.of(dataset).strains
    result = simulate(designs_of(rows["image"]), ["uniaxial_extension"], strains, element_order=order)
    published = rows["response"][:, 0, 2:]  # the first steps have no digits
    error = np.linalg.norm(result.energy[:, 0, 2:] - published, axis=1) / np.linalg.norm(published, axis=1)
    assert error.mean() <= mean
    assert error.max() <= worst


@ORDERS
@pytest.mark.parametrize("solver", ["torch-fem", "scipy"])
def test_an_independent_code_agrees(order, solver, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import other_solvers

    designs, strains = composites(4, size=6), [0.05, 0.1, 0.15]
    result = simulate(designs, ["uniaxial_extension"], strains, element_order=order, return_fields=True)
    if solver == "scipy":
        stress = [other_solvers.SciPyNewton(6, order).extended(design, strains) for design in designs]
        assert torch.allclose(torch.tensor(stress, dtype=torch.float64), result.stress[:, 0], rtol=1e-8)
        return
    if not find_spec("torchfem"):
        pytest.skip("torch-fem is not installed")
    displacement, stress, energy = other_solvers.extend_with_torch_fem(designs, order, strains)
    assert torch.allclose(displacement, result.displacement[:, 0].flatten(2, 3), atol=1e-6)
    assert torch.allclose(stress, result.stress[:, 0], rtol=1e-6, atol=0)
    assert torch.allclose(energy, result.energy[:, 0], rtol=1e-6, atol=0)


def test_a_refined_mesh_converges_and_order_2_is_nearer():
    design = composites(1, size=4)

    def energy(refinement, order):
        fine = design.repeat_interleave(refinement, 1).repeat_interleave(refinement, 2)
        return simulate(fine, strains=[0.1], element_order=order, pixel_size=1 / refinement).energy.item()

    reference = energy(16, 2)
    errors = {order: [energy(refinement, order) / reference - 1 for refinement in (1, 2, 4)] for order in (1, 2)}
    for values in errors.values():  # displacement elements are too stiff, and less so the finer they are
        assert values[0] > values[1] > values[2] > 0
    assert all(second < first / 2 for first, second in zip(errors[1], errors[2], strict=True))


def test_a_design_does_not_see_its_neighbours():
    designs = composites(6)
    designs[3] = 1.0
    for cases in (["uniaxial_extension", "shear"], ["uniaxial_compression"]):
        together = simulate(designs, cases, element_order=1, batch_size=6)
        alone = simulate(designs, cases, element_order=1, batch_size=np.int64(1))
        assert torch.allclose(together.stress, alone.stress, rtol=1e-9, atol=0)
        assert torch.allclose(together.energy, alone.energy, rtol=1e-9, atol=0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the test may have cores
def test_processes_change_neither_results_nor_the_random_state_and_none_is_left(two_threads):
    designs = composites(2, size=32).requires_grad_()
    state = torch.get_rng_state()
    shared = simulate(designs, strains=[0.02])
    assert torch.equal(torch.get_rng_state(), state)
    assert not active_children()
    torch.set_num_threads(1)
    alone = simulate(designs, strains=[0.02])
    assert torch.allclose(shared.stress, alone.stress, rtol=1e-9, atol=0)
    slopes = [torch.autograd.grad(result.stress.sum(), designs)[0] for result in (shared, alone)]
    assert torch.allclose(*slopes, rtol=1e-7, atol=1e-12)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_error_in_a_process_is_raised_and_no_process_is_left(two_threads, monkeypatch):
    def breaks(*arguments):
        raise ArithmeticError(f"in process {os.getpid()}")

    monkeypatch.setattr(import_module("mechdiffusers.mechanics.simulate"), "follow", breaks)
    with pytest.raises(ArithmeticError, match="in process") as caught:
        simulate(composites(2, size=32), strains=[0.02])
    assert f"in process {os.getpid()}" not in str(caught.value)
    del caught
    gc.collect()
    assert not active_children()


def test_a_design_that_cannot_be_solved_is_nan_and_leaves_its_neighbours_untouched():
    designs = torch.stack([torch.ones(4, 4), torch.zeros(4, 4), composites(1, size=4)[0]]).requires_grad_()
    strains = [0.1, 0.5, 0.999999]  # the last asks for a millionth of the volume
    result = simulate(designs, ["confined_compression"], strains, element_order=1)
    assert torch.equal(result.converged[:, 0], ~result.stress[:, 0].isnan().any(-1))
    assert not result.converged[2]
    assert result.stress[:, 0, 0].isfinite().all()
    assert result.converged[:2].all()  # homogeneous cells have that state in closed form
    (gradient,) = torch.autograd.grad(result.stress[~result.stress.isnan()].sum(), designs)
    assert gradient.isfinite().all()


def test_arrays_give_arrays_and_tensors_give_tensors():
    designs, _ = random_composites(2, size=4)
    array = simulate(designs, ["shear", "shear_x"], [[0.1, 0.2], [0.2, 0.3]], element_order=1, return_fields=True)
    tensor = simulate(torch.from_numpy(designs), ["shear"], [0.1, 0.2], element_order=1)
    assert isinstance(array.stress, np.ndarray)
    assert isinstance(tensor.stress, torch.Tensor)
    assert np.array_equal(array.strain, [[0.1, 0.2], [0.2, 0.3]])
    assert np.allclose(array.stress[:, 0], tensor.stress[:, 0], rtol=1e-9)
    assert array.stress.shape == array.energy.shape == (2, 2, 2)
    assert array.converged.shape == (2, 2)
    assert array.converged.dtype == bool
    assert array.displacement.shape == (2, 2, 2, 5, 5, 2)
    assert array.pixel_stress.shape == (2, 2, 2, 4, 4, 2, 2)
    assert tensor.displacement is None


def test_units_scale():
    designs = composites(2, size=4)
    one = simulate(designs, strains=[0.1], element_order=1, return_fields=True)
    other = simulate(
        designs, strains=[0.1], element_order=1, return_fields=True, young_soft=2, young_stiff=200, pixel_size=3
    )
    assert torch.allclose(other.stress, 2 * one.stress)
    assert torch.allclose(other.energy, 2 * 9 * one.energy)
    assert torch.allclose(other.displacement, 3 * one.displacement)


def test_a_path_in_finer_steps_comes_to_the_same_place():
    designs = composites(3)
    coarse = simulate(designs, ["uniaxial_extension", "shear"], [0.3], element_order=1)
    fine = simulate(designs, ["uniaxial_extension", "shear"], np.linspace(0.02, 0.3, 15), element_order=1)
    assert torch.allclose(coarse.stress[..., -1], fine.stress[..., -1], rtol=1e-8)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"designs": torch.full((1, 4, 4), 1.1)}, "designs"),
        ({"designs": torch.full((1, 4, 4), -0.1)}, "designs"),
        ({"designs": torch.full((1, 4, 4), float("nan"))}, "designs"),
        ({"designs": torch.zeros(4, 4)}, "designs"),
        ({"designs": torch.zeros(0, 4, 4)}, "designs"),
        ({"designs": [[0.0]]}, "designs"),
        ({"designs": np.full((1, 4, 4), "stiff")}, "designs"),
        ({"designs": np.zeros((1, 4, 4), complex)}, "designs"),
        ({"strains": [0.2, 0.1]}, "strains"),
        ({"strains": [0.0, 0.1]}, "strains"),
        ({"strains": [-0.2, -0.1]}, "strains"),
        ({"strains": [0.1, float("nan")]}, "strains"),
        ({"strains": []}, "strains"),
        ({"strains": 0.1}, "strains"),
        ({"strains": [[0.1], [0.2]]}, "strains"),
        ({"strains": [[0.1, 0.2], [0.1]]}, "strains"),
        ({"load_cases": ["torsion"]}, "load_cases"),
        ({"load_cases": [3]}, "load_cases"),
        ({"load_cases": "shear"}, "load_cases"),
        ({"load_cases": []}, "load_cases"),
        ({"load_cases": None}, "load_cases"),
        ({"load_cases": (name for name in ["shear"])}, "load_cases"),
        ({"load_cases": [["shear"]]}, "load_cases"),
        ({"young_soft": 0.0}, "young_soft"),
        ({"young_stiff": -1.0}, "young_stiff"),
        ({"young_stiff": float("inf")}, "young_stiff"),
        ({"pixel_size": 0}, "pixel_size"),
        ({"poisson": 0.5}, "poisson"),
        ({"poisson": 0.0}, "poisson"),
        ({"poisson": "0.3"}, "poisson"),
        ({"element_order": 3}, "element_order"),
        ({"element_order": 2.0}, "element_order"),
        ({"element_order": True}, "element_order"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
    ],
)
def test_bad_input_is_named(change, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        simulate(**{"designs": torch.zeros(1, 4, 4), **change})
