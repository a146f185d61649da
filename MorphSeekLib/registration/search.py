"""Find large motion by coupled convex optimization over all displacements within reach.

Features of both images are averaged over cells, compared at every displacement of some cells each way, and the field is
found by turns: each cell takes the displacement that is best by features and near to its neighbors' mean, then the mean
is taken again, while nearness counts more and more. Both directions are searched and made consistent with each other.

Source: Siebert, Hansen, Heinrich, "Fast 3D registration with accurate optimisation and little learning for Learn2Reg
2021" (ConvexAdam), whose settings are kept where nothing else was measured to be better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.compiled import kernels
from ..space import fields

_NEARNESS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_CONSISTENT = 5  # iterations; the source's 15 smooth the field more, and warped labels overlap less


@dataclass(frozen=True)
class Pass:
    """A search over all displacements of up to ``reach`` cells along each axis, a cell being ``cell`` voxels long."""

    cell: int
    reach: int


PASSES = (Pass(4, 5), Pass(3, 3), Pass(2, 2))
"""Each begins where the one before has ended."""
SMALL = (Pass(2, 3), Pass(2, 1))
"""Of a small image."""
MOST_COSTS = 45_000_000
"""Of a pass, numbers of four bytes: 180 MB."""
_FEWEST_CELLS = 4_000


def costs_of(one: Pass, shape: Sequence[float]) -> int:
    """Return how many costs a pass compares in each direction on a grid of this many voxels along each axis."""
    return math.prod(math.ceil(n / one.cell) for n in shape) * (2 * one.reach + 1) ** 3


def level_for(shape: Sequence[int]) -> tuple[int, tuple[Pass, ...]]:
    """Return the level of a pyramid to search on, and the passes there.

    Args:
        shape: voxels of level 0; those of each coarser level are twice as long.

    Returns:
        the finest level on which no pass has more than :data:`MOST_COSTS`; level 0 and smaller cells for an image that
        would have few of them.
    """
    if math.prod(n / PASSES[0].cell for n in shape) < _FEWEST_CELLS:
        return 0, SMALL
    level = 0
    while max(costs_of(one, [n / 2**level for n in shape]) for one in PASSES) > MOST_COSTS:
        level += 1
    return level, PASSES


def search(
    fixed: Tensor,
    moving: Tensor,
    passes: tuple[Pass, ...] = PASSES,
    threads: int = 1,
    check: Callable[[], None] = lambda: None,
    counts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return control points of the displacement from fixed to moving.

    Args:
        fixed, moving: (1, channels, i, j, k) features on one grid; even sizes.
        passes: one after the other.
        threads: of the compiled kernels, where they are used.
        check: called between steps; may raise to cancel.
        counts: (1, 1, i, j, k), of the fixed and of the moving image: how much each voxel counts; None: all the same.

    Returns:
        (1, 3, i/2, j/2, k/2) voxels, on the centers of blocks of 2x2x2 voxels.
    """
    shape = fixed.shape[2:]
    total = fixed.new_zeros(1, 3, *(n // 2 for n in shape))
    if counts is not None:  # as one channel more, so that what is warped is warped together
        fixed, moving = (torch.cat(pair, dim=1) for pair in zip((fixed, moving), counts, strict=True))
    for number, one in enumerate(passes):
        warped = moving
        if number:
            points = F.interpolate(total, size=tuple(shape), mode="trilinear", align_corners=False)
            warped = fields.warp(moving, points, padding="border")
        step = _searched(fixed, warped, one, counts is not None, threads, check)
        total = step if not number else _after(total, step)
    return total


def _after(outer: Tensor, step: Tensor) -> Tensor:
    """Return the control points of ``outer`` after ``step``, both in voxels, two of which lie between points."""
    return 2 * fields.compose(outer / 2, step / 2)


def _searched(
    fixed: Tensor, moving: Tensor, one: Pass, counted: bool, threads: int, check: Callable[[], None]
) -> Tensor:
    """Return control points of the displacement that a pass finds, consistent in both directions.

    Where ``counted``, the last channel is how much each voxel counts.
    """
    cells = [_cells(features, one.cell) for features in (fixed, moving)]
    counts: list[Tensor | None] = [None, None]
    if counted:
        counts = [features[0, -1] for features in cells]
        cells = [features[:, :-1] for features in cells]
    (f, m), (f_counts, m_counts) = cells, counts
    there = _one_way(f, m, one.reach, f_counts, threads, check)
    back = _one_way(m, f, one.reach, m_counts, threads, check)
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
    return F.avg_pool3d(F.pad(features, pad, mode="replicate") if any(pad) else features, size)


def _one_way(
    fixed: Tensor, moving: Tensor, reach: int, counts: Tensor | None, threads: int, check: Callable[[], None]
) -> Tensor:
    """Return the displacement of each cell, (1, 3, a, b, c) cells; counts: (a, b, c)."""
    costs: _Costs
    counts = fixed.new_ones(fixed.shape[2:]) if counts is None else counts
    module = kernels("registration.search_kernels") if fixed.device.type == "cpu" else None
    if module is not None:
        costs = CompiledCosts(module, fixed, moving, reach, counts, threads, check)
    else:
        costs = TorchCosts(fixed, moving, reach, counts, check)
    found = costs.best(fixed.new_zeros(1, 3, *fixed.shape[2:]), 0.0)
    for nearness in _NEARNESS:
        check()
        found = costs.best(_mean(found), nearness)
    return _mean(found)


class _Costs(Protocol):
    """How unlike the cells of two images are at every displacement, times how much each cell counts."""

    def best(self, mean: Tensor, nearness: float) -> Tensor:
        """Return the displacement of each cell with the least cost + nearness |displacement - mean|^2.

        Args:
            mean: (1, 3, a, b, c) cells.
            nearness: weight.

        Returns:
            (1, 3, a, b, c) cells.
        """


class TorchCosts:
    """The costs by torch, on any device; nothing waits for it."""

    def __init__(
        self, fixed: Tensor, moving: Tensor, reach: int, counts: Tensor, check: Callable[[], None] = lambda: None
    ) -> None:
        side = torch.arange(-reach, reach + 1, device=fixed.device, dtype=fixed.dtype)
        self._moves = torch.stack(torch.meshgrid(side, side, side, indexing="ij")).view(3, -1)
        self._squares = self._moves.square().sum(dim=0)[:, None]
        self.costs = self._compared(fixed, moving, reach, counts, check)  # (displacements, a, b, c)

    def best(self, mean: Tensor, nearness: float) -> Tensor:
        flat = self.costs.flatten(1)
        # |m - mean|^2 without what is the same for all displacements m
        near = torch.addmm(self._squares.expand(-1, flat.shape[1]), self._moves.T, mean[0].flatten(1), alpha=-2.0)
        return self._moves[:, torch.add(flat, near, alpha=nearness).argmin(dim=0)].view_as(mean)

    @staticmethod
    def _compared(fixed: Tensor, moving: Tensor, reach: int, counts: Tensor, check: Callable[[], None]) -> Tensor:
        a, b, c = fixed.shape[2:]
        side = 2 * reach + 1
        padded = F.pad(moving, [reach] * 6, mode="replicate")[0]
        costs = fixed.new_empty(side, side, side, a, b, c)
        for x in range(side):
            check()
            for y in range(side):
                # (side, channels, a, b, c): all displacements along the last axis at once
                rows = padded[:, x : x + a, y : y + b].unfold(3, c, 1).movedim(3, 0)
                costs[x, y] = (rows - fixed).square_().sum(dim=1).mul_(counts)
        flat = costs.view(-1, 1, a, b, c)
        for axis in (2, 3, 4):
            flat = _blurred(flat, axis)
        return flat[:, 0]


class CompiledCosts:
    """The costs by :mod:`.search_kernels`, in slabs that run side by side."""

    def __init__(
        self,
        module: ModuleType,
        fixed: Tensor,
        moving: Tensor,
        reach: int,
        counts: Tensor,
        threads: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._kernels, self._reach, self._threads = module, reach, threads
        padded = F.pad(moving.float(), [reach] * 6, mode="replicate")[0]
        strips = padded.unfold(3, 2 * reach + 1, 1).permute(1, 3, 0, 2, 4)
        a, c, channels, b, side = strips.shape
        rows = torch.zeros(a, c, channels, b * side + module.LANES)
        rows[..., : b * side].unflatten(3, (b, side)).copy_(strips)
        cells = fixed[0].float().movedim(0, 3).contiguous().numpy()
        self._shape = cells.shape[:3]
        self.costs = np.empty((*self._shape, (2 * reach + 1) ** 3), np.float32)
        check()
        weights = counts.float().contiguous().numpy()
        near = rows.numpy()
        self._each(self._shape[0], lambda *slab: module.compare(cells, near, weights, reach, self.costs, *slab))
        check()
        self._each(self._shape[1], lambda *slab: module.blur_planes(self.costs, *slab))
        self._least = np.empty(self._shape, np.float32)
        self._each(self._shape[0], lambda *slab: module.least_costs(self.costs, self._least, *slab))

    def best(self, mean: Tensor, nearness: float) -> Tensor:
        near, weight = mean[0].float().contiguous().numpy(), np.float32(nearness)
        found = np.empty((3, *self._shape), np.float32)
        self._each(
            self._shape[0],
            lambda *slab: self._kernels.choose(self.costs, self._least, near, weight, self._reach, found, *slab),
        )
        return torch.from_numpy(found)[None].to(mean.dtype)

    def _each(self, planes: int, work: Callable[[int, int], None]) -> None:
        """Do the work on slabs of planes, one for each thread."""
        count = max(1, min(self._threads, planes))
        cuts = [planes * n // count for n in range(count + 1)]
        if count == 1:
            work(0, planes)
            return
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, cuts[:-1], cuts[1:]))


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
