"""The report of a verification, as an object, a table, files and pictures."""

from __future__ import annotations

import csv
import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mechdiffusers.atomic_file import atomic_write, checked_file_names
from mechdiffusers.evaluation.inverse_design.retrieval import NearestDesigns
from mechdiffusers.evaluation.inverse_design.target_range import RangeCheck
from mechdiffusers.mechanics import ResponseSpec

__all__ = ["VerificationReport", "save_verification_figure"]

#: Designs that a picture of a target shows, the best ones.
_SHOWN = 8


@dataclass
class VerificationReport:
    """B designs for T targets, those of a target neighbours; numpy arrays, or tensors on the CPU for a tensor."""

    spec: ResponseSpec  #: of target and response
    designs: Any  #: shape (B, H, W)
    target: Any  #: shape (T, L, S), NaN where unspecified
    response: Any  #: by finite elements, shape (B, L, S), NaN where not solved
    error: Any  #: of :func:`.response_error`, shape (B,), NaN where not solved at a strain that the target gives
    rank: Any  #: 1 the least error of the target, shape (B,); what has no error comes last
    solved: Any  #: whether the solver followed all load cases to their end, bool, shape (B,)
    stiff_connectivity: Any  #: share of the stiff phase in its largest piece, shape (B,)
    diversity: Any  #: mean fraction of differing pixels within a target, shape (T,), NaN for single designs
    novelty: Any = None  #: least fraction of differing pixels to any training design, shape (B,)
    retrieval: NearestDesigns | None = None  #: as many training designs for each target, by their stored responses
    reach: RangeCheck | None = None  #: whether the targets lie within what the training data can reach

    def rows(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """A row a design: its target (its number, or its name), rank, error and what else is known of it."""
        per_target = len(self.designs) // len(self.target)
        rows = []
        for i, design in enumerate(np.asarray(self.designs)):
            target = i // per_target
            row = {
                "target": target if names is None else names[target],
                "design": i % per_target,
                "rank": int(self.rank[i]),
                "error": float(self.error[i]),
                "solved": bool(self.solved[i]),
                "volume_fraction": float(design.mean()),
                "stiff_connectivity": float(self.stiff_connectivity[i]),
            }
            rows.append(row if self.novelty is None else {**row, "novelty": float(self.novelty[i])})
        return rows

    def table(self, names: Sequence[str]) -> str:
        """A line a target: the best and the mean error, beside what retrieval has."""
        errors, solved = (np.asarray(values).reshape(len(names), -1) for values in (self.error, self.solved))
        lines = [f"{'target':24} {'best':>8} {'mean':>8} {'solved':>8} {'retrieval':>10} {'p in range':>11}"]
        for i, name in enumerate(names):
            known = errors[i][np.isfinite(errors[i])]
            best, mean = (f"{f(known):8.2%}" if known.size else f"{'-':>8}" for f in (np.min, np.mean))
            nearest = f"{self.retrieval.error[i, 0]:10.2%}" if self.retrieval is not None else f"{'-':>10}"
            p_value = math.nan if self.reach is None else self.reach.p_value[i]
            within = f"{p_value:11.2g}" if math.isfinite(p_value) else f"{'-':>11}"
            lines.append(f"{name[:24]:24} {best} {mean} {solved[i].sum():4d} of {solved[i].size:d} {nearest} {within}")
        return "\n".join(lines)

    def to_dict(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Everything but the designs, as JSON holds it: ``None`` for NaN."""
        content = {
            "spec": self.spec.to_dict(),
            "targets": _plain(self.target),
            "responses": _plain(self.response),
            "designs": [{key: _plain(value) for key, value in row.items()} for row in self.rows(names)],
            "diversity": _plain(self.diversity),
        }
        if self.reach is not None:
            content["reach"] = {name: _plain(values) for name, values in vars(self.reach).items()}
        if self.retrieval is not None:
            content["retrieval"] = {"error": _plain(self.retrieval.error), "row": _plain(self.retrieval.index)}
        return content

    def save(self, folder: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """Writes ``verification.csv``, ``verification.json``, ``designs.npy`` and a picture of each target.

        Args:
            folder: Made if need be; files of an earlier report are replaced, but pictures of targets that this one has
                not are left.
            names: Of the targets, which name the pictures too; by default ``target_0`` and so on.

        Raises:
            ValueError: If there is not one name for each target, fit for a file.
        """
        default = [f"target_{index}" for index in range(len(self.target))]
        chosen = default if names is None else checked_file_names(names, len(self.target), "target")
        path, rows = Path(folder), self.rows(chosen)
        with (
            atomic_write(path / "verification.csv") as table_file,
            atomic_write(path / "verification.json") as whole_file,
            atomic_write(path / "designs.npy") as designs_file,
        ):
            with table_file.open("w", newline="") as file:
                table = csv.DictWriter(file, fieldnames=list(rows[0]))
                table.writeheader()
                table.writerows(rows)
            whole_file.write_text(json.dumps(self.to_dict(chosen), indent=1) + "\n")
            np.save(designs_file, np.asarray(self.designs))
        for index, name in enumerate(chosen):
            save_verification_figure(self, path / f"{name}.png", index=index, name=name)


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
    cases, strains = report.spec.load_cases, np.asarray(report.spec.strains)
    mark = "s" if strains.shape[1] == 1 else ""  # a single point has no line
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
                axes.plot(strains[case], response[best[1:], case].T, mark, color="0.7", linewidth=0.8)
                axes.lines[0].set_label("other designs")
            axes.plot(strains[case], response[best[0], case], f"C0{mark}", linewidth=1.8, label="best design")
            if report.retrieval is not None:
                nearest = report.retrieval.response[index, 0, case]
                axes.plot(
                    strains[case], nearest, f"C1--{mark}", linewidth=1, label="known: the nearest training design"
                )
            axes.plot(strains[case], np.asarray(report.target[index][case]), "ko", markersize=4, label="target")
            axes.set(title=cases[case].replace("_", " "))
            axes.set(xticks=[]) if report.spec.is_scalar else axes.set_xlabel("nominal strain")
            if not report.spec.signed:
                axes.set_ylim(0, None)
        axes = figure.axes[-len(cases)]
        axes.set_ylabel(textwrap.fill(f"{report.spec.quantity} ({report.spec.units})", 32))
        axes.legend(frameon=False, fontsize=7)
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)


def _plain(values: Any) -> Any:
    """Numbers as JSON holds them, ``None`` for NaN."""
    if isinstance(values, (np.ndarray, Tensor, list)):
        return [_plain(value) for value in (values if isinstance(values, list) else values.tolist())]
    return None if isinstance(values, float) and not math.isfinite(values) else values
