"""Designs as files for other programs: pictures, arrays, and meshes for other solvers.

A mesh has one quadrilateral a pixel. The origin is the lower left corner of the cell, x points to the right and y
upwards. The phases are SOFT and STIFF, the sides TOP, BOTTOM, LEFT and RIGHT:

====== ================== =================================== ============================== ==================
suffix for                phases                              sides                          nodes at order 1, 2
====== ================== =================================== ============================== ==================
inp    Abaqus, CalculiX   element sets                        node sets                      4, 8
vtu    VTK, ParaView      cell data ``phase``, 0 or 1         point data ``TOP``, ..., 0, 1  4, 9
msh    Gmsh, FEniCS       physical groups of quadrilaterals   physical groups of lines       4, 9
====== ================== =================================== ============================== ==================

Elements of 9 nodes are those of :func:`.simulate`. Abaqus and CalculiX have none of plane strain, so a deck has CPE4 or
CPE8. CPE8 has no node in the middle: its displacements are a subset of ours, and a design is stiffer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path

import meshio
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechdiffusers.atomic_file import atomic_write, checked_file_names

__all__ = ["export_designs"]

_PHASES = ("SOFT", "STIFF")
#: Elements of the plane by order, and those of the sides, as meshio calls them.
_CELLS = {1: ("quad", "line"), 2: ("quad9", "line3")}


def export_designs(
    designs: np.ndarray | Tensor,
    folder: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    formats: Sequence[str] = ("png", "npy", "inp"),
    element_order: int = 2,
    pixel_size: float = 1.0,
) -> None:
    """Writes each design as ``NAME.png``, ``NAME.npy``, ``NAME.inp`` and so on.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1]: 0 the soft phase, 1 the stiff one; row 0 at the top.
        folder: Made if need be. Files of the same name are replaced.
        names: Of the designs, one each, different; by default ``design-000`` and so on.
        formats: Among ``png``, ``npy``, and the meshes ``inp``, ``vtu`` and ``msh``, which are for binary designs.
        element_order: 1 or 2, of the meshes.
        pixel_size: Length of a pixel's side in the meshes.

    Raises:
        ValueError: If an argument is not as described, or a file cannot be written.

    Example:
        >>> export_designs(np.eye(4)[None], "runs/export", names=["diagonal"], formats=["inp"])  # doctest: +SKIP
    """
    if isinstance(designs, Tensor):  # numpy lacks bfloat16
        designs = designs.detach().to("cpu", torch.promote_types(designs.dtype, torch.float64)).numpy()
    values = np.asarray(designs)
    if values.ndim != 3 or not values.size or values.dtype.kind not in "buif":
        got = f"shape {values.shape} of {values.dtype}"
        raise ValueError(f"designs must be numbers of shape (B, H, W), none of them 0, got {got}")
    values = values.astype(np.float64)
    if not ((values >= 0) & (values <= 1)).all():  # also false for NaN
        raise ValueError("designs must lie in [0, 1] everywhere, got values outside or NaN")
    names = [f"design-{index:03d}" for index in range(len(values))] if names is None else names
    chosen = checked_file_names(names, len(values), "design")
    is_list = isinstance(formats, Sequence) and not isinstance(formats, str)
    if not is_list or not formats or not all(form in list(_WRITERS) for form in formats):
        raise ValueError(f"formats must be a list of some of {', '.join(_WRITERS)}, got {formats!r}")
    if isinstance(element_order, bool) or element_order not in _CELLS:
        raise ValueError(f"element_order must be 1 or 2, got {element_order!r}")
    if isinstance(pixel_size, bool) or not isinstance(pixel_size, Real) or not 0 < pixel_size < math.inf:
        raise ValueError(f"pixel_size must be a positive number, got {pixel_size!r}")
    if meshes := [form for form in formats if form not in ("png", "npy")]:
        other = values[(values != 0) & (values != 1)]
        if other.size:
            raise ValueError(f"designs must be 0 or 1 everywhere for meshes ({', '.join(meshes)}), got {other[0]:g}")
    for name, design in zip(chosen, values, strict=True):
        for form in formats:
            try:
                with atomic_write(Path(folder) / f"{name}.{form}") as unfinished:
                    _WRITERS[form](unfinished, design, element_order, float(pixel_size))
            except OSError as error:
                raise ValueError(f"folder must be one that can be written, got {folder}: {error}") from error


def _write_png(path: Path, design: np.ndarray, *_: object) -> None:
    """A picture of 1 bit a pixel for a binary design, of 8 for a grey one."""
    is_binary = ((design == 0) | (design == 1)).all()
    Image.fromarray(design > 0.5 if is_binary else np.rint(255 * design).astype(np.uint8)).save(path, "PNG")


def _write_npy(path: Path, design: np.ndarray, *_: object) -> None:
    with path.open("wb") as file:
        np.save(file, design)


def _write_inp(path: Path, design: np.ndarray, order: int, pixel_size: float) -> None:
    """An Abaqus deck of nodes, elements and sets; a model adds materials, steps and boundary conditions."""
    points, cells, sides = _mesh(design.shape, order, pixel_size)
    used = np.unique(cells[:, :8])  # without the nodes in the middle of a pixel
    cells = np.searchsorted(used, cells[:, :8])
    nodes = {name: np.searchsorted(used, numbers) for name, numbers in _nodes_of(sides).items()}
    stiff = design.ravel() == 1
    phases = {name: [np.flatnonzero(chosen)] for name, chosen in zip(_PHASES, (~stiff, stiff), strict=True)}
    plane = "quad" if order == 1 else "quad8"
    mesh = meshio.Mesh(points[used], [(plane, cells)], cell_sets=phases, point_sets=nodes)
    # solvers read at most 20 characters of a number, and meshio writes 22 unless told otherwise
    meshio.write(path, mesh, "abaqus", float_fmt=".12e", translate_cell_names=False)
    # meshio knows no elements of plane strain
    path.write_text(path.read_text().replace(f"TYPE={plane}\n", f"TYPE=CPE{cells.shape[1]}\n"))


def _write_vtu(path: Path, design: np.ndarray, order: int, pixel_size: float) -> None:
    points, cells, sides = _mesh(design.shape, order, pixel_size)
    marks = {name: np.isin(np.arange(len(points)), nodes).astype(np.int32) for name, nodes in _nodes_of(sides).items()}
    phase = [design.ravel().astype(np.int32)]
    mesh = meshio.Mesh(points, [(_CELLS[order][0], cells)], cell_data={"phase": phase}, point_data=marks)
    meshio.write(path, mesh, "vtu")


def _write_msh(path: Path, design: np.ndarray, order: int, pixel_size: float) -> None:
    """Gmsh's format 2.2, in text, which most programs read."""
    points, cells, sides = _mesh(design.shape, order, pixel_size)
    plane, line = _CELLS[order]
    groups = {name: np.array([index + 1, 2]) for index, name in enumerate(_PHASES)}
    groups |= {name: np.array([index + 3, 1]) for index, name in enumerate(sides)}
    blocks = [(plane, cells), *((line, edges) for edges in sides.values())]
    tags = [design.ravel().astype(np.int32) + 1]
    tags += [np.full(len(edges), groups[name][0], dtype=np.int32) for name, edges in sides.items()]
    data = {"gmsh:physical": tags, "gmsh:geometrical": tags}
    meshio.write(path, meshio.Mesh(points, blocks, cell_data=data, field_data=groups), "gmsh22", binary=False)


