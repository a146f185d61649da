"""Image and label files in and out, through SimpleITK.

What is read is checked once, here, so that the rest of the engine may trust a volume: three axes of two or more voxels,
one finite number a voxel, a regular grid with a known place in space (LPS mm). Everything refused is refused with one
sentence (:class:`MorphSeekLib.errors.MorphSeekError`). What is written appears whole or not at all.

SimpleITK mends some broken files in silence (what a NIfTI lacks at its end becomes zeros, and so does NaN; a spacing of
zero becomes one; a NIfTI cut short by a full disk counts as written), so NIfTI files are also looked at here, as the
NIfTI-1 and NIfTI-2 standards describe them (https://nifti.nimh.nih.gov).
"""

from __future__ import annotations

import errno
import gzip
import logging
import math
import os
import shutil
import struct
import tempfile
import uuid
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch

from .errors import MorphSeekError
from .geometry import DenseTransform, Grid, Transform, Volume, index_points, resample

log = logging.getLogger(__name__)

WRITABLE = (".nii", ".nii.gz", ".nrrd", ".mha")
_PART = ".morphseek-"
_AXES = ("first", "second", "third")


def read_image(path: str | os.PathLike) -> Volume:
    """Read an intensity image.

    Args:
        path: a NIfTI, NRRD or MetaImage file, anything else SimpleITK reads in 3D, a folder of DICOM slices, or one of
            the slices (its whole series is read).

    Returns:
        Float32 data (i, j, k) on its grid (LPS mm).

    Raises:
        MorphSeekError: missing, damaged, not one 3D image of one finite number a voxel, constant, or without a place in
            space.
    """
    volume = volume_from_sitk(read_sitk(path), f"{path}")
    check_intensities(volume, f"{path}")
    return volume


def check_intensities(volume: Volume, name: str) -> None:
    """Refuse an image with voxels that are not numbers, or all the same.

    Raises:
        MorphSeekError: with ``name``, what to call the image.
    """
    bad = int((~torch.isfinite(volume.data)).sum())
    if bad:
        raise MorphSeekError(_not_finite(name, bad))
    low, high = float(volume.data.min()), float(volume.data.max())
    if low == high:
        raise MorphSeekError(f"{name} is empty: every voxel is {low:g}; check that it is the one you mean.")


def read_labels(path: str | os.PathLike) -> Volume:
    """Read a label image: int32 data (i, j, k) on its grid (LPS mm).

    Floating-point files are accepted when they hold whole numbers.

    Raises:
        MorphSeekError: as :func:`read_image`, and for values that are not whole numbers or a file without any label.
    """
    image = read_sitk(path)
    volume = volume_from_sitk(image, f"{path}", torch.float64)
    whole = volume.data.round()
    # scl_slope makes 3 into 2.9999998
    if not bool(((volume.data - whole).abs() < 1e-3).all()) or float(whole.abs().max()) >= 2**31:
        raise MorphSeekError(
            f"{path} is not a label image: some of its values are not whole numbers; give a segmentation that was "
            "resampled with nearest-neighbour interpolation."
        )
    if not bool(whole.any()):
        raise MorphSeekError(f"{path} has no label: every voxel is 0; check that it is the file you mean.")
    return Volume(whole.to(torch.int32), volume.grid)


