"""Pictures of simulations: a design, its deformed mesh coloured by a stress, its curves, and its path as a GIF.

Fields come from ``simulate(..., return_fields=True)``, here for one design under one load case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.mechanics.elements import loop

__all__ = ["draw_deformed", "save_path_animation", "save_simulation_figure"]


def draw_deformed(axes: Axes, displacement: Any, values: Any, limit: float) -> PolyCollection:
    """Draws the deformed pixels, coloured by a value each.

    Args:
        axes: Where to draw.
        displacement: Of the nodes, in pixels, shape ``(kH + 1, kW + 1, 2)``.
        values: One of each pixel, such as a component of stress, shape ``(H, W)``.
        limit: Colours run from ``-limit`` to ``limit``.
    """
    displacement, values = np.asarray(displacement), np.asarray(values)
    height, width = values.shape
    order = (len(displacement) - 1) // height
    rows, columns = np.meshgrid(*(np.arange(n) / order for n in displacement.shape[:2]), indexing="ij")
    place = np.stack([columns, height - rows], -1) + displacement
    row, column = loop(order, order).T  # around a pixel, bent sides included
    corner = np.indices((height, width)).reshape(2, -1, 1) * order
    patches = PolyCollection(list(place[corner[0] + row, corner[1] + column]), cmap="RdBu_r", edgecolors="face")
    patches.set_array(values.ravel())
    patches.set_clim(-limit, limit)
    axes.add_collection(patches)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return patches


def save_simulation_figure(
    design: Any, result: Any, path: Path, *, index: int = 0, load_cases: Sequence[str], component: str = "yy"
) -> None:
    """Writes a design, its deformed mesh at the last solved strain of the first load case, and all its curves.

    Args:
        design: Shape ``(H, W)``.
        result: What ``simulate`` returned with fields, for a pixel size of 1.
        path: File to write, ending in ``.png``; its folder is made if need be.
        index: Which design of the result.
        load_cases: Names of the result's load cases.
        component: Of the first Piola-Kirchhoff stress, ``"xx"``, ``"xy"``, ``"yx"`` or ``"yy"``.
    """
    strains, displacement, stress, limit = _fields(result, index, 0, component)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        left.imshow(np.asarray(design), cmap="gray_r", vmin=0, vmax=1.15)
        left.set_axis_off()
        left.set_title("design, stiff phase dark")
        patches = draw_deformed(middle, displacement[-1], stress[-1], limit)
        _frame(middle, displacement, np.asarray(design).shape)
        middle.set_title(f"{load_cases[0].replace('_', ' ')}, strain {strains[-1]:.2g}")
        figure.colorbar(patches, ax=middle, shrink=0.8, label=f"$P_{{{component}}}$")
        for case, name in enumerate(load_cases):
            strain, curve = (np.asarray(values) for values in (result.strain[case], result.stress[index, case]))
            right.plot([0, *strain], [0, *curve], marker="o", markersize=3, label=name.replace("_", " "))
        right.set(xlabel="nominal strain", ylabel="nominal stress")
        right.legend(frameon=False, fontsize=7)
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)


def save_path_animation(
    result: Any, path: Path, *, index: int = 0, load_case: int = 0, component: str = "yy", milliseconds: int = 120
) -> None:
    """Writes the deformed mesh of every solved strain, one after another and back, as a GIF.

    Args:
        result: What ``simulate`` returned with fields, for a pixel size of 1.
        path: File to write, ending in ``.gif``; its folder is made if need be.
        index: Which design of the result.
        load_case: Which load case of the result.
        component: Of the first Piola-Kirchhoff stress.
        milliseconds: Time of a frame.
    """
    _, displacement, stress, limit = _fields(result, index, load_case, component)
    frames = []
    for step in range(len(stress)):
        figure = Figure(figsize=(3, 3), layout="constrained")
        axes = figure.subplots()
        draw_deformed(axes, displacement[step], stress[step], limit)
        _frame(axes, displacement, stress.shape[1:])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    film = frames + frames[-2:0:-1]
    with atomic_write(path) as unfinished:
        film[0].save(unfinished, "GIF", save_all=True, append_images=film[1:], duration=milliseconds, loop=0)


def _fields(
    result: Any, index: int, load_case: int, component: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Solved strains, displacements and stresses of a path, and the range of colours."""
    if result.displacement is None:
        raise ValueError("result must have fields: simulate with return_fields=True")
    if component not in ("xx", "xy", "yx", "yy"):
        raise ValueError(f"component must be 'xx', 'xy', 'yx' or 'yy', got {component!r}")
    i, j = ("xy".index(letter) for letter in component)
    displacement = np.asarray(result.displacement[index, load_case])
    stress = np.asarray(result.pixel_stress[index, load_case][..., i, j])
    solved = np.isfinite(stress).all((1, 2))
    if not solved.any():
        raise ValueError(f"result must have a solved strain of design {index}, got none")
    strain, displacement, stress = np.asarray(result.strain[load_case])[solved], displacement[solved], stress[solved]
    return strain, displacement, stress, float(np.quantile(np.abs(stress), 0.99)) or 1.0


def _frame(axes: Axes, displacement: np.ndarray, size: tuple[int, ...]) -> None:
    """The same frame for all states of a path."""
    reach = np.abs(displacement).max((0, 1, 2)) + 0.5
    axes.set(xlim=(-reach[0], size[1] + reach[0]), ylim=(-reach[1], size[0] + reach[1]))
