r"""Selects the designs whose curves have the wanted shape, whatever their height: these are worth refining.

A few pixels can change how stiff a design is in each load case, but hardly the shape of its curves. The shape error of
a curve :math:`y` is what remains of its error when it is scaled by the best factor,

.. math:: \min_{s \ge 0} \|s \, y - y^*\|_2 / \|y^*\|_2,

and that of a design is the mean over load cases. First-order elements predict it well: they are too stiff, but by
nearly the same factor all along a curve.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.evaluation.inverse_design.checks import checked_count, checked_simulator, checked_targets
from mechdiffusers.evaluation.inverse_design.response import as_array, response_error
from mechdiffusers.mechanics import ResponseSpec, Simulator

__all__ = ["curve_shape_error", "nearest_in_curve_shape"]


def curve_shape_error(response: np.ndarray, target: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """Relative error of responses after each load case is scaled by its best factor.

    Args:
        response: Shape ``(B, L, S)``, NaN where not solved.
        target: Shape ``(B, L, S)``, or ``(L, S)`` for one target of all; NaN where unspecified.
        signed: Whether the response may be negative, as its specification says.

    Returns:
        Shape ``(B,)``, at most the :func:`.response_error`, NaN where that is.

    Raises:
        ValueError: As :func:`.response_error` does.

    Example:
        >>> float(curve_shape_error(np.full((1, 2, 3), 7.0), np.ones((2, 3)))[0])
        0.0
    """
    found, wanted = as_array(response, "response"), as_array(target, "target")
    response_error(found, wanted)  # refuses what does not fit
    both, square = (np.where(np.isnan(wanted), 0.0, found * other).sum(-1, keepdims=True) for other in (wanted, found))
    factor = np.divide(both, square, out=np.ones_like(square), where=square != 0)
    return response_error(found * np.where(factor < 0, 0.0, factor), wanted, signed=signed)  # NaN stays


def nearest_in_curve_shape(
    designs: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    spec: ResponseSpec,
    num_designs: int = 2,
    *,
    simulator: Simulator | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> np.ndarray | Tensor:
    """Chooses the designs whose curves are nearest in shape to a target.

    Of equal shapes, as all are where a target gives one point for each load case, the nearest in height come first.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1]; with T targets, B / T for each, those of a target neighbours.
        target: Shape ``(T, L, S)``, or ``(L, S)`` for one; NaN where unspecified.
        spec: Of the response, as :func:`.verify` takes it.
        num_designs: How many to choose for each target.
        simulator: As :func:`.verify` takes it; by default our solver with first-order elements.
        device: Where our solver computes; by default on the CPU.
        progress: Whether it shows a progress bar.

    Returns:
        Shape ``(T * num_designs, H, W)``, of the kind of ``designs``; those of a target are neighbours, the nearest
        first. A design that is not solved comes last.

    Raises:
        ValueError: If the designs do not divide among the targets, the target does not fit ``spec``, or
            ``num_designs`` is no integer from 1 to the designs of a target.

    Example:
        >>> few = nearest_in_curve_shape(designs, targets, spec, 2)  # doctest: +SKIP
        >>> refined = refine(few, targets, spec, pipe.predict_response)  # doctest: +SKIP
    """
    array = as_array(designs, "designs")
    wanted = checked_targets(target, spec, array.shape)
    simulate = checked_simulator(simulator, spec, element_order=1, device=device, progress=progress)
    per_target = len(array) // len(wanted)
    if checked_count(num_designs) > per_target:
        raise ValueError(f"num_designs must be at most the {per_target} designs of a target, got {num_designs}")
    response = simulate(array)
    asked = np.repeat(wanted, per_target, axis=0)
    errors = [
        measure(response, asked, signed=spec.signed).reshape(len(wanted), per_target)
        for measure in (response_error, curve_shape_error)
    ]
    order = np.lexsort([errors[0], errors[1].round(12)], axis=1)[:, :num_designs]  # NaN comes last
    given = designs if isinstance(designs, Tensor) else np.asarray(designs)
    return given[(order + per_target * np.arange(len(wanted))[:, None]).ravel()]