def read_sitk(path: str | os.PathLike, components: int = 1) -> sitk.Image:
    """Read a 3D image file or DICOM series as SimpleITK has it, refusing what cannot be read truly.

    Args:
        path: as for :func:`read_image`.
        components: how many numbers each voxel must have: 1, or 3 for a displacement field.

    Raises:
        MorphSeekError: missing, damaged, of another kind, or without a place in space. (Constant images, one-voxel
            axes, shear and, outside NIfTI, NaN are left to the caller.)
    """
    path = Path(path)
    if not path.exists():
        raise MorphSeekError(f"{path} does not exist; check the name.")
    if not os.access(path, os.R_OK):
        raise MorphSeekError(f"{path} may not be read; check its permissions.")
    if path.is_dir():
        return _read_series(path)
    if path.stat().st_size == 0:
        raise MorphSeekError(f"{path} is an empty file (0 bytes); copy or export it again.")
    if _is_dicom(path):
        return _read_series(path.parent, path)
    if _is_nifti(path):
        _check_nifti(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _quiet():
        try:
            # the header first: a long time series is refused before it fills the memory
            reader.ReadImageInformation()
            _check_kind(
                reader.GetSize(), reader.GetNumberOfComponents(), reader.GetPixelIDValue(), str(path), components
            )
            if not all(math.isfinite(s) and s > 0 for s in reader.GetSpacing()):
                raise MorphSeekError(_no_spacing(path, reader.GetSpacing()))
            return reader.Execute()
        except RuntimeError as error:
            raise MorphSeekError(_unreadable(path, str(error))) from None


def check_overlap(
    fixed: Volume, moving: Volume, transform: Transform | None = None, names: tuple[str, str] = ("", "")
) -> None:
    """Refuse two images that do not touch in world space.

    Args:
        fixed, moving: the images.
        transform: fixed point -> moving point, LPS mm; None for the identity.
        names: what to call the two in the sentence (their files); "" leaves the name out.

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
        fixed_name, moving_name = (f" ({name})" if name else "" for name in names)
        raise MorphSeekError(
            f"The fixed image{fixed_name} and the moving image{moving_name} do not overlap: {gap:.0f} mm lie between "
            "them; use --align center (or rigid or affine) to bring them together, or check --initial-transform."
        )


def check_labels(labels: Volume, image: Volume, name: str) -> Volume:
    """A label image on its image's grid.

    Args:
        labels: integer data.
        image: what it labels.
        name: what to call it in a warning or refusal (its file).

    Returns:
        ``labels`` itself when the grids are the same; otherwise resampled (nearest), with a warning in the log that
        says how many labelled voxels lay outside.

    Raises:
        MorphSeekError: no labelled voxel lies in the image.
    """
    grid = image.grid
    if labels.grid.same_as(grid):
        return labels
    labelled = labels.data.nonzero().T.double()
    to_image = torch.from_numpy(np.linalg.inv(grid.affine) @ labels.grid.affine)
    index = to_image[:3, :3] @ labelled + to_image[:3, 3:]
    limit = torch.tensor(grid.shape).view(3, 1) - 0.5
    inside = ((index >= -0.5) & (index <= limit)).all(dim=0)
    if not bool(inside.any()):
        raise MorphSeekError(
            f"{name} labels nothing in its image: all its labels lie outside, in another place of the world; give the "
            "segmentation of this very image, or one with the same origin and directions."
        )
    log.warning(
        "%s has another grid (%s voxels of %s mm) than its image (%s of %s mm); it was resampled to nearest neighbours"
        " (%.1f %% of the labelled voxels lie outside the image).",
        name,
        *(text for g in (labels.grid, grid) for text in (_by(g.shape), _by(g.spacing.round(3)))),
        100 * (1 - float(inside.double().mean())),
    )
    return resample(labels, grid, mode="nearest")


def write_image(volume: Volume, path: str | os.PathLike) -> None:
    """Write a volume, compressed, all of it or nothing.

    Integers and booleans take the smallest of uint8, int16 and int32 that holds them, everything else float32.

    Args:
        volume: data (i, j, k) on its grid (LPS mm).
        path: ends with one of ``WRITABLE``; its folder exists.

    Raises:
        MorphSeekError: unknown format, or the disk is full or the folder not writable.
    """
    if not str(path).lower().endswith(WRITABLE):
        raise MorphSeekError(f"{path} has no format to write an image in; end its name with {_or(WRITABLE)}.")
    image = sitk_from_volume(volume)
    with whole_file(path) as part, _quiet():
        sitk.WriteImage(image, str(part), useCompression=True)
        if _is_nifti(part):
            try:  # a short NIfTI write counts as done for SimpleITK
                _scan_nifti(part)
            except (EOFError, zlib.error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def volume_from_sitk(image: sitk.Image, name: str = "The image", dtype: torch.dtype = torch.float32) -> Volume:
    """From a SimpleITK image (axes i, j, k = x, y, z of its index).

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
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-3:
        raise MorphSeekError(_SHEARED.format(name=name))
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the reader refuses
        array = sitk.GetArrayFromImage(image).astype(torch.empty(0, dtype=dtype).numpy().dtype).transpose(2, 1, 0)
    return Volume(torch.from_numpy(np.ascontiguousarray(array)), grid)


def sitk_from_volume(volume: Volume) -> sitk.Image:
    """To a SimpleITK image: uint8, int16 or int32 for integers (the smallest that holds them), else float32."""
    data = volume.data.detach().cpu()
    if data.is_floating_point():
        kind = np.float32
    else:
        low, high = (int(data.min()), int(data.max())) if data.dtype != torch.bool else (0, 1)
        fits = [t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= low and high <= np.iinfo(t).max]
        if not fits:
            raise ValueError(f"Integers from {low} to {high} do not fit 32 bits.")
        kind = fits[0]
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.numpy().transpose(2, 1, 0).astype(kind)))
    image.SetSpacing(volume.grid.spacing.tolist())
    image.SetDirection(volume.grid.direction.ravel().tolist())
    image.SetOrigin(volume.grid.origin.tolist())
    return image


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file that appears whole or not at all.

    Yields:
        A name in the same folder, with the same endings, to write to; it takes the place of ``path`` when the block
        ends, and is removed when the block fails.

    Raises:
        MorphSeekError: the disk is full or the folder not writable (OSError and RuntimeError of the block, which is
            what SimpleITK and HDF5 raise, become this).
    """
    path = Path(path)
    part = path.with_name(f".part-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has this name", str(path))
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise _unwritable(path, error) from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def output_folder(path: str | os.PathLike, owns: Collection[str] = ()) -> Iterator[Path]:
    """A folder whose files appear together or not at all.

    Args:
        path: the folder; made when it is missing.
        owns: names a run may write. Those left by an earlier run that this one does not write are removed with it, so
            that the folder never mixes two results.

    Yields:
        A temporary folder inside ``path`` to write to. Its files move up when the block ends; when it fails (or is
        cancelled) it is removed with everything made for it, and what was in ``path`` before stays.

    Raises:
        MorphSeekError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    missing = [p for p in (path, *path.parents) if not p.exists()]
    part: Path | None = None
    done = False
    try:
        path.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=path))
        yield part
        written = sorted(part.iterdir())
        for file in written:
            if (path / file.name).is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder has this name", str(path / file.name))
        for file in written:
            os.replace(file, path / file.name)
        for name in set(owns) - {file.name for file in written}:
            (path / name).unlink(missing_ok=True)
        done = True
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        if not done:
            for folder in missing:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


