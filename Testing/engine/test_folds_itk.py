"""What is said of folds, checked on the written file by SimpleITK, which knows nothing of our cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from MorphSeekLib.io.transforms import rounded, write_transform
from MorphSeekLib.measures import folds
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, Grid, dense_from_voxels, voxel_displacement

STEP = 0.02  # voxels, from a point to where its differences are taken
TURN = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
GRID = Grid.from_parts((16, 14, 12), (2.0, 3.0, 1.5), TURN, (-30.0, 20.0, 40.0))  # oblique, anisotropic
AFFINE = np.array([[1.1, 0.2, 0.0, 5.0], [-0.1, 0.9, 0.1, 3.0], [0.0, 0.1, 1.2, -4.0], [0.0, 0.0, 0.0, 1.0]])
ALIGNMENTS = {"none": None, "affine": AFFINE, "mirrored": np.diag([-1.0, 1.0, 1.0, 1.0]) @ AFFINE}


@dataclass(frozen=True)
class Points:
    """Points in cells: cell (n, 3), the index of its first corner; within (n, 3), from 0 to 1 along each edge."""

    cell: np.ndarray
    within: np.ndarray

    @classmethod
    def random(cls, cells: np.ndarray, count: int, seed: int) -> Points:
        """Points in some of the given cells (m, 3), anywhere in them."""
        random = np.random.default_rng(seed)
        return cls(cells[random.integers(0, len(cells), count)], random.random((count, 3)))

    def on_edges(self) -> Points:
        """Each point moved onto one of the twelve edges of its cell."""
        random = np.random.default_rng(0)
        along = random.integers(0, 3, (len(self.cell), 1)) == np.arange(3)
        return Points(self.cell, np.where(along, self.within, random.integers(0, 2, self.within.shape)))


def rough(size: float, alignment: str) -> DenseTransform:
    """Random displacements of so many voxels at each node, and an alignment after them."""
    displacement = size * torch.randn(1, 3, *GRID.shape, generator=torch.Generator().manual_seed(0))
    return dense_from_voxels(displacement, GRID, ALIGNMENTS[alignment])


def written(transform: DenseTransform, folder: Path) -> sitk.Transform:
    write_transform(transform, folder / "transform.h5")
    return sitk.ReadTransform(str(folder / "transform.h5"))


def mapped(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """(n, 3) points through a transform, all at once: a field moves each voxel of a line to its point before it."""
    line = np.zeros_like(points)
    line[:, 0] = np.arange(len(points))
    to_points = sitk.DisplacementFieldTransform(sitk.GetImageFromArray((points - line)[None, None], isVector=True))
    chain = sitk.CompositeTransform([transform, to_points])
    moved = sitk.TransformToDisplacementField(chain, sitk.sitkVectorFloat64, (len(points), 1, 1))
    return sitk.GetArrayFromImage(moved)[0, 0] + line


def found_by_simpleitk(transform: sitk.Transform, points: Points) -> np.ndarray:
    """(n,) determinants of differences of STEP voxels, each taken towards the middle of the point's own cell."""
    way = np.where(points.within < 0.5, STEP, -STEP)
    index = points.cell + points.within
    start = mapped(transform, index @ GRID.affine[:3, :3].T + GRID.origin)
    columns = []
    for axis in range(3):
        there = index + way * (np.arange(3) == axis)
        moved = mapped(transform, there @ GRID.affine[:3, :3].T + GRID.origin)
        columns.append((moved - start) / way[:, axis, None])
    return np.linalg.det(np.stack(columns, axis=-1)) / np.linalg.det(GRID.affine[:3, :3])


def all_cells() -> np.ndarray:
    return np.indices(np.array(GRID.shape) - 1).reshape(3, -1).T


def coefficients(transform: DenseTransform, cells: np.ndarray) -> np.ndarray:
    """(3, 3, 3, n) Bernstein coefficients of the determinant in the given cells, of the world's map."""
    nodes = np.indices(GRID.shape).astype(float)
    nodes += np.tensordot(np.linalg.inv(GRID.affine[:3, :3]), transform.displacement.double().numpy(), axes=1)
    corners = np.empty((2, 2, 2, 3, len(cells)))
    for corner in np.ndindex(2, 2, 2):
        corners[corner] = nodes[(slice(None), *(cells + corner).T)]
    return folds.bernstein(torch.from_numpy(corners)).numpy()


