"""DICOM series into one volume: slices in files of their own, or all in one file (enhanced, multi-frame).

GDCM, through SimpleITK, decodes the voxels. The position of each slice and the scale of its numbers are checked here,
slice by slice, because ITK takes most of it from the first slice and spaces the rest evenly without a warning.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

from ..protocol.errors import MorphSeekError
from ..protocol.startup import shown
from .files import library_name, python_name

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# what tells several volumes in one file apart: the macro that holds it, its attribute, and what to call it
_VOLUMES = (
    ("FrameContentSequence", "StackID", "stacks"),
    ("MREchoSequence", "EffectiveEchoTime", "echoes"),
    ("FrameContentSequence", "TemporalPositionIndex", "time points"),
    ("MRDiffusionSequence", "DiffusionBValue", "diffusion weightings"),
    ("SegmentIdentificationSequence", "ReferencedSegmentNumber", "segments"),
)


def is_dicom(path: Path) -> bool:
    """Return whether a file is one of DICOM."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_series(folder: Path, member: Path | None = None) -> sitk.Image:
    """Read the DICOM series of a folder.

    Args:
        folder: its folder.
        member: chooses the series that this file belongs to.

    Returns:
        one image; float32 when its slices store their numbers in different ways.

    Raises:
        MorphSeekError: there is none, there are several, or the slices do not form a regular block.
    """
    files = _choose(folder, member)
    name = shown(folder if member is None else member)
    try:
        if len(files) > 1:
            return _read_slices(files, name)
        if _frames(files[0]) > 1:
            return _read_frames(Path(files[0]), name)
        return sitk.ReadImage(library_name(files[0]))
    except RuntimeError:
        raise MorphSeekError(f"{name} holds DICOM slices that cannot be read together; export them again.") from None


def _choose(folder: Path, member: Path | None) -> Sequence[str]:
    """Return the files of the one series that is meant."""
    where = library_name(folder)
    found = sitk.ImageSeriesReader.GetGDCMSeriesIDs(where)
    listed = (sitk.ImageSeriesReader.GetGDCMSeriesFileNames(where, uid) for uid in found)
    series = [[python_name(file) for file in files] for files in listed]
    if member is not None:
        series = [files for files in series if any(os.path.samefile(member, f) for f in files)] or [[str(member)]]
    if not series:
        raise MorphSeekError(
            f"{shown(folder)} is a folder without DICOM slices; give an image file, or the folder that holds the "
            "slices themselves."
        )
    # scouts, reports and secondary captures come as single files beside the one true series
    several = [files for files in series if len(files) > 1 or _frames(files[0]) > 1]
    if len(several) == 1:
        series = several
    if len(series) > 1:
        texts = ", ".join(_describe(files) for files in series[:8]) + (", ..." if len(series) > 8 else "")
        raise MorphSeekError(
            f"{shown(folder)} holds {len(series)} DICOM series: {texts}; give one file of the series you want instead "
            "of the folder."
        )
    return series[0]


