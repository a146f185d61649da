"""Image and label files in and out, through SimpleITK.

What is read is checked once, here, so that the rest of the engine may trust a volume: three axes of two or more voxels,
one finite number a voxel, a regular grid with a known place in space (LPS mm). Everything refused is refused with one
sentence (:class:`MorphSeekLib.protocol.errors.MorphSeekError`); what was decided for the user is said in the volume's
notices. What is written appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from ..protocol.errors import MorphSeekError
from ..protocol.job import Notice
from ..protocol.startup import check_readable, shown
from ..space.geometry import DenseTransform, Grid, Transform, Volume, covering_grid, index_points, reordered, resample
from . import dicom, nifti
from .files import library_name, linked, whole_file
from .labels import check_label_values

_ALL_THREADS = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
WRITABLE = (".nii", ".nii.gz", ".nrrd", ".mha")
_SAMPLES = 1 << 22  # voxels, at random, of which the air value of a large image is found
_AXES = ("first", "second", "third")


def read_image(path: str | os.PathLike, nifti_form: str | None = None) -> Volume:
    """Read an intensity image.

    Args:
        path: a NIfTI, NRRD or MetaImage file, anything else SimpleITK reads in 3D, a folder of DICOM slices, or one of
            the slices (its whole series is read).
        nifti_form: "qform" or "sform", which of the two says where a NIfTI image lies when its header has both; None
            for the one that ITK, and so Slicer, takes. A notice says so when they differ.

    Returns:
        Float32 data (i, j, k) on its grid (LPS mm). NaN (a place outside the field of view) has become background.

    Raises:
        MorphSeekError: missing, damaged, not one 3D image of one finite number a voxel, constant, or without a place in
            space.
    """
    source = _read(path, nifti_form=nifti_form)
    volume = usable(_volume(source, shown(path), torch.float32), shown(path))
    return _right_angled(volume, shown(path), "linear")


def read_map(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> Volume:
    """Read a result, such as a Jacobian: data (i, j, k) of a type on its grid, which may be the same everywhere.

    Raises:
        MorphSeekError: missing, damaged, or not one 3D image of one number a voxel.
    """
    return _volume(_read(path), shown(path), dtype)


def voxel_count(path: str | os.PathLike) -> int:
    """Return how many voxels an image file says it has, by its header alone; 0 where that does not tell."""
    reader = sitk.ImageFileReader()
    try:
        reader.SetFileName(library_name(path))
        with _quiet():
            reader.ReadImageInformation()
    except (RuntimeError, MorphSeekError):
        return 0
    return math.prod(reader.GetSize())


def read_grid(path: str | os.PathLike, nifti_form: str | None = None) -> Grid:
    """Read where the voxels of an image or a label map lie; its values do not matter.

    Args:
        path, nifti_form: as for :func:`read_image`.

    Raises:
        MorphSeekError: as :func:`read_image`, but for the values.
    """
    volume = _volume(_read(path, nifti_form=nifti_form), shown(path), torch.float32)
    return _right_angled(volume, shown(path), "nearest").grid


def usable(volume: Volume, name: str) -> Volume:
    """Return an intensity image as the engine takes it: NaN, which stands for "outside the field of view", is
    background.

    Args:
        volume: floating-point data.
        name: what to call the image.

    Returns:
        the volume; where there was NaN, a new one with :func:`air_value` in its place and a notice that counts them.

    Raises:
        MorphSeekError: infinite voxels, nothing but NaN, or all voxels the same.
    """
    data = volume.data
    infinite, missing = int(data.isinf().sum()), int(data.isnan().sum())
    if infinite:
        raise MorphSeekError(nifti.not_finite(name, infinite))
    if missing == data.numel():
        raise MorphSeekError(f"{name} is empty: every voxel is NaN; check that it is the one you mean.")
    if missing:
        air = air_value(data)
        volume = dataclasses.replace(volume, data=data.nan_to_num(nan=air))
        text = f"{name} has {missing} voxels that are NaN; they are taken for background and read as {air:g}."
        volume.notices += (Notice("nan", text),)
    low, high = float(volume.data.min()), float(volume.data.max())
    if low == high:
        raise MorphSeekError(f"{name} is empty: every voxel is {low:g}; check that it is the one you mean.")
    return volume


def air_value(data: Tensor) -> float:
    """Return the value of an image's background, which also holds outside of it: the one that most voxels of its
    faces share, or else the value that one voxel in a thousand is below (its minimum, but for stray voxels)."""
    faces = [data.select(axis, end).flatten() for axis in range(3) for end in (0, -1)]
    rim = torch.cat(faces)
    rim = rim[~rim.isnan()].float()
    if rim.numel():
        values, counts = rim.unique(return_counts=True)
        if int(counts.max()) > rim.numel() / 2:
            return float(values[counts.argmax()])
    values = data.flatten()
    if values.numel() > _SAMPLES:
        values = values[torch.randint(values.numel(), (_SAMPLES,), generator=torch.Generator().manual_seed(0))]
    values = values[~values.isnan()].float()
    return float(values.kthvalue(1 + values.numel() // 1000).values) if values.numel() else 0.0


def read_labels(path: str | os.PathLike, nifti_form: str | None = None) -> Volume:
    """Read a label image: int32 data (i, j, k) on its grid (LPS mm).

    Floating-point files are accepted when they hold whole numbers; NaN is background.

    Args:
        path, nifti_form: as for :func:`read_image`; give the form that was taken for the image of these labels.

    Raises:
        MorphSeekError: as :func:`read_image`, and for values that are not labels or a file without any label.
    """
    volume = _volume(_read(path, nifti_form=nifti_form), shown(path), torch.float64)
    missing = int(volume.data.isnan().sum())
    if missing:
        text = f"{shown(path)} has {missing} voxels that are NaN; they are taken for background."
        volume.notices += (Notice("nan", text),)
    labels = label_values(volume.data.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), shown(path))
    if not bool(labels.any()):
        raise MorphSeekError(f"{shown(path)} has no label: every voxel is 0; check that it is the file you mean.")
    return _right_angled(dataclasses.replace(volume, data=labels), shown(path), "nearest")


def label_values(values: Tensor, name: str) -> Tensor:
    """Convert numbers to labels, int32.

    Raises:
        MorphSeekError: with ``name``: fractions, negative values, or values beyond 32 bits.
    """
    whole = values.round()
    if values.is_floating_point() and bool(((values - whole).abs() <= 1e-3).all()):
        values = whole  # scl_slope makes 3 into 2.9999998
    check_label_values(values, name)
    return values.to(torch.int32)


@dataclass
class _Source:
    """A file's image and what its header adds to it.

    Attributes:
        image: as SimpleITK has it.
        affine: where it lies (LPS mm) when that is not where ITK places it.
        elsewhere: the other place that a NIfTI header states when it states two.
        nifti_codes: see :class:`Grid`.
        notices: about its place.
    """

    image: sitk.Image
    affine: np.ndarray | None = None
    elsewhere: np.ndarray | None = None
    nifti_codes: tuple[int, int] = (1, 1)
    notices: tuple[Notice, ...] = ()


def read_sitk(path: str | os.PathLike, components: int = 1) -> sitk.Image:
    """Read a 3D image file or DICOM series as SimpleITK has it, refusing what cannot be read truly.

    Args:
        path: as for :func:`read_image`.
        components: how many numbers each voxel must have: 1, or 3 for a displacement field.

    Raises:
        MorphSeekError: missing, damaged, of another kind, or without a place in space. (Constant images, one-voxel
            axes, shear and, outside displacement fields in NIfTI, NaN are left to the caller.)
    """
    return _read(path, components).image


def _read(path: str | os.PathLike, components: int = 1, nifti_form: str | None = None) -> _Source:
    """Read as :func:`read_sitk` does, with what the header says."""
    path = Path(path)
    if nifti_form not in (None, *nifti.FORMS):
        raise MorphSeekError(f"There is no NIfTI form '{nifti_form}'; choose qform or sform.")
    library_name(path)
    check_readable(path)
    if path.is_dir() or dicom.is_dicom(path):
        with _quiet():
            return _Source(dicom.read_series(path) if path.is_dir() else dicom.read_series(path.parent, path))
    if not nifti.is_nifti(path):
        upper = path.suffix != ".mha" and path.suffix.lower() == ".mha"  # the one format that ITK knows by its case
        with linked(path, ".mha") if upper else nullcontext(library_name(path)) as name:
            return _Source(_read_file(name, path, components))
    header, missing = nifti.check(path, nan=components == 1)
    # ITK refuses a file whose only form is sheared, so it is asked for the voxels alone
    placeless = nifti_form == "sform" and header is not None and header.sheared and header.codes[0] <= 0
    with nifti.openable(path, without_forms=placeless) as name:
        image = _read_file(name, path, components)
    if header is None:
        return _Source(image)
    if missing:
        image = _with_nan(image, nifti.nan_voxels(path, header))
    taken = None if placeless else _form_of(image, header)
    wanted = nifti_form if nifti_form is not None and header.codes[nifti.FORMS.index(nifti_form)] > 0 else None
    notice = _form_notice(path, header, taken, wanted)
    affine = header.form(wanted) if wanted is not None and wanted != taken else None
    elsewhere = None
    if nifti.disagreement(header) is not None:
        elsewhere = header.form("sform" if (wanted or taken) == "qform" else "qform")
    return _Source(image, affine, elsewhere, header.codes, () if notice is None else (notice,))


def _read_file(name: str, path: Path, components: int) -> sitk.Image:
    """Read a file by the name that ITK can open; ``path`` is what the user calls it."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(name)
    with _quiet():
        try:
            # the header first: a long time series is refused before it fills the memory
            reader.ReadImageInformation()
            _check_kind(
                reader.GetSize(), reader.GetNumberOfComponents(), reader.GetPixelIDValue(), str(path), components
            )
            if not all(math.isfinite(s) and s > 0 for s in reader.GetSpacing()):
                raise MorphSeekError(nifti.no_spacing(path, reader.GetSpacing()))
            return reader.Execute()
        except RuntimeError as error:
            raise MorphSeekError(_unreadable(path, str(error))) from None


