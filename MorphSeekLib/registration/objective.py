"""What the fit lowers on one level, with its gradient written out: no autograd graph is built.

A level is a grid of voxels with an even number along each axis. The displacement lives on control points, the centers
of blocks of 2x2x2 voxels, and is linear along each axis between them, so that a voxel takes 3/4 of the nearer and 1/4
of the farther point along each axis, and a level's field is exactly one of the next, finer level. The objective is

    -sum of squared block correlations, or a weight times squared differences of features, or both
    + lambda 8/9 sum |du/2|^2 + kappa sum relu(0.05 - det),

over blocks and over differences of neighboring control points. Block correlation: W, W^2 and F W are summed over
blocks, then over five blocks along each axis, a window of ten voxels; with n = 1000, or as many of these as both images
see, C, U and V as in :func:`MorphSeekLib.measures.similarity.lncc` its value is C^2 / (U V + epsilon).

This is the form for every device; :mod:`.kernels` has the same for the CPU, compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measures.similarity import box_sum
from ..space import fields

EPSILON = 1e-3
"""Of the correlation, for intensities in [0, 1]."""
SHOWN = 0.02
"""Of the range of intensities: darker voxels are background."""
WANTED = 0.05
"""Determinants below it are pushed up."""
_WINDOW = 5  # blocks
_COUNT = (2 * _WINDOW) ** 3  # voxels of a window
_FEWEST = 200  # of them, that both images must see where they are to be correlated
_INSIDE = 0.8  # of a window's voxels, that both images show where it lies inside of them


class Energy(NamedTuple):
    """An objective, a scalar, and its gradient by the control points, (1, 3, a, b, c)."""

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Maps:
    """Learned features that are compared beside the intensities.

    Attributes:
        fixed, moving: (1, channels, 2 a, 2 b, 2 c), as for :class:`Level`.
        weight: of their squared differences, a voxel.
    """

    fixed: Tensor
    moving: Tensor
    weight: float


@dataclass(frozen=True)
class Level:
    """What is compared on one level; (a, b, c) control points, (2 a, 2 b, 2 c) voxels.

    Attributes:
        fixed, moving: (1, channels, 2 a, 2 b, 2 c): one channel of intensities in [0, 1], or features. The moving
            image lies on the fixed one's grid; beyond the edge its edge value holds.
        counted: (a, b, c) bool, the blocks that count; the others are as if black in both images.
        features: compare by squared differences times this weight; None: by block correlation.
        diffusion, folding: lambda and kappa.
        valid: (a, b, c) bool, the blocks that both images see; None: all. Of the others nothing is known, while what is
            not counted otherwise is black.
        beside: what is compared too, where blocks are correlated; None: nothing.
    """

    fixed: Tensor
    moving: Tensor
    counted: Tensor
    features: float | None = None
    diffusion: float = 0.1
    folding: float = 800.0
    valid: Tensor | None = None
    beside: Maps | None = None

    @property
    def points(self) -> tuple[int, int, int]:
        """How many control points lie along each axis."""
        i, j, k = (n // 2 for n in self.fixed.shape[2:])
        return i, j, k


class Objective:
    """The objective of a level, on the level's device.

    Attributes:
        voxels: (1, 1, 2 a, 2 b, 2 c) bool, which voxels count.
        fixed_sums: S_F and U of each window, (1, 1, a, b, c) each; where blocks are correlated.
        shares: (1, 1, a, b, c), 1 / n of each window, or 0 where n is too few.
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        self.voxels = doubled(level.counted[None, None])
        self._fixed = level.fixed * self.voxels
        if level.features is None:
            sums = torch.cat([block_sum(self._fixed), block_sum(self._fixed.square())], dim=1)
            s, squares = box_sum(sums, _WINDOW).split(1, dim=1)
            self.shares = _shares(level).to(s.dtype)
            self.fixed_sums = s, (squares - s.square() * self.shares).clamp(min=0)

    def __call__(self, control: Tensor) -> Energy:
        """Return the objective of control points (1, 3, a, b, c), voxels of the level."""
        points = upsample(control)
        points += fields.identity(points.shape[2:], like=points)
        value, slope = self.alike(self._warped(points))
        by_points = _sample_backward(slope * self.voxels, self.level.moving, points)
        if self.level.beside is not None:
            maps = self.level.beside
            found = fields.sample(maps.moving, points, padding="border")
            difference = self.voxels * (found - maps.fixed)
            value = value + maps.weight * difference.square().sum()
            by_points = by_points + _sample_backward(2 * maps.weight * difference, maps.moving, points)
        gradient = upsample_transposed(by_points)
        smooth = diffusion(control, self.level.diffusion)
        unfolded = folding(control, self.level.folding)
        return Energy(value + smooth.value + unfolded.value, gradient.add_(smooth.gradient).add_(unfolded.gradient))

    def _warped(self, points: Tensor) -> Tensor:
        return self.voxels * fields.sample(self.level.moving, points, padding="border")

    def alike(self, warped: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective's first term, and its slope by the warped image (1, channels, 2 a, 2 b, 2 c), which is
        zero where blocks do not count."""
        if self.level.features is not None:
            difference = warped - self._fixed
            return self.level.features * difference.square().sum(), 2 * self.level.features * difference
        moved, cross, s = self._correlated(warped)
        fixed, fixed_variance = self.fixed_sums
        by_cross = 2 * s
        by_variance = by_cross * s * fixed_variance
        by_sum = (by_cross * fixed - by_variance * moved) * self.shares
        weights = box_sum(torch.cat([by_cross, by_variance, by_sum], dim=1), _WINDOW)
        by_cross, by_variance, by_sum = doubled(weights).split(1, dim=1)
        return -(cross * s).sum(), by_sum + warped * by_variance - self._fixed * by_cross

    def correlation(self, warped: Tensor) -> Tensor:
        """Return the squared correlation of each window, C^2 / (U V + epsilon), (1, 1, a, b, c); 0 where too little of
        it is seen."""
        _, cross, s = self._correlated(warped)
        return cross * s

    def contrast(self, warped: Tensor) -> Tensor:
        """Return whether the images grow brighter together inside of what they show, a scalar from 1 to -1.

        It is the share of the squared correlation that has the sign plus, less that with the sign minus, over windows
        that lie inside; at the rim of two objects on black every pair of images grows brighter together.
        """
        _, cross, s = self._correlated(warped)
        shown = block_sum(((self._fixed > SHOWN) & (warped > SHOWN)).float())
        value = cross * s * (box_sum(shown, _WINDOW) > _INSIDE * _COUNT) * self.level.counted
        return (value * cross.sign()).sum() / value.sum().clamp(min=1e-6)

    def _correlated(self, warped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return S_W, C and C / (U V + epsilon) of each window."""
        sums = torch.cat([block_sum(warped), block_sum(warped.square()), block_sum(warped * self._fixed)], dim=1)
        moved, squares, products = box_sum(sums, _WINDOW).split(1, dim=1)
        fixed, fixed_variance = self.fixed_sums
        variance = (squares - moved.square() * self.shares).clamp(min=0)
        cross = products - fixed * moved * self.shares
        return moved, cross, torch.where(self.shares > 0, cross / (fixed_variance * variance + EPSILON), 0)


def _shares(level: Level) -> Tensor:
    """Return 1 / n of each window, (1, 1, a, b, c): n voxels of it are seen by both images; 0 where they are few."""
    if level.valid is None:
        return level.fixed.new_full((1, 1, *level.points), 1 / _COUNT)
    unseen = box_sum((~level.valid[None, None]).to(level.fixed.dtype), _WINDOW)
    count = _COUNT - 8 * unseen.round()
    return torch.where(count >= _FEWEST, 1 / count.clamp(min=1), 0)


def block_sum(voxels: Tensor) -> Tensor:
    """Sum (n, channels, 2 a, 2 b, 2 c) over blocks of 2x2x2: (n, channels, a, b, c)."""
    return 8 * F.avg_pool3d(voxels, 2)


def doubled(blocks: Tensor) -> Tensor:
    """Give the eight voxels of each block its value."""
    return blocks.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)


