r"""Load cases: which displacements are prescribed on the boundary of the cell.

A load case is a displacement gradient :math:`G` for a strain of 1 and the components prescribed on each edge: there,
:math:`u = \varepsilon\, G (X - X_0)`. Everything else on the boundary is free of traction. ``NAME_x`` is load case
``NAME`` of the transposed design: what acted along y acts along x.

References:
    | Mechanical MNIST: a benchmark dataset for mechanical metamodels (Lejeune, 2020)
    | https://doi.org/10.1016/j.eml.2020.100659
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LOAD_CASES", "LoadCase", "load_case", "mirrored_cases", "transposed_cases"]


@dataclass(frozen=True)
class LoadCase:
    """Prescribed displacements of a strain of 1; lengths in units of the cell's sides."""

    gradient: tuple[tuple[float, float], tuple[float, float]]  #: rows: x and y displacement; columns: along x and y
    prescribed: Mapping[str, str]  #: the components, "x", "y" or "xy", by edge: "top", "bottom", "left" or "right"
    origin: tuple[float, float] = (0.0, 0.0)  #: X_0 as fractions of width and height from the lower left corner
    reach: float = 0.3  #: the largest strain unless told otherwise

    def free(self, lattice: tuple[int, int], device: torch.device) -> Tensor:
        """Which displacements of a lattice of nodes are unknown, bool, shape ``(*lattice, 2)``."""
        free = torch.ones(*lattice, 2, dtype=torch.bool, device=device)
        edges = {"top": free[0], "bottom": free[-1], "left": free[:, 0], "right": free[:, -1]}
        for edge, components in self.prescribed.items():
            for component in components:
                edges[edge][:, "xy".index(component)] = False
        return free

    def affine(self, lattice: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
        """The affine displacement of a strain of 1 on a cell of ``size`` (height, width), shape ``(*lattice, 2)``."""
        x = torch.linspace(0, size[1], lattice[1], dtype=torch.float64, device=device) - self.origin[0] * size[1]
        y = torch.linspace(size[0], 0, lattice[0], dtype=torch.float64, device=device) - self.origin[1] * size[0]
        (xx, xy), (yx, yy) = self.gradient
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([xx * x + xy * y, yx * x + yy * y], dim=-1)


_CLAMPED = {"bottom": "xy", "top": "xy"}
_SLIDING = {"bottom": "y", "top": "y", "left": "x", "right": "x"}

LOAD_CASES = {
    "uniaxial_extension": LoadCase(((0, 0), (0, 1)), _CLAMPED),
    "uniaxial_compression": LoadCase(((0, 0), (0, -1)), _CLAMPED, reach=0.1),
    "equibiaxial_extension": LoadCase(((1, 0), (0, 1)), _SLIDING, origin=(0.5, 0.5)),
    "shear": LoadCase(((0, 1), (0, 0)), _CLAMPED),
    "confined_compression": LoadCase(((0, 0), (0, -1)), _SLIDING, reach=0.1),
}


def load_case(name: str) -> tuple[LoadCase, bool]:
    """The load case of a name and whether the design is to be transposed.

    Raises:
        ValueError: If there is no such load case.
    """
    base = name.removesuffix("_x") if isinstance(name, str) else name
    if not isinstance(base, str) or base not in LOAD_CASES:
        known = ", ".join(LOAD_CASES)
        raise ValueError(f"load_cases must be among {known}, each also with the suffix _x, got {name!r}")
    return LOAD_CASES[base], base != name


def mirrored_cases(names: Sequence[str]) -> list[int | None]:
    """Which load case of a design is each load case of its mirror image.

    Args:
        names: Load cases.

    Returns:
        For each the index of the one under which the design itself responds alike: its own where the load mirrors into
        itself, ``None`` where it does not, as shear, which turns round.

    Example:
        >>> mirrored_cases(["uniaxial_extension", "shear"])
        [0, None]
    """
    gradients = [load_case(name)[0].gradient for name in names]
    return [i if (xy, yx) == (0, 0) else None for i, ((_, xy), (yx, _)) in enumerate(gradients)]


def transposed_cases(names: Sequence[str]) -> list[int | None]:
    """Which load case of a design is each load case of the transposed design, whose rows are its columns.

    Args:
        names: Load cases.

    Returns:
        For each the index of the one under which the design itself responds alike: of ``NAME_x`` for ``NAME`` and the
        other way round, its own where all directions are alike, ``None`` where that is not among them.

    Example:
        >>> transposed_cases(["uniaxial_extension", "uniaxial_extension_x", "shear"])
        [1, 0, None]
    """
    twins = []
    for name in names:
        case, along_x = load_case(name)
        (xx, _), (_, yy) = case.gradient
        twin = name if xx == yy != 0 else name.removesuffix("_x") if along_x else f"{name}_x"
        twins.append(names.index(twin) if twin in names else None)
    return twins
