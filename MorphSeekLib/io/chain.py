"""Transforms of ITK, one applied after another: forward exactly as ITK does it, and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import SimpleITK as sitk
import torch

from ..space import fields
from ..space.geometry import DenseTransform, Grid, Transform, apply_affine

_MOST_ITERATIONS = 200
_DAMPING = 0.7  # with it the iteration converges where the map stretches up to 2.8 times its affine part
_TOLERANCE = 1e-5  # of the distance between nodes
_LATTICE = 12  # points along each axis to which the affine part is fitted


@dataclass(frozen=True)
class Link:
    """One transform of a chain.

    Attributes:
        transform: as ITK has it, no composite.
        domain: the box between the outermost nodes is where ITK knows a displacement; beyond it ITK's is 0, a jump.
            None for a transform that is linear, the same everywhere.
    """

    transform: sitk.Transform
    domain: Grid | None

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """Map (n, 3) LPS mm; a point beyond the domain moves as the nearest one of the domain does."""
        if self.domain is None:
            return mapped(self.transform, points)
        index = apply_affine(np.linalg.inv(self.domain.affine), points)
        held = np.clip(index, 0, np.array(self.domain.shape) - 1)
        if self._nodes is not None:
            return points + _sampled(self._nodes, held)
        held = apply_affine(self.domain.affine, held)
        return points + (mapped(self.transform, held) - held)

    def inverse_points(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find where (n, 3) LPS mm come from: the fixed points of p + B (q - T(p)), B the inverse of T's affine part.

        Returns:
            (n, 3) LPS mm, and (n,) whether it was found; where the transform folds it may be not.
        """
        if self.domain is None:
            return mapped(self.transform.GetInverse(), points), np.ones(len(points), dtype=bool)
        back = np.linalg.inv(self._affine_part)
        found = apply_affine(back, points)
        tolerance = _TOLERANCE * float(self.domain.spacing.min())
        moving = np.arange(len(points))  # points that have not come to rest
        for _ in range(_MOST_ITERATIONS):
            step = (points[moving] - self.map_points(found[moving])) @ back[:3, :3].T
            found[moving] += _DAMPING * step
            moving = moving[np.abs(step).max(axis=1, initial=0) > tolerance]
            if not len(moving):
                break
        rests = np.ones(len(points), dtype=bool)
        rests[moving] = False
        return found, rests

    @cached_property
    def _nodes(self) -> torch.Tensor | None:
        """(1, 3, i, j, k) mm, the displacements at the nodes of a field; None for another kind."""
        if self.transform.GetTransformEnum() != sitk.sitkDisplacementField:
            return None
        field = sitk.DisplacementFieldTransform(self.transform).GetDisplacementField()
        values = np.ascontiguousarray(sitk.GetArrayViewFromImage(field).transpose(3, 2, 1, 0))
        return torch.from_numpy(values)[None]

    @cached_property
    def _affine_part(self) -> np.ndarray:
        """(4, 4) LPS: least squares over a lattice in the domain."""
        assert self.domain is not None
        lattice = np.meshgrid(*[np.linspace(0, n - 1, _LATTICE) for n in self.domain.shape], indexing="ij")
        points = apply_affine(self.domain.affine, np.stack([axis.ravel() for axis in lattice], axis=1))
        middle = points.mean(axis=0)
        moved = self.map_points(points)
        slopes = np.linalg.lstsq(points - middle, moved - moved.mean(axis=0), rcond=None)[0].T
        affine = np.eye(4)
        if abs(np.linalg.det(slopes)) > 1e-3:
            affine[:3, :3] = slopes
        affine[:3, 3] = moved.mean(axis=0) - affine[:3, :3] @ middle
        return affine


def links_of(transform: sitk.Transform) -> list[Link]:
    """Return the transforms of a chain in the order in which they are applied, composites within it taken apart."""
    kind = transform.GetTransformEnum()
    if kind == sitk.sitkComposite:
        chain = sitk.CompositeTransform(transform)
        backward = reversed(range(chain.GetNumberOfTransforms()))  # what was added last is applied first
        return [link for n in backward for link in links_of(chain.GetNthTransform(n))]
    if kind == sitk.sitkDisplacementField:
        field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        place = field.GetSpacing(), field.GetDirection(), field.GetOrigin()
        return [Link(transform, Grid.from_parts(field.GetSize(), *place))]
    if kind == sitk.sitkBSplineTransform:
        return [Link(transform, _spline_domain(sitk.BSplineTransform(transform)))]
    return [Link(transform, None)]


