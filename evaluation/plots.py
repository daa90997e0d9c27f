"""Pictures of designs and of how their statistics compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation.statistics import two_point_correlation

__all__ = ["save_image_grid", "save_statistics_figure"]


def save_image_grid(designs: np.ndarray, path: Path, *, columns: int = 8, zoom: int = 3) -> None:
    """Writes designs side by side as a picture, the stiff phase dark.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1].
        path: File to write, ending in ``.png``; its folder is made if need be.
        columns: Designs in a row.
        zoom: Pixels of the picture along a side of a pixel of a design.
    """
    num, height, width = designs.shape
    rows = -(-num // columns)
    margin = 2
    canvas = np.ones((rows * (height + margin) + margin, columns * (width + margin) + margin), dtype=np.float32)
    for i, design in enumerate(designs):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        canvas[top : top + height, left : left + width] = 0.9 - 0.8 * design
    picture = Image.fromarray(np.rint(np.kron(canvas, np.ones((zoom, zoom))) * 255).astype(np.uint8))
    with atomic_write(path) as unfinished:
        picture.save(unfinished, format="PNG")


def save_statistics_figure(sets: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes the volume-fraction distributions and mean two-point correlations of several sets of designs.

    Args:
        sets: Name and designs, shape ``(B, H, W)``, in [0, 1]; the first is the reference, drawn as a filled area.
        path: File to write, ending in ``.png``; its folder is made if need be.
    """
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        fractions, correlations = figure.subplots(1, 2)
        bins = np.linspace(0, 1, 41)
        for i, (name, designs) in enumerate(sets.items()):
            color = "0.75" if i == 0 else f"C{i - 1}"
            histogram, _ = np.histogram(designs.mean((1, 2)), bins, density=True)
            fractions.stairs(histogram, bins, label=name, color=color, fill=i == 0)
            lags = two_point_correlation(designs).mean(0)[0, : designs.shape[2] // 2 + 1]
            correlations.plot(lags, label=name, color=color, linewidth=6 if i == 0 else 1.5, zorder=i)
        fractions.set(xlabel="volume fraction of the stiff phase", ylabel="probability density")
        correlations.set(xlabel="lag along x in pixels", ylabel="two-point correlation $S_2$")
        correlations.legend(frameon=False)
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)
