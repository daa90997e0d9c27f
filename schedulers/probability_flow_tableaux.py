r"""Explicit Runge-Kutta methods as data, and the weights of the Adams-Bashforth method in log-SNR.

Both are for equations :math:`dy / d\varsigma = f` with :math:`\varsigma = e^{-\lambda / 2}`. This file travels inside
checkpoints: it imports numpy alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["TABLEAUX", "Tableau", "adams_weights", "noise_level"]


class Tableau(NamedTuple):
    """Explicit Runge-Kutta method (Butcher 2016, section 23).

    Args:
        stages: For each stage the weights of the slopes before it; their sum is how far into the step it lies.
        weights: Weights of all slopes at the end of the step.
        error: These less the weights of the embedded method of lower order, where there is one.
    """

    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...] = ()


TABLEAUX: Mapping[str, Tableau] = {
    "euler": Tableau(((),), (1.0,)),
    "heun": Tableau(((), (1.0,)), (1 / 2, 1 / 2)),
    "rk4": Tableau(((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def adams_weights(known: np.ndarray, start: float, end: float) -> list[float]:
    r"""Integrals over :math:`\varsigma` of the Lagrange polynomials in log-SNR through the known slopes."""
    nodes, shares = np.polynomial.legendre.leggauss(16)
    log_snr = (start + end) / 2 + (end - start) / 2 * nodes
    measure = -np.exp(-log_snr / 2) / 2 * (end - start) / 2 * shares  # d varsigma / d lambda
    weights = []
    for i, own in enumerate(known):
        others = np.delete(known, i)
        weights.append(float((measure * np.prod((log_snr[:, None] - others) / (own - others), axis=1)).sum()))
    return weights


def noise_level(log_snr: Any) -> float:
    r""":math:`\varsigma = \sigma / \alpha`."""
    return float(np.exp(-log_snr / 2))
