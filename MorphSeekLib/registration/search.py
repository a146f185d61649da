"""Find large motion by coupled convex optimization over all displacements within reach.

Features of both images are averaged over cells, compared at every displacement of some cells each way, and the field is
found by turns: each cell takes the displacement that is best by features and near to its neighbors' mean, then the mean
is taken anew, while nearness counts more and more. Both directions are searched and made consistent with each other.

Source: Siebert, Hansen, Heinrich, "Fast 3D registration with accurate optimisation and little learning for Learn2Reg
2021" (ConvexAdam), whose settings are kept where nothing else was measured to be better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..space import fields

_NEARNESS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_CONSISTENT = 15  # iterations


@dataclass(frozen=True)
class Pass:
    """A search over all displacements of up to ``reach`` cells along each axis, a cell being ``cell`` voxels long."""

    cell: int
    reach: int


PASSES = (Pass(4, 5), Pass(3, 3))
"""The second begins where the first has ended."""
MOST_CELLS = 32_000
"""Of a level's first pass: their costs take 170 MB in each direction."""


def search(
    fixed: Tensor, moving: Tensor, passes: tuple[Pass, ...] = PASSES, check: Callable[[], None] = lambda: None
) -> Tensor:
    """Return control points of the displacement from fixed to moving.

    Args:
        fixed, moving: (1, channels, i, j, k) features on one grid; even sizes.
        passes: one after the other.
        check: called between steps; may raise to cancel.

    Returns:
        (1, 3, i/2, j/2, k/2) voxels, on the centers of blocks of 2x2x2 voxels.
    """
    shape = fixed.shape[2:]
    total = fixed.new_zeros(1, 3, *(n // 2 for n in shape))
    for number, one in enumerate(passes):
        warped = moving
        if number:
            points = F.interpolate(total, size=tuple(shape), mode="trilinear", align_corners=False)
            warped = fields.warp(moving, points, padding="border")
        step = _searched(fixed, warped, one, check)
        total = step if not number else _after(total, step)
    return total


def _after(outer: Tensor, step: Tensor) -> Tensor:
    """Return the control points of ``outer`` after ``step``, both in voxels, two of which lie between points."""
    return 2 * fields.compose(outer / 2, step / 2)


def _searched(fixed: Tensor, moving: Tensor, one: Pass, check: Callable[[], None]) -> Tensor:
    """Return control points of the displacement that a pass finds, consistent in both directions."""
    cells = [_cells(features, one.cell) for features in (fixed, moving)]
    there, back = (_one_way(a, b, one.reach, check) for a, b in (cells, cells[::-1]))
    for _ in range(_CONSISTENT):
        there, back = (
            0.5 * (there - fields.warp(back, there, padding="border")),
            0.5 * (back - fields.warp(there, back, padding="border")),
        )
    a, b, c = (n // 2 for n in fixed.shape[2:])
    # the center of block x lies at voxel 2 x + 0.5, that of cell y at cell y + (cell - 1) / 2
    at = (2 * fields.identity((a, b, c), like=there) + 0.5 - (one.cell - 1) / 2) / one.cell
    return one.cell * fields.sample(there, at, padding="border")


def _cells(features: Tensor, size: int) -> Tensor:
    """Return the means over cells; the last ones are completed by edge values."""
    pad = [n for axis in (4, 3, 2) for n in (0, -features.shape[axis] % size)]
    return F.avg_pool3d(F.pad(features, pad, mode="replicate"), size)


def _one_way(fixed: Tensor, moving: Tensor, reach: int, check: Callable[[], None]) -> Tensor:
    """Return the displacement of each cell, (1, 3, a, b, c) cells."""
    costs = _costs(fixed, moving, reach, check)  # (displacements, a, b, c)
    shape = fixed.shape[2:]
    side = torch.arange(-reach, reach + 1, device=fixed.device, dtype=costs.dtype)
    moves = torch.stack(torch.meshgrid(side, side, side, indexing="ij")).view(3, -1)
    squares = moves.square().sum(dim=0)
    flat = costs.flatten(1)
    found = moves[:, flat.argmin(dim=0)].view(1, 3, *shape)
    for nearness in _NEARNESS:
        check()
        mean = _mean(found)
        # |m - mean|^2 without what is the same for all displacements m
        near = torch.addmm(squares[:, None].expand(-1, flat.shape[1]), moves.T, mean[0].flatten(1), alpha=-2.0)
        found = moves[:, torch.add(flat, near, alpha=nearness).argmin(dim=0)].view(1, 3, *shape)
    return _mean(found)


def _costs(fixed: Tensor, moving: Tensor, reach: int, check: Callable[[], None]) -> Tensor:
    """Return the sum of squared differences at each displacement, blurred over cells: (displacements, a, b, c)."""
    a, b, c = fixed.shape[2:]
    side = 2 * reach + 1
    padded = F.pad(moving, [reach] * 6, mode="replicate")[0]
    costs = fixed.new_empty(side, side, side, a, b, c)
    for x in range(side):
        check()
        for y in range(side):
            # (channels, a, b, c, side): all displacements along the last axis at once
            rows = padded[:, x : x + a, y : y + b].unfold(3, c, 1).movedim(3, 0)
            costs[x, y] = (rows - fixed).square_().sum(dim=1)
    flat = costs.view(-1, 1, a, b, c)
    for axis in (2, 3, 4):
        flat = _blurred(flat, axis)
    return flat[:, 0]


def _blurred(maps: Tensor, axis: int) -> Tensor:
    """Blur by [1 2 3 2 1] / 9 along an axis; beyond the edge the edge's value holds."""
    pad = [0] * 6
    pad[8 - 2 * axis] = pad[9 - 2 * axis] = 2
    padded, n = F.pad(maps, pad, mode="replicate"), maps.shape[axis]
    out = padded.narrow(axis, 2, n) * (3 / 9)
    for start, weight in ((0, 1 / 9), (1, 2 / 9), (3, 2 / 9), (4, 1 / 9)):
        out.add_(padded.narrow(axis, start, n), alpha=weight)
    return out


def _mean(field: Tensor) -> Tensor:
    """Return the mean over 3x3x3 cells; edge values hold beyond the grid."""
    return F.avg_pool3d(F.pad(field, [1] * 6, mode="replicate"), 3, stride=1)
