"""Microstructures: designs, where they come from, and datasets of them with their responses."""

from mechdiffusers.microstructures.build_dataset import build_dataset
from mechdiffusers.microstructures.design_families import DESIGN_FAMILIES
from mechdiffusers.microstructures.mechanical_mnist import load_mechanical_mnist
from mechdiffusers.microstructures.random_composites import random_composites

__all__ = ["DESIGN_FAMILIES", "build_dataset", "load_mechanical_mnist", "random_composites"]