def upsample(control: Tensor) -> Tensor:
    """Return the field (n, 3, 2 a, 2 b, 2 c) of control points (n, 3, a, b, c); beyond the outermost their value
    holds."""
    return F.interpolate(control, scale_factor=2, mode="trilinear", align_corners=False)


def upsample_transposed(field: Tensor) -> Tensor:
    """Return the transpose of :func:`upsample`, of (n, 3, 2 a, 2 b, 2 c)."""
    for axis in (4, 3, 2):
        even, odd = field.unflatten(axis, (-1, 2)).unbind(axis + 1)
        out = (even + odd) * 0.75
        n = out.shape[axis]
        out.narrow(axis, 0, n - 1).add_(even.narrow(axis, 1, n - 1), alpha=0.25)
        out.narrow(axis, 1, n - 1).add_(odd.narrow(axis, 0, n - 1), alpha=0.25)
        out.select(axis, 0).add_(even.select(axis, 0), alpha=0.25)
        out.select(axis, n - 1).add_(odd.select(axis, n - 1), alpha=0.25)
        field = out
    return field


def finer(control: Tensor) -> Tensor:
    """Return the control points of the next, finer level: the same map, in voxels of that level."""
    return 2 * upsample(control)


def diffusion(control: Tensor, weight: float) -> Energy:
    """Return weight 8/9 sum |du/2|^2 over neighboring control points."""
    weight = weight * 2 / 9
    value, gradient = control.new_zeros(()), torch.zeros_like(control)
    for axis in (2, 3, 4):
        difference = control.diff(dim=axis)
        value = value + weight * difference.square().sum()
        n = difference.shape[axis]
        gradient.narrow(axis, 1, n).add_(difference, alpha=2 * weight)
        gradient.narrow(axis, 0, n).sub_(difference, alpha=2 * weight)
    return Energy(value, gradient)