_SHEARED = (
    "{name} has voxel axes that are not at right angles (its header shears the image); resample it onto a right-angled "
    "grid first, for instance with Slicer's Resample Image module, and give that file."
)


def _unreadable(path: Path, reason: str) -> str:
    if "orthonormal" in reason:
        return _SHEARED.format(name=path)
    if "direction" in reason and "determinant" in reason:
        return _singular(path)
    if "Unable to determine ImageIO" in reason:
        return f"{path} is not an image of a known format; give a NIfTI, NRRD or MHA file, or a folder of DICOM slices."
    beside = " (a .mhd or .nhdr file needs its data file beside it)" if path.suffix in (".mhd", ".nhdr") else ""
    return f"{path} is damaged or incomplete and cannot be read{beside}; copy or export it again."


def _singular(path: Path) -> str:
    return (
        f"{path} has a singular direction matrix in its header, so its voxels have no place in space; repair the "
        "header (for instance with Slicer's Volumes module) and save it again."
    )


def _not_finite(path: str | os.PathLike, count: int) -> str:
    return (
        f"{path} has {count} voxels that are NaN or infinite; replace them (with the background's value, for instance) "
        "and save it again."
    )


def _no_spacing(path: Path, spacing: Collection[float]) -> str:
    return (
        f"{path} says that its voxels measure {_by(spacing)} mm; every size must be above zero: repair the header (for "
        "instance with Slicer's Volumes module) and save it again."
    )


