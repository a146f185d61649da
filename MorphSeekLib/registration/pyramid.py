"""The two images as search, fit and judge see them: along the fixed image's axes, at several resolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..measures.similarity import SIMILARITIES
from ..protocol.job import SILENT, Job
from ..space import fields
from ..space.geometry import (
    DenseTransform,
    Grid,
    Transform,
    Volume,
    dense_from_voxels,
    in_box,
    index_points,
    map_voxels,
    resample,
    smooth_for_spacing,
    voxel_displacement,
    world_spacing,
)
from .descent import counted_blocks, halved, whole_blocks
from .objective import SHOWN, Level, Objective

COARSEST = 2
"""The level on which results are judged: voxels are 2^2 times as long as those of level 0 ..."""
_LEAST = 16
"""... but for fixed images that would have fewer voxels than this along an axis there ..."""
_ACROSS = 4
"""... and moving ones that would be thinner than so many: a block of two that they see wholly may not lie in them."""
MOST_VOXELS = 20_000_000
"""The most on level 0."""
_UNEVEN = 2.0  # times longer than the shortest, an edge of a voxel is divided
_MULTIPLE = 16
_RIM = 4  # voxels around what the fixed image shows
_REACH = 32  # voxels around a mask, as far as a search reaches


@dataclass(frozen=True)
class Crop:
    """A fixed image around what it shows.

    Attributes:
        grid: along the fixed image's axes; sizes are multiples of 16.
        lattice: the same voxels as far as the fixed image reaches.
        offset: (3,) the grid's first voxel in the lattice; even.
        image: (1, 1, i, j, k) in [0, 1]; edge values beyond the lattice.
        seen: (1, 1, i, j, k) bool, where the lattice is.
        counts: (1, 1, i, j, k) bool, what a mask leaves of it; None for all.
    """

    grid: Grid
    lattice: Grid
    offset: tuple[int, int, int]
    image: Tensor
    seen: Tensor
    counts: Tensor | None = None

    @classmethod
    def of(cls, fixed: Volume, device: torch.device, job: Job = SILENT, counts: Tensor | None = None) -> Crop:
        """Crop a fixed image whose intensities lie in [0, 1].

        Args:
            fixed: the image.
            device: where to compute.
            job: checked.
            counts: (i, j, k) bool, which of its voxels count; None for all.
        """
        lattice, data, marks = lattice_of(fixed.grid), fixed.data, counts
        if not lattice.same_as(fixed.grid):
            data = resample(smooth_for_spacing(fixed, world_spacing(lattice)), lattice, device=device, job=job).data
            if counts is not None:
                mask = Volume(counts.to(torch.uint8), fixed.grid)
                marks = resample(mask, lattice, mode="nearest", device=device, job=job).data > 0
        begin, size = _box(data > SHOWN, marks)
        affine = lattice.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ begin
        image = _cut(data.float(), begin, size, "replicate").to(device)
        seen = _cut(torch.ones(lattice.shape), begin, size, "constant").to(device) > 0
        i, j, k = begin.tolist()
        left = None if marks is None else _cut(marks.float(), begin, size, "constant").to(device) > 0
        return cls(_grid(size, affine), lattice, (i, j, k), image, seen, left)


@dataclass(frozen=True)
class Coarse:
    """Two images as they are judged: the fixed one on the coarsest level, the moving one as smooth on its own grid.

    Attributes:
        grid: of the fixed image; an even number of voxels along each axis.
        fixed, moving: (1, 1, i, j, k) in [0, 1].
        counted: blocks of 2x2x2 voxels that count, bool.
        valid: blocks that masks leave of both images, bool; None for all.
        moving_grid: of the moving image.
    """

    grid: Grid
    fixed: Tensor
    counted: Tensor
    valid: Tensor | None
    moving: Tensor
    moving_grid: Grid

    @classmethod
    def of(cls, crop: Crop, moving: Volume, alignment: Transform, counts: Tensor | None = None) -> Coarse:
        """Return the images of a crop and a moving image, both in [0, 1]; what either does not see is not counted.

        Args:
            crop: of the fixed image.
            moving: the image.
            alignment: fixed point -> moving point, LPS mm: where the moving image lies.
            counts: (i, j, k) bool, which voxels of the moving image count; None for all.
        """
        fixed, seen, level = crop.image, crop.seen.float(), 0
        longest = (moving.grid.spacing * moving.grid.shape).min() / _ACROSS
        while (
            level < COARSEST
            and min(fixed.shape[2:]) >= 2 * _LEAST
            and 2 ** (level + 1) * crop.grid.spacing.max() <= longest
        ):
            fixed, seen, level = halved(fixed), halved(seen), level + 1
        grid = level_grid(crop.grid, level)
        block = averaged(moving, grid)
        image = block.data[None, None].to(fixed.device)
        points = index_points(grid, alignment, block.grid, fixed.device)
        at = index_points(grid, alignment, moving.grid, fixed.device)
        sees = in_box(at, moving.grid) & (seen > 0.99)
        left = _both(crop.counts, counts, at, level)
        counted = counted_blocks(
            fixed, fields.sample(image, points, padding="border"), sees if left is None else sees & left
        )
        return cls(grid, fixed, counted, None if left is None else whole_blocks(left), image, block.grid)


@dataclass(frozen=True)
class Pyramid:
    """A fixed and an aligned moving image on the crop's grid, and what either makes on other levels.

    Attributes:
        crop: the fixed image.
        source: the moving image on its own grid, in [0, 1].
        alignment: fixed point -> moving point, LPS mm.
        moving: (1, 1, i, j, k), brought onto the crop's grid by the alignment; edge values beyond the image.
        seen: (1, 1, i, j, k) bool, where both images lie.
        counts: (1, 1, i, j, k) bool, what masks leave of both; None for all.
        moving_counts: (i, j, k) bool, which voxels of the moving image count; None for all.
    """

    crop: Crop
    source: Volume
    alignment: Transform
    moving: Tensor
    seen: Tensor
    counts: Tensor | None = None
    moving_counts: Tensor | None = None

    @classmethod
    def of(
        cls, crop: Crop, moving: Volume, alignment: Transform, job: Job = SILENT, counts: Tensor | None = None
    ) -> Pyramid:
        """Bring a moving image whose intensities lie in [0, 1], and what counts of it, onto the crop's grid."""
        device = crop.image.device
        moved = _moved(moving, crop.grid, alignment, device, job)
        at = index_points(crop.grid, alignment, moving.grid, device)
        seen = crop.seen & in_box(at, moving.grid)
        return cls(crop, moving, alignment, moved, seen, _both(crop.counts, counts, at, 0), counts)

    def after(self, displacement: DenseTransform | None) -> Pyramid:
        """Return the same images with the moving one's mask where a displacement before the alignment brings it."""
        if displacement is None or self.moving_counts is None:
            return self
        there = voxel_displacement(displacement, self.crop.grid, self.crop.image.device)
        at = map_voxels(there, self.crop.grid, self.alignment, self.source.grid)
        return replace(self, counts=_both(self.crop.counts, self.moving_counts, at, 0))

    def swapped(self) -> Pyramid:
        """Return the images in exchanged roles on the same grid: the fixed one moves to the aligned moving one."""
        crop, marks = self.crop, None
        if self.moving_counts is not None:
            at = index_points(crop.grid, self.alignment, self.source.grid, self.moving.device)
            marks = _both(None, self.moving_counts, at, 0)
        own = None if crop.counts is None else crop.counts[0, 0].cpu()
        return Pyramid(
            replace(crop, image=self.moving, seen=self.seen, counts=marks),
            Volume(crop.image[0, 0].cpu(), crop.grid),
            np.eye(4),
            crop.image,
            self.seen,
            self.counts,
            own,
        )

    def images(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return fixed, moving and where both are seen, (1, 1, i, j, k), of a level.

        Args:
            level: 0 for the crop's own grid; each above it is coarser by a factor of two, -1 finer by two.
        """
        if level < 0:
            return self._finer
        fixed, moving, seen = self.crop.image, self.moving, self.seen.float()
        for _ in range(level):
            fixed, moving, seen = halved(fixed), halved(moving), halved(seen)
        return fixed, moving, seen > 0.99

    def left(self, level: int) -> Tensor | None:
        """Return what masks leave of both images on a level, (1, 1, i, j, k) bool; None for all."""
        if self.counts is None or level < 0:
            return self.counts if self.counts is None else F.interpolate(self.counts.float(), scale_factor=2) > 0
        left = self.counts.float()
        for _ in range(level):
            left = halved(left)
        return left > 0.99

    @cached_property
    def _finer(self) -> tuple[Tensor, Tensor, Tensor]:
        fixed = F.interpolate(self.crop.image, scale_factor=2, mode="trilinear", align_corners=False)
        moving = _moved(self.source, self.grid(-1), self.alignment, fixed.device, SILENT)
        return fixed, moving, F.interpolate(self.seen.float(), scale_factor=2) > 0

    def counts_of_each(self, level: int) -> tuple[Tensor, Tensor] | None:
        """Return how much each voxel of a level counts for the fixed and for the aligned moving image's mask, (1, 1, i,
        j, k) from 0 to 1; None where both count everywhere."""
        if self.counts is None:
            return None
        own = self.crop.counts
        moving = None
        if self.moving_counts is not None:
            at = index_points(self.crop.grid, self.alignment, self.source.grid, self.moving.device)
            moving = _both(None, self.moving_counts, at, 0)
        shares = [torch.ones_like(self.moving) if one is None else one.float() for one in (own, moving)]
        for _ in range(level):
            shares = [halved(share) for share in shares]
        return shares[0], shares[1]

    def whole(self, number: int) -> Tensor:
        """Return the blocks of a level, (a, b, c) bool, that both images see and that masks leave of both."""
        seen, left = self.images(number)[2], self.left(number)
        return whole_blocks(seen if left is None else seen & left)

    def level(self, number: int, similarity: str, diffusion: float, folding: float) -> Level:
        """Return what a fit compares on a level; the number as for :meth:`images`, the weights as in
        :class:`.objective.Level`."""
        fixed, moving, seen = self.images(number)
        left = self.left(number)
        counted = counted_blocks(fixed, moving, seen if left is None else seen & left)
        valid = None if left is None else whole_blocks(left)
        if similarity == "lncc":
            return Level(fixed, moving, counted, None, diffusion, folding, valid)
        measure = SIMILARITIES[similarity]
        features = measure.prepare(fixed), measure.prepare(moving)
        return Level(*features, counted, measure.fit_weight / features[0].shape[1], diffusion, folding)

    def grid(self, level: int) -> Grid:
        """Return the grid of a level's voxels."""
        return level_grid(self.crop.grid, level)

    def contrast(self) -> float:
        """Return whether the images grow brighter together; see :meth:`.objective.Objective.contrast`."""
        level = self.level(0, "lncc", 0.0, 0.0)
        objective = Objective(level)
        return float(objective.contrast(level.moving * objective.voxels))

    def displacement(self, control: Tensor, level: int) -> DenseTransform:
        """Return the map that control points of a level make before the alignment, on nodes that are control points.

        The nodes go on beyond the crop, with the outermost values, until they cover the fixed image.

        Args:
            control: (1, 3, a, b, c), voxels of the level.
        """
        return dense_from_voxels(*self._nodes(control, level))

    def transform(self, control: Tensor, level: int) -> DenseTransform:
        """Return the whole map, alignment included, as :meth:`displacement` does."""
        return dense_from_voxels(*self._nodes(control, level), self.alignment)

    def control(self, displacement: DenseTransform, level: int) -> Tensor:
        """Return control points of a level, (1, 3, a, b, c) voxels, of a displacement before the alignment."""
        return 2 * voxel_displacement(displacement, self.grid(level + 1), self.crop.image.device)

    def _nodes(self, control: Tensor, level: int) -> tuple[Tensor, Grid]:
        """Return a displacement, and the grid in whose voxels it is."""
        points = np.array(control.shape[2:])
        before, after = _beyond(np.array(self.crop.offset), points, self.crop.lattice.shape, level)
        pad = [int(n) for axis in (2, 1, 0) for n in (before[axis], after[axis])]
        grid = _nodes(self.crop.lattice, np.array(self.crop.offset), points, level, before, after)
        return F.pad(control / 2, pad, mode="replicate"), grid


