"""How an image reaches the network: the working grid and the intensities, as a model's card says."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..protocol.errors import MorphSeekError
from ..protocol.startup import ALIGNMENTS
from .background import quiet_background
from .geometry import Grid, Volume, covering_grid

HOUNSFIELD = (-1000.0, 600.0)
"""What CT with lungs is seen by without a model: from air to bone; ..."""
SOFT_TISSUE = (-200.0, 300.0)
"""... and other CT: organs, which lie within a tenth of that, are told apart."""
_LUNGS = (-900.0, -600.0)  # Hounsfield units; pads of a table are darker
_LUNG_SHARE = 0.12  # of tissue; below it a scan shows no lungs, or their bases
_FAT = -200.0  # Hounsfield units, or a little less
_SEED = 1
_LEAST_SHARE = 0.01  # of the voxels, that make a value the background though it is not the least
_MOST_CLIPPED = 0.1  # of the foreground, that the lower percentile may take with it


@dataclass(frozen=True)
class Preprocessing:
    """Stored in every model.

    Attributes:
        orientation: axis code of the working grid, such as "RAS": i runs to the right, j to anterior, k up.
        spacing: mm of the working grid; None keeps the fixed image's own.
        shape: the working grid has at least this many voxels (the size seen in training); None: what the image needs.
        intensity: "percentile" (low and high are percentiles of the foreground, mapped to 0..1),
            "window" (low and high are intensities, such as HU) or "none".
        low, high: see intensity. Values outside are clipped.
        align: what to do before the network when nothing is asked for: "none", "center", "rigid" or "affine".
        steps: steps of the network when nothing is asked for (the T of training).
        knows: smallest and largest size in mm of what the training images showed
            (:func:`MorphSeekLib.registration.alignment.object_size`); None: it was not measured.
    """

    orientation: str = "RAS"
    spacing: tuple[float, float, float] | None = None
    shape: tuple[int, int, int] | None = None
    intensity: str = "percentile"
    low: float = 0.5
    high: float = 99.5
    align: str = "affine"
    steps: int = 2
    knows: tuple[float, float] | None = None

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
        if self.knows is not None and not 0 < self.knows[0] <= self.knows[1] < math.inf:
            raise ValueError("knows must be two sizes in mm, the smaller one first")

    def beyond(self, size: float) -> float:
        """Return how many times larger than the largest (above 1) or than the smallest (below 1) of the sizes known;
        else 1.

        Args:
            size: of an image's object, mm.
        """
        if self.knows is None:
            return 1.0
        return size / min(max(size, self.knows[0]), self.knows[1])

    def scaled(self, factor: float) -> Preprocessing:
        """Return the same on a working grid that is ``factor`` times coarser."""
        if self.spacing is None:
            return self
        i, j, k = self.spacing
        return dataclasses.replace(self, spacing=(factor * i, factor * j, factor * k))


def working_grid(fixed: Grid, preprocessing: Preprocessing, multiple_of: int) -> Grid:
    """Return the grid the network works on; it covers the whole fixed image.

    An image that already lies on a grid the network takes keeps its voxels, at most turned; others get a rim. The grid
    has at least two cells of the coarsest feature: networks that normalize over a feature's voxels refuse one.
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


def general(*images: Tensor) -> Preprocessing:
    """Return how images reach search and fit: CT by a window, others from their background to a percentile.

    A lower percentile would take what is dark in the object for background, such as the white matter of a T2 image.
    Images are taken for CT if each shows air near -1000 and tissue, from fat on, of a usual density. What lies in lungs
    is seen where one of them shows lungs; else the window is that of soft tissue, by which organs come together better.
    """
    values = [sampled(image).float() for image in images]
    if not all(_is_ct(some) for some in values):
        return Preprocessing(low=0.0)
    low, high = HOUNSFIELD if any(_shows_lungs(some) for some in values) else SOFT_TISSUE
    return Preprocessing(intensity="window", low=low, high=high)


def _is_ct(values: Tensor) -> bool:
    """Return whether values may be Hounsfield units: some of air (what was not scanned may be lower), some tissue."""
    air = (values > 1.1 * HOUNSFIELD[0]) & (values < HOUNSFIELD[0] / 2)
    shares = [float(which.float().mean()) for which in (air, values > _FAT)]
    return min(shares) >= _LEAST_SHARE and float(values[values > HOUNSFIELD[0]].median()) < HOUNSFIELD[1]


