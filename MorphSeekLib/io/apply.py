"""Apply a chain of transforms to an image, a label map or points: one interpolation, as ITK does it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
import torch

from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job, Notice
from ..protocol.startup import check_interpolation, shown
from ..space.geometry import DenseTransform, Grid, Transform, Volume, apply_affine
from .chain import Link, beyond_domain, field_transform, inverse_points, itk_transform, joined, links_of, mapped
from .images import air_value, sitk_from_volume, volume_from_sitk
from .transforms import read_itk_transform

_KINDS = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline}
_SLAB_POINTS = 1_000_000
_LATTICE = 30  # points along each axis of the reference that are looked at for the warnings

AnyTransform = str | os.PathLike | Transform
"""A transform file, a (4, 4) matrix (LPS mm), or a dense transform."""


def apply_transforms(
    image: Volume,
    transforms: Sequence[AnyTransform],
    reference: Grid,
    *,
    interpolation: str = "linear",
    inverse: bool = False,
    job: Job = SILENT,
) -> Volume:
    """Resample an image onto a grid through a chain of transforms: out(p) = image(T(p)), interpolated once.

    The answer is that of ITK's resampling: where a displacement field or a B-spline ends it moves nothing, and a notice
    says so if the grid reaches beyond.

    Args:
        image: the image, or a label map (integer data).
        transforms: T, each applied to a point in the order given; from a point of ``reference`` to one of ``image``.
        reference: the grid to fill.
        interpolation: "linear", "nearest" or "bspline" (cubic); label maps take "nearest" whatever is given.
        inverse: take T backward; a field and a B-spline then go on beyond their edge as at it.
        job: told how far it is, and asked for cancellation.

    Returns:
        On ``reference``. An image has the number type of its file, in which :func:`write_image` rounds and clips it,
        and its air value outside; labels are 0 there. Notices say what the user should know.

    Raises:
        MorphSeekError: another interpolation, a transform that cannot be read or inverted, or nothing of the image
            lands on the grid.
    """
    check_interpolation(interpolation)
    labels = not image.data.is_floating_point()
    links = _links(transforms)
    notices = list(image.notices)
    job.report("resample", 0.0, "Applying the transform")
    if inverse:
        transform, lost = _inverse(links, reference, job.part(0.0, 0.7))
        notices += _without_inverse(lost)
    else:
        transform = joined(links)
        beyond = beyond_domain(links, _lattice(reference))
        _check_finite(mapped(transform, _lattice(reference)))
        notices += _beyond(100 * float(beyond.mean()))
    outside = 0.0 if labels else air_value(image.data)
    kind = _KINDS["nearest" if labels else interpolation]
    found = _resampled(sitk_from_volume(image), transform, reference, (kind, outside), job.part(0.7 * inverse, 1.0))
    data = volume_from_sitk(found, dtype=torch.int32 if labels else torch.float32).data
    if not bool((data != outside).any()):
        what = image.called("The label map" if labels else "The image")
        raise MorphSeekError(
            f"{what} has nothing where the reference is after these transforms; check their order and direction "
            "(--inverse) and that the reference is the right one."
        )
    return dataclasses.replace(image, data=data, grid=reference, notices=tuple(notices), elsewhere=None)


def map_points(points: np.ndarray, transforms: Sequence[AnyTransform], *, inverse: bool = False) -> np.ndarray:
    """Map points through a chain of transforms, as ITK does.

    Args:
        points: (n, 3) LPS mm.
        transforms: each applied in the order given.
        inverse: take the chain backward; a field and a B-spline then go on beyond their edge as at it.

    Returns:
        (n, 3) LPS mm.

    Raises:
        MorphSeekError: a transform cannot be read, or a point has no inverse because the transform folds there.
    """
    links, points = _links(transforms), np.asarray(points, dtype=np.float64).reshape(-1, 3)
    if not inverse:
        moved = mapped(joined(links), points)
    else:
        moved, found = _backward(links, points)
        if not found.all():
            lost = ", ".join(f"{mm:.1f}" for mm in points[~found][0])
            raise MorphSeekError(
                f"{int((~found).sum())} of {len(points)} points have no inverse, the first at ({lost}) mm LPS: the "
                "transform folds there; leave these points out."
            )
    _check_finite(moved)
    return moved


def _links(transforms: Sequence[AnyTransform]) -> list[Link]:
    """Return the transforms in the order in which they are applied."""
    if not transforms:
        raise MorphSeekError("There is no transform to apply; give one or more.")
    links = []
    for transform in transforms:
        if isinstance(transform, (np.ndarray, DenseTransform)):
            own, name = links_of(itk_transform(transform)), "A transform"
        else:
            own, name = links_of(read_itk_transform(transform)), shown(transform)
        if any(link.domain is None and not _is_finite(link.transform) for link in own):
            raise MorphSeekError(f"{name} holds numbers that are not finite; compute it again.")
        links += own
    return links


def _is_finite(transform: sitk.Transform) -> bool:
    return bool(np.isfinite([*transform.GetParameters(), *transform.GetFixedParameters()]).all())


def _check_finite(points: np.ndarray) -> None:
    if not np.isfinite(points).all():
        raise MorphSeekError("The transforms move points by amounts that are NaN or infinite; compute them again.")


def _backward(links: Sequence[Link], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Do :func:`inverse_points`; refuse a matrix that is singular."""
    try:
        return inverse_points(links, points)
    except RuntimeError:
        raise MorphSeekError("A transform holds a singular matrix, which has no inverse; compute it again.") from None


