"""Align from many starts, turned by up to 70 degrees, by features that heed no contrast.

The mutual information of two bodies is often higher where they lie wrong than where they match. MIND (Heinrich et al.,
MICCAI 2013) of very coarse images, with voxels of some 2 cm in a body, tells these apart and costs less than a
millisecond, so that more than a hundred starts are compared and the best ones improved. All maps are rigid, so none
mirrors.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..measures.similarity import mind_ssc
from ..protocol.job import SILENT, Job
from ..space import fields
from ..space.geometry import Volume, apply_affine
from .descent import halved
from .objective import SHOWN
from .pyramid import Crop, averaged, level_grid

GAIN = 0.02
"""An alignment from here is taken where the judge finds it so much better than the one that was found before."""
_STEP, _MOST = 40.0, 70.0  # degrees between the starts' rotations, and the largest
_FEWEST = 20  # voxels along an axis, below which an image is not halved again
_LEVELS = 4
_IMPROVED = 2  # starts
_PROMISE = 0.15  # of similarity is the most that a start wins on its way; on development pairs it was 0.05 to 0.17
_ROUNDS = 8
_TURN = 15.0  # degrees of the first steps; the shifts are half a voxel
_AT_ONCE = 40


def look_around(
    crop: Crop,
    moving: Volume,
    found: np.ndarray | None = None,
    counts: Tensor | None = None,
    job: Job = SILENT,
) -> np.ndarray | None:
    """Return the best rigid alignment from many starts.

    The starts turn the images by up to 70 degrees, with the middles of the images, or of what they show, together.

    Args:
        crop: of the fixed image.
        moving: intensities in [0, 1].
        found: another alignment, fixed point -> moving point, (4, 4) LPS mm; starts that lie near it, or that are so
            much less alike that they cannot lead to a better one, are passed over.
        counts: (i, j, k) bool, which of the moving image's voxels count; None for all.
        job: checked often.

    Returns:
        fixed point -> moving point, (4, 4) LPS mm; the same for the same images every time. None where all starts are
        passed over.
    """
    view = _View(crop, moving, counts, job)
    middles = view.middles()
    turns = _rotations()
    starts = np.stack([[_turned(turn, *pair) for pair in middles] for turn in turns])
    alike = view.alike(starts.reshape(-1, 4, 4)).reshape(len(turns), len(middles))
    if found is not None:
        near = view.apart(starts, found) < view.voxel
        alike[near | (alike < view.alike(found[None])[0] - _PROMISE)] = -np.inf
    order = np.argsort(-alike.max(axis=1), kind="stable")[:_IMPROVED]
    best = [starts[n, alike[n].argmax()] for n in order if np.isfinite(alike[n].max())]
    return view.improved(best, middles[0][0]) if best else None


class _View:
    """Two images on very coarse voxels, and how alike they are under rigid maps."""

    def __init__(self, crop: Crop, moving: Volume, counts: Tensor | None, job: Job) -> None:
        fixed, left, level = crop.image, crop.seen.float(), 0
        if crop.counts is not None:
            left = left * crop.counts
        while level < _LEVELS and min(fixed.shape[2:]) >= _FEWEST:
            fixed, left, level = halved(fixed), halved(left), level + 1
        self._job, self._crop, self._fixed = job, crop, fixed
        self._grid = level_grid(crop.grid, level)
        self.voxel = float(self._grid.spacing.mean())  # mm
        self._moving = averaged(moving, self._grid)
        self._image = self._moving.data[None, None].to(fixed.device)
        self._counts = None
        if counts is not None:
            share = averaged(Volume(counts.float(), moving.grid), self._grid)
            self._counts = share.data[None, None].to(fixed.device)
        near = F.max_pool3d((fixed > SHOWN).float(), 3, stride=1, padding=1)
        self._weight = near * (left > 0.5)
        self._features = mind_ssc(fixed, radius=1, dilation=1)
        # of two images that have nothing to do with each other: twice the variance
        voxels = self._features[0][:, self._weight[0, 0] > 0]
        self._unlike = (2 * voxels.var(dim=1, correction=0).sum()).clamp(min=1e-6)

    def middles(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return points of the fixed and the moving image that may belong together, LPS mm: the middles of what they
        show; those of the images, where these are other ones."""
        whole = self._crop.lattice.center, self._moving.grid.center
        sides = (self._fixed[0, 0], self._grid), (self._moving.data, self._moving.grid)
        points = [apply_affine(grid.affine, (data > SHOWN).nonzero().cpu().double().numpy()) for data, grid in sides]
        if any(len(side) == 0 for side in points):
            return [whole]
        shown = points[0].mean(axis=0), points[1].mean(axis=0)
        other = np.linalg.norm((whole[1] - whole[0]) - (shown[1] - shown[0])) > self.voxel
        return [shown, whole] if other else [shown]

    def apart(self, matrices: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return the mean distance in mm, (...), over the fixed image, between where maps (..., 4, 4) and another one
        lead."""
        points = self._crop.grid.corners()
        points = np.concatenate([points, np.ones((len(points), 1))], axis=1)
        middle = 0.5 * (points + points.mean(axis=0))  # as far out as the voxels are on average
        return np.linalg.norm((middle @ np.swapaxes(matrices - other, -1, -2))[..., :3], axis=-1).mean(axis=-1)

    def alike(self, matrices: np.ndarray) -> np.ndarray:
        """Return how alike the images are, (n,): 1 for the same, about 0 for others, and what leaves the moving image
        counts as unlike.

        Args:
            matrices: (n, 4, 4), fixed point -> moving point, LPS mm.
        """
        return np.concatenate([self._alike(matrices[n : n + _AT_ONCE]) for n in range(0, len(matrices), _AT_ONCE)])

    def _alike(self, matrices: np.ndarray) -> np.ndarray:
        self._job.check()
        into = self._moving.grid
        to_index = torch.from_numpy(np.linalg.inv(into.affine) @ matrices @ self._grid.affine).to(self._fixed)
        at = to_index[:, :3, :3] @ fields.identity(self._grid.shape, self._fixed).flatten(2) + to_index[:, :3, 3:]
        at = at.view(-1, 3, *self._grid.shape)
        inside = ((at >= -0.5) & (at <= fields.per_axis(into.shape, at) - 0.5)).all(dim=1, keepdim=True)
        if self._counts is not None:
            inside &= fields.sample(self._counts, at, padding="border") > 0.5
        moved = mind_ssc(fields.sample(self._image, at, padding="border"), radius=1, dilation=1)
        apart = (moved - self._features).square().sum(dim=1, keepdim=True)
        alike = (1 - apart / self._unlike) * inside * self._weight
        return (alike.sum(dim=(1, 2, 3, 4)) / self._weight.sum().clamp(min=1)).cpu().numpy()

    def improved(self, matrices: list[np.ndarray], middle: np.ndarray) -> np.ndarray:
        """Return the best of what small turns about a point and shifts make of some maps, all improved side by side."""
        best = self.alike(np.stack(matrices))
        sizes = np.ones(len(matrices))
        for _ in range(_ROUNDS):
            tried = [self._steps(m, middle, size) for m, size in zip(matrices, sizes, strict=True)]
            alike = self.alike(np.concatenate(tried)).reshape(len(tried), -1)
            for n, row in enumerate(alike):
                if row.max() > best[n]:
                    best[n], matrices[n] = row.max(), tried[n][row.argmax()]
                else:
                    sizes[n] /= 2
        return matrices[int(best.argmax())]

    def _steps(self, matrix: np.ndarray, middle: np.ndarray, size: float) -> np.ndarray:
        """Return (12, 4, 4): a map with a turn both ways about each axis, and shifted both ways along each."""
        shift = 0.5 * size * self.voxel
        found = []
        for way in (*np.eye(3), *-np.eye(3)):
            shifted = matrix.copy()
            shifted[:3, 3] += shift * way
            found += [matrix @ _turned(_rotation(size * _TURN * way), middle, middle), shifted]
        return np.stack(found)


def _rotations() -> list[np.ndarray]:
    """Return rotations whose vectors (axis times angle) fill a ball evenly: a body-centered lattice."""
    vectors = [_STEP / 2 * np.array(n) for n in product(range(-4, 5), repeat=3) if len({m % 2 for m in n}) == 1]
    return [_rotation(v) for v in sorted(vectors, key=lambda v: float(v @ v)) if np.linalg.norm(v) <= _MOST]


def _rotation(vector: np.ndarray) -> np.ndarray:
    """Return the (3, 3) rotation about a vector by its length in degrees (Rodrigues)."""
    angle = float(np.deg2rad(np.linalg.norm(vector)))
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / np.linalg.norm(vector)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _turned(turn: np.ndarray, about: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Return (4, 4): a turn about a point that is then brought to another one."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, to - turn @ about
    return matrix
