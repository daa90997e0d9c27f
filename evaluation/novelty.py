"""How new and how varied designs are, and whether their stiff phase hangs together.

Designs are compared phase by phase: a pixel above one half belongs to the stiff phase, and two designs differ in the
fraction of pixels whose phases differ. The ratio of two diversities compares grey levels.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor

__all__ = ["diversity", "diversity_ratio", "novelty", "stiff_connectivity"]

#: Training designs compared at once: bounds the memory of the products to some tens of megabytes.
_CHUNK = 4096


def novelty(designs: np.ndarray | Tensor, training_designs: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Least fraction of differing pixels to any training design, over shifts of up to one pixel and the half-turn.

    A shifted pair is compared where it overlaps. The half-turn is the exact symmetry of clamped extension and shear.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1].
        training_designs: Shape ``(N, H, W)``, in [0, 1].

    Returns:
        Shape ``(B,)``, float64, of the kind of ``designs``: 0 for a training design, whichever way it is turned.

    Raises:
        ValueError: If these are no stacks of designs of one size, of at least 2 x 2 pixels.

    Example:
        >>> design = np.eye(4)[None]
        >>> float(novelty(np.roll(design, 1, axis=2), design)[0])
        0.0
    """
    ours, theirs = _phases("designs", designs), _phases("training_designs", training_designs)
    if ours.shape[1:] != theirs.shape[1:] or min(ours.shape[1:]) < 2:
        raise ValueError(
            "designs must have the size of the training designs, at least (2, 2), got "
            f"{tuple(ours.shape[1:])} and {tuple(theirs.shape[1:])}"
        )
    least = torch.full((len(ours),), torch.inf)
    for chunk in theirs.split(_CHUNK):
        for turned in (chunk, chunk.flip(1, 2)):
            for down, right in product((-1, 0, 1), repeat=2):
                window = _overlap(ours, down, right)
                shifted = _overlap(turned, -down, -right)
                # phases a and b differ in |a| + |b| - 2 a.b pixels: exact, all terms are small integers
                common = window @ shifted.T
                differing = window.sum(1, keepdim=True) + shifted.sum(1) - 2 * common
                least = torch.minimum(least, differing.amin(1) / window.shape[1])
    return least.double() if isinstance(designs, Tensor) else least.double().numpy()


def diversity(designs: np.ndarray | Tensor) -> float:
    """Mean fraction of differing pixels over all pairs of a set of designs.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1], at least two.

    Returns:
        The mean, in [0, 1].

    Raises:
        ValueError: If these are no designs, or fewer than two.

    Example:
        >>> diversity(np.stack([np.zeros((4, 4)), np.ones((4, 4))]))
        1.0
    """
    phases = _phases("designs", designs).flatten(1)
    num = len(phases)
    if num < 2:
        raise ValueError(f"designs must be at least two to differ, got {num}")
    stiff = phases.sum(0).double()  # a pixel differs in as many pairs as one of the stiff makes with one of the soft
    return float((stiff * (num - stiff)).mean() / (num * (num - 1) / 2))


def diversity_ratio(samples: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """Diversity of samples over that of the data: 0 if all samples are equal, about 1 if they vary as the data do.

    Diversity is the mean over pixels of the variance in a set, here. For black-and-white designs the ratio is that of
    :func:`diversity`; for grey ones it does not depend on the range of their levels.

    Args:
        samples: Shape ``(B, H, W)``, in [0, 1], at least two.
        reference: Shape ``(B', H, W)``, in [0, 1], at least two, not all equal.

    Returns:
        The ratio.

    Raises:
        ValueError: If a set is not as described.

    Example:
        >>> diversity_ratio(np.zeros((3, 4, 4)), np.stack([np.zeros((4, 4)), np.eye(4)]))
        0.0
    """
    variances = []
    for name, designs in (("samples", samples), ("reference", reference)):
        values = _designs(name, designs).double()
        if len(values) < 2:
            raise ValueError(f"{name} must be at least two designs to differ, got {len(values)}")
        # from the first design, so that equal designs have a variance of exactly 0
        variances.append((values - values[0]).var(0).mean().item())
    if not variances[1]:
        raise ValueError("reference must hold designs that differ, got equal ones")
    return variances[0] / variances[1]


def stiff_connectivity(designs: np.ndarray | Tensor) -> np.ndarray:
    """Share of the stiff phase that lies in its largest piece, pixels being joined by their edges.

    Args:
        designs: Shape ``(B, H, W)``, in [0, 1].

    Returns:
        Shape ``(B,)``: 1 where the stiff phase is of one piece, NaN where there is none.

    Raises:
        ValueError: If these are no designs.

    Example:
        >>> stiff_connectivity(np.eye(4)[None])
        array([0.25])
    """
    shares = []
    for phases in _phases("designs", designs).numpy():
        pieces = np.bincount(label(phases)[0].ravel())[1:]
        shares.append(pieces.max() / pieces.sum() if pieces.size else np.nan)
    return np.array(shares)


def _phases(name: str, designs: np.ndarray | Tensor) -> Tensor:
    """1.0 where the stiff phase is, float32, on the CPU, shape ``(B, H, W)``."""
    return (_designs(name, designs) > 0.5).float()


def _designs(name: str, designs: np.ndarray | Tensor) -> Tensor:
    """The designs, checked, on the CPU, shape ``(B, H, W)``."""
    # a view that runs backwards is none for torch
    values = designs.detach().cpu() if isinstance(designs, Tensor) else torch.from_numpy(np.array(designs))
    if values.ndim != 3 or not values.numel():
        raise ValueError(
            f"{name} must be a stack of designs, shape (B, H, W), none of them 0, got {tuple(values.shape)}"
        )
    if not ((values >= 0) & (values <= 1)).all():  # also false for NaN
        raise ValueError(f"{name} must lie in [0, 1] and hold no NaN")
    return values


def _overlap(designs: Tensor, down: int, right: int) -> Tensor:
    """The part of designs that stays in sight when another is moved over them, flat, shape ``(B, P)``."""
    height, width = designs.shape[1:]
    rows = slice(max(down, 0), height + min(down, 0))
    columns = slice(max(right, 0), width + min(right, 0))
    return designs[:, rows, columns].flatten(1)
