"""Can designs be verified for these targets? What cannot be verified is refused before any simulation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mechdiffusers.evaluation.inverse_design.response import as_array, response_error
from mechdiffusers.evaluation.inverse_design.retrieval import stored_designs, stored_responses
from mechdiffusers.mechanics.load_cases import load_case
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.microstructures import response_meaning
from mechdiffusers.models.response_encoder import difference_of_meanings

__all__ = ["check_binary", "checked_count", "checked_meaning", "checked_names", "checked_targets"]

_MEANING = {"quantity", "load_cases", "strains", "element_order", "pixel_size", "material"}
_MATERIAL = {"law", "young_soft", "young_stiff", "poisson"}


def checked_targets(
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


def checked_count(num: int, name: str = "num_designs", least: int = 1) -> int:
    """``num``, if it is an integer of at least ``least``, else a ``ValueError`` that names the argument."""
    if isinstance(num, bool) or not isinstance(num, (int, np.integer)) or num < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {num!r}")
    return int(num)
