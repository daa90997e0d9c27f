"""Mechanics: batched hyperelastic finite elements."""

from mechdiffusers.mechanics.export import export_designs
from mechdiffusers.mechanics.response_spec import ResponseSpec, Simulator
from mechdiffusers.mechanics.simulate import SimulationResult, simulate

__all__ = ["ResponseSpec", "SimulationResult", "Simulator", "export_designs", "simulate"]