def _header(file: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(library_name(file))
    reader.ReadImageInformation()
    return reader


def _tag(reader: sitk.ImageFileReader, key: str) -> str:
    return reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else ""


def _frames(file: str) -> int:
    try:
        return int(_tag(_header(file), "0028|0008") or 1)
    except (RuntimeError, ValueError):
        return 1


def _describe(files: Collection[str]) -> str:
    first = next(iter(files))
    try:
        what = _tag(_header(first), "0008|103e") or "without description"
    except RuntimeError:
        what = "unreadable"
    return f"'{what}' ({len(files)} files such as {shown(Path(first).name)})"


def _read_slices(files: Sequence[str], name: str) -> sitk.Image:
    """Return one image of slices in files of their own."""
    headers = [_header(file) for file in files]
    try:
        places = np.array([[float(x) for x in _tag(h, "0020|0032").split("\\")] for h in headers])
        cosines = np.array([[float(x) for x in _tag(h, "0020|0037").split("\\")] for h in headers])
    except ValueError:
        raise MorphSeekError(_unplaced(name, "slices")) from None
    _check_stack(places, cosines, name, "slices", "a time series or several echoes")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([library_name(file) for file in files])
    # by itself the reader squeezes every slice into the number type of the first
    stored = {(h.GetPixelID(), _tag(h, "0028|1052"), _tag(h, "0028|1053"), _tag(h, "0028|0103")) for h in headers}
    one_type = len(stored) == 1 or headers[0].GetNumberOfComponents() > 1  # colors are refused later
    reader.SetOutputPixelType(headers[0].GetPixelID() if one_type else sitk.sitkFloat32)
    return reader.Execute()


def _check_stack(places: np.ndarray, cosines: np.ndarray, name: str, slices: str, several: str) -> np.ndarray:
    """Refuse slices that do not form a regular block.

    Args:
        places: (n, 3) LPS mm of their first voxels.
        cosines: (n, 6) directions of their rows and columns.
        name: what to call the file or folder.
        slices: what to call them: "slices" or "frames".
        several: what two of them at one place may be.

    Returns:
        (n,) their order along the normal.
    """
    if places.shape[1:] != (3,) or cosines.shape[1:] != (6,) or not np.isfinite([*places.flat, *cosines.flat]).all():
        raise MorphSeekError(_unplaced(name, slices))
    if np.abs(cosines - cosines[0]).max() > 1e-3:
        raise MorphSeekError(
            f"{name} holds DICOM {slices} of different directions in one series (a scout?); give a series of parallel "
            "slices."
        )
    normal = np.cross(cosines[0, :3], cosines[0, 3:])
    order = np.argsort(places @ normal, kind="stable")
    steps = np.diff(places[order], axis=0)
    heights = steps @ normal
    if heights.min() < 1e-3:
        raise MorphSeekError(
            f"{name} holds several DICOM {slices} at one place ({several}); export one volume of it, for instance from "
            "Slicer, and give that."
        )
    sideways = np.linalg.norm(steps - heights[:, None] * normal, axis=1)
    if np.abs(heights / np.median(heights) - 1).max() > 0.1 or sideways.max() > 0.02 * np.median(heights):
        raise MorphSeekError(_irregular(name, slices))
    return order


def _irregular(name: str, slices: str) -> str:
    return (
        f"{name} holds DICOM {slices} that do not form a regular block ({slices} missing, unevenly spaced, or a tilted "
        "gantry); load it in Slicer with acquisition geometry regularization on, and give the volume saved from there."
    )


def _unplaced(name: str, slices: str) -> str:
    return (
        f"{name} holds DICOM {slices} without a position or direction (secondary captures?); give the original series."
    )


def _read_frames(path: Path, name: str) -> sitk.Image:
    """Return one image of the frames of one file, in the order of their places, each with its own scale."""
    import pydicom  # no other kind of file needs it

    try:
        data = pydicom.dcmread(path)
        count, per_frame = int(data.NumberOfFrames), data.get("PerFrameFunctionalGroupsSequence")
    except (pydicom.errors.InvalidDicomError, OSError, AttributeError, ValueError):
        raise MorphSeekError(f"{name} is damaged or incomplete and cannot be read; copy or export it again.") from None
    if per_frame is None:
        return _read_plain_frames(path, data, name)
    shared = (data.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]

    def values(group: str, attribute: str) -> list:
        """Return the value of every frame: its own, else the shared one, else None."""
        found = (next((f for f in (frame, shared) if group in f and f[group].value), None) for frame in per_frame)
        return [None if f is None else f[group][0].get(attribute) for f in found]

    if data.get("SamplesPerPixel", 1) != 1:
        raise MorphSeekError(f"{name} holds color pictures; give the original series, with one number a voxel.")
    if len(per_frame) != count:
        raise MorphSeekError(f"{name} is damaged or incomplete and cannot be read; copy or export it again.")
    several = [
        f"{len(set(map(str, found)))} {word}"
        for group, attribute, word in _VOLUMES
        if len(set(map(str, found := values(group, attribute)))) > 1
    ]
    if several:
        raise MorphSeekError(
            f"{name} holds several volumes in one DICOM file ({', '.join(several)}); export one volume of it, for "
            "instance from Slicer, and give that."
        )
    try:
        places = np.array(values("PlanePositionSequence", "ImagePositionPatient"), dtype=np.float64)
        cosines = np.array(values("PlaneOrientationSequence", "ImageOrientationPatient"), dtype=np.float64)
        spacings = np.array(values("PixelMeasuresSequence", "PixelSpacing"), dtype=np.float64)
    except (TypeError, ValueError):
        raise MorphSeekError(_unplaced(name, "frames")) from None
    order = _check_stack(places, cosines, name, "frames", "acquisitions that nothing in the file tells apart")
    apart = float(np.linalg.norm(places[order[-1]] - places[order[0]])) / (count - 1)
    stated = _numbers(values("PixelMeasuresSequence", "SpacingBetweenSlices"), 0.0)
    number = _numbers(values("FrameContentSequence", "InStackPositionNumber"), 0.0)[order]
    numbered = len(set(number.tolist())) == count
    if 0 < 1.5 * stated.max() < apart or (numbered and np.abs(np.diff(number)).max() > 1):
        raise MorphSeekError(_irregular(name, "frames"))
    if spacings.shape[1:] != (2,) or np.abs(spacings - spacings[0]).max() > 1e-3 * spacings.min():
        raise MorphSeekError(f"{name} holds DICOM frames with pixels of different sizes; give a series of equal ones.")
    slopes = _numbers(values("PixelValueTransformationSequence", "RescaleSlope"), 1.0)
    intercepts = _numbers(values("PixelValueTransformationSequence", "RescaleIntercept"), 0.0)
    block = _scaled(_stored_values(path, data, per_frame, shared), slopes, intercepts)[order]
    image = sitk.GetImageFromArray(block)
    row, column = cosines[0, :3], cosines[0, 3:]
    image.SetSpacing((spacings[0, 1], spacings[0, 0], apart))
    image.SetDirection(np.column_stack([row, column, np.cross(row, column)]).ravel().tolist())
    image.SetOrigin(places[order[0]].tolist())
    return image


def _numbers(values: Sequence, missing: float) -> np.ndarray:
    return np.array([missing if value is None else float(value) for value in values])


def _scaled(stored: np.ndarray, slopes: np.ndarray, intercepts: np.ndarray) -> np.ndarray:
    """Rescale frames (k, j, i) of stored numbers; integers stay integers where all frames shift alike."""
    if (
        stored.dtype.kind in "iu"
        and (slopes == 1).all()
        and (intercepts == intercepts[0]).all()
        and intercepts[0] == round(intercepts[0])
    ):
        low, high = int(stored.min()) + int(intercepts[0]), int(stored.max()) + int(intercepts[0])
        kinds = (stored.dtype, np.int16, np.int32)
        fits = [kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]
        if fits:
            return (stored.astype(np.int64) + int(intercepts[0])).astype(fits[0])
    return (stored * slopes[:, None, None] + intercepts[:, None, None]).astype(np.float32)


def _stored_values(path: Path, data: Dataset, per_frame: Sequence[Dataset], shared: Dataset) -> np.ndarray:
    """Return (k, j, i) as stored, in the file's order. GDCM decodes a copy without scales: of those it knows only
    one."""
    scaled = [frame for frame in (*per_frame, shared) if "PixelValueTransformationSequence" in frame]
    for frame in scaled:
        del frame.PixelValueTransformationSequence
    folder = tempfile.TemporaryDirectory(prefix="morphseek-") if scaled else nullcontext()
    with folder as name:
        copy = path if name is None else Path(name) / "frames.dcm"
        if name is not None:
            data.save_as(copy)
        return sitk.GetArrayFromImage(sitk.ReadImage(library_name(copy)))


def _read_plain_frames(path: Path, data: Dataset, name: str) -> sitk.Image:
    """Return one image of frames that say their places as a dose or a nuclear tomogram does; ITK reads those."""
    offsets = data.get("GridFrameOffsetVector")  # a dose: mm along the normal
    slices = data.get("SliceVector")  # a tomogram: the number of each frame's slice
    if offsets is None and slices is None:
        raise MorphSeekError(_unplaced(name, "frames"))
    places = np.array(offsets if offsets is not None else slices, dtype=np.float64)
    steps = np.diff(places)
    if len(places) != int(data.NumberOfFrames) or np.abs(steps - steps[0]).max() > 0.1 * abs(steps[0]):
        raise MorphSeekError(
            f"{name} holds DICOM frames that do not form a regular block (several volumes, or frames missing or "
            "unevenly spaced); export one volume of it, for instance from Slicer, and give that."
        )
    return sitk.ReadImage(library_name(path))
