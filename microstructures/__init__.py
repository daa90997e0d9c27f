"""Microstructures: designs and where they come from."""

from mechdiffusers.microstructures.mechanical_mnist import load_mechanical_mnist
from mechdiffusers.microstructures.random_composites import random_composites

__all__ = ["load_mechanical_mnist", "random_composites"]