def _shows_lungs(values: Tensor) -> bool:
    """Return whether values of a CT scan are those of lungs and what is around them."""
    lungs = (values > _LUNGS[0]) & (values < _LUNGS[1])
    return int(lungs.sum()) > _LUNG_SHARE * int((values > _FAT).sum())


def sampled(values: Tensor, count: int = 250_000) -> Tensor:
    """Draw at most ``count`` of a tensor's values, (n,), at random; the same ones every time and on every device.

    A stride would do for noise, but not for images: one that is a multiple of an axis reads a single slice of them.
    """
    values = values.flatten()
    return values if values.numel() <= count else values[sampled_places(values.numel(), count).to(values.device)]


def sampled_places(length: int, count: int) -> Tensor:
    """Draw ``count`` random places in a list of this length, (count,), the same ones every time."""
    return torch.randint(length, (count,), generator=torch.Generator().manual_seed(_SEED))


def background_of(values: Tensor) -> float:
    """Return the value of the background: foreground is what is brighter.

    It is the most frequent value that has at most half as many voxels below it as it holds itself, and no more below
    than above: exact black, even where a few voxels are darker yet. There may be more below if it is one value, farther
    down than twice what the image is brighter: what lies outside of a field of view was filled with it. An image
    without such a value has its minimum for it, which leaves out next to nothing.

    Args:
        values: of an image or a sample of it, any shape.
    """
    value, count = torch.unique(values, return_counts=True)
    below = count.cumsum(0) - count
    above = values.numel() - below - count
    brighter = values.float().quantile(0.995) - value
    filled = (value - value[0] > 2 * brighter) & (below <= 1.02 * count[0]) & (above >= _LEAST_SHARE * values.numel())
    fits = (count >= 2 * below) & ((above >= below) | filled) & (count >= _LEAST_SHARE * values.numel())
    return float(value[torch.where(fits, count, -1).argmax()]) if bool(fits.any()) else float(value[0])


def foreground_of(data: Tensor) -> Tensor:
    """Return which voxels are brighter than the background, see :func:`background_of`; any shape, bool."""
    return data > background_of(sampled(data))


def normalize(data: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale intensities as the network saw them in training, any shape, float32.

    Percentiles are read off a random sample of the voxels, which moves them by less than the noise. Where the lower one
    would take a good part of the foreground with it, as in an image of few values, the background stands for it.
    """
    data = data.float()
    if preprocessing.intensity == "none":
        return data
    low, high = preprocessing.low, preprocessing.high
    if preprocessing.intensity == "percentile":
        values = sampled(data)
        background = background_of(values)
        inside = values[values > background]
        if inside.numel() == 0:  # an object so small that the sample has missed it
            inside = sampled(data[data > background])
        if inside.numel() == 0:
            return torch.zeros_like(data)
        low, high = torch.quantile(inside, torch.tensor([low / 100, high / 100], device=data.device)).tolist()
        if float((inside <= low).float().mean()) > _MOST_CLIPPED:
            low = background
    if not high > low:
        high = low + 1e-6 * max(1.0, abs(low))
    return ((data - low) / (high - low)).clamp(0, 1)


def normalized(image: Volume, preprocessing: Preprocessing, name: str) -> Volume:
    """Return an image as the network takes it, noise in its air made flat.

    Args:
        image: its intensities as they were read.
        preprocessing: of the model's card.
        name: what to call the image in a refusal.

    Raises:
        MorphSeekError: nothing is left to see: every voxel has one value then.
    """
    data = normalize(image.data, preprocessing)
    low, high = float(data.min()), float(data.max())
    if not high > low:  # NaN too
        values = f"{float(image.data.min()):g} to {float(image.data.max()):g}"
        if preprocessing.intensity == "window":
            window = f"{preprocessing.low:g} to {preprocessing.high:g}"
            raise MorphSeekError(
                f"{name} has intensities from {values}, and the model sees those from {window} only, where the image "
                "is constant; check its rescale slope and intercept, or choose another model."
            )
        raise MorphSeekError(
            f"{name} has intensities from {values}, but almost all of its voxels have one value, so that there is "
            "nothing to register; check that it is the one you mean."
        )
    return Volume(quiet_background(data), image.grid)