def _with_nan(image: sitk.Image, where: np.ndarray) -> sitk.Image:
    """Return an image with NaN where its file has it and ITK made it zero."""
    values = sitk.GetArrayFromImage(image)
    values.reshape(where.shape[::-1])[where.T] = np.nan
    repaired = sitk.GetImageFromArray(values)
    repaired.CopyInformation(image)
    return repaired


def form_notices(path: str | os.PathLike) -> tuple[Notice, ...]:
    """Return notices about where a NIfTI file lies, from its header alone; nothing for other and unreadable
    files.

    For an application that has read the file by itself, with ITK.
    """
    path = Path(path)
    try:
        header = nifti.read_header(path) if nifti.is_nifti(path) and path.is_file() else None
        if header is None:
            return ()
        reader = sitk.ImageFileReader()
        with nifti.openable(path) as name, _quiet():
            reader.SetFileName(name)
            reader.ReadImageInformation()
        notice = _form_notice(path, header, _form_of(reader, header), None)
    except (OSError, EOFError, zlib.error, RuntimeError, MorphSeekError):
        return ()
    return () if notice is None else (notice,)


def _form_of(image: sitk.Image | sitk.ImageFileReader, header: nifti.Header) -> str | None:
    """Return which form ITK took: the nearer one; None when the header has none."""
    present = [form for form, code in zip(nifti.FORMS, header.codes, strict=True) if code > 0]
    dimension = image.GetDimension()
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3] * image.GetSpacing()[:3]
    matrix[:3, 3] = image.GetOrigin()[:3]
    corner = np.array([*header.shape[:3]])

    def off(form: str) -> float:
        difference = header.form(form) - matrix
        return float(np.abs(difference[:3, :3] * corner).max() + np.abs(difference[:3, 3]).max())

    return min(present, key=off) if present else None


