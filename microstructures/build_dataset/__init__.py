"""Datasets of designs with their responses."""

from mechdiffusers.microstructures.build_dataset.builder import build_dataset

__all__ = ["build_dataset"]
