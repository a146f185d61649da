"""What a network has learned to find in each of two images by itself, for search, fit and judge to compare.

Features are probabilities of labels without that of the background, each image's on a grid of its own; nothing of the
other image is known to them, so that they are made once and then brought along like an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..networks.devices import network_autocast
from ..networks.model_file import Card
from ..networks.policy import RegistrationModel
from ..protocol.job import Job
from ..space import fields
from ..space.geometry import Grid, Transform, Volume, index_points, resample, smooth_for_spacing, world_spacing
from ..space.preprocessing import Preprocessing, working_grid
from .pyramid import Coarse, block_means

MOST_VALUES = 100_000_000
"""Features times voxels that are compared at once: 400 MB for each image."""
_FOUND = 0.5  # the probability from which on a voxel shows a label
_FEWEST = 8  # voxels of the working grid
_LARGER = 3.0  # times, or smaller, than what the training's cases hold is something else
_SURE = 0.5  # of its expected volume, in which a label is the likeliest
_MISSING = 0.1  # of what they hold: less is a label that is not there


@dataclass(frozen=True)
class Features:
    """Those of one image.

    Attributes:
        maps: (1, labels, i, j, k), probabilities.
        grid: of their voxels.
    """

    maps: Tensor
    grid: Grid

    @classmethod
    def of(cls, network: RegistrationModel, image: Volume, preprocessing: Preprocessing, job: Job) -> Features:
        """Find them in an image whose intensities are as the network takes them, on the device of the network."""
        grid = working_grid(image.grid, preprocessing, network.multiple_of)
        device = next(network.parameters()).device
        smooth = smooth_for_spacing(image, world_spacing(grid))
        seen = resample(smooth, grid, device=device, job=job).data[None, None].to(device)
        job.check()
        with torch.no_grad(), network_autocast(device):
            found = network.found(seen)
        assert found is not None  # a network whose features are compared has some
        return cls(found, grid)

    def found(self, card: Card | None = None) -> bool:
        """Return whether labels are there: any of them, or those of a card, as many as half of what each of its cases
        had about as large as it says."""
        if card is None or not card.volumes:
            return sum(self._counts) >= _FEWEST
        alike = [1 / _LARGER <= size <= _LARGER for size in self.sizes(card).values()]
        return 2 * sum(alike) >= (card.fewest or len(alike))

    def sizes(self, card: Card) -> dict[int, float]:
        """Return how large is what was found for each channel, over what the card says."""
        spacing = card.preprocessing.spacing  # of objects that are larger or smaller, the grid is that much coarser
        voxel = float(np.prod(self.grid.spacing if spacing is None else spacing)) / 1000
        return {channel: voxel * self._counts[channel - 1] / volume for channel, volume in card.volumes.items()}

    @cached_property
    def decided(self) -> Features:
        """What :func:`decided` makes of these."""
        return replace(self, maps=decided(self.maps))

    @cached_property
    def _counts(self) -> list[int]:
        """Return the voxels of each channel."""
        counts: list[int] = (self.maps > _FOUND).sum(dim=(0, 2, 3, 4)).tolist()
        return counts

    def on(self, grid: Grid, transform: Transform) -> Tensor:
        """Return them at the voxels of another grid, (1, labels, i, j, k), as smooth as that.

        Args:
            grid: the other.
            transform: its points -> points of this image, LPS mm.
        """
        maps, own = block_means(self.maps, self.grid, grid)
        return fields.sample(maps, index_points(grid, transform, own, maps.device), padding="border")


def likeliest(maps: Tensor) -> Tensor:
    """Return the likeliest channel of each voxel, from 1 on, or 0 for the background, (n, 1, i, j, k) int64, of
    probabilities without that of the background, (n, labels, i, j, k)."""
    background = 1 - maps.sum(dim=1, keepdim=True)
    return torch.cat([background, maps], dim=1).argmax(dim=1, keepdim=True)


def decided(maps: Tensor) -> Tensor:
    """Return 1 for the label that is likeliest at a voxel and 0 for all others, or for all where the background is.

    A fit brings the moving image's probabilities onto this, not onto the fixed image's. The expected Dice of a label is
    about 2 sum f m / sum (f + m), of probabilities f and of warped ones m. It is highest where m is 1 wherever f is
    above half of that Dice, and 0 elsewhere, and not where m equals f: what is certain in the moving image is to fill
    what is likely in the fixed one. A label that is likeliest in less than half of the volume that its probabilities
    add up to is too uncertain for that, and stays as it is.

    Args:
        maps: (n, labels, i, j, k), probabilities without that of the background.
    """
    channels = torch.arange(1, maps.shape[1] + 1, device=maps.device).view(1, -1, 1, 1, 1)
    found = (likeliest(maps) == channels).to(maps)
    space = (0, 2, 3, 4)
    sure = found.sum(dim=space) >= _SURE * maps.sum(dim=space)
    return torch.where(sure.view(1, -1, 1, 1, 1), found, maps)


@dataclass(frozen=True)
class Learned:
    """The features of a fixed and a moving image."""

    fixed: Features
    moving: Features

    def common(self, card: Card) -> Learned | None:
        """Return those of labels that are there in both images; None where there are none.

        The cases of one modality may have fewer labels than those of the other, and an organ may be gone: what is found
        in one image alone would be shrunk to nothing.
        """
        sizes = [features.sizes(card) for features in (self.fixed, self.moving)]
        gone = {channel for channel in card.volumes if min(side[channel] for side in sizes) < _MISSING}
        kept = [n for n in range(self.fixed.maps.shape[1]) if n + 1 not in gone]
        if not kept:
            return None
        return self if not gone else Learned(*(replace(f, maps=f.maps[:, kept]) for f in (self.fixed, self.moving)))

    def compared(self, grid: Grid, alignment: Transform, swapped: bool = False) -> tuple[Tensor, Tensor]:
        """Return what a fit compares on a grid, (1, labels, i, j, k) each: what is :func:`decided` of the image that is
        fitted to, and what was found in the one that moves.

        Args:
            grid: of the fixed image.
            alignment: fixed point -> moving point, LPS mm.
            swapped: the fixed image moves, and the aligned moving one is fitted to.
        """
        fixed, moving = np.eye(4), alignment
        if swapped:
            return self.moving.decided.on(grid, moving), self.fixed.on(grid, fixed)
        return self.fixed.decided.on(grid, fixed), self.moving.on(grid, moving)

    def coarse(self, coarse: Coarse) -> Coarse:
        """Return two images as they are judged, with their features in place of their intensities."""
        moving, grid = block_means(self.moving.maps, self.moving.grid, coarse.grid)
        return replace(coarse, fixed=self.fixed.decided.on(coarse.grid, np.eye(4)), moving=moving, moving_grid=grid)

    def levels(self, wanted: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the levels of a crop of ``shape`` on which so many features can be compared, coarse to fine."""
        count = self.fixed.maps.shape[1] * math.prod(shape)
        return tuple(level for level in wanted if count / 8**level <= MOST_VALUES) or wanted[:1]
