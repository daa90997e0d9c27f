"""What designs really do: their response by finite elements beside what was asked for, and what else is to be known.

A verification takes the element order, load cases, strains and material from the meaning of the response, which travels
with the dataset and the checkpoint: nothing is chosen here, so that errors of different designs can be compared.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation.novelty import diversity, novelty, stiff_connectivity
from mechdiffusers.evaluation.plots import save_verification_figure
from mechdiffusers.evaluation.response import (
    NearestDesigns,
    nearest_training_designs,
    response_error,
    stored_designs,
    stored_responses,
)
from mechdiffusers.evaluation.target_range import RangeCheck, TargetRange
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.microstructures import response_meaning
from mechdiffusers.microstructures.build_dataset.parts import simulated_response
from torch import Tensor

__all__ = ["VerificationReport", "verify"]

_MEANING = {"quantity", "load_cases", "strains", "element_order", "pixel_size", "material"}
_MATERIAL = {"law", "young_soft", "young_stiff", "poisson"}


@dataclass
class VerificationReport:
    """B designs for T targets, those of a target neighbours; numpy arrays, or tensors where the designs were one."""

    meaning: dict[str, Any]  #: of target and response
    designs: Any  #: shape (B, H, W)
    target: Any  #: shape (T, L, S), NaN where open
    response: Any  #: by finite elements, shape (B, L, S), NaN where not solved
    error: Any  #: see :func:`~mechdiffusers.evaluation.response_error`, shape (B,), NaN where not solved
    rank: Any  #: 1 the least error of the target, shape (B,); what is not solved comes last
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

    def to_dict(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Everything but the designs, as JSON holds it: ``None`` for NaN."""
        content = {
            "meaning": self.meaning,
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
            folder: Made if need be; files of an earlier report are replaced.
            names: Of the targets, which name the pictures too; by default ``target_0`` and so on.

        Raises:
            ValueError: If there is not one name for each target, fit for a file.
        """
        chosen = [f"target_{index}" for index in range(len(self.target))] if names is None else list(names)
        if len(set(chosen)) != len(self.target) or any(not name or Path(name).name != name for name in chosen):
            raise ValueError(f"names must be {len(self.target)} different names of files, got {chosen!r}")
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


def verify(
    designs: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    meaning: Mapping[str, Any],
    *,
    dataset: Any = None,
    heldout: Any = None,
    binary: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> VerificationReport:
    """Simulates designs and compares them with what was asked for.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1]; with T targets, B / T designs for each, those of a target neighbours,
            as a pipeline gives them.
        target: Shape ``(T, L, S)``, or ``(L, S)`` for one; NaN where open.
        meaning: What the response means, as ``pipe.response_encoder.config.meaning`` or
            :func:`mechdiffusers.response_meaning` has it.
        dataset: The training data, for novelty and for retrieval, the baseline of as many stored designs.
        heldout: Designs kept from training, likewise: with them an :class:`OutOfRangeWarning` says which targets lie
            outside what the training data can reach.
        binary: Whether the family of designs is binary; then so must these be.
        device: Where to simulate; by default on the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The report. A design that the solver cannot follow is kept, flagged and ranked last.

    Raises:
        ValueError: If the designs are not binary where they should be, or do not divide among the targets; if the
            target does not fit the meaning, the meaning is not complete, or the dataset's responses mean another thing.

    Example:
        >>> report = verify(designs, target, pipe.response_encoder.config.meaning)  # doctest: +SKIP
        >>> report.error.min(), report.save("runs/design")  # doctest: +SKIP
    """
    meaning = checked_meaning(meaning)
    wanted = np.asarray(target, dtype=np.float64)
    wanted = wanted[None] if wanted.ndim == 2 else wanted
    shape = np.shape(meaning["strains"])
    if wanted.ndim != 3 or wanted.shape[1:] != shape or not len(wanted):
        raise ValueError(
            f"target must have shape (T, {shape[0]}, {shape[1]}): the load cases {meaning['load_cases']} at {shape[1]} "
            f"strains each; got {np.shape(target)}"
        )
    array = np.asarray(designs.detach().cpu() if isinstance(designs, Tensor) else designs, dtype=np.float64)
    if array.ndim != 3 or not array.size or len(array) % len(wanted):
        raise ValueError(
            f"designs must have shape (B, H, W), as many for each of {len(wanted)} targets, got {array.shape}"
        )
    if binary and not ((array == 0) | (array == 1)).all():
        raise ValueError(
            "designs must be 0 or 1 everywhere, as their family is, got values in between: np.rint(designs) makes them "
            "so; binary=False is for a family of grey designs"
        )
    for name, rows in (("dataset", dataset), ("heldout", heldout)):
        if rows is not None and any(response_meaning(rows)[key] != meaning[key] for key in _MEANING):
            raise ValueError(f"{name} must have responses of the meaning of the target, got another meaning")
    if heldout is not None and dataset is None:
        raise ValueError("heldout must come with the training data, got no dataset")
    per_target = len(array) // len(wanted)
    each = np.repeat(wanted, per_target, axis=0)
    response_error(each, each)  # an unfit target is refused before hours of simulation

    reach = None
    if heldout is not None:
        reach = TargetRange(stored_responses(dataset), stored_responses(heldout)).check(wanted)
    response = simulated_response(array, meaning, device=device, progress=progress)
    error = response_error(response, each)
    groups = array.reshape(len(wanted), per_target, *array.shape[1:])
    order = np.argsort(error.reshape(len(wanted), per_target), axis=1, kind="stable")  # NaN comes last
    found = {
        "response": response,
        "error": error,
        "rank": (np.argsort(order, axis=1) + 1).ravel(),
        "solved": np.isfinite(response).all((1, 2)),
        "stiff_connectivity": stiff_connectivity(array),
        "diversity": np.array([diversity(group) if per_target > 1 else math.nan for group in groups]),
    }
    if dataset is not None:
        found["novelty"] = novelty(array, stored_designs(dataset))
    if isinstance(designs, Tensor):
        found = {name: torch.from_numpy(values) for name, values in found.items()}
        report = VerificationReport(meaning, designs, torch.from_numpy(wanted), **found)
    else:
        report = VerificationReport(meaning, designs, wanted, **found)
    if dataset is not None:
        report.retrieval, report.reach = nearest_training_designs(wanted, dataset, per_target), reach
    return report


def checked_meaning(meaning: Mapping[str, Any] | None) -> dict[str, Any]:
    """The meaning of a response, if it says all that a simulation needs, else a ``ValueError``."""
    if not isinstance(meaning, Mapping) or _MEANING - meaning.keys():
        have = sorted(meaning) if isinstance(meaning, Mapping) else meaning
        raise ValueError(f"meaning must have {sorted(_MEANING)}, as response_meaning(dataset) gives it, got {have!r}")
    if _MATERIAL - meaning["material"].keys() or meaning["material"]["law"] != CompressibleNeoHookean.__name__:
        raise ValueError(
            f"meaning must have a material with {sorted(_MATERIAL)}, its law {CompressibleNeoHookean.__name__}, got "
            f"{meaning['material']!r}"
        )
    if meaning["quantity"] not in ("stress", "energy"):
        raise ValueError(f"meaning must have the quantity 'stress' or 'energy', got {meaning['quantity']!r}")
    return dict(meaning)


def _plain(values: Any) -> Any:
    """Numbers as JSON holds them, ``None`` for NaN."""
    if isinstance(values, (np.ndarray, Tensor, list)):
        return [_plain(value) for value in (values if isinstance(values, list) else values.tolist())]
    return None if isinstance(values, float) and not math.isfinite(values) else values
