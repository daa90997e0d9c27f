"""What the entries of a response are: the specification that travels with every response.

A response is an array ``(B, L, S)`` of L load cases at S strains each, NaN where unspecified or not solved. A quantity
without a curve, such as a stiffness tensor, a porosity or a damping, has its entries as load cases and S = 1.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mechdiffusers.mechanics.load_cases import load_case
from mechdiffusers.mechanics.materials import CompressibleNeoHookean
from mechdiffusers.mechanics.simulate import check_settings, simulate

__all__ = ["ResponseSpec", "Simulator"]

#: The settings of ``simulate`` that change a response, with their defaults.
_SETTINGS = {
    name: inspect.signature(simulate).parameters[name].default
    for name in ("element_order", "young_soft", "young_stiff", "poisson", "pixel_size")
}
_LAW = CompressibleNeoHookean.__name__


class Simulator(Protocol):
    """Any function of designs that returns their response, by a solver or a measurement."""

    def __call__(self, designs: np.ndarray, /) -> np.ndarray | Tensor:
        """The response of designs ``(B, H, W)`` in [0, 1], shape ``(B, L, S)``, NaN where not solved."""


@dataclass(frozen=True)
class ResponseSpec:
    """The specification of a response.

    Args:
        quantity: What was measured, such as ``"stress"``, ``"energy"`` or ``"stiffness"``.
        load_cases: L different names; for a quantity without a curve its entries, such as ``["C11", "C22", "C12"]``.
        strains: L lists of S strains, finite and increasing. For a quantity without a curve ``[[0.0], [0.0], ...]``.
        units: Of the response, such as ``"MPa"``; ``"1"`` where it has none.
        signed: Whether the response may be negative.
        solver: The settings of :func:`.simulate` that made it: ``element_order``, ``young_soft``, ``young_stiff``,
            ``poisson``, ``pixel_size``, those left out at their defaults. ``None`` for responses from elsewhere.

    Raises:
        ValueError: If an argument is not as described, or :func:`.simulate` cannot have made such a response.

    Example:
        >>> spec = ResponseSpec("stiffness", ["C11", "C22", "C12"], [[0.0]] * 3, units="GPa", signed=True)
        >>> spec.shape
        (3, 1)
        >>> spec.difference(ResponseSpec("stiffness", ["C11", "C22", "C12"], [[0.0]] * 3, units="MPa", signed=True))
        "units 'GPa', not 'MPa'"
    """

    quantity: str
    load_cases: Sequence[str]  # kept as tuples
    strains: Sequence[Sequence[float]]
    units: str
    signed: bool
    solver: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("quantity", "units"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                remedy = "; '1' is for a quantity without units" if name == "units" else ""
                raise ValueError(f"{name} must be a word or words, got {getattr(self, name)!r}{remedy}")
        if not isinstance(self.signed, (bool, np.bool_)):
            raise ValueError(f"signed must be True or False, got {self.signed!r}")
        object.__setattr__(self, "signed", bool(self.signed))
        object.__setattr__(self, "load_cases", _checked_names(self.load_cases))
        object.__setattr__(self, "strains", _checked_strains(self.strains, self.load_cases))
        if self.solver is not None:
            object.__setattr__(self, "solver", self._checked_solver())

    @property
    def shape(self) -> tuple[int, int]:
        """(L, S), the shape of one response."""
        return len(self.strains), len(self.strains[0])

    @property
    def is_scalar(self) -> bool:
        """Whether the quantity has no curve, only one value for each of its entries: S = 1 at strain 0."""
        return all(case == (0.0,) for case in self.strains)

    @classmethod
    def of(cls, source: Any) -> ResponseSpec:
        """The specification of the responses of a dataset, or of those that a pipeline was trained with.

        Args:
            source: A ``datasets.Dataset`` or ``IterableDataset`` of :func:`mechdiffusers.build_dataset` or
                :func:`mechdiffusers.dataset_from_responses`, wherever it has been stored since, or a pipeline.

        Raises:
            ValueError: If it has no responses, or they came without their specification.

        Example:
            >>> dataset = load_dataset("parquet", data_files="data/composites-32/train.parquet", split="train")
            >>> ResponseSpec.of(dataset).load_cases
            ('uniaxial_extension', 'uniaxial_extension_x', 'shear')
        """
        if (encoder := getattr(source, "response_encoder", None)) is not None:
            if encoder.config.spec is None:
                raise ValueError("pipeline must be trained with responses, got one that was trained without")
            return cls.from_dict(encoder.config.spec)
        features = getattr(source, "features", None)
        if features is None:
            raise ValueError(f"dataset must be one of the datasets library, one split, got {type(source).__name__}")
        if "response" not in features:
            raise ValueError(f"dataset must have a column 'response', got {sorted(features)}")
        stored = getattr(features["response"], "id", None)
        if stored is None:
            raise ValueError(
                "dataset must say what its responses are, got a column 'response' that has lost its 'id': "
                "dataset_from_responses makes a dataset of them with their specification"
            )
        return cls.from_dict(json.loads(stored))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ResponseSpec:
        """The specification that :meth:`to_dict` gave, or a dataset or checkpoint of the first edition holds.

        Raises:
            ValueError: If it is no such dictionary.
        """
        needed = {"quantity", "load_cases", "strains", "units"}
        if not isinstance(stored, Mapping) or needed - stored.keys():
            got = sorted(stored) if isinstance(stored, Mapping) else stored
            raise ValueError(f"spec must be a dictionary with {sorted(needed)}, as ResponseSpec.to_dict, got {got!r}")
        material, solver = stored.get("material"), None
        if material is not None:
            if not isinstance(material, Mapping) or material.get("law") != _LAW:
                raise ValueError(f"spec must have a material of the law {_LAW}, got {material!r}")
            solver = {name: value for name, value in material.items() if name != "law"}
            solver |= {name: stored[name] for name in ("element_order", "pixel_size") if name in stored}
        entries = {name: stored[name] for name in needed}
        return cls(**entries, signed=stored.get("signed", False), solver=solver)  # once none was negative

    def to_dict(self) -> dict[str, Any]:
        """As configurations and features of datasets store it, in JSON's types."""
        stored: dict[str, Any] = {
            "quantity": self.quantity,
            "load_cases": list(self.load_cases),
            "strains": [list(case) for case in self.strains],
            "units": self.units,
            "signed": self.signed,
        }
        if self.solver is not None:
            material = {name: self.solver[name] for name in ("young_soft", "young_stiff", "poisson")}
            stored |= {name: self.solver[name] for name in ("element_order", "pixel_size")}
            stored["material"] = {"law": _LAW, **material}
        return stored

    def difference(self, other: ResponseSpec) -> str | None:
        """The first entry in which another specification differs, in words; ``None`` if there is none."""
        for name in ("quantity", "load_cases", "strains", "units", "signed", "solver"):
            mine, theirs = (_rounded(getattr(spec, name)) for spec in (self, other))
            if mine != theirs:
                return f"{name} {mine!r}, not {theirs!r}"
        return None

    def simulator(
        self, *, element_order: int | None = None, device: str | torch.device | None = None, progress: bool = False
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Our simulator of this response: a function of designs.

        Args:
            element_order: In the place of the one that the responses were made with.
            device: Where to compute; by default on the CPU.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If the responses are from elsewhere.

        Example:
            >>> spec = ResponseSpec("stress", ["shear"], [[0.1, 0.2]], units="MPa", signed=False, solver={})
            >>> spec.simulator()(np.ones((1, 8, 8))).shape
            (1, 1, 2)
        """
        if self.solver is None:
            raise ValueError(
                "simulator must be given for responses from elsewhere, whose specification has no solver: a function "
                "of designs (B, H, W) that returns their response (B, L, S)"
            )
        solver = self.solver if element_order is None else {**self.solver, "element_order": element_order}
        return functools.partial(_simulated, replace(self, solver=solver), device=device, progress=progress)

    def _checked_solver(self) -> dict[str, Any]:
        """The settings of ``simulate``, all of them, if it can have made this response."""
        if not isinstance(self.solver, Mapping) or not self.solver.keys() <= _SETTINGS.keys():
            raise ValueError(
                f"solver must be None or settings of simulate among {sorted(_SETTINGS)}, got {self.solver!r}"
            )
        if self.quantity not in ("stress", "energy"):
            raise ValueError(f"quantity must be 'stress' or 'energy' for our solver, got {self.quantity!r}")
        for case in self.load_cases:
            load_case(case)
        if any(case[0] <= 0 for case in self.strains):
            raise ValueError(f"strains must be positive for our solver, got {self.strains!r}")
        solver = {**_SETTINGS, **self.solver}
        check_settings(**solver)
        of = {name: type(default) for name, default in _SETTINGS.items()}
        return {name: of[name](value) for name, value in solver.items()}


def _simulated(
    spec: ResponseSpec, designs: np.ndarray, *, device: str | torch.device | None, progress: bool
) -> np.ndarray:
    """The response of designs, float64, NaN where not solved."""
    assert spec.solver is not None  # ResponseSpec.simulator has checked it
    result = simulate(designs, spec.load_cases, spec.strains, **spec.solver, device=device, progress=progress)
    return getattr(result, spec.quantity)


def _checked_names(load_cases: Sequence[str]) -> tuple[str, ...]:
    """The load cases, if they are at least one and different."""
    names = () if isinstance(load_cases, str) or not isinstance(load_cases, Sequence) else tuple(load_cases)
    if not names or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"load_cases must be a sequence of different names, at least one, got {load_cases!r}")
    return names


def _checked_strains(strains: Any, load_cases: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """The strains of each load case, if they are as many, finite and increasing."""
    try:
        array = np.asarray(strains, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    fit = array.ndim == 2 and len(array) == len(load_cases) and array.size
    if not fit or not np.isfinite(array).all() or (np.diff(array) <= 0).any():
        raise ValueError(
            f"strains must be {len(load_cases)} lists, one for each of the load cases {list(load_cases)}, equally "
            f"long, finite and increasing, got {strains!r}"
        )
    return tuple(map(tuple, array.tolist()))


def _rounded(value: Any) -> Any:
    """A value as it is compared: numbers to nine digits, since files may have passed through other hands."""
    if isinstance(value, Mapping):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) and math.isfinite(value) else value
