"""Verifies designs: their response by finite elements beside the target, and what else is to be known of them.

Load cases, strains and the settings of our solver come from the specification of the response, which travels with the
dataset and the checkpoint. Nothing is chosen here, so errors of different designs can be compared. A user's own solver
is a function of designs, ``simulator``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.atomic_file import checked_file_names
from mechdiffusers.evaluation.inverse_design.checks import (
    check_binary,
    checked_simulator,
    checked_targets,
)
from mechdiffusers.evaluation.inverse_design.report import VerificationReport
from mechdiffusers.evaluation.inverse_design.response import as_array, response_error
from mechdiffusers.evaluation.inverse_design.retrieval import nearest_training_designs, stored_designs, stored_responses
from mechdiffusers.evaluation.inverse_design.target_range import TargetRange
from mechdiffusers.evaluation.novelty import diversity, novelty, stiff_connectivity
from mechdiffusers.mechanics import ResponseSpec, Simulator

__all__ = ["verify"]


def verify(
    designs: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    spec: ResponseSpec,
    *,
    simulator: Simulator | None = None,
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
        target: Shape ``(T, L, S)``, or ``(L, S)`` for one; NaN where unspecified.
        spec: Of the response, such as ``ResponseSpec.of(pipe)`` or ``ResponseSpec.of(dataset)``.
        simulator: Takes designs (B, H, W) and returns their response (B, L, S), NaN where not solved; by default our
            solver, with the settings of ``spec``.
        dataset: The training data, for novelty and for retrieval, the baseline of as many stored designs.
        heldout: Designs kept from training, likewise: with them an :class:`OutOfRangeWarning` says which targets lie
            outside what the training data can reach.
        names: Of the targets, for that warning, as :meth:`VerificationReport.save` has them; by default their numbers.
        binary: Whether the family of designs is binary; then so must these be.
        device: Where our solver computes; by default on the CPU.
        progress: Whether it shows a progress bar.

    Returns:
        The report. A design that the solver cannot follow to the end is kept and flagged; where it fails at a strain
        that the target gives, it has no error and is ranked last.

    Raises:
        ValueError: If the designs are not binary where they should be, or do not divide among the targets; if the
            target does not fit ``spec``, or the dataset has another, its designs are of another size or too few, or
            if there is no simulator. All of that is found before anything is simulated.

    Example:
        >>> report = verify(designs, target, ResponseSpec.of(pipe))  # doctest: +SKIP
        >>> report.error.min(), report.save("runs/design")  # doctest: +SKIP
    """
    array = as_array(designs, "designs")
    wanted = checked_targets(target, spec, array.shape, dataset=dataset, heldout=heldout)
    simulate = checked_simulator(simulator, spec, device=device, progress=progress)
    if names is not None:
        names = checked_file_names(names, len(wanted), "target")
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
        reach = TargetRange(stored_responses(dataset), stored_responses(heldout), signed=spec.signed).check(
            wanted, names=names
        )

    response = simulate(array)
    error = response_error(response, np.repeat(wanted, per_target, axis=0), signed=spec.signed)
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
            spec, designs.detach().cpu(), torch.from_numpy(wanted), **found, retrieval=retrieval, reach=reach
        )
    return VerificationReport(spec, np.asarray(designs), wanted, **found, retrieval=retrieval, reach=reach)