@pytest.fixture(scope="module", params=["none", "affine"])
def unfolded(request) -> DenseTransform:
    """As written, after half of its cells folded."""
    transform = rough(0.3, request.param)
    assert folds.certify(transform, GRID).count.folded_percent > 30
    return rounded(folds.unfold(transform))


def test_simpleitk_finds_no_fold_where_all_is_proven(unfolded, tmp_path):
    assert folds.certify(unfolded, GRID).count.no_fold_proven
    transform = written(unfolded, tmp_path)
    bounds = coefficients(unfolded, all_cells()).min(axis=(0, 1, 2))
    least = all_cells()[np.argsort(bounds)[:1000]]
    within = Points.random(least, 50_000, seed=1)
    for points in (Points.random(all_cells(), 100_000, seed=0), within, within.on_edges()):
        assert (found_by_simpleitk(transform, points) <= 0).sum() == 0


def test_simpleitk_finds_no_determinant_below_the_smallest_proven(unfolded, tmp_path):
    smallest = folds.certify(unfolded, GRID).count.smallest_proven
    points = Points.random(all_cells(), 50_000, seed=2)
    transform = written(unfolded, tmp_path)
    for some in (points, points.on_edges()):
        assert found_by_simpleitk(transform, some).min() > smallest - 1e-6


@pytest.mark.parametrize("size", [0.2, 0.3, 0.4])
@pytest.mark.parametrize("alignment", list(ALIGNMENTS))
def test_simpleitk_finds_as_much_folded_space_as_the_folded_cells_hold(tmp_path, size, alignment):
    transform = rounded(rough(size, alignment))
    sign = -1 if alignment == "mirrored" else 1
    certificate = folds.certify(transform, GRID, mirrored=sign < 0)
    folded = np.unique(np.floor(certificate.folded.low.numpy()).astype(int), axis=0)
    assert len(folded) == certificate.count.folded
    # expected: of the cells' polynomials, sampled within the folded ones only
    random = np.random.default_rng(3)
    which, t = random.integers(0, len(folded), 40_000), random.random((3, 40_000))
    basis = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)
    ours = np.einsum("abcn,an,bn,cn->n", coefficients(transform, folded)[..., which], *basis)
    expected = (sign * ours <= 0).mean() * len(folded) / len(all_cells())
    # found: in the folded cells, where it is worth looking, and in all others, each weighted by its share of space
    others = np.array(sorted(set(map(tuple, all_cells().tolist())) - set(map(tuple, folded.tolist()))))
    on_disk = written(transform, tmp_path)
    hits, found = 0, 0.0
    for cells in (folded, others):
        bad = sign * found_by_simpleitk(on_disk, Points.random(cells, 100_000, seed=4)) <= 0
        hits += int(bad.sum())
        found += bad.mean() * len(cells) / len(all_cells())
    assert hits >= 50
    assert 0.5 < found / expected < 2


def alternating(low: float, high: float) -> DenseTransform:
    """Displacements along the first axis in voxels, by the parity of i + j + k; none in a margin of three nodes."""
    displacement = torch.zeros(1, 3, *GRID.shape)
    parity = torch.from_numpy(np.indices(GRID.shape).sum(axis=0) % 2).float()
    inner = (slice(3, -3),) * 3
    displacement[0, 0][inner] = (low + (high - low) * parity)[inner]
    return dense_from_voxels(displacement, GRID)


def test_a_displacement_that_alternates_is_folded_though_central_differences_see_nothing(tmp_path):
    transform = alternating(-0.6, 0.6)
    certificate = folds.certify(transform, GRID)
    assert certificate.count.folded > 100
    assert float(certificate.folded.determinant.min()) == pytest.approx(-0.2, abs=1e-3)
    central = fields.jacobian_determinant(voxel_displacement(transform, GRID))
    assert float(central.min()) == pytest.approx(0.7, abs=1e-3)
    found = found_by_simpleitk(written(transform, tmp_path), Points.random(all_cells(), 20_000, seed=0).on_edges())
    assert found.min() == pytest.approx(-0.2, abs=1e-2)


def test_a_displacement_that_alternates_by_less_than_a_voxel_is_not_folded():
    assert folds.certify(alternating(0.0, 0.6), GRID).count.no_fold_proven