def level_grid(grid: Grid, level: int) -> Grid:
    """Return the voxels of a level of a pyramid on a grid, 2^level times as long."""
    size = 2.0**level
    to_grid = np.diag([size, size, size, 1.0])
    to_grid[:3, 3] = (size - 1) / 2
    return _grid(np.array(grid.shape) / size, grid.affine @ to_grid)


def nodes_around(lattice: Grid) -> Grid:
    """Return the grid of level 0's control points that covers a lattice; a crop's lie on it, as its offset is even."""
    none, points = np.zeros(3, int), (np.array(lattice.shape) + 1) // 2
    before, after = _beyond(none, points, lattice.shape, 0)
    return _nodes(lattice, none, points, 0, before, after)


def _beyond(
    offset: np.ndarray, points: np.ndarray, shape: tuple[int, int, int], level: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many control points of a level lie before and after a crop's to cover a lattice of a shape."""
    step = 2.0 * 2.0**level  # voxels of the lattice between control points
    first = offset + (step - 1) / 2
    last = first + step * (points - 1)
    before = np.maximum(np.ceil(first / step - 1e-6), 0).astype(int)
    return before, np.maximum(np.ceil((np.array(shape) - 1 - last) / step - 1e-6), 0).astype(int)


def _nodes(
    lattice: Grid, offset: np.ndarray, points: np.ndarray, level: int, before: np.ndarray, after: np.ndarray
) -> Grid:
    """Return the grid of control points of a level, with some more before and after."""
    step = 2.0 * 2.0**level
    to_lattice = np.diag([step, step, step, 1.0])
    to_lattice[:3, 3] = offset + (step - 1) / 2 - step * before
    return _grid(points + before + after, lattice.affine @ to_lattice)


def with_opposite_contrast(image: Volume) -> Volume:
    """Return an image in [0, 1] whose object is dark where it was bright; the background stays."""
    return Volume(torch.where(image.data > SHOWN, 1 + 2 * SHOWN - image.data, image.data), image.grid)


def lattice_of(fixed: Grid) -> Grid:
    """Return the fixed image's voxels, but for edges that are much longer than others, or too many of them.

    Returns:
        a grid along the same axes over the same extent.
    """
    spacing, shape = fixed.spacing, np.array(fixed.shape)
    wanted = spacing
    if spacing.max() > _UNEVEN * spacing.min():
        wanted = np.full(3, float(np.prod(spacing)) ** (1 / 3))
    crowd = float(np.prod(shape * spacing / wanted)) / MOST_VOXELS
    if crowd > 1:
        wanted = wanted * crowd ** (1 / 3)
    count = np.maximum(np.round(shape * spacing / wanted), 2).astype(int)
    if (count == shape).all():
        return fixed
    scale = shape / count
    to_fixed = np.diag([*scale, 1.0])
    to_fixed[:3, 3] = (scale - 1) / 2
    return _grid(count, fixed.affine @ to_fixed)


def _grid(shape: torch.Size | np.ndarray, affine: np.ndarray) -> Grid:
    i, j, k = (int(n) for n in shape)
    return Grid((i, j, k), affine)


def _both(fixed: Tensor | None, moving: Tensor | None, at: Tensor, level: int) -> Tensor | None:
    """Return what masks leave of both images on a level, (1, 1, i, j, k) bool; None for all.

    Args:
        fixed: (1, 1, i, j, k) bool, on level 0.
        moving: (i, j, k) bool, on the moving image's own grid.
        at: (1, 3, i, j, k), where the level's voxels lie in that.
        level: of ``at``.
    """
    left = None
    if fixed is not None:
        share = fixed.float()
        for _ in range(level):
            share = halved(share)
        left = share > 0.99
    if moving is not None:
        inside = fields.sample(moving.float()[None, None].to(at.device), at, padding="border") > 0.5
        left = inside if left is None else left & inside
    return left


def _box(shown: Tensor, counts: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Return first index (even) and size (a multiple of 16) along each axis of a box around what is shown, or around
    what a mask leaves of it as far as a search reaches."""
    begin, size = np.zeros(3, int), np.zeros(3, int)
    for axis in range(3):
        low, high = _extent(shown, axis)
        if counts is not None:
            first, last = _extent(shown & counts, axis)
            low, high = max(low, first - _REACH), min(high, last + _REACH)
        size[axis] = math.ceil((high - low + 2 * _RIM) / _MULTIPLE) * _MULTIPLE
        begin[axis] = low - (size[axis] - (high - low)) // 2
        begin[axis] -= begin[axis] % 2
    return begin, size


def _extent(shown: Tensor, axis: int) -> tuple[int, int]:
    """Return the first index along an axis at which anything is shown, and the one after the last."""
    one, other = (a for a in range(3) if a != axis)
    where = shown.any(dim=other).any(dim=one).nonzero()[:, 0]
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, shown.shape[axis])


def _cut(data: Tensor, begin: np.ndarray, size: np.ndarray, mode: str) -> Tensor:
    """Return (1, 1, *size): a box of data (i, j, k), padded where it reaches beyond."""
    ends = begin + size
    inside = [slice(max(b, 0), min(e, n)) for b, e, n in zip(begin, ends, data.shape, strict=True)]
    beyond = [(max(-b, 0), max(e - n, 0)) for b, e, n in zip(begin, ends, data.shape, strict=True)]
    return F.pad(data[tuple(inside)][None, None], [int(n) for pair in beyond[::-1] for n in pair], mode=mode)


def _moved(moving: Volume, grid: Grid, alignment: Transform, device: torch.device, job: Job) -> Tensor:
    """Return (1, 1, *grid.shape): a moving image as smooth as the grid, with edge values beyond it."""
    smooth = smooth_for_spacing(moving, world_spacing(grid)).data[None, None].to(device)
    job.check()
    return fields.sample(smooth, index_points(grid, alignment, moving.grid, device), padding="border")


def averaged(volume: Volume, onto: Grid) -> Volume:
    """Return the means of blocks of voxels that are about as large as those of a grid."""
    data, grid = block_means(volume.data.float()[None, None], volume.grid, onto)
    return Volume(data[0, 0].contiguous(), grid)


def block_means(data: Tensor, grid: Grid, onto: Grid) -> tuple[Tensor, Grid]:
    """Return the means of blocks of voxels (n, channels, i, j, k) of a grid that are about as large as those of another
    one, and the grid of the blocks."""
    spacing = float(onto.spacing.max())
    size = [int(max(1, min(round(spacing / s), n))) for s, n in zip(grid.spacing, grid.shape, strict=True)]
    data = F.avg_pool3d(data, size)
    to_first = np.diag([*size, 1.0])
    to_first[:3, 3] = (np.array(size) - 1) / 2
    return data, _grid(data.shape[2:], grid.affine @ to_first)
