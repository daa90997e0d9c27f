"""Mechanics: batched hyperelastic finite elements."""

from mechdiffusers.mechanics.simulate import SimulationResult, simulate

__all__ = ["SimulationResult", "simulate"]
