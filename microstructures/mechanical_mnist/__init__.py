"""Published designs with their responses: Mechanical MNIST."""

from mechdiffusers.microstructures.mechanical_mnist.reader import load_mechanical_mnist

__all__ = ["load_mechanical_mnist"]
