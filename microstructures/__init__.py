"""Microstructures: designs, where they come from, and datasets of them with their responses."""

from mechdiffusers.microstructures.build_dataset import build_dataset
from mechdiffusers.microstructures.design_families import DESIGN_FAMILIES
from mechdiffusers.microstructures.import_responses import dataset_from_responses
from mechdiffusers.microstructures.mechanical_mnist import load_mechanical_mnist
from mechdiffusers.microstructures.random_composites import random_composites
from mechdiffusers.microstructures.read_designs import DesignFiles, read_designs

__all__ = [
    "DESIGN_FAMILIES",
    "DesignFiles",
    "build_dataset",
    "dataset_from_responses",
    "load_mechanical_mnist",
    "random_composites",
    "read_designs",
]