def joined(links: Iterable[Link]) -> sitk.Transform:
    """Return the one transform of ITK that applies links in their order."""
    return sitk.CompositeTransform([link.transform for link in links][::-1])


def itk_transform(transform: Transform) -> sitk.Transform:
    """Return a matrix or a dense transform as ITK has it; beyond its nodes a dense one moves nothing there."""
    if not isinstance(transform, DenseTransform):
        return sitk.AffineTransform(transform[:3, :3].ravel().tolist(), transform[:3, 3].tolist())
    values = transform.displacement.detach().cpu().double().numpy().transpose(3, 2, 1, 0)
    return field_transform(np.ascontiguousarray(values), transform.grid)


def field_transform(values: np.ndarray, grid: Grid) -> sitk.Transform:
    """Return a displacement field as a transform of ITK.

    Args:
        values: (k, j, i, 3) float64, LPS mm.
        grid: of its nodes.
    """
    field = sitk.GetImageFromArray(values, isVector=True)
    field.SetSpacing(grid.spacing.tolist())
    field.SetDirection(grid.direction.ravel().tolist())
    field.SetOrigin(grid.origin.tolist())
    return sitk.DisplacementFieldTransform(field)


def inverse_points(links: Sequence[Link], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find where a chain takes (n, 3) LPS mm from; see :meth:`Link.inverse_points`."""
    found = np.ones(len(points), dtype=bool)
    for link in reversed(links):
        points, own = link.inverse_points(points)
        found &= own
    return points, found


def beyond_domain(links: Iterable[Link], points: np.ndarray) -> np.ndarray:
    """Return (n,) which points a chain takes out of the domain of one of its transforms, where ITK moves nothing."""
    beyond = np.zeros(len(points), dtype=bool)
    for link in links:
        if link.domain is not None:
            index = apply_affine(np.linalg.inv(link.domain.affine), points)
            rim = 0.5 if link.transform.GetTransformEnum() == sitk.sitkDisplacementField else 1e-3
            beyond |= ((index < -rim) | (index > np.array(link.domain.shape) - 1 + rim)).any(axis=1)
        points = mapped(link.transform, points)
    return beyond


def mapped(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """Return (n, 3) points through a transform of ITK, all at once.

    ITK maps a list only point by point, but an image of any size: so the points become the nodes of a line of voxels
    with a field that moves each voxel to its point, and the transform is applied after that field.
    """
    line = np.zeros_like(points)
    line[:, 0] = np.arange(len(points))
    field = sitk.GetImageFromArray((points - line)[None, None], isVector=True)
    chain = sitk.CompositeTransform([transform, sitk.DisplacementFieldTransform(field)])
    moved = sitk.TransformToDisplacementField(chain, sitk.sitkVectorFloat64, (len(points), 1, 1))
    return sitk.GetArrayFromImage(moved)[0, 0] + line


def _sampled(nodes: torch.Tensor, index: np.ndarray) -> np.ndarray:
    """Return (n, 3) displacements at (n, 3) indices, linear between the nodes."""
    places = torch.from_numpy(np.ascontiguousarray(index.T)).reshape(1, 3, -1, 1, 1)
    return fields.sample(nodes, places, padding="border").reshape(3, -1).numpy().T


def _spline_domain(spline: sitk.BSplineTransform) -> Grid:
    """Return the box in which ITK knows a B-spline, smaller by 1e-6 of a cell: on its edge rounding decides what is
    inside."""
    mesh = np.array(spline.GetTransformDomainMeshSize())
    spacing = np.array(spline.GetTransformDomainPhysicalDimensions()) / mesh
    box = Grid.from_parts(mesh + 1, spacing, spline.GetTransformDomainDirection(), spline.GetTransformDomainOrigin())
    smaller = np.diag([*(1 - 2e-6 / mesh), 1.0])
    smaller[:3, 3] = 1e-6
    return Grid(box.shape, box.affine @ smaller)
