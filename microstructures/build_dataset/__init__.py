"""Datasets of designs with their responses."""

from mechdiffusers.microstructures.build_dataset.builder import build_dataset
from mechdiffusers.microstructures.build_dataset.columns import response_meaning

__all__ = ["build_dataset", "response_meaning"]
