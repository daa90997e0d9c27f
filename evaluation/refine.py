r"""Designs brought nearer to their targets by simulating one after the other.

A predictor that is wrong by some per cent of a response is wrong by nearly the same for a design that differs in a few
pixels. So what is known of a design :math:`x` by finite elements, :math:`f(x)`, corrects the prediction :math:`p` of
its neighbours,

.. math:: f(x') \approx f(x) + p(x') - p(x),

which is the response correction of space mapping (Bandler et al. 2004, on output space mapping). With several designs
known, what the prediction lacks between them is interpolated by ordinary kriging (Cressie 1993, section 3.2), whose
variogram is the number of pixels in which two designs differ. Among many neighbours the one that should be nearest to
the target is simulated, and is the design to go on from if it is nearer indeed.

A neighbour has the other phase in some pixels at the interface, which is no longer in the end than that of the design
given: without that, designs grow rough, which they are not likely to be. The pixels are chosen as in matching pursuit
(Mallat and Zhang 1993), though each with the coefficient one: one after the other, the pixel whose own change of the
prediction takes most of what is left to the target.

References:
    | Space mapping: the state of the art (Bandler et al., 2004)
    | https://doi.org/10.1109/TMTT.2003.820904
    | Statistics for Spatial Data (Cressie, 1993)
    | https://doi.org/10.1002/9781119115151
    | Matching pursuits with time-frequency dictionaries (Mallat & Zhang, 1993)
    | https://doi.org/10.1109/78.258082
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mechdiffusers.evaluation.design import checked_count
from mechdiffusers.evaluation.response import as_array, response_error
from mechdiffusers.evaluation.verify import check_binary, checked_question
from mechdiffusers.microstructures.build_dataset.parts import simulated_response
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["RefinedDesigns", "refine"]

#: Predictor of responses ``(B, L, S)`` for designs ``(B, H, W)``, as ``pipe.predict_response``.
Predictor = Callable[[np.ndarray], "np.ndarray | Tensor"]

#: Times that neighbours of neighbours are looked at before one is simulated.
_SEARCHES = 2
#: Pixels whose own change is predicted, and sets of them that are predicted together, in each.
_PIXELS, _SETS = 128, 48
#: The most pixels of a set, and the share of the pixels that it may choose from, for the sets to differ.
_LARGEST, _SHARE = 8, 0.4


@dataclass
class RefinedDesigns:
    """B designs, numpy arrays, or tensors on the CPU for a tensor."""

    designs: Any  #: the nearest of each chain, shape (B, H, W)
    error: Any  #: of the nearest so far, before and after each round, shape (B, num_rounds + 1), NaN where not solved


def refine(
    designs: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    meaning: Mapping[str, Any],
    predict: Predictor,
    *,
    response: np.ndarray | Tensor | None = None,
    num_rounds: int = 7,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> RefinedDesigns:
    """Changes a few pixels of binary designs, so that their response by finite elements comes nearer to the target.

    Every design is a chain of its own, of ``num_rounds + 1`` simulations at the most.

    Args:
        designs: Shape ``(B, H, W)``, 0 or 1; with T targets, B / T for each, those of a target neighbours.
        target: Shape ``(T, L, S)``, or ``(L, S)`` for one; NaN where open.
        meaning: Of the response, as :func:`.verify` takes it.
        predict: Predicts responses of designs, as ``pipe.predict_response`` does.
        response: Of the designs by finite elements where that is known, as ``report.response`` of :func:`.verify`,
            shape ``(B, L, S)``; they are not simulated again then.
        num_rounds: Simulations of each design after the first, at least 1.
        seed: Of all random choices; those of a design do not depend on the designs after it.
        device: Where to simulate; by default on the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The designs and how their errors fell. One that the solver cannot follow stays as it is.

    Raises:
        ValueError: If the designs are not binary or do not divide among the targets, if the target does not fit the
            meaning or the response the designs, or ``num_rounds`` is no integer of at least 1.

    Example:
        >>> refined = refine(designs, target, meaning, pipe.predict_response)  # doctest: +SKIP
        >>> refined.error[:, [0, -1]].mean(0)  # doctest: +SKIP
    """
    array = as_array(designs)
    meaning, targets = checked_question(target, meaning, array.shape)
    check_binary(array)
    num_rounds = checked_count(num_rounds, "num_rounds")
    wanted = np.repeat(targets, len(array) // len(targets), axis=0)

    def simulated(chosen: np.ndarray) -> np.ndarray:
        return simulated_response(chosen, meaning, device=device)

    found = simulated(array) if response is None else as_array(response)
    if found.shape != (len(array), *wanted.shape[1:]):
        raise ValueError(f"response must have shape {(len(array), *wanted.shape[1:])}, got {found.shape}")
    rngs = (np.random.default_rng([seed, i]) for i in range(len(array)))
    chains = [_Chain(*each) for each in zip(array.copy(), found, wanted, rngs, strict=True)]
    errors = [[chain.error for chain in chains]]
    for _ in tqdm(range(num_rounds), desc="refine", unit="round", disable=not progress):
        tried = [(chain, near) for chain in chains if (near := chain.neighbour(predict)) is not None]
        if tried:
            answers = simulated(np.stack([design for _, design in tried]))
            for (chain, design), answer in zip(tried, answers, strict=True):
                chain.learn(design, answer)
        errors.append([chain.error for chain in chains])
    refined, error = np.stack([chain.design for chain in chains]), np.array(errors).T
    if isinstance(designs, Tensor):
        return RefinedDesigns(torch.from_numpy(refined).to(designs.dtype), torch.from_numpy(error))
    return RefinedDesigns(refined.astype(designs.dtype), error)


@dataclass
class _Chain:
    """The nearest design so far of those that were simulated one after the other, and what they taught."""

    design: np.ndarray  #: shape (H, W)
    response: np.ndarray  #: by finite elements, shape (L, S)
    wanted: np.ndarray  #: the target, same shape, NaN where open
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.error = self._error(self.response)
        self._known = {self.design.tobytes()}
        self._solved = [(self.design, self.response)]
        self._longest = _interface_length(self.design)

    def neighbour(self, predict: Predictor) -> np.ndarray | None:
        """The design near by that should be nearest to the target and was not simulated; ``None`` if there is none."""
        if not np.isfinite(self.error):
            return None
        known, responses = (np.stack(each) for each in zip(*self._solved, strict=True))
        lacking = responses - _predicted(predict, known)
        nearest, least, expected_of_it = None, np.inf, self.response
        for _ in range(_SEARCHES):
            start = self.design if nearest is None else nearest
            found = _sets_of_flips(start, expected_of_it, self.wanted, self._longest, predict, self.rng)
            found = [design for design in found if design.tobytes() not in self._known]
            if not found:
                break
            expected = _predicted(predict, np.stack(found)) + _kriged(known, lacking, np.stack(found))
            error = response_error(expected, self.wanted)
            if error.min() < least:
                least, nearest, expected_of_it = error.min(), found[error.argmin()], expected[error.argmin()]
        return nearest

    def learn(self, design: np.ndarray, response: np.ndarray) -> None:
        """Takes in what a simulation says of a neighbour, and moves there if it is nearer."""
        self._known.add(design.tobytes())
        error = self._error(response)
        if np.isfinite(error):
            self._solved.append((design, response))
        if error < self.error:
            self.design, self.response, self.error = design, response, error

    def _error(self, response: np.ndarray) -> float:
        return float(response_error(response[None], self.wanted)[0])


def _sets_of_flips(
    design: np.ndarray,
    expected: np.ndarray,
    wanted: np.ndarray,
    longest: int,
    predict: Predictor,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Neighbours of a design, with a set of pixels of the other phase each and an interface up to ``longest``."""
    pixels = np.flatnonzero(_lengthening(design) < _lengthening(np.zeros_like(design)))  # some neighbour is another
    if not len(pixels):
        return []
    pixels = rng.choice(pixels, min(_PIXELS, len(pixels)), replace=False)
    flipped = np.repeat(design.reshape(1, -1), len(pixels), axis=0)
    flipped[np.arange(len(pixels)), pixels] = 1 - flipped[np.arange(len(pixels)), pixels]
    given = ~np.isnan(wanted)
    scale = np.where(given, wanted, 0.0)
    scale = np.where(given, 1 / np.linalg.norm(scale, axis=-1, keepdims=True).clip(1e-300), 0.0)
    before = _predicted(predict, design[None])
    effect = ((_predicted(predict, flipped.reshape(-1, *design.shape)) - before) * scale).reshape(len(pixels), -1)
    left = np.repeat((np.where(given, wanted - expected, 0.0) * scale).reshape(1, -1), _SETS, axis=0)

    # all sets at once: shape (sets, pixels); adding pixel j to set i changes |left|^2 by |effect|^2 - 2 left . effect
    free, sizes = rng.random((_SETS, len(pixels))) < _SHARE, rng.integers(1, _LARGEST + 1, _SETS)
    found = np.repeat(design[None], _SETS, axis=0)
    flat, room = found.reshape(_SETS, -1), np.full(_SETS, longest - _interface_length(design))
    for step in range(_LARGEST):
        longer = _lengthening(found).reshape(_SETS, -1)[:, pixels]
        gain = np.where(free & (longer <= room[:, None]), (effect**2).sum(1) - 2 * left @ effect.T, np.inf)
        rows = np.flatnonzero((gain.min(1) < 0) & (step < sizes))
        pixel = gain.argmin(1)[rows]
        free[rows, pixel] = False
        flat[rows, pixels[pixel]] = 1 - flat[rows, pixels[pixel]]
        room[rows] -= longer[rows, pixel]
        left[rows] -= effect[pixel]
    return [each for each in np.unique(found, axis=0) if (each != design).any()]


