"""Mechanics: batched hyperelastic finite elements."""

from mechdiffusers.mechanics.response_spec import ResponseSpec, Simulator
from mechdiffusers.mechanics.simulate import SimulationResult, simulate

__all__ = ["ResponseSpec", "SimulationResult", "Simulator", "simulate"]