def _form_notice(path: Path, header: nifti.Header, taken: str | None, wanted: str | None) -> Notice | None:
    """Return the notice about a header whose two forms differ, or whose only one is sheared.

    Args:
        taken: the form by which ITK places the image; None when it refuses the image.
        wanted: the form that was asked for and is there, or None.
    """
    apart = nifti.disagreement(header)
    if apart is not None:
        said = f"{shown(path)} states two places in its header, qform and sform, up to {apart}"
        said += "; its sform is sheared" if header.sheared else ""
    elif wanted == "sform" and taken is None:
        return Notice(
            "nifti-forms",
            f"{shown(path)} has a sheared sform, which was taken as asked; Slicer and ITK refuse this file, so load "
            "warped.nii.gz instead, whose two forms are equal.",
        )
    else:
        return None
    if wanted is None:
        other = nifti.FORMS[taken == "qform"]
        said += f". The {taken} was taken, as ITK and Slicer do; if the {other} is right, use --nifti-form {other}."
    elif wanted == taken:
        said += f". The {wanted} was taken, as asked; it is also what ITK and Slicer take."
    else:
        said += (
            f". The {wanted} was taken, as asked; Slicer and ITK place this file elsewhere, by its {taken}, so load "
            "warped.nii.gz instead, whose two forms are equal."
        )
    return Notice("nifti-forms", said)


