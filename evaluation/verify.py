"""What designs really do: their response by finite elements beside what was asked for, and what else is to be known.

A verification takes the element order, load cases, strains and material from the meaning of the response, which travels
with the dataset and the checkpoint: nothing is chosen here, so that errors of different designs can be compared.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.atomic_file import atomic_write
from mechdiffusers.evaluation.novelty import diversity, novelty, stiff_connectivity
from mechdiffusers.evaluation.plots import save_verification_figure
from mechdiffusers.evaluation.response import (
    NearestDesigns,
    as_array,
    nearest_training_designs,
    response_error,
    stored_designs,
    stored_responses,
)
from mechdiffusers.evaluation.target_range import RangeCheck, TargetRange
from mechdiffusers.mechanics.load_cases import load_case
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.microstructures import response_meaning
from mechdiffusers.microstructures.build_dataset.parts import simulated_response
from mechdiffusers.models.response_encoder import difference_of_meanings

__all__ = ["VerificationReport", "verify"]

_MEANING = {"quantity", "load_cases", "strains", "element_order", "pixel_size", "material"}
_MATERIAL = {"law", "young_soft", "young_stiff", "poisson"}


@dataclass
class VerificationReport:
    """B designs for T targets, those of a target neighbours; numpy arrays, or tensors on the CPU for a tensor."""

    meaning: dict[str, Any]  #: of target and response
    designs: Any  #: shape (B, H, W)
    target: Any  #: shape (T, L, S), NaN where open
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
            folder: Made if need be; files of an earlier report are replaced, but pictures of targets that this one has
                not are left.
            names: Of the targets, which name the pictures too; by default ``target_0`` and so on.

        Raises:
            ValueError: If there is not one name for each target, fit for a file.
        """
        default = [f"target_{index}" for index in range(len(self.target))]
        chosen = default if names is None else checked_names(names, len(self.target))
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
    names: Sequence[str] | None = None,
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
        names: Of the targets, for that warning, as :meth:`VerificationReport.save` has them; by default their numbers.
        binary: Whether the family of designs is binary; then so must these be.
        device: Where to simulate; by default on the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The report. A design that the solver cannot follow to the end is kept and flagged; where it fails at a strain
        that the target gives, it has no error and is ranked last.

    Raises:
        ValueError: If the designs are not binary where they should be, or do not divide among the targets; if the
            target does not fit the meaning, the meaning is not complete, or the dataset's responses mean another thing,
            its designs are of another size or too few. All of that is found before anything is simulated.

    Example:
        >>> report = verify(designs, target, pipe.response_encoder.config.meaning)  # doctest: +SKIP
        >>> report.error.min(), report.save("runs/design")  # doctest: +SKIP
    """
    array = as_array(designs, "designs")
    meaning, wanted = checked_question(target, meaning, array.shape, dataset=dataset, heldout=heldout)
    if names is not None:
        names = checked_names(names, len(wanted))
    if binary:
        check_binary(array, "; binary=False is for a family of grey designs")
    per_target = len(array) // len(wanted)
    groups = array.reshape(len(wanted), per_target, *array.shape[1:])
    found: dict[str, Any] = {
        "stiff_connectivity": stiff_connectivity(array),
        "diversity": np.array([diversity(group) if per_target > 1 else math.nan for group in groups]),
    }
    retrieval = reach = None
    if dataset is not None:
        found["novelty"] = novelty(array, stored_designs(dataset))
        retrieval = nearest_training_designs(wanted, dataset, per_target)
    if heldout is not None:
        reach = TargetRange(stored_responses(dataset), stored_responses(heldout)).check(wanted, names=names)

    response = simulated_response(array, meaning, device=device, progress=progress)
    error = response_error(response, np.repeat(wanted, per_target, axis=0))
    order = np.argsort(error.reshape(len(wanted), per_target), axis=1, kind="stable")  # NaN comes last
    found |= {
        "response": response,
        "error": error,
        "rank": (np.argsort(order, axis=1) + 1).ravel(),
        "solved": np.isfinite(response).all((1, 2)),
    }
    if isinstance(designs, Tensor):
        found = {name: torch.from_numpy(values) for name, values in found.items()}
        return VerificationReport(
            meaning, designs.detach().cpu(), torch.from_numpy(wanted), **found, retrieval=retrieval, reach=reach
        )
    return VerificationReport(meaning, np.asarray(designs), wanted, **found, retrieval=retrieval, reach=reach)


def checked_question(
    target: np.ndarray | Tensor,
    meaning: Mapping[str, Any] | None,
    shape: Sequence[int],
    *,
    dataset: Any = None,
    heldout: Any = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Meaning and targets (T, L, S), if designs of ``shape`` (B, H, W) can be verified, else a ``ValueError``."""
    meaning = checked_meaning(meaning)
    wanted = as_array(target, "target")
    wanted = wanted[None] if wanted.ndim == 2 else wanted
    curves = np.shape(meaning["strains"])
    if wanted.ndim != 3 or wanted.shape[1:] != curves or not len(wanted):
        raise ValueError(
            f"target must have shape (T, {curves[0]}, {curves[1]}): the load cases {meaning['load_cases']} at "
            f"{curves[1]} strains each; got {np.shape(target)}"
        )
    if len(shape) != 3 or not math.prod(shape) or shape[0] % len(wanted):
        raise ValueError(
            f"designs must have shape (B, H, W), as many for each of {len(wanted)} targets, got {tuple(shape)}"
        )
    response_error(wanted, wanted)  # refuses an unfit target
    if (wanted < 0).any():
        raise ValueError(
            "target must be non-negative, since it belongs to magnitudes of strain, in compression too; got "
            f"{np.nanmin(wanted):g}"
        )
    for name, rows in (("dataset", dataset), ("heldout", heldout)):
        if rows is not None:
            found, asked = ({key: each.get(key) for key in _MEANING} for each in (response_meaning(rows), meaning))
            if (other := difference_of_meanings(found, asked)) is not None:
                raise ValueError(f"{name} must have responses of the meaning of the target, got {other}")
    if dataset is not None:
        stored, per_target = stored_responses(dataset), shape[0] // len(wanted)
        solved = min(int((np.isfinite(stored) | np.isnan(each)).all((1, 2)).sum()) for each in wanted)
        if solved < per_target:
            raise ValueError(
                f"dataset must have as many solved designs as there are for a target, {per_target}, got {solved}"
            )
        size = stored_designs(dataset.select([0])).shape[1:]
        if size != tuple(shape[1:]):
            raise ValueError(f"dataset must have designs of the size {tuple(shape[1:])} of the designs, got {size}")
    if heldout is not None:
        if dataset is None:
            raise ValueError("heldout must come with the training data, got no dataset")
        if (wanted <= 0).any():
            raise ValueError("target must be positive where given, for heldout to tell whether it is within reach")
    return meaning, wanted


