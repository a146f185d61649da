"""How an image reaches the network: the working grid and the intensities, as a checkpoint's card says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .geometry import Grid, covering_grid
from .startup import ALIGNMENTS

FINE_VOXELS = 16_000_000
"""Refinement takes about 400 bytes of memory a voxel."""


@dataclass(frozen=True)
class Preprocessing:
    """Stored in every checkpoint.

    Attributes:
        orientation: axis code of the working grid, such as "RAS": i runs to the right, j to anterior, k up.
        spacing: mm of the working grid; None keeps the fixed image's own.
        shape: the working grid has at least this many voxels (the size seen in training); None: what the image needs.
        intensity: "percentile" (low and high are percentiles of the voxels above the minimum, mapped to 0..1),
            "window" (low and high are intensities, such as HU) or "none".
        low, high: see intensity. Values outside are clipped.
        align: what to do before the network when nothing is asked for: "none", "center", "rigid" or "affine".
        steps: refinement steps when nothing is asked for (the T of training).
    """

    orientation: str = "RAS"
    spacing: tuple[float, float, float] | None = None
    shape: tuple[int, int, int] | None = None
    intensity: str = "percentile"
    low: float = 0.5
    high: float = 99.5
    align: str = "affine"
    steps: int = 2

    def __post_init__(self) -> None:
        if self.intensity not in ("percentile", "window", "none"):
            raise ValueError(f"intensity is '{self.intensity}'; it must be 'percentile', 'window' or 'none'")
        if self.intensity != "none" and not self.low < self.high:
            raise ValueError("low must be below high")
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align is '{self.align}'; it must be one of {', '.join(ALIGNMENTS)}")
        if self.spacing is not None and min(self.spacing) <= 0:
            raise ValueError("spacing must be positive")
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def working_grid(fixed: Grid, preprocessing: Preprocessing, multiple_of: int) -> Grid:
    """The grid the network works on; it covers the whole fixed image.

    An image that already lies on a grid the network takes keeps its voxels, at most turned; others get a rim. The grid
    has at least two cells of the coarsest feature: networks that normalise over a feature's voxels refuse one.
    """
    wanted = (fixed, preprocessing.spacing, preprocessing.orientation, multiple_of)
    grid = covering_grid(*wanted, preprocessing.shape)
    if max(grid.shape) == multiple_of:
        grid = covering_grid(*wanted, (2 * multiple_of, 1, 1))
    turns = np.abs(grid.direction.T @ fixed.direction)
    order = turns.argmax(axis=1)
    shape = np.array(fixed.shape)[order]
    if (
        np.allclose(turns.max(axis=1), 1, atol=1e-6)
        and np.allclose(fixed.spacing[order], grid.spacing, rtol=1e-4)
        and not (shape % multiple_of).any()
        and max(shape) > multiple_of
        and (preprocessing.shape is None or (shape >= preprocessing.shape).all())
    ):
        corner = fixed.center - grid.direction @ (fixed.spacing[order] * (shape - 1) / 2)
        grid = Grid.from_parts(shape.tolist(), fixed.spacing[order], grid.direction, corner)
    return grid


def fine_grid(fixed: Grid, working: Grid) -> Grid:
    """The fixed image's own grid, but no more than twice as fine as the working grid and of FINE_VOXELS at most.

    Args:
        fixed, working: the fixed image's grid, and the network's that covers it.

    Returns:
        a grid along the fixed image's axes that covers its voxels' centres; an image that has more than FINE_VOXELS on
        the working grid already keeps that one's spacing.
    """
    coarsest = np.linalg.norm(fixed.direction.T @ working.direction * working.spacing, axis=1)  # along fixed's axes
    least = coarsest / 2
    length = fixed.spacing * np.maximum(np.array(fixed.shape) - 1, 1)  # between the first and the last centre
    crowd = np.prod(length / np.maximum(fixed.spacing, least)) / FINE_VOXELS
    if crowd > 1:
        least = np.minimum(np.maximum(fixed.spacing, least) * crowd ** (1 / 3), coarsest)
    shape = np.maximum(fixed.shape, 2)  # a fold or a slope needs two voxels
    shape = np.where(fixed.spacing < least, np.ceil(length / least - 1e-6).astype(int) + 1, shape)
    return Grid.from_parts(shape.tolist(), length / (shape - 1), fixed.direction, fixed.origin)


def normalize(data: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Intensities as the network saw them in training, any shape, float32.

    Percentiles are read off at most 200,000 evenly spread voxels, which moves them by less than the noise.
    """
    data = data.float()
    if preprocessing.intensity == "none":
        return data
    low, high = preprocessing.low, preprocessing.high
    if preprocessing.intensity == "percentile":
        values = data.flatten()
        values = values[:: max(1, values.numel() // 200_000)]
        inside = values[values > values.min()]
        if inside.numel() == 0:
            return torch.zeros_like(data)
        low, high = torch.quantile(inside, torch.tensor([low / 100, high / 100], device=data.device)).tolist()
    if not high > low:
        high = low + 1e-6 * max(1.0, abs(low))
    return ((data - low) / (high - low)).clamp(0, 1)
