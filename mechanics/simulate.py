r"""The response of designs to load: what users call.

Sensitivities come from the implicit adjoint. At equilibrium the energy changes with a pixel's Young's modulus
:math:`E_e` by the energy :math:`w_e` of that pixel for a modulus of 1 alone, and the stress by

.. math:: \frac{d\sigma}{dE_e} = \frac{1}{A}\, \frac{du}{d\varepsilon} \cdot f_e,

with the nodal forces :math:`f_e` of the pixel for a modulus of 1: the adjoint state of the stress is the tangent of the
equilibrium path, because energy and stress belong to one potential. That is one more solution a step.

References:
    | Topology Optimization (Bendsøe & Sigmund, 2004), section 2.1, on adjoint sensitivities of nonlinear problems
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from mechdiffusers.mechanics.load_cases import load_case
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.mechanics.newton import TOLERANCE, Cell
from mechdiffusers.mechanics.path_following import RESPONSE_TOLERANCE, follow
from mechdiffusers.parallel import num_workers, one_thread, run

__all__ = ["SimulationResult", "simulate"]

#: What a batch may take: on a CPU, each of the processes that work on batches should find its own in the cache.
_CPU_BYTES = 64e6
#: A design from which on a second thread is of use: 64 x 64 pixels of order 2 have half of it, 128 x 128 twice as much.
_LARGE_BYTES = 128e6
_GPU_SHARE = 0.5


@dataclass
class SimulationResult:
    """Responses of B designs to L load cases at S strains each; NaN where a design is not solved.

    Tensors where the designs were a tensor, else numpy arrays; float64. Fields are in the frame of the design: x to the
    right, y upwards, row 0 at the top.
    """

    strain: Any  #: magnitude of the nominal strain, shape (L, S)
    stress: Any  #: d(energy) / d(strain) / area, in units of the moduli, shape (B, L, S)
    energy: Any  #: strain energy, modulus x length^2 per unit thickness, shape (B, L, S)
    converged: Any  #: whether all strains are solved, bool, shape (B, L)
    displacement: Any = None  #: of the nodes, shape (B, L, S, kH + 1, kW + 1, 2) for elements of order k
    pixel_stress: Any = None  #: mean first Piola-Kirchhoff stress P_iJ of each pixel, shape (B, L, S, H, W, 2, 2)


def simulate(
    designs: Tensor | np.ndarray,
    load_cases: Sequence[str] = ("uniaxial_extension",),
    strains: Any = None,
    *,
    element_order: int = 2,
    young_soft: float = 1.0,
    young_stiff: float = 100.0,
    poisson: float = 0.3,
    pixel_size: float = 1.0,
    return_fields: bool = False,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> SimulationResult:
    r"""Loads designs in plane strain, quasi-statically, by finite elements in float64.

    Young's modulus of a pixel is linear in its value. Every pixel is one quadrilateral; the law is
    :class:`mechdiffusers.mechanics.materials.CompressibleNeoHookean`. A design that loses stability is followed to the
    stable state that its energy leads down to; where that, or convergence, is not to be had, it is NaN from that strain
    on. A design's result does not depend on the others (to 1e-9).

    On a CPU the work is shared among as many processes as torch has threads (on Linux, and unless it is little).
    Without ``return_fields`` and gradients, stress and energy are in equilibrium to about 1e-9, with them to 1e-11.

    Stress and energy are differentiable in ``designs``; fields are not.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1]: 0 the soft phase, 1 the stiff one; row 0 at the top. Products of small
            primes are the fast sizes.
        load_cases: Names: ``uniaxial_extension``, ``uniaxial_compression``, ``equibiaxial_extension``, ``shear``,
            ``confined_compression``; with the suffix ``_x``, of the transposed design, so that the load is along x.
        strains: Magnitudes of nominal strain, positive and increasing: displacement over the cell's height, or over
            its width along x. Shape ``(S,)``, or one such sequence for each load case, ``(L, S)``. By default six
            equal steps to 0.3, or to 0.1 in compression.
        element_order: 1 or 2. Order 1 is several times faster and, on binary composites, several per cent too stiff.
        young_soft: Young's modulus where the design is 0.
        young_stiff: Young's modulus where the design is 1.
        poisson: Poisson's ratio, everywhere, within (0, 0.5).
        pixel_size: Length of a pixel's side, the unit of ``displacement`` and, squared, of ``energy``.
        return_fields: Whether to return nodal displacements and stresses of the pixels.
        batch_size: Designs computed at once; by default as many as suit the cache or the GPU's memory.
        device: Where to compute; by default where the designs are.
        progress: Whether to show a progress bar.

    Returns:
        The responses, on the device of the designs.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> designs, _ = random_composites(3, size=16)
        >>> simulate(designs, ("uniaxial_extension", "shear_x"), [0.1, 0.2]).stress.shape
        (3, 2, 2)
    """
    given = designs
    if isinstance(designs, np.ndarray) and designs.dtype.kind in "buif":
        given = torch.from_numpy(np.array(designs, dtype=np.float64, order="C"))  # views that run backwards too
    if not isinstance(given, Tensor) or given.is_complex() or given.ndim != 3 or not given.numel():
        what = (
            f"shape {tuple(designs.shape)} of {designs.dtype}" if hasattr(designs, "dtype") else type(designs).__name__
        )
        raise ValueError(f"designs must be a tensor or array of numbers, shape (B, H, W), none of them 0, got {what}")
    if not bool(((given >= 0) & (given <= 1)).all()):  # also false for NaN
        raise ValueError("designs must lie in [0, 1] everywhere, got values outside or NaN")
    check_settings(element_order, young_soft, young_stiff, poisson, pixel_size)
    if batch_size is not None and not (_is_integer(batch_size) and batch_size > 0):
        raise ValueError(f"batch_size must be a positive integer or None, got {batch_size!r}")
    if isinstance(load_cases, str) or not isinstance(load_cases, Collection) or not len(load_cases):
        raise ValueError(f"load_cases must be a sequence of at least one name, got {load_cases!r}")
    cases = [load_case(name) for name in load_cases]
    strain = _checked_strains(strains, [case.reach for case, _ in cases])

    where = checked_device(device) if device is not None else given.device
    values = given.to(where, torch.float64)
    batch, height, width = values.shape
    law = CompressibleNeoHookean(poisson)
    cells = [
        Cell(*((width, height) if transposed else (height, width)), element_order, case, law, where)
        for case, transposed in cases
    ]
    with_gradient = given.requires_grad and torch.is_grad_enabled()

    def work(task: tuple[int, int, int]) -> tuple[tuple[int, int, int], dict[str, Tensor]]:
        case, start, stop = task
        with torch.no_grad():
            chosen = values.detach()[start:stop]
            modulus = young_soft + (young_stiff - young_soft) * (chosen.mT if cases[case][1] else chosen)
            return task, _responses(cells[case], modulus, strain[case], return_fields, with_gradient)

    suited, workers = _shared(values.shape, element_order, len(cases), where)
    size = batch_size or suited
    tasks = [(case, start, min(start + size, batch)) for case in range(len(cases)) for start in range(0, batch, size)]
    collected: dict[str, Tensor] = {}
    small = where.type == "cpu" and _bytes_of(values.shape[1:], element_order) < _LARGE_BYTES
    bar = tqdm(total=batch * len(cases), disable=not progress, unit="path", desc="simulate")
    with bar, one_thread(small):
        for (case, start, stop), part in run(work, tasks, workers):
            for name, field in part.items():
                turned = _untransposed(name, field) if cases[case][1] else field
                if name not in collected:
                    collected[name] = turned.new_empty(batch, len(cases), *turned.shape[1:])
                collected[name][start:stop, case] = turned
            bar.update(stop - start)

    stress, energy = collected["stress"], collected["energy"] * pixel_size**2
    if with_gradient:
        contrast = young_stiff - young_soft
        slopes = collected["stress_slope"] * contrast, collected["energy_slope"] * (contrast * pixel_size**2)
        stress, energy = _Response.apply(values, stress, energy, *slopes)
    result = SimulationResult(strain, stress, energy, collected["converged"])
    if return_fields:
        result.displacement = collected["displacement"] * pixel_size
        result.pixel_stress = collected["pixel_stress"]
    for name, tensor in vars(result).items():
        if tensor is not None:
            tensor = tensor.to(given.device)
            setattr(result, name, tensor if isinstance(designs, Tensor) else tensor.numpy())
    return result


def _responses(cell: Cell, modulus: Tensor, strains: Tensor, fields: bool, slopes: bool) -> dict[str, Tensor]:
    """Everything asked for, of the designs of one batch under one load case, shapes ``(b, S, ...)``."""
    steps: dict[str, list[Tensor]] = {}
    nan = torch.tensor(math.nan, dtype=torch.float64, device=modulus.device)
    for now in follow(cell, modulus, strains, TOLERANCE if fields or slopes else RESPONSE_TOLERANCE):
        found = {"stress": now.stress, "energy": now.energy}
        if fields or slopes:
            state = cell.elements.state(now.displacement)
            unit_stress = cell.elements.stress(state)
        if fields:
            found["displacement"] = now.displacement
            found["pixel_stress"] = cell.elements.mean_stress(unit_stress * modulus.flatten())
        found = {name: torch.where(_like(now.solved, value), value, nan) for name, value in found.items()}
        if slopes:
            tangent = cell.path_tangent(state, modulus)
            forces = cell.elements.nodal_forces(unit_stress)
            work = (cell.elements.grid.gathered(tangent) * forces).sum((0, 1)).view(modulus.shape) / cell.area
            # 0, not NaN, so that the gradient of what is chosen from the solved is not spoilt by the rest
            for name, value in (("stress_slope", work), ("energy_slope", cell.elements.energy(state))):
                found[name] = torch.where(_like(now.solved, value), value, 0.0)
        for name, value in found.items():
            steps.setdefault(name, []).append(value)
    return {"converged": now.solved.clone(), **{name: torch.stack(values, 1) for name, values in steps.items()}}


class _Response(torch.autograd.Function):
    """Attaches the known sensitivities ``(B, L, S, H, W)`` of stress and energy ``(B, L, S)`` to the designs."""

    @staticmethod
    def forward(
        ctx: Any, designs: Tensor, stress: Tensor, energy: Tensor, stress_slope: Tensor, energy_slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(stress_slope, energy_slope)
        return stress.clone(), energy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors
        stress, energy = (torch.einsum("bls,blshw->bhw", up, slope) for up, slope in zip(upstream, slopes, strict=True))
        return stress + energy, None, None, None, None


def check_settings(element_order: Any, young_soft: Any, young_stiff: Any, poisson: Any, pixel_size: Any) -> None:
    """Raises a ``ValueError`` that names the first setting of :func:`simulate` that is not as it describes."""
    if not _is_integer(element_order) or element_order not in (1, 2):
        raise ValueError(f"element_order must be the integer 1 or 2, got {element_order!r}")
    for name, value in (("young_soft", young_soft), ("young_stiff", young_stiff), ("pixel_size", pixel_size)):
        if not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if not (_is_number(poisson) and 0 < poisson < 0.5):
        raise ValueError(f"poisson must lie inside (0, 0.5), got {poisson!r}")


def checked_device(device: str | torch.device) -> torch.device:
    """The device, if torch has it here, else a ``ValueError``."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:  # the first where torch is built without it
        raise ValueError(f"device must be one that torch has here, got {device!r}: {error}") from error


