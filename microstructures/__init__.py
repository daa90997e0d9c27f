"""Microstructures: designs and where they come from."""

from mechdiffusers.microstructures.random_composites import random_composites

__all__ = ["random_composites"]
