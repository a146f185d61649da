"""Image files byte by byte: what a fuzz needs and well-behaved writers refuse.

Arrays are (i, j, k) in the order of the file's axes, grids are LPS mm. Every function returns the path to give to the
command line: a file, or a folder of DICOM slices.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from MorphSeekLib.space.geometry import Grid

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NRRD_TYPES = {
    "int8": "int8", "uint8": "uint8", "int16": "int16", "uint16": "uint16", "int32": "int32", "uint32": "uint32",
    "int64": "int64", "float32": "float", "float64": "double",
}  # fmt: skip
_ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
_CT = "1.2.840.10008.5.1.4.1.1.2"


@dataclass
class NiftiHeader:
    """What a NIfTI header says beside its array.

    Attributes:
        qform_code, sform_code: 0 to 4.
        qform, sform: (4, 4) RAS mm; None for the grid's own. ``sform`` may be sheared or singular.
        slope, intercept: scl_slope and scl_inter; slope 0 means that the values are not scaled.
        order: "<" or ">", of the bytes.
        version: 1 or 2.
        meters: write all lengths in meters, with their unit.
        trailing: sizes of more axes.
        intent: of the header; 1002 marks a label image.
    """

    qform_code: int = 1
    sform_code: int = 1
    qform: np.ndarray | None = None
    sform: np.ndarray | None = None
    slope: float = 0.0
    intercept: float = 0.0
    order: str = "<"
    version: int = 1
    meters: bool = False
    trailing: tuple[int, ...] = ()
    intent: int = 0


def write_nifti(path: Path, array: np.ndarray, grid: Grid, said: NiftiHeader) -> Path:
    """Write .nii, .nii.gz or .img with its .hdr."""
    pair = path.suffix.lower() == ".img"
    kind = nibabel.Nifti2Header if said.version == 2 else nibabel.Nifti1Header
    header = kind(endianness=said.order)
    unit = 1e-3 if said.meters else 1.0
    scale = np.diag([unit, unit, unit, 1.0])
    affine = LPS_TO_RAS @ grid.affine
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_zooms([*(grid.spacing * unit), *([1.0] * (array.ndim - 3))])
    header.set_qform(scale @ (affine if said.qform is None else said.qform), code=said.qform_code)
    header["pixdim"][1:4] = grid.spacing * unit
    sform = scale @ (affine if said.sform is None else said.sform)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        header[name] = sform[row]
    header["sform_code"] = said.sform_code
    header["scl_slope"], header["scl_inter"] = said.slope, said.intercept
    header["intent_code"] = said.intent
    header.set_xyzt_units("meter" if said.meters else "mm")
    offset = 0 if pair else {1: 352, 2: 544}[said.version]
    header["vox_offset"] = offset
    if said.version == 1:
        header["magic"] = b"ni1" if pair else b"n+1"
    block = header.binaryblock
    data = array.astype(array.dtype.newbyteorder(said.order)).tobytes("F")
    if pair:
        path.with_suffix(".hdr").write_bytes(block + b"\0" * 4)
        path.write_bytes(data)
    else:
        content = block.ljust(offset, b"\0") + data
        path.write_bytes(gzip.compress(content, 1) if path.suffix.lower() == ".gz" else content)
    return path


def write_nrrd(path: Path, array: np.ndarray, grid: Grid, space: str = "LPS", order: str = "little") -> Path:
    """Write .nrrd (gzip), or .nhdr with its .raw."""
    alone = path.suffix.lower() == ".nrrd"
    turn = LPS_TO_RAS[:3, :3] if space == "RAS" else np.eye(3)
    name = {"LPS": "left-posterior-superior", "RAS": "right-anterior-superior"}[space]

    def vector(values: np.ndarray) -> str:
        return "(" + ",".join(f"{v:.15g}" for v in turn @ values) + ")"

    lines = [
        "NRRD0004",
        f"type: {_NRRD_TYPES[array.dtype.name]}",
        "dimension: 3",
        f"space: {name}",
        "sizes: " + " ".join(map(str, array.shape)),
        "space directions: " + " ".join(vector(grid.affine[:3, axis]) for axis in range(3)),
        "kinds: domain domain domain",
        f"endian: {order}",
        f"encoding: {'gzip' if alone else 'raw'}",
        f"space origin: {vector(grid.origin)}",
    ]
    data = array.astype(array.dtype.newbyteorder("<" if order == "little" else ">")).tobytes("F")
    if alone:
        path.write_bytes(("\n".join(lines) + "\n\n").encode() + gzip.compress(data, 1))
    else:
        raw = _plain(path, ".raw")
        raw.write_bytes(data)
        path.write_bytes(("\n".join([*lines, f"data file: {raw.name}"]) + "\n\n").encode())
    return path


def write_sitk(image: sitk.Image, path: Path) -> Path:
    """Write by SimpleITK, which takes only names of plain characters; a .raw beside a .mhd keeps such a name."""
    plain = _plain(path, path.suffix if path.suffix in (".mha", ".mhd") else ".nii.gz")
    sitk.WriteImage(image, str(plain), useCompression=path.suffix != ".mhd", compressionLevel=1)
    plain.rename(path)
    return path


def sitk_image(array: np.ndarray, grid: Grid) -> sitk.Image:
    """Build a SimpleITK image of (i, j, k) values."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(grid.spacing.tolist())
    image.SetDirection(grid.direction.ravel().tolist())
    image.SetOrigin(grid.origin.tolist())
    return image


