"""Two images in one picture: a checkerboard and a difference, as arrays that a volume node can show.

Fixed and moving images may be of different scanners or modalities, so both are first brought to gray values from 0 to 1
through the windows in which they are shown; what the user sees is what is compared.
"""

from __future__ import annotations

import numpy as np


def gray(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Gray values from 0 (black) to 1 (white), float32, of an array shown in a window (darkest, brightest value)."""
    low, high = window
    values = (array.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-12))
    return np.clip(values, 0, 1, out=values)


def checkerboard(first: np.ndarray, second: np.ndarray, tile: tuple[int, int, int]) -> np.ndarray:
    """Return blocks of the one and the other in turn, along all three axes, so that every slice shows a board.

    Args:
        first, second: arrays of one shape.
        tile: voxels of a block along each axis.
    """
    parity = sum(
        (np.arange(n) // max(1, t)).reshape([-1 if other == axis else 1 for other in range(3)])
        for axis, (n, t) in enumerate(zip(first.shape, tile, strict=True))
    )
    return np.where(parity % 2 == 0, first, second)


def difference_limit(difference: np.ndarray) -> float:
    """Return the difference that gets the full color: few voxels are above it, and noise alone does not look like
    much."""
    values = difference.ravel()
    if values.size > 300_000:  # at random, for a stride may meet a single slice
        values = values[np.random.default_rng(1).integers(values.size, size=300_000)]
    return max(0.2, float(np.percentile(np.abs(values), 99)))