def _interface_length(design: np.ndarray) -> int:
    """Sides that pixels of different phases share."""
    return int((design[1:] != design[:-1]).sum() + (design[:, 1:] != design[:, :-1]).sum())


def _lengthening(designs: np.ndarray) -> np.ndarray:
    """How much longer the interface of designs ``(..., H, W)`` is where that pixel alone changes, same shape."""
    padded = np.pad(designs, [(0, 0)] * (designs.ndim - 2) + [(1, 1), (1, 1)], constant_values=np.nan)
    around = (
        padded[..., :-2, 1:-1],
        padded[..., 2:, 1:-1],
        padded[..., 1:-1, :-2],
        padded[..., 1:-1, 2:],
    )
    return np.sum([(near == designs).astype(int) - (near == 1 - designs) for near in around], axis=0)


def _kriged(known: np.ndarray, values: np.ndarray, designs: np.ndarray) -> np.ndarray:
    """Values ``(n, L, S)`` of known designs, interpolated to others by ordinary kriging with a linear variogram.

    Where designs and values allow, that is linear in the pixels of binary designs. The system is singular where one
    design follows from others, as x + a + b from x, x + a and x + b: then the smallest weights are taken.
    """
    places, others = known.reshape(len(known), -1), designs.reshape(len(designs), -1)
    between, away = (np.abs(these[:, None] - places).sum(-1) for these in (places, others))
    system = np.block([[between, np.ones((len(known), 1))], [np.ones(len(known)), 0.0]])
    weights = np.linalg.lstsq(system, np.column_stack([away, np.ones(len(others))]).T)[0][:-1]
    return np.einsum("kb,kls->bls", weights, values)


def _predicted(predict: Predictor, designs: np.ndarray) -> np.ndarray:
    """Predictions as float64 arrays."""
    return as_array(predict(designs))