@dataclass
class DicomScale:
    """Rescale slope and intercept of every slice."""

    slopes: np.ndarray
    intercepts: np.ndarray


def write_slices(
    folder: Path, array: np.ndarray, grid: Grid, scale: DicomScale, shuffle: np.random.Generator | None = None
) -> Path:
    """Write a folder of CT slices, named in the order of space or shuffled; returns the folder."""
    import pydicom

    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = (pydicom.uid.generate_uid() for _ in range(3))
    numbers = np.arange(array.shape[2])
    if shuffle is not None:
        shuffle.shuffle(numbers)
    for k, number in enumerate(numbers):
        slice_ = _dicom(_CT, "CT", array[:, :, k].T, series, study, frame)
        slice_.InstanceNumber = int(number) + 1
        slice_.ImageOrientationPatient = _decimals(grid.direction[:, :2].T.ravel())
        slice_.ImagePositionPatient = _decimals(grid.origin + k * grid.affine[:3, 2])
        slice_.PixelSpacing = _decimals(grid.spacing[[1, 0]])
        slice_.SliceThickness = _decimals([grid.spacing[2]])[0]
        slice_.RescaleSlope = _decimals([scale.slopes[k]])[0]
        slice_.RescaleIntercept = _decimals([scale.intercepts[k]])[0]
        slice_.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)
    return folder


def write_frames(path: Path, array: np.ndarray, grid: Grid, scale: DicomScale, order: np.ndarray) -> Path:
    """Write one multi-frame (enhanced) MR file whose frame n is the slice ``order[n]``; slices may be left out."""
    import pydicom

    dataset = _dicom(_ENHANCED_MR, "MR", array[:, :, order].transpose(2, 1, 0), *(pydicom.uid.generate_uid(),) * 3)
    dataset.NumberOfFrames = len(order)
    shared = pydicom.Dataset()
    shared.PlaneOrientationSequence = [pydicom.Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = _decimals(grid.direction[:, :2].T.ravel())
    measures = pydicom.Dataset()
    measures.PixelSpacing = _decimals(grid.spacing[[1, 0]])
    measures.SliceThickness = measures.SpacingBetweenSlices = _decimals([grid.spacing[2]])[0]
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in order:
        frame, content, place, values = (pydicom.Dataset() for _ in range(4))
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", int(k) + 1, [1, int(k) + 1]
        place.ImagePositionPatient = _decimals(grid.origin + k * grid.affine[:3, 2])
        values.RescaleSlope = _decimals([scale.slopes[k]])[0]
        values.RescaleIntercept = _decimals([scale.intercepts[k]])[0]
        values.RescaleType = "US"
        frame.FrameContentSequence, frame.PlanePositionSequence = [content], [place]
        frame.PixelValueTransformationSequence = [values]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.save_as(path, enforce_file_format=True)
    return path


def _plain(path: Path, suffix: str) -> Path:
    """A name beside ``path`` that is not taken and holds no odd character."""
    return path.with_name(f"data{sum(1 for _ in path.parent.iterdir())}{suffix}")


def _dicom(kind: str, modality: str, pixels: np.ndarray, series: str, study: str, frame: str):
    """Build a data set with pixels and without a place; its last two axes are rows and columns."""
    import pydicom

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = kind
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = series, study, frame
    dataset.Modality, dataset.PatientName, dataset.PatientID = modality, "Fuzz", "1"
    dataset.StudyID, dataset.SeriesNumber, dataset.StudyDate = "1", 1, "20200101"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, int(pixels.dtype == np.int16)
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    return dataset


def _decimals(values) -> list:
    """Round numbers to DICOM's decimal strings of at most 16 characters."""
    import pydicom

    return [pydicom.valuerep.DSfloat(float(v), auto_format=True) for v in values]
