r"""How far responses are from a target.

The error of a response :math:`y` is the mean over load cases of

.. math:: \|y - y^*\|_2 / \|y^*\|_2,

the norms along that case's strains, so that a soft load case counts as much as a stiff one. Entries that the target
:math:`y^*` leaves unspecified (NaN) are left out. A load case without any entry is left out as a whole.

A response that may be negative may also be zero or nearly zero, such as a coupling stiffness: no relative error of that
load case means anything. So if the response is signed, all load cases are measured against the root mean square of
their norms, as a tensor is against its Frobenius norm. So is a load case of an unsigned response whose target is zero.
If all of the target is zero, the error is in units of the response.
"""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_array", "error_scale", "response_error"]

#: The share of the other load cases' norms below which a target is zero.
_ZERO = 1e-6


@overload
def response_error(response: np.ndarray, target: np.ndarray, *, signed: bool = False) -> np.ndarray: ...
@overload
def response_error(response: Tensor, target: Tensor, *, signed: bool = False) -> Tensor: ...
def response_error(
    response: np.ndarray | Tensor, target: np.ndarray | Tensor, *, signed: bool = False
) -> np.ndarray | Tensor:
    """Relative error of responses, differentiable.

    Args:
        response: Shape ``(B, L, S)``, NaN where not solved.
        target: Shape ``(B, L, S)``, or ``(L, S)`` for one target of all; NaN where unspecified.
        signed: Whether the response may be negative, as its specification says.

    Returns:
        Shape ``(B,)``, float64, of the kind of ``response``; NaN where an entry that the target gives is not solved.

    Raises:
        ValueError: If the shapes do not fit, or a target is infinite or unspecified everywhere.

    Example:
        >>> float(response_error(np.full((1, 2, 3), 1.1), np.ones((2, 3)))[0])
        0.1000000000000000...
    """
    found, wanted = (
        (values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))).to(torch.float64)
        for values in (response, target)
    )
    if found.ndim != 3 or wanted.shape not in (found.shape, found.shape[1:]):
        raise ValueError(
            "target must have the shape (B, L, S) or (L, S) of the response (B, L, S), got "
            f"{tuple(wanted.shape)} for {tuple(found.shape)}"
        )
    given = ~wanted.isnan()
    cases = given.any(-1)
    if not cases.any(-1).all() or wanted.isinf().any():
        raise ValueError("target must be finite and given somewhere")
    distance = torch.linalg.vector_norm(torch.where(given, found - wanted, 0.0), dim=-1)
    relative = torch.where(cases, distance / error_scale(wanted, signed), 0.0)
    error = relative.sum(-1) / cases.sum(-1)
    return error if isinstance(response, Tensor) else error.numpy()


def error_scale(target: Tensor, signed: bool) -> Tensor:
    """What the distance from a target ``(*, L, S)`` is measured against in each load case, shape ``(*, L)``."""
    given = ~target.isnan()
    size = torch.linalg.vector_norm(torch.where(given, target, 0.0), dim=-1)
    typical = (size.square().sum(-1, keepdim=True) / given.any(-1).sum(-1, keepdim=True).clamp(min=1)).sqrt()
    typical = torch.where(typical > 0, typical, 1.0).expand_as(size)
    return typical if signed else torch.where(size > _ZERO * typical, size, typical)


def as_array(values: np.ndarray | Tensor, name: str = "values") -> np.ndarray:
    """Numbers on the CPU, float64, without what a tensor knows of its gradient; ``name`` is whose error it would be."""
    try:
        if isinstance(values, Tensor) and not values.is_complex():  # which may be of a kind that numpy has not
            return values.detach().to("cpu", torch.float64).numpy()
        return np.asarray(values).astype(np.float64, casting="same_kind" if np.iscomplexobj(values) else "unsafe")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"{name} must be a tensor, an array or lists of real numbers, as long as each other, got "
            f"{type(values).__name__}"
        ) from None