def check_overlap(fixed: Volume, moving: Volume, transform: Transform | None = None) -> None:
    """Refuse two images that do not touch in world space.

    Args:
        fixed, moving: the images.
        transform: fixed point -> moving point, LPS mm; None for the identity.

    Raises:
        MorphSeekError: not one voxel of either lies within the other, or the transform is not finite.
    """
    gap = _gap(fixed.grid, moving.grid, transform)
    if math.isnan(gap):
        raise MorphSeekError("The transform between the two images is not made of finite numbers; check it.")
    if gap > 0 and not isinstance(transform, DenseTransform):
        # a small moving image may slip between the points looked at in a large fixed one
        gap = min(gap, _gap(moving.grid, fixed.grid, None if transform is None else np.linalg.inv(transform)))
    if gap > 0:
        raise MorphSeekError(
            f"{fixed.called('The fixed image')} and {moving.called('the moving image')} do not overlap: {gap:.0f} mm "
            "lie between them; use --align center (or rigid or affine) to bring them together, or check "
            "--initial-transform."
        )


def use_simpleitk_threads(count: int | None = None) -> None:
    """Set the number of SimpleITK's threads; None for as many as it took at the start."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(count or _ALL_THREADS)


def check_labels(labels: Volume, image: Volume, name: str) -> Volume:
    """Return a label image on its image's grid.

    Args:
        labels: integer data.
        image: what it labels.
        name: what to call it in a warning or refusal (its file).

    Returns:
        ``labels`` itself when the grids are the same, with its axes turned when the voxels are; otherwise resampled
        (nearest), with a notice that says how many labeled voxels lay outside.

    Raises:
        MorphSeekError: no labeled voxel lies in the image.
    """
    grid = image.grid
    if labels.grid.same_as(grid):
        return labels
    turned = reordered(labels, grid)
    if turned is not None:
        return turned
    if _same_but_for_the_form(labels, image):
        text = (
            f"{name} and its image were placed by different forms (qform, sform) of their headers, so the labels were "
            "moved onto the image's voxels."
        )
        return dataclasses.replace(labels, grid=grid, notices=(*labels.notices, Notice("labels-place", text)))
    labeled = labels.data.nonzero().T.double()
    to_image = torch.from_numpy(np.linalg.inv(grid.affine) @ labels.grid.affine)
    index = to_image[:3, :3] @ labeled + to_image[:3, 3:]
    limit = torch.tensor(grid.shape).view(3, 1) - 0.5
    inside = ((index >= -0.5) & (index <= limit)).all(dim=0)
    if not bool(inside.any()):
        raise MorphSeekError(
            f"{name} labels nothing in its image: all its labels lie outside of it; give the segmentation of this "
            "image, or one with the same origin and directions."
        )
    sizes = (f"{nifti.by(g.shape)} voxels of {nifti.by(g.spacing.round(3))} mm" for g in (labels.grid, grid))
    text = (
        "{} has another grid ({}) than its image ({}); it was resampled to nearest neighbors ({:.1f} % of its labeled "
        "voxels lie outside the image)."
    ).format(name, *sizes, 100 * (1 - float(inside.double().mean())))
    found = resample(labels, grid, mode="nearest")
    return dataclasses.replace(found, notices=(*labels.notices, Notice("labels-grid", text)))


def _same_but_for_the_form(labels: Volume, image: Volume) -> bool:
    """Return whether labels have the voxels of an image, and lie where one of the two headers places the image."""
    if labels.data.shape != image.data.shape:
        return False
    pairs = ((labels.grid.affine, image.elsewhere), (labels.elsewhere, image.grid.affine))
    return any(
        one is not None and other is not None and Grid(image.grid.shape, one).same_as(Grid(image.grid.shape, other))
        for one, other in pairs
    )


def write_image(volume: Volume, path: str | os.PathLike) -> None:
    """Write a volume, compressed, all of it or nothing.

    Integers and booleans take the smallest of uint8, int16 and int32 that holds them; everything else is written in the
    volume's number type, see :func:`stored_values`. Both forms of a NIfTI file are the same.

    Args:
        volume: data (i, j, k) on its grid (LPS mm).
        path: ends with one of ``WRITABLE``; its folder exists.

    Raises:
        MorphSeekError: unknown format, or the disk is full or the folder not writable.
    """
    check_image_name(path)
    image = _sitk_of(stored_values(volume), volume.grid)
    with whole_file(path) as part, _quiet():
        if not nifti.is_nifti(part):
            sitk.WriteImage(image, library_name(part), useCompression=True)
            return
        plain = part.with_name(f"{part.name.removesuffix('.gz').removesuffix('.nii')}-plain.nii")
        sitk.WriteImage(image, library_name(plain))
        if not nifti.is_complete(plain):  # SimpleITK does not notice a short write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if volume.grid.nifti_codes != (1, 1):  # ITK knows no other codes
            nifti.set_codes(plain, volume.grid.nifti_codes)
        if part.suffix == ".gz":
            nifti.compress(plain, part)
        else:
            os.replace(plain, part)


def check_image_name(path: str | os.PathLike) -> None:
    """Refuse a name that says no format to write an image in.

    Raises:
        MorphSeekError: with the endings that there are.
    """
    if not str(path).lower().endswith(WRITABLE):
        raise MorphSeekError(f"{shown(path)} has no format to write an image in; end its name with {_or(WRITABLE)}.")


def stored_values(volume: Volume) -> np.ndarray:
    """Return (i, j, k) values as they are written.

    Returns:
        Floating-point data in the volume's number type: rounded and clipped where that is an integer, else float32.
        Integers in the smallest of uint8, int16 and int32 that holds them.

    Raises:
        ValueError: integers beyond 32 bits.
    """
    data = volume.data.detach().cpu()
    if not data.is_floating_point():
        return data.numpy().astype(_smallest_type(data))
    kind = np.dtype(volume.dtype)
    if kind.kind not in "iu":
        return data.numpy().astype(np.float32)
    limits = np.iinfo(kind)
    # the largest 64-bit integers round up to numbers beyond them
    highest = limits.max if kind.itemsize < 8 else np.nextafter(np.float64(limits.max), 0)
    return data.double().numpy().round().clip(limits.min, highest).astype(kind)


def _smallest_type(data: Tensor) -> type:
    low, high = (int(data.min()), int(data.max())) if data.dtype != torch.bool else (0, 1)
    for kind in (np.uint8, np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    raise ValueError(f"Integers from {low} to {high} do not fit 32 bits.")


def _volume(source: _Source, name: str, dtype: torch.dtype) -> Volume:
    """Return what was read as a volume; its axes need not be at right angles when a NIfTI form that was asked for says
    so."""
    volume = volume_from_sitk(source.image, name, dtype)
    affine = volume.grid.affine if source.affine is None else source.affine
    grid = Grid(volume.grid.shape, affine, source.nifti_codes)
    return dataclasses.replace(volume, grid=grid, notices=source.notices, elsewhere=source.elsewhere, name=name)


def _right_angled(volume: Volume, name: str, mode: str) -> Volume:
    """Return a volume whose axes are not at right angles, resampled onto the nearest grid of those that covers it.

    No file of ours could say where a sheared grid lies, and Slicer would straighten it.
    """
    if not nifti.is_sheared(volume.grid.affine):
        return volume
    direction = nifti.nearest_rotation(volume.grid.affine[:3, :3])
    grid = covering_grid(volume.grid, volume.grid.spacing, direction)
    grid = dataclasses.replace(grid, nifti_codes=volume.grid.nifti_codes)
    background = air_value(volume.data) if mode == "linear" else 0
    text = (
        f"{name} has axes that are not at right angles; it was resampled onto a grid with right angles "
        f"({nifti.by(grid.shape)} voxels of {nifti.by(grid.spacing.round(3))} mm), on which the results lie."
    )
    straight = resample(volume, grid, mode=mode, background=background)
    notices = (*volume.notices, Notice("resampled-shear", text))
    return dataclasses.replace(straight, dtype=volume.dtype, notices=notices, name=volume.name)


def volume_from_sitk(image: sitk.Image, name: str = "The image", dtype: torch.dtype = torch.float32) -> Volume:
    """Convert a SimpleITK image (axes i, j, k = x, y, z of its index) to a volume.

    Args:
        image: one 3D image of one number a voxel.
        name: what to call it in a refusal.
        dtype: the type of the data.

    Raises:
        MorphSeekError: not one 3D image, complex, an axis of one voxel, a sheared or singular place in space.
    """
    image = _squeeze(image, name)
    for axis, size in zip(_AXES, image.GetSize(), strict=True):
        if size < 2:
            raise MorphSeekError(
                f"{name} has only {size} voxel along its {axis} axis; give a volume of at least two slices each way."
            )
    direction = np.array(image.GetDirection()).reshape(3, 3)
    try:
        grid = Grid.from_parts(image.GetSize(), image.GetSpacing(), direction, image.GetOrigin())
    except ValueError as error:
        raise MorphSeekError(f"{name} cannot be placed in space. {error}") from None
    # Slicer and NIfTI have no place for shear and would straighten it: our results would lie elsewhere than their image
    if nifti.is_sheared(grid.affine):
        raise MorphSeekError(_SHEARED.format(name=name))
    stored = sitk.GetArrayFromImage(image)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the reader refuses
        array = stored.astype(torch.empty(0, dtype=dtype).numpy().dtype).transpose(2, 1, 0)
    kind = stored.dtype.name if stored.dtype.kind in "iu" else "float32"
    return Volume(torch.from_numpy(np.ascontiguousarray(array)), grid, dtype=kind)


def sitk_from_volume(volume: Volume) -> sitk.Image:
    """Convert a volume to a SimpleITK image: integers to the smallest of uint8, int16 and int32, others to float32."""
    return _sitk_of(stored_values(dataclasses.replace(volume, dtype="float32")), volume.grid)


def _sitk_of(values: np.ndarray, grid: Grid) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    image.SetSpacing(grid.spacing.tolist())
    image.SetDirection(grid.direction.ravel().tolist())
    image.SetOrigin(grid.origin.tolist())
    return image


_SHEARED = (
    "{name} has voxel axes that are not at right angles (its header shears the image); resample it onto a right-angled "
    "grid first, for instance with Slicer's Resample Image module, and give that file."
)
_SHEARED_SFORM = (
    "{name} has voxel axes that are not at right angles (its only form, the sform, is sheared), which ITK and Slicer "
    "do not read; give --nifti-form sform to have it resampled onto a right-angled grid."
)


def _unreadable(path: Path, reason: str) -> str:
    if "orthonormal" in reason:
        return _SHEARED_SFORM.format(name=path)
    if "direction" in reason and "determinant" in reason:
        return nifti.singular(path)
    if path.name.lower().endswith(".mgz"):
        return f"{path} is a FreeSurfer file, which is not read; convert it to .nii.gz, for instance with mri_convert."
    if "Unable to determine ImageIO" in reason:
        return f"{path} is not an image of a known format; give a NIfTI, NRRD or MHA file, or a folder of DICOM slices."
    beside = " (a .mhd or .nhdr file needs its data file beside it)" if path.suffix in (".mhd", ".nhdr") else ""
    return f"{path} is damaged or incomplete and cannot be read{beside}; copy or export it again."


def _check_kind(size: Collection[int], components: int, pixel: int, name: str, wanted: int = 1) -> None:
    """Refuse what is not one 3D image with ``wanted`` real numbers a voxel; trailing axes of one (time) are fine."""
    size = tuple(size)
    if pixel in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise MorphSeekError(f"{name} holds complex numbers; save its magnitude as an image of its own and give that.")
    if components != wanted and wanted > 1:
        raise MorphSeekError(
            f"{name} is no displacement field: it has {components} instead of {wanted} numbers at each voxel; give a "
            "field of mm along x, y and z."
        )
    if components > wanted:
        raise MorphSeekError(
            f"{name} has {components} numbers at each voxel (a color image or a vector field); give an image with one "
            "number a voxel."
        )
    if len(size) < 3:
        raise MorphSeekError(f"{name} is a 2D image ({nifti.by(size)}); give a 3D volume.")
    if any(n > 1 for n in size[3:]):
        raise MorphSeekError(
            f"{name} is a {len(size)}D image ({nifti.by(size)}), such as a time series; save one of its volumes as a "
            "file of its own and give that."
        )


def _squeeze(image: sitk.Image, name: str) -> sitk.Image:
    _check_kind(image.GetSize(), image.GetNumberOfComponentsPerPixel(), image.GetPixelIDValue(), name)
    while image.GetDimension() > 3:
        size = list(image.GetSize())
        size[-1] = 0
        image = sitk.Extract(
            image, size, directionCollapseToStrategy=sitk.ExtractImageFilter.DIRECTIONCOLLAPSETOSUBMATRIX
        )
    return image


def _gap(grid: Grid, into: Grid, transform: Transform | None) -> float:
    """Return the mm from the nearest of some 30^3 mapped voxels of ``grid`` to the box ``into``; 0 if one is inside."""
    step = np.maximum(1, (np.array(grid.shape) - 1) / 29)
    shape = np.floor((np.array(grid.shape) - 1) / step + 1e-6).astype(int) + 1
    sparse = Grid(tuple(shape), grid.affine @ np.diag([*step, 1.0]))
    points = index_points(sparse, transform, into).double().reshape(3, -1)
    limit = torch.tensor(into.shape).view(3, 1) - 0.5
    beyond = (points - points.clamp(min=-0.5).minimum(limit)).T @ torch.from_numpy(into.affine[:3, :3].T.copy())
    return float(beyond.norm(dim=1).min())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ITK's own warnings: what matters in them becomes an error or a notice here."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _or(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
