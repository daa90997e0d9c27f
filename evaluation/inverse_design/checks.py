"""Can designs be verified for these targets? What cannot be verified is refused before any simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mechdiffusers.evaluation.inverse_design.response import as_array, response_error
from mechdiffusers.evaluation.inverse_design.retrieval import stored_designs, stored_responses
from mechdiffusers.mechanics import ResponseSpec, Simulator

__all__ = ["check_binary", "checked_count", "checked_simulator", "checked_targets"]


def checked_targets(
    target: np.ndarray | Tensor,
    spec: ResponseSpec,
    shape: Sequence[int],
    *,
    dataset: Any = None,
    heldout: Any = None,
) -> np.ndarray:
    """Targets (T, L, S), if designs of ``shape`` (B, H, W) can be verified, else a ``ValueError``."""
    if not isinstance(spec, ResponseSpec):
        raise ValueError(f"spec must be a ResponseSpec, such as ResponseSpec.of(dataset), got {type(spec).__name__}")
    wanted = as_array(target, "target")
    wanted = wanted[None] if wanted.ndim == 2 else wanted
    num_cases, num_strains = spec.shape
    if wanted.ndim != 3 or wanted.shape[1:] != spec.shape or not len(wanted):
        raise ValueError(
            f"target must have shape (T, {num_cases}, {num_strains}): the load cases {list(spec.load_cases)} at "
            f"{num_strains} strains each; got {np.shape(target)}"
        )
    if len(shape) != 3 or not math.prod(shape) or shape[0] % len(wanted):
        raise ValueError(
            f"designs must have shape (B, H, W), as many for each of {len(wanted)} targets, got {tuple(shape)}"
        )
    response_error(wanted, wanted)  # refuses an unfit target
    if not spec.signed and (wanted < 0).any():
        raise ValueError(f"target must be non-negative, since its specification is unsigned, got {np.nanmin(wanted):g}")
    for name, rows in (("dataset", dataset), ("heldout", heldout)):
        if rows is not None and (difference := ResponseSpec.of(rows).difference(spec)) is not None:
            raise ValueError(f"{name} must have responses of the specification of the target, got {difference}")
    if dataset is not None:
        stored, per_target = stored_responses(dataset), shape[0] // len(wanted)
        solved = min(int((np.isfinite(stored) | np.isnan(each)).all((1, 2)).sum()) for each in wanted)
        if solved < per_target:
            raise ValueError(
                f"dataset must have as many solved designs as there are for a target, {per_target}, got {solved}: "
                "leave it out, or ask for fewer designs"
            )
        size = stored_designs(dataset.select([0])).shape[1:]
        if size != tuple(shape[1:]):
            raise ValueError(f"dataset must have designs of the size {tuple(shape[1:])} of the designs, got {size}")
    if heldout is not None and dataset is None:
        raise ValueError("heldout must come with the training data, got no dataset")
    return wanted


def checked_simulator(
    simulator: Simulator | None, spec: ResponseSpec, **options: Any
) -> Callable[[np.ndarray], np.ndarray]:
    """A simulator, ours with its options if there is none, whose response is checked each time that it is called."""
    if simulator is None:
        return spec.simulator(**options)
    if not callable(simulator):
        raise ValueError(f"simulator must be a function of designs (B, H, W), got {simulator!r}")

    def checked(designs: np.ndarray) -> np.ndarray:
        response = as_array(simulator(designs), "simulator")
        if response.shape != (len(designs), *spec.shape):
            raise ValueError(
                f"simulator must return the response of {len(designs)} designs, shape {(len(designs), *spec.shape)}, "
                f"got {response.shape}"
            )
        if np.isinf(response).any():
            raise ValueError("simulator must return a finite response, NaN where a design is not solved, got infinity")
        return response

    return checked


def check_binary(designs: np.ndarray, otherwise: str = "") -> None:
    """Raises a ``ValueError`` unless designs are 0 or 1 everywhere, with what else there is to do."""
    other = designs[(designs != 0) & (designs != 1)]
    if other.size:
        rounded = np.rint(other)
        unfit = other[(rounded != 0) & (rounded != 1)]  # also NaN
        remedy = "" if unfit.size else f": np.rint(designs) makes them so{otherwise}"
        got = float((unfit if unfit.size else other)[0])
        raise ValueError(f"designs must be 0 or 1 everywhere, as their family is, got {got!r}{remedy}")


def checked_count(num: int, name: str = "num_designs", least: int = 1) -> int:
    """``num``, if it is an integer of at least ``least``, else a ``ValueError`` that names the argument."""
    if isinstance(num, bool) or not isinstance(num, (int, np.integer)) or num < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {num!r}")
    return int(num)
