r"""Designs brought nearer to their targets by a few simulations.

A predictor's error is nearly the same for designs that differ in a few pixels. So the simulated response :math:`f(x)`
of a design :math:`x` corrects the prediction :math:`p` of its neighbours,

.. math:: f(x') \approx f(x) + p(x') - p(x).

This is the response correction of output space mapping (Bandler et al. 2004). Where several designs are simulated, the
residual :math:`f - p` is interpolated between them by ordinary kriging (Cressie 1993, section 3.2); its variogram is
the number of pixels in which two designs differ. The neighbour that should be nearest to the target is simulated. If it
is nearer, it becomes the current design.

First-order elements allow a second correction of this kind. Their responses :math:`f_1` are too stiff, but by nearly
the same factor for a design and its neighbours. So a chain of coarse simulations takes some steps towards the target

.. math:: y^*_1 = y^* \, f_1(x) / f(x).

Only the design where it arrives is simulated at the element order of the specification. That gives the next factor.

References:
    | Space mapping: the state of the art (Bandler et al., 2004)
    | https://doi.org/10.1109/TMTT.2003.820904
    | Statistics for Spatial Data (Cressie, 1993)
    | https://doi.org/10.1002/9781119115151
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechdiffusers.evaluation.inverse_design.checks import (
    check_binary,
    checked_count,
    checked_simulator,
    checked_targets,
)
from mechdiffusers.evaluation.inverse_design.interface_flips import Predictor, interface_length, sets_of_flips
from mechdiffusers.evaluation.inverse_design.response import as_array, error_scale, response_error
from mechdiffusers.mechanics import ResponseSpec, Simulator
from mechdiffusers.parallel import num_workers, one_thread, run

__all__ = ["RefinedDesigns", "refine"]

#: Searches among neighbours, and neighbours of these, before a simulation at the order of the specification. Before a
#: coarse simulation one search is enough: a second one would take longer than the simulation.
_SEARCHES = 2


@dataclass
class RefinedDesigns:
    """B designs, numpy arrays, or tensors on the CPU for a tensor."""

    designs: Any  #: the nearest of each chain, shape (B, H, W)
    error: Any  #: of the nearest so far, before and after each round, shape (B, num_rounds + 1), NaN where not solved


def refine(
    designs: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    spec: ResponseSpec,
    predict: Predictor,
    *,
    simulator: Simulator | None = None,
    response: np.ndarray | Tensor | None = None,
    num_rounds: int = 3,
    num_coarse_steps: int = 5,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> RefinedDesigns:
    """Changes some pixels of binary designs, so that their response by finite elements comes nearer to the target.

    Every design is a chain of its own, of up to ``num_rounds + 1`` simulations at the specification's element order and
    ``num_rounds * num_coarse_steps + 1`` with first-order elements.

    Args:
        designs: Shape ``(B, H, W)``, 0 or 1; with T targets, B / T for each, those of a target neighbours.
        target: Shape ``(T, L, S)``, or ``(L, S)`` for one; NaN where unspecified.
        spec: Of the response, as :func:`.verify` takes it.
        predict: Predicts responses of designs, as ``pipe.predict_response`` does.
        simulator: As :func:`.verify` takes it. With one of your own, every step is a simulation by it.
        response: Of the designs by finite elements where that is known, as ``report.response`` of :func:`.verify`,
            shape ``(B, L, S)``; they are not simulated again at that order then.
        num_rounds: Simulations of each design at the order of the specification after the first, at least 1.
        num_coarse_steps: Simulations with first-order elements before each of them, which find out what is worth it. 0
            leaves that to the predictor alone. There are none with a simulator of your own, or where the specification
            has first-order elements itself: more rounds make up for it.
        seed: Of all random choices, at least 0; those of a design do not depend on the designs after it.
        device: Where our solver computes; by default on the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The designs and how their errors fell. One that the solver cannot follow, at either order, stays as it is.

    Raises:
        ValueError: If the designs are not binary or do not divide among the targets, if the target does not fit
            ``spec``, or the response or what ``predict`` gives do not fit the two, or if there is no simulator,
            ``num_rounds`` is no integer of at least 1, or ``num_coarse_steps`` or ``seed`` none of at least 0.

    Example:
        >>> refined = refine(designs, target, spec, pipe.predict_response)  # doctest: +SKIP
        >>> refined.error[:, [0, -1]].mean(0)  # doctest: +SKIP
    """
    array = as_array(designs, "designs")
    targets = checked_targets(target, spec, array.shape)
    simulate = checked_simulator(simulator, spec, device=device)
    check_binary(array)
    num_rounds = checked_count(num_rounds, "num_rounds")
    num_coarse_steps = checked_count(num_coarse_steps, "num_coarse_steps", least=0)
    seed = checked_count(seed, "seed", least=0)
    wanted = np.repeat(targets, len(array) // len(targets), axis=0)
    if not callable(predict):
        raise ValueError(f"predict must be a function of designs, such as pipe.predict_response, got {predict!r}")
    if (shape := as_array(predict(array[:1]), "predict").shape) != (1, *wanted.shape[1:]):
        raise ValueError(f"predict must give a response of shape {(1, *wanted.shape[1:])} for a design, got {shape}")
    found = simulate(array) if response is None else as_array(response, "response")
    if found.shape != (len(array), *wanted.shape[1:]):
        raise ValueError(f"response must have shape {(len(array), *wanted.shape[1:])}, got {found.shape}")
    if np.isinf(found).any():
        raise ValueError("response must be finite, or NaN where a design is not solved, got an infinite one")

    chains = _chains(array, found, wanted, seed, spec.signed)
    errors = [[chain.error for chain in chains]]
    coarse_chains = []
    if num_coarse_steps and simulator is None and spec.solver is not None and spec.solver["element_order"] > 1:
        simulate_coarsely = spec.simulator(element_order=1, device=device)
        known = np.where(np.isnan(found), np.nan, simulate_coarsely(array))
        aims = wanted * _ratio(known, found)
        coarse_chains = _chains(array, known, np.where(np.isnan(aims), wanted, aims), seed, spec.signed)
    steps = num_coarse_steps if coarse_chains else 0
    with tqdm(total=num_rounds * (steps + 1), desc="refine", unit="step", disable=not progress) as bar:
        for _ in range(num_rounds):
            for _ in range(steps):
                _simulate(coarse_chains, _neighbours(coarse_chains, predict, 1), simulate_coarsely)
                bar.update()
            if coarse_chains:
                _simulate(chains, [chain.design for chain in coarse_chains], simulate)
                for each, chain in zip(coarse_chains, chains, strict=True):
                    each.aim_at(chain.wanted * _ratio(each.response, chain.known[each.design.tobytes()]))
            else:
                _simulate(chains, _neighbours(chains, predict, _SEARCHES), simulate)
            bar.update()
            errors.append([chain.error for chain in chains])
    refined, error = np.stack([chain.design for chain in chains]), np.array(errors).T
    if isinstance(designs, Tensor):
        return RefinedDesigns(torch.from_numpy(refined).to(designs.dtype), torch.from_numpy(error))
    return RefinedDesigns(refined.astype(np.asarray(designs).dtype), error)


class _Chain:
    """The nearest design so far of those that were simulated one after the other, and what they taught."""

    def __init__(
        self, design: np.ndarray, response: np.ndarray, wanted: np.ndarray, rng: np.random.Generator, signed: bool
    ) -> None:
        self.design, self.response, self.wanted = design, response, wanted  # shapes (H, W) and twice (L, S)
        self._signed = signed
        self.known = {design.tobytes(): response}
        self.rng, self._solved, self._max_length = rng, [(design, response)], interface_length(design)
        self.error = self._error(response)

    def neighbour(self, predict: Predictor, num_searches: int) -> np.ndarray | None:
        """The design near by that should be nearest to the target and was not simulated; ``None`` if there is none."""
        if not np.isfinite(self.error):
            return None
        known, responses = (np.stack(each) for each in zip(*self._solved, strict=True))
        residuals = responses - as_array(predict(known))
        nearest, least, expected_of_it = None, np.inf, self.response
        scale = error_scale(torch.from_numpy(self.wanted), self._signed).numpy()
        for _ in range(num_searches):
            start = self.design if nearest is None else nearest
            found = sets_of_flips(start, expected_of_it, self.wanted, scale, self._max_length, predict, self.rng)
            found = [design for design in found if design.tobytes() not in self.known]
            if not found:
                break
            expected = as_array(predict(np.stack(found))) + _kriged(known, residuals, np.stack(found))
            error = response_error(expected, self.wanted, signed=self._signed)
            if error.min() < least:
                least, nearest, expected_of_it = error.min(), found[error.argmin()], expected[error.argmin()]
        return nearest

    def learn(self, design: np.ndarray, response: np.ndarray) -> None:
        """Takes in what a simulation says of a neighbour, and moves there if it is nearer."""
        self.known[design.tobytes()] = response
        error = self._error(response)
        if np.isfinite(error):
            self._solved.append((design, response))
        if error < self.error:
            self.design, self.response, self.error = design, response, error

    def aim_at(self, wanted: np.ndarray) -> None:
        """Goes for another target from the known design that is nearest to it.

        Where parts of that target are missing, as the design gave no factor for them, the chain leaves the design.
        """
        if not np.isfinite(self.error):
            return
        if (np.isnan(wanted) == np.isnan(self.wanted)).all():
            self.wanted = wanted
        elif len(self._solved) > 1:
            self._solved = [(design, response) for design, response in self._solved if design is not self.design]
        self.error, nearest = min((self._error(response), i) for i, (_, response) in enumerate(self._solved))
        self.design, self.response = self._solved[nearest]

    def _error(self, response: np.ndarray) -> float:
        return float(response_error(response[None], self.wanted, signed=self._signed)[0])


def _chains(designs: np.ndarray, response: np.ndarray, wanted: np.ndarray, seed: int, signed: bool) -> list[_Chain]:
    """A chain for each design."""
    rngs = (np.random.default_rng([seed, i]) for i in range(len(designs)))
    return [_Chain(*each, signed) for each in zip(designs, response, wanted, rngs, strict=True)]


def _neighbours(chains: Sequence[_Chain], predict: Predictor, num_searches: int) -> list[np.ndarray | None]:
    """The neighbour of each chain, see :meth:`_Chain.neighbour`; the chains are shared by processes of one thread."""

    def search(index: int) -> tuple[int, np.ndarray | None, np.random.Generator]:
        return index, chains[index].neighbour(predict, num_searches), chains[index].rng

    found: list[np.ndarray | None] = [None] * len(chains)
    workers = 1 if torch.cuda.is_initialized() else num_workers()  # CUDA does not survive a fork
    with one_thread():
        for index, neighbour, rng in run(search, range(len(chains)), workers):
            found[index], chains[index].rng = neighbour, rng
    return found


def _simulate(
    chains: Sequence[_Chain],
    designs: Sequence[np.ndarray | None],
    simulate: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Simulates a design for each chain that has one, unless it knows that."""
    pairs = zip(chains, designs, strict=True)
    tried = [(chain, design) for chain, design in pairs if design is not None and design.tobytes() not in chain.known]
    if tried:
        answers = simulate(np.stack([design for _, design in tried]))
        for (chain, design), answer in zip(tried, answers, strict=True):
            chain.learn(design, answer)


def _ratio(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Of responses; 1 where the finer one is 0."""
    return np.divide(coarse, fine, out=np.ones_like(fine), where=fine != 0)


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
