"""Transform files in and out: ITK's formats, fixed point -> moving point, LPS mm."""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk
import torch

from ..protocol.errors import MorphSeekError
from ..space.geometry import DenseTransform, Grid, Transform, apply_affine
from .chain import links_of
from .files import library_name, whole_file
from .images import read_sitk

_FIELDS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
# displacements are rounded to 1/4096 of the nodes' distance, or finer: the file shrinks by a third
_STEPS_PER_NODE = 4096
_CHUNK = 3 << 14
_SLAB_POINTS = 1_000_000  # mapped at once


def rounded(transform: DenseTransform) -> DenseTransform:
    """Return the transform as :func:`write_transform` writes it.

    Displacements become multiples of a power of two: 1/4096 mm, or finer where the nodes lie less than a millimeter
    apart, so that the error stays under 1/8192 of their distance in an image of any size.
    """
    nodes = min(1.0, float(transform.grid.spacing.min()))
    step = 2.0 ** math.floor(math.log2(nodes)) / _STEPS_PER_NODE
    values = transform.displacement.detach().cpu().float()
    return DenseTransform(torch.round(values / step) * step, transform.grid)


def write_transform(transform: DenseTransform, path: str | os.PathLike) -> None:
    """Write a dense transform as ITK's DisplacementFieldTransform, all of it or nothing.

    The layout is that of ITK's HDF5TransformIO; float32, shuffled and deflated, which ITK reads but never writes (its
    own files hold uncompressed doubles and are about four times as large). SimpleITK and Slicer read it. Between the
    nodes SimpleITK interpolates linearly, as :class:`DenseTransform` does; Slicer sets the transforms it reads from
    files to cubic, which differs by some hundredths of a millimeter where the field bends strongly.

    Args:
        transform: fixed point -> moving point, LPS mm.
        path: ends with ``.h5``; its folder exists.

    Raises:
        MorphSeekError: another ending, or the disk is full or the folder not writable.
    """
    if Path(path).suffix.lower() != ".h5":
        raise MorphSeekError(f"{path} has no format to write a dense transform in; end its name with .h5.")
    grid = transform.grid
    fixed = [*grid.shape, *grid.origin, *grid.spacing, *grid.direction.ravel()]
    values = rounded(transform).displacement.numpy().transpose(3, 2, 1, 0).ravel()
    text = h5py.string_dtype("ascii")
    made = io.BytesIO()  # HDF5 itself crashes the process when the disk is full
    with h5py.File(made, "w") as file:
        file.create_dataset("ITKVersion", data=["5.4"], dtype=text)
        file.create_dataset("HDFVersion", data=[h5py.version.hdf5_version], dtype=text)
        group = file.create_group("TransformGroup/0")
        group.create_dataset("TransformType", data=["DisplacementFieldTransform_float_3_3"], dtype=text)
        group.create_dataset("TransformFixedParameters", data=np.array(fixed, dtype=np.float64))
        group.create_dataset(
            "TransformParameters",
            data=values,
            chunks=(min(_CHUNK, values.size),),
            shuffle=True,
            compression="gzip",
            compression_opts=4,
        )
    with whole_file(path) as part:
        part.write_bytes(made.getbuffer())