#: What writes a design to a path, by the suffix.
_WRITERS: dict[str, Callable[[Path, np.ndarray, int, float], None]] = {
    "png": _write_png,
    "npy": _write_npy,
    "inp": _write_inp,
    "vtu": _write_vtu,
    "msh": _write_msh,
}


def _mesh(
    shape: tuple[int, ...], order: int, pixel_size: float
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Nodes, elements in the order of the pixels, and the edges of each side.

    Args:
        shape: Height and width in pixels.
        order: Of the elements.
        pixel_size: Length of a pixel's side.

    Returns:
        Coordinates, shape ``(nodes, 3)``; nodes of the elements, ``(H * W, 4 or 9)``, counterclockwise, corners first,
        then the middles of the sides, then the middle; nodes of the edges by side, ``(edges, 2 or 3)``, ends first.
    """
    height, width = shape
    rows, columns = np.mgrid[: order * height + 1, : order * width + 1]
    number = np.arange(rows.size).reshape(rows.shape)
    place = np.stack([columns, order * height - rows, 0 * rows], -1).reshape(-1, 3)
    # rows and columns, from the upper left corner of a pixel, in pixels
    corners = [(1, 0), (1, 1), (0, 1), (0, 0)]
    others = [(1, 0.5), (0.5, 1), (0, 0.5), (0.5, 0), (0.5, 0.5)] if order == 2 else []
    first = number[:-1:order, :-1:order].reshape(-1, 1)
    offsets = [int(order * down) * number.shape[1] + int(order * right) for down, right in [*corners, *others]]
    lines = {"TOP": number[0], "BOTTOM": number[-1], "LEFT": number[:, 0], "RIGHT": number[:, -1]}
    sides = {
        name: np.stack([line[:-1:order], line[order::order], *([line[1::2]] if order == 2 else [])], 1)
        for name, line in lines.items()
    }
    return place * (pixel_size / order), first + np.array(offsets), sides


def _nodes_of(sides: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The nodes of each side."""
    return {name: np.unique(edges) for name, edges in sides.items()}
