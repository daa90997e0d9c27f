"""Microstructures: designs, where they come from, and datasets of them with their responses."""

from mechdiffusers.microstructures.build_dataset import build_dataset, response_meaning
from mechdiffusers.microstructures.random_composites import random_composites

__all__ = ["build_dataset", "random_composites", "response_meaning"]