def read_transform(path: str | os.PathLike | Sequence[str | os.PathLike], grid: Grid) -> Transform:
    """Read a transform, fixed point -> moving point (what ITK, Slicer and ANTs store to resample the moving image).

    A displacement field or a B-spline, alone or within a composite, ends at the edge of its domain, where ITK jumps to
    no displacement at all and so tears the image. Here the displacement at the edge holds beyond it.

    Args:
        path: an ITK transform file (.tfm, .txt, .mat, .h5, .xfm) of any kind, composites included, or a displacement
            field image (.nii.gz, .nrrd, .mha; LPS mm, but NIfTI of intent 1006 RAS mm, as ITK has it); or several,
            through which a fixed point goes in this order.
        grid: where to sample a transform that is not linear; it should cover the fixed image.

    Returns:
        A (4, 4) matrix, LPS mm, when all are linear; a DenseTransform on ``grid`` otherwise.

    Raises:
        MorphSeekError: missing, damaged, not a 3D transform, singular or not finite; or none is given.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise MorphSeekError("There is no transform to read; give one file or more.")
    transforms = [read_itk_transform(one) for one in paths]
    if all(transform.IsLinear() for transform in transforms):
        matrices = [_matrix(transform, Path(one)) for transform, one in zip(transforms, paths, strict=True)]
        return functools.reduce(lambda before, then: then @ before, matrices)
    links = [(link, one) for transform, one in zip(transforms, paths, strict=True) for link in links_of(transform)]
    displacement = torch.empty(3, *grid.shape)
    length = max(1, _SLAB_POINTS // (grid.shape[1] * grid.shape[2]))
    for slab, first in zip(displacement.split(length, dim=1), range(0, grid.shape[0], length), strict=True):
        index = np.indices(slab.shape[1:]).reshape(3, -1).T + np.array([first, 0, 0])
        points = apply_affine(grid.affine, np.ascontiguousarray(index, dtype=np.float64))  # as BLAS wants them
        moved = points
        for link, one in links:
            moved = link.map_points(moved)
            if not np.isfinite(moved).all():
                raise MorphSeekError(
                    f"{one} moves points by amounts that are NaN or infinite; compute the transform again."
                )
        slab.copy_(torch.from_numpy((moved - points).T).view(slab.shape))
    return DenseTransform(displacement, grid)


def read_dense(path: str | os.PathLike) -> DenseTransform:
    """Read a displacement field with its own nodes, as :func:`write_transform` wrote it.

    Raises:
        MorphSeekError: it cannot be read, or is a transform of another kind.
    """
    transform = read_itk_transform(path)
    if transform.GetTransformEnum() != sitk.sitkDisplacementField:
        raise MorphSeekError(f"{path} is not a displacement field; give a transform.h5 of a registration.")
    field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
    values = np.ascontiguousarray(sitk.GetArrayViewFromImage(field).transpose(3, 2, 1, 0), dtype=np.float32)
    place = field.GetSpacing(), field.GetDirection(), field.GetOrigin()
    return DenseTransform(torch.from_numpy(values), Grid.from_parts(field.GetSize(), *place))


def read_itk_transform(path: str | os.PathLike) -> sitk.Transform:
    """Read a transform as ITK has it; see :func:`read_transform` for what can be read.

    Raises:
        MorphSeekError: missing, damaged, not a 3D transform.
    """
    path = Path(path)
    library_name(path)
    if not path.exists():
        raise MorphSeekError(f"{path} does not exist; check the name.")
    if path.is_dir():
        raise MorphSeekError(f"{path} is a folder; give a transform file.")
    if path.name.lower().endswith(_FIELDS):
        field = read_sitk(path, components=3)
        transform: sitk.Transform = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    else:
        transform = _read_itk(path)
    if transform.GetDimension() != 3:
        raise MorphSeekError(f"{path} is a {transform.GetDimension()}D transform; give a 3D one.")
    return transform


def _read_itk(path: Path) -> sitk.Transform:
    damaged = MorphSeekError(
        f"{path} cannot be read as a transform: it is damaged or of another program; give an ITK transform (.h5, .tfm, "
        ".txt, .mat), as Slicer and ANTs save them, or a displacement field image."
    )
    if path.suffix.lower() in (".h5", ".hdf5"):
        # looked into first: ITK's HDF5 library prints a page of its own for every file it cannot open
        try:
            with h5py.File(path, "r") as file:
                if "TransformGroup" not in file:
                    raise damaged
        except OSError:
            raise damaged from None
    try:
        return sitk.ReadTransform(library_name(path))
    except RuntimeError:
        raise damaged from None


def _matrix(transform: sitk.Transform, path: Path) -> np.ndarray:
    """Return (4, 4) of a linear transform of any class, from where it takes four points."""
    reach = 100.0  # mm; far enough that the differences keep their digits
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    for axis in range(3):
        point = [0.0, 0.0, 0.0]
        point[axis] = reach
        matrix[:3, axis] = (np.array(transform.TransformPoint(point)) - origin) / reach
    matrix[:3, 3] = origin
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
        raise MorphSeekError(f"{path} holds a matrix that is singular or not finite; compute the transform again.")
    return matrix
