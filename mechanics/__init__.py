"""Mechanics: batched hyperelastic finite elements."""

from mechdiffusers.mechanics.simulate import SimulationResult, simulate
from mechdiffusers.mechanics.simulated_response import simulated_response

__all__ = ["SimulationResult", "simulate", "simulated_response"]
