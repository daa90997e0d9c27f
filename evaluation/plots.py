"""Pictures of designs and of how their statistics compare."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation.statistics import two_point_correlation

if TYPE_CHECKING:
    from mechdiffusers.evaluation.verify import VerificationReport

__all__ = ["save_image_grid", "save_statistics_figure", "save_verification_figure"]

#: Designs that a picture of a target shows, the best ones.
_SHOWN = 8


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


def save_verification_figure(report: VerificationReport, path: Path, *, index: int = 0, name: str = "") -> None:
    """Writes the best designs for a target with their errors, and their curves beside the target's.

    If the report has a retrieval, the nearest training design stands beside them.

    Args:
        report: A verification.
        path: File to write, ending in ``.png``; its folder is made if need be.
        index: Which target.
        name: Of the target, for the title.
    """
    per_target = len(report.designs) // len(report.target)
    rows = slice(index * per_target, (index + 1) * per_target)
    designs, response, error, rank = (
        np.asarray(values[rows]) for values in (report.designs, report.response, report.error, report.rank)
    )
    best = np.argsort(rank)[:_SHOWN]
    cases, strains = report.meaning["load_cases"], np.asarray(report.meaning["strains"])
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=[1, 2])
        top, bottom = halves
        outside = report.reach is not None and report.reach.out_of_range[index]
        remark = ", outside what the training data can reach" if outside else ""
        says = f"has an error of {error[best[0]]:.2%}" if np.isfinite(error[best[0]]) else "is not solved"
        figure.suptitle(f"{name}: best of {per_target} {says}{remark}".lstrip(": "), parse_math=False)
        shown = [(designs[i], f"{error[i]:.2%}" if np.isfinite(error[i]) else "not solved", "black") for i in best]
        if report.retrieval is not None:
            shown.append((report.retrieval.designs[index, 0], f"known: {report.retrieval.error[index, 0]:.2%}", "C1"))
        for axes, (design, says, color) in zip(np.atleast_1d(top.subplots(1, len(shown))), shown, strict=True):
            axes.imshow(design, cmap="gray_r", vmin=0, vmax=1.15)
            axes.set_title(says, fontsize=8, color=color)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=color)
        for case, axes in enumerate(np.atleast_1d(bottom.subplots(1, len(cases)))):
            if len(best) > 1:
                axes.plot(strains[case], response[best[1:], case].T, color="0.7", linewidth=0.8)
                axes.lines[0].set_label("other designs")
            axes.plot(strains[case], response[best[0], case], "C0", linewidth=1.8, label="best design")
            if report.retrieval is not None:
                nearest = report.retrieval.response[index, 0, case]
                axes.plot(strains[case], nearest, "C1--", linewidth=1, label="known: the nearest training design")
            axes.plot(strains[case], np.asarray(report.target[index][case]), "ko", markersize=4, label="target")
            axes.set(xlabel="nominal strain", title=cases[case].replace("_", " "), ylim=(0, None))
        axes = figure.axes[-len(cases)]
        units = report.meaning.get("units")  # which a meaning need not have
        label = report.meaning["quantity"] + (f" ({units})" if units else "")
        axes.set_ylabel(textwrap.fill(label, 32))
        axes.legend(frameon=False, fontsize=7)
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)