def folding(control: Tensor, weight: float) -> Energy:
    """Return weight sum relu(0.05 - det) over cells of control points, by one-sided differences from their first
    corner."""
    a, b, c = (n - 1 for n in control.shape[2:])
    here = control[0, :, :a, :b, :c]
    ahead = control[0, :, 1:, :b, :c], control[0, :, :a, 1:, :c], control[0, :, :a, :b, 1:]
    edges = [(other - here) / 2 for other in ahead]
    for axis, edge in enumerate(edges):
        edge[axis] += 1
    s, t, r = edges
    slopes = [torch.linalg.cross(t, r, dim=0), torch.linalg.cross(r, s, dim=0), torch.linalg.cross(s, t, dim=0)]
    lacking = torch.relu(WANTED - (s * slopes[0]).sum(dim=0))
    push = (lacking > 0) * (weight / 2)
    gradient = torch.zeros_like(control)
    for axis, slope in enumerate(slopes):
        moved = push * slope
        starts = [1 if other == axis else 0 for other in range(3)]
        gradient[0, :, starts[0] : starts[0] + a, starts[1] : starts[1] + b, starts[2] : starts[2] + c] -= moved
        gradient[0, :, :a, :b, :c] += moved
    return Energy(weight * lacking.sum(), gradient)


def _sample_backward(slope: Tensor, image: Tensor, points: Tensor) -> Tensor:
    """Return the slope by the points (1, 3, ...) of what was sampled there, of its slope (1, channels, ...)."""
    with torch.enable_grad():
        at = points.detach().requires_grad_()
        sampled = fields.sample(image, at, padding="border")
    return torch.autograd.grad(sampled, at, slope)[0]