def check_binary(designs: np.ndarray, otherwise: str = "") -> None:
    """Raises a ``ValueError`` unless designs are 0 or 1 everywhere, with what else there is to do."""
    other = designs[(designs != 0) & (designs != 1)]
    if other.size:
        rounded = np.rint(other)
        unfit = other[(rounded != 0) & (rounded != 1)]  # also NaN
        remedy = "" if unfit.size else f": np.rint(designs) makes them so{otherwise}"
        got = float((unfit if unfit.size else other)[0])
        raise ValueError(f"designs must be 0 or 1 everywhere, as their family is, got {got!r}{remedy}")


def checked_names(names: Sequence[str], num: int) -> list[str]:
    """As many different names as there are targets, fit for files, else a ``ValueError``."""
    chosen = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    fit = all(isinstance(name, str) and name and Path(name).name == name and "\0" not in name for name in chosen)
    if not fit or not len(set(chosen)) == len(chosen) == num or max(len(os.fsencode(name)) for name in chosen) > 200:
        raise ValueError(
            f"names must be {num} different names of files, one for each target, got {chosen!r}; 200 bytes are the most"
        )
    return chosen


def checked_meaning(meaning: Mapping[str, Any] | None) -> dict[str, Any]:
    """The meaning of a response, if it says all that a simulation needs, else a ``ValueError``."""
    if not isinstance(meaning, Mapping) or _MEANING - meaning.keys():
        have = sorted(meaning) if isinstance(meaning, Mapping) else meaning
        raise ValueError(f"meaning must have {sorted(_MEANING)}, as response_meaning(dataset) gives it, got {have!r}")
    material, law = meaning["material"], CompressibleNeoHookean.__name__
    if not isinstance(material, Mapping) or _MATERIAL - material.keys() or material["law"] != law:
        raise ValueError(f"meaning must have a material with {sorted(_MATERIAL)}, its law {law}, got {material!r}")
    if meaning["quantity"] not in ("stress", "energy"):
        raise ValueError(f"meaning must have the quantity 'stress' or 'energy', got {meaning['quantity']!r}")
    cases = meaning["load_cases"]
    try:
        strains = np.asarray(meaning["strains"], dtype=np.float64)
    except (TypeError, ValueError):
        strains = np.empty(0)
    if isinstance(cases, str) or not isinstance(cases, Sequence) or strains.ndim != 2 or len(strains) != len(cases):
        raise ValueError(
            f"meaning must have load cases, and strains of shape (L, S), a row for each, got {cases!r} and "
            f"{meaning['strains']!r}"
        )
    for case in cases:
        try:
            load_case(case)
        except ValueError as error:
            raise ValueError(f"meaning must have load cases that are known: {error}") from None
    if not strains.size or not np.isfinite(strains).all() or (np.diff(strains, prepend=0.0) <= 0).any():
        raise ValueError(f"meaning must have positive, finite and increasing strains, got {meaning['strains']!r}")
    if meaning["element_order"] not in (1, 2):
        raise ValueError(f"meaning must have the element_order 1 or 2, got {meaning['element_order']!r}")
    return {**meaning, "load_cases": list(cases), "strains": strains.tolist()}


def _plain(values: Any) -> Any:
    """Numbers as JSON holds them, ``None`` for NaN."""
    if isinstance(values, (np.ndarray, Tensor, list)):
        return [_plain(value) for value in (values if isinstance(values, list) else values.tolist())]
    return None if isinstance(values, float) and not math.isfinite(values) else values