def _check_kind(size: Collection[int], components: int, pixel: int, name: str, wanted: int = 1) -> None:
    """Refuse what is not one 3D image of so many real numbers a voxel; trailing axes of one (time) are fine."""
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
            f"{name} has {components} numbers at each voxel (a colour image or a vector field); give an image with one "
            "number a voxel."
        )
    if len(size) < 3:
        raise MorphSeekError(f"{name} is a 2D image ({_by(size)}); give a 3D volume.")
    if any(n > 1 for n in size[3:]):
        raise MorphSeekError(
            f"{name} is a {len(size)}D image ({_by(size)}), such as a time series; save one of its volumes as a file "
            "of its own and give that."
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


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


class _NiftiHeader(NamedTuple):
    """The fields of a NIfTI-1 or NIfTI-2 header that are looked at here."""

    order: str
    shape: tuple[int, ...]
    datatype: int
    bits: int
    offset: int
    pixdim: tuple[float, ...]
    qform_code: int
    sform_code: int
    sform: np.ndarray


def _nifti_header(raw: bytes) -> _NiftiHeader | None:
    """Of a file's first 540 bytes; None when they are no NIfTI header."""
    if len(raw) < 352:
        raise EOFError
    for order in "<>":
        length = struct.unpack_from(order + "i", raw)[0]
        if length == 348:
            dim = struct.unpack_from(order + "8h", raw, 40)
            datatype, bits = struct.unpack_from(order + "2h", raw, 70)
            pixdim = struct.unpack_from(order + "8f", raw, 76)
            (offset,) = struct.unpack_from(order + "f", raw, 108)
            codes = struct.unpack_from(order + "2h", raw, 252)
            rows = struct.unpack_from(order + "12f", raw, 280)
        elif length == 540 and len(raw) == 540:
            datatype, bits = struct.unpack_from(order + "2h", raw, 12)
            dim = struct.unpack_from(order + "8q", raw, 16)
            pixdim = struct.unpack_from(order + "8d", raw, 104)
            (offset,) = struct.unpack_from(order + "q", raw, 168)
            codes = struct.unpack_from(order + "2i", raw, 344)
            rows = struct.unpack_from(order + "12d", raw, 400)
        else:
            continue
        shape = dim[1 : dim[0] + 1]
        if not 1 <= dim[0] <= 7 or min(shape) < 1 or not 0 <= offset < 2**31:
            raise EOFError
        return _NiftiHeader(
            order, shape, datatype, bits, int(offset), pixdim[1:4], *codes, np.array(rows).reshape(3, 4)
        )
    return None


def _scan_nifti(path: Path) -> tuple[_NiftiHeader | None, int]:
    """A NIfTI file's header (None: it is something else) and how many of its voxels are NaN or infinite.

    Raises:
        EOFError, gzip.BadGzipFile, zlib.error: the file is shorter than its header says, or wrongly compressed.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    bad = 0
    with gzip.open(path) if compressed else open(path, "rb") as file:
        header = _nifti_header(file.read(540))
        if header is None:
            return None, 0
        file.seek(header.offset)
        kind = {16: "f4", 64: "f8"}.get(header.datatype)
        left = math.prod(header.shape) * header.bits // 8
        while left > 0:
            wanted = min(left, 1 << 22)
            block = file.read(wanted)
            if len(block) < wanted:
                raise EOFError
            left -= wanted
            if kind is not None:
                bad += int((~np.isfinite(np.frombuffer(block, header.order + kind))).sum())
        while compressed and file.read(1 << 22):  # as far as the checksum
            pass
    return header, bad


def _check_nifti(path: Path) -> None:
    """Refuse a NIfTI file that SimpleITK would mend in silence."""
    try:
        header, bad = _scan_nifti(path)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise MorphSeekError(f"{path} is damaged or incomplete and cannot be read; copy or export it again.") from None
    if header is None or len(header.shape) < 3:
        return
    if bad:
        raise MorphSeekError(_not_finite(path, bad))
    if not all(math.isfinite(s) and s > 0 for s in header.pixdim):
        raise MorphSeekError(_no_spacing(path, header.pixdim))
    if header.sform_code <= 0:
        return
    if not np.isfinite(header.sform).all():
        raise MorphSeekError(_singular(path))
    if header.qform_code > 0:  # ITK, and so Slicer, fall back on it
        return
    linear = header.sform[:, :3]
    norms = np.linalg.norm(linear, axis=0)
    if not abs(np.linalg.det(linear)) > 1e-6 * np.prod(norms):
        raise MorphSeekError(_singular(path))
    # ITK takes the size from pixdim, other programs from the matrix; a sheared matrix gets ITK's own refusal
    sheared = np.abs((linear / norms).T @ (linear / norms) - np.eye(3)).max() > 1e-3
    if not sheared and np.abs(norms / header.pixdim - 1).max() > 0.01:
        raise MorphSeekError(
            f"{path} states two voxel sizes in its header ({_by(header.pixdim)} mm as pixdim, {_by(norms)} mm as "
            "sform); make them agree and save it again."
        )


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_series(folder: Path, member: Path | None = None) -> sitk.Image:
    """The DICOM series of a folder; ``member`` chooses the one that this file belongs to."""
    with _quiet():
        found = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        series = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in found]
    if member is not None:
        series = [files for files in series if any(os.path.samefile(member, f) for f in files)] or [(str(member),)]
    if not series:
        raise MorphSeekError(
            f"{folder} is a folder without DICOM slices; give an image file, or the folder that holds the slices "
            "themselves."
        )
    # scouts, reports and secondary captures come as single files beside the one true series
    several = [files for files in series if len(files) > 1]
    if len(several) == 1:
        series = several
    if len(series) > 1:
        listed = ", ".join(_describe(files) for files in series[:8]) + (", ..." if len(series) > 8 else "")
        raise MorphSeekError(
            f"{folder} holds {len(series)} DICOM series: {listed}; give one file of the series you want instead of the "
            "folder."
        )
    files = series[0]
    name = str(folder if member is None else member)
    try:
        with _quiet():
            if len(files) == 1:
                return sitk.ReadImage(files[0])
            _check_stack(files, name)
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(files)
            return reader.Execute()
    except RuntimeError:
        raise MorphSeekError(f"{name} holds DICOM slices that cannot be read together; export them again.") from None


def _tags(file: str) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _describe(files: Collection[str]) -> str:
    first = next(iter(files))
    try:
        what = _tags(first).get("0008|103e") or "without description"
    except RuntimeError:
        what = "unreadable"
    return f"'{what}' ({len(files)} files such as {Path(first).name})"


def _check_stack(files: Collection[str], name: str) -> None:
    """Refuse slices that are no regular block; ITK would space them evenly in silence."""
    tags = [_tags(file) for file in files]
    try:
        places = np.array([[float(x) for x in t["0020|0032"].split("\\")] for t in tags])
        cosines = np.array([[float(x) for x in t["0020|0037"].split("\\")] for t in tags])
    except (KeyError, ValueError):
        raise MorphSeekError(
            f"{name} holds DICOM slices without a position or direction (secondary captures?); give the original "
            "series."
        ) from None
    normal = np.cross(cosines[0, :3], cosines[0, 3:])
    if np.abs(cosines - cosines[0]).max() > 1e-3:
        raise MorphSeekError(
            f"{name} holds DICOM slices of different directions in one series (a scout?); give a series of parallel "
            "slices."
        )
    places = places[np.argsort(places @ normal)]
    steps = np.diff(places, axis=0)
    heights = steps @ normal
    if heights.min() < 1e-3:
        raise MorphSeekError(
            f"{name} holds several DICOM slices at one place (a time series or several echoes); export one volume of "
            "it, for instance from Slicer, and give that."
        )
    sideways = np.linalg.norm(steps - heights[:, None] * normal, axis=1)
    if np.abs(heights / np.median(heights) - 1).max() > 0.1 or sideways.max() > 0.02 * np.median(heights):
        raise MorphSeekError(
            f"{name} holds DICOM slices that are no regular block (slices missing, unevenly spaced, or a tilted "
            "gantry); load it in Slicer with acquisition geometry regularization on, and give the volume saved from "
            "there."
        )


def _gap(grid: Grid, into: Grid, transform: Transform | None) -> float:
    """mm from the nearest of about 30^3 voxels of ``grid``, mapped, to the box of ``into``; 0 when one lies inside."""
    step = np.maximum(1, (np.array(grid.shape) - 1) / 29)
    shape = np.floor((np.array(grid.shape) - 1) / step + 1e-6).astype(int) + 1
    sparse = Grid(tuple(shape), grid.affine @ np.diag([*step, 1.0]))
    points = index_points(sparse, transform, into).double().reshape(3, -1)
    limit = torch.tensor(into.shape).view(3, 1) - 0.5
    beyond = (points - points.clamp(min=-0.5).minimum(limit)).T @ torch.from_numpy(into.affine[:3, :3].T.copy())
    return float(beyond.norm(dim=1).min())


def _unwritable(path: Path, error: Exception) -> MorphSeekError:
    """One sentence for a failed write."""
    folder = next(p for p in (path, *path.parents) if p.is_dir())
    path = Path(*(part for part in path.parts if not part.startswith(_PART)))  # the name that the person knows
    number = getattr(error, "errno", None)
    # SimpleITK and HDF5 do not always say why
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and shutil.disk_usage(folder).free < 1 << 16):
        return MorphSeekError(
            f"The disk is full: {path} could not be written; free some space or choose another folder."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "the writing failed"
    return MorphSeekError(f"{path} cannot be written ({reason.lower()}); choose a folder that you may write to.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ITK's own warnings: what matters in them becomes our sentence."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _by(numbers: Collection[float]) -> str:
    return " x ".join(f"{float(n):g}" for n in numbers)


def _or(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