def _inverse(links: Sequence[Link], reference: Grid, job: Job) -> tuple[sitk.Transform, float]:
    """Return the inverse of a chain, exact at the voxels of a grid, and the percentage of them without one."""
    if all(link.domain is None for link in links):
        _backward(links, np.zeros((1, 3)))  # refuses what is singular
        return joined([Link(link.transform.GetInverse(), None) for link in reversed(links)]), 0.0
    i, j, k = reference.shape
    values, lost = np.empty((k, j, i, 3)), 0
    length = max(1, _SLAB_POINTS // (i * j))
    for first in range(0, k, length):
        job.report("resample", first / k, "Inverting the transform")
        job.check()
        slab = values[first : first + length]
        index = np.indices(slab.shape[:3])[::-1].reshape(3, -1).T + np.array([0, 0, first])
        points = apply_affine(reference.affine, np.ascontiguousarray(index, dtype=np.float64))
        moved, found = _backward(links, points)
        _check_finite(moved)
        slab[...] = (moved - points).reshape(slab.shape)
        lost += int((~found).sum())
    return field_transform(values, reference), 100 * lost / (i * j * k)


def _resampled(
    image: sitk.Image, transform: sitk.Transform, reference: Grid, how: tuple[int, float], job: Job
) -> sitk.Image:
    """Resample by ITK; ``how`` is the interpolator and the value outside."""
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in reference.shape])
    resampler.SetOutputSpacing(reference.spacing.tolist())
    resampler.SetOutputDirection(reference.direction.ravel().tolist())
    resampler.SetOutputOrigin(reference.origin.tolist())
    resampler.SetTransform(transform)
    resampler.SetInterpolator(how[0])
    resampler.SetDefaultPixelValue(how[1])
    watch = _Watch(resampler, job)
    resampler.AddCommand(sitk.sitkProgressEvent, watch)
    try:
        return resampler.Execute(image)
    except RuntimeError:
        job.check()  # it was aborted
        raise
    finally:
        resampler.RemoveAllCommands()


class _Watch:
    """Tells a job how far a filter of ITK is, and stops the filter when the job is cancelled."""

    def __init__(self, worker: sitk.ProcessObject, job: Job) -> None:
        self._worker, self._job = worker, job

    def __call__(self) -> None:
        self._job.report("resample", self._worker.GetProgress(), "Applying the transform")
        if self._job.is_cancelled:
            self._worker.Abort()


def _lattice(grid: Grid) -> np.ndarray:
    """Return (n, 3) LPS mm: some points of a grid, its corners among them."""
    axes = [np.linspace(0, n - 1, min(n, _LATTICE)) for n in grid.shape]
    index = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    return apply_affine(grid.affine, index)


def _beyond(percent: float) -> list[Notice]:
    if not percent:
        return []
    text = (
        f"About {max(0.1, percent):.1f} % of the reference reaches beyond the domain of a displacement field or "
        "B-spline, where ITK moves nothing: expect a jump in the result there."
    )
    return [Notice("beyond-domain", text)]


def _without_inverse(percent: float) -> list[Notice]:
    if not percent:
        return []
    text = f"At {percent:.2g} % of the reference's voxels the transform has no inverse because it folds there; do not "
    return [Notice("no-inverse", text + "rely on the result at these places.")]