def _shared(shape: Sequence[int], order: int, cases: int, device: torch.device) -> tuple[int, int]:
    """How many designs to compute at once, and how many processes of one thread are to share the work.

    On a CPU small products gain nothing from several threads, and threads that call them wait for each other in the
    interpreter. So there are as many processes as torch has threads, where they can be forked and all have work that is
    worth it; batches are of equal size, so that all have work to the end.
    """
    batch = shape[0]
    design = _bytes_of(shape[1:], order)
    if device.type == "cuda":
        return max(1, int(_GPU_SHARE * torch.cuda.mem_get_info(device)[0] / design)), 1
    most = max(1, int(_CPU_BYTES / design))
    least = max(1, most // 4)  # smaller batches take longer in all
    workers = min(num_workers(), math.ceil(batch * cases / least)) if device.type == "cpu" else 1
    count = math.ceil(batch / most)
    while count * cases % workers and batch >= least * (count + 1):
        count += 1
    return math.ceil(batch / count), workers


def _bytes_of(size: Sequence[int], order: int) -> int:
    """Memory that a design takes: six times the stiffness of its elements."""
    return 6 * 8 * math.prod(size) * (2 * (order + 1) ** 2) ** 2


def _untransposed(name: str, value: Tensor) -> Tensor:
    """A field of the transposed design in the frame of the design: rows and columns, and with them x and y, change."""
    if name == "displacement":
        return -value.transpose(2, 3).flip(-1)  # both axes change direction as well
    if name == "pixel_stress":
        return value.transpose(2, 3).flip(-1, -2)
    return value.mT if name.endswith("slope") else value


def _like(mask: Tensor, value: Tensor) -> Tensor:
    """The mask ``(b,)`` with as many dimensions as ``value``."""
    return mask.view(-1, *[1] * (value.ndim - 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked_strains(strains: Any, reaches: Sequence[float]) -> Tensor:
    """Strains of each load case, shape ``(L, S)``."""
    if strains is None:
        return torch.tensor([[reach * step / 6 for step in range(1, 7)] for reach in reaches], dtype=torch.float64)
    try:
        array = np.asarray(strains.cpu() if isinstance(strains, Tensor) else strains, dtype=np.float64)
        array = np.broadcast_to(array, (len(reaches), array.shape[-1]))
    except (TypeError, ValueError, IndexError):
        raise ValueError(
            f"strains must be one sequence of numbers, or one of equal length for each of {len(reaches)} load cases, "
            f"got {strains!r}"
        ) from None
    if not array.size or not np.isfinite(array).all() or (np.diff(array, prepend=0.0) <= 0).any():
        raise ValueError(f"strains must be positive, finite and increasing, got {strains!r}")
    return torch.tensor(array)
