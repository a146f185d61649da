"""DICOM in: slices in files of their own or in one, in the order of their places, each with its own scale."""

from __future__ import annotations

import copy
import locale
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid
from test_images import refused

from MorphSeekLib.io import images

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases beside the checkout")


def block_of() -> np.ndarray:
    """(k, j, i) stored values."""
    return np.random.default_rng(0).integers(0, 1000, (6, 12, 10)).astype(np.int16)


def series(
    folder: Path,
    name: str = "a",
    *,
    places=None,
    normal_step=(0.0, 0.0, 2.0),
    direction="1\\0\\0\\0\\1\\0",
    scales=None,
    block=None,
) -> Path:
    """A series of slices, whose positions follow ``places`` times ``normal_step``; ``scales`` are slope, intercept."""
    folder.mkdir(exist_ok=True)
    language = locale.setlocale(locale.LC_ALL)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    block = block_of() if block is None else block
    for k, place in enumerate(range(6) if places is None else places):
        image = sitk.GetImageFromArray(block[k])
        image.SetSpacing((1.5, 0.5))
        position = np.array(normal_step) * place + (5.0, 6.0, 7.0)
        uid = f"1.2.{sum(name.encode())}"
        for tag, value in {
            "0008|0060": "MR",
            "0008|103e": f"series {name}",
            "0020|000d": "1.2",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{k + 1}",
            "0020|0013": str(k),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": direction,
        }.items():
            image.SetMetaData(tag, value)
        path = folder / f"{name}{9 - k}.dcm"  # names in the wrong order
        writer.SetFileName(str(path))
        writer.Execute(image)
        if scales is not None:
            slice_ = pydicom.dcmread(path)
            slice_.RescaleSlope, slice_.RescaleIntercept = scales[k]
            slice_.save_as(path)
    locale.setlocale(locale.LC_ALL, language)  # GDCM sets "C" when it writes
    return folder


def test_dicom_folder(tmp_path):
    volume = images.read_image(series(tmp_path / "d"))
    assert volume.grid.shape == (10, 12, 6)
    assert np.allclose(volume.grid.affine[:3], [[1.5, 0, 0, 5], [0, 0.5, 0, 6], [0, 0, 2, 7]])
    block = np.random.default_rng(0).integers(0, 1000, (6, 12, 10))
    assert np.array_equal(volume.data.numpy(), block.transpose(2, 1, 0))


def test_dicom_folder_of_two_series_is_refused_and_a_file_chooses(tmp_path):
    folder = series(series(tmp_path / "d", "a"), "b", normal_step=(0.0, 0.0, 3.0))
    refused(folder, "2 DICOM series", "series a", "series b", "one file")
    assert images.read_image(folder / "b7.dcm").grid.spacing[2] == 3.0


def test_dicom_scout_beside_a_series_is_passed_over(tmp_path):
    folder = series(series(tmp_path / "d", "a"), "s", places=[0])
    assert images.read_image(folder).grid.shape == (10, 12, 6)


def test_dicom_that_is_no_regular_block(tmp_path):
    refused(series(tmp_path / "gap", places=[0, 1, 2, 4, 5, 6]), "slices missing")
    refused(series(tmp_path / "tilt", normal_step=(0.0, 0.3, 2.0)), "tilted")
    refused(series(tmp_path / "time", places=[0, 1, 2, 0, 1, 2]), "one place")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "without DICOM")


SCALES = [(1, 0), (0.0126, 0), (0.0127, -3.5), (2, 10), (0.5, -1024), (1, 0.25)]


def test_slices_with_different_scales_keep_their_values(tmp_path):
    """The number type of the first slice alone, an integer, would round the others away."""
    volume = images.read_image(series(tmp_path / "d", scales=SCALES))
    expected = np.stack([slope * plane + shift for plane, (slope, shift) in zip(block_of(), SCALES, strict=True)])
    np.testing.assert_allclose(volume.data.numpy().transpose(2, 1, 0), expected, atol=1e-4)
    assert volume.dtype == "float32"


@pytest.mark.parametrize("shifts", [[0, 0, 0, 0, 0, 7], [0, 1, 2, 3, 4, 5]])
def test_slices_with_different_intercepts_keep_their_values(tmp_path, shifts):
    volume = images.read_image(series(tmp_path / "d", scales=[(1, shift) for shift in shifts]))
    expected = block_of() + np.array(shifts)[:, None, None]
    np.testing.assert_array_equal(volume.data.numpy().transpose(2, 1, 0), expected)


def test_one_file_of_a_series_with_different_scales_reads_them_all(tmp_path):
    folder = series(tmp_path / "d", scales=SCALES)
    assert np.array_equal(images.read_image(folder / "a4.dcm").data, images.read_image(folder).data)


def test_a_later_slice_of_larger_numbers_is_not_clipped(tmp_path):
    """Signed 16 bits in the first slice, unsigned in the others."""
    folder = series(tmp_path / "d")
    for name in ("a4.dcm", "a6.dcm"):
        plane = pydicom.dcmread(folder / name)
        plane.PixelRepresentation = 0
        plane.PixelData = np.full((12, 10), 60000, np.uint16).tobytes()
        for tag in ("SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingValue"):
            if tag in plane:
                delattr(plane, tag)
        plane.save_as(folder / name)
    assert float(images.read_image(folder).data[:, :, 5].min()) == 60000


def test_a_series_of_one_number_type_keeps_it(tmp_path):
    assert images.read_image(series(tmp_path / "d")).dtype == "int16"


@needs_cases
def test_the_series_that_lost_its_values_keeps_them():
    planes = [pydicom.dcmread(path) for path in (CASES / "dcm_slope").glob("*.dcm")]
    planes.sort(key=lambda plane: float(plane.ImagePositionPatient[2]))
    expected = np.stack([p.pixel_array * float(p.RescaleSlope) + float(p.RescaleIntercept) for p in planes])
    volume = images.read_image(CASES / "dcm_slope")
    np.testing.assert_allclose(volume.data.numpy().transpose(2, 1, 0), expected, rtol=1e-6)
    assert len(volume.data.unique()) > 4000


# what frame k of an enhanced file says beside its place; the last of these are of frames that share all else
def frame_of(k: int, step=(0.0, 0.0, 2.0), scale=(1, 0), **more) -> Dataset:
    """One item of the per-frame functional groups; ``more``: group_Attribute -> value."""
    position = (np.array(step) * k + (5.0, 6.0, 7.0)).tolist()
    values = {
        "PlanePositionSequence": {"ImagePositionPatient": position},
        "PixelValueTransformationSequence": {
            "RescaleSlope": scale[0],
            "RescaleIntercept": scale[1],
            "RescaleType": "US",
        },
        "FrameContentSequence": {"StackID": "1", "InStackPositionNumber": k + 1},
    }
    for name, value in more.items():
        group, attribute = name.split("_")
        values.setdefault(group, {})[attribute] = value
    frame = Dataset()
    for group, attributes in values.items():
        item = Dataset()
        for attribute, value in attributes.items():
            setattr(item, attribute, value)
        setattr(frame, group, Sequence([item]))
    return frame


def enhanced(path: Path, frames: list[Dataset], block: np.ndarray, cosines=(1, 0, 0, 0, 1, 0)) -> Path:
    """An enhanced MR file of these frames, in this order."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = EnhancedMRImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = generate_uid(), generate_uid(), "MR"
    data.NumberOfFrames, data.Rows, data.Columns = block.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, int(block.dtype.kind == "i")
    shared = Dataset()
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(cosines)
    measures.PixelSpacing, measures.SliceThickness = [0.5, 1.5], 2.0
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.PixelData = block.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5]])
def test_frames_are_sorted_by_their_places(tmp_path, order):
    frames = [frame_of(k) for k in range(6)]
    path = enhanced(tmp_path / "x.dcm", [frames[k] for k in order], block_of()[order])
    volume = images.read_image(path)
    assert np.array_equal(volume.data.numpy().transpose(2, 1, 0), block_of())
    assert np.allclose(volume.grid.affine[:3], [[1.5, 0, 0, 5], [0, 0.5, 0, 6], [0, 0, 2, 7]])
    assert volume.dtype == "int16"


def test_frames_of_a_slanted_stack_lie_where_they_say(tmp_path):
    cosines = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)
    normal = np.cross(cosines[:3], cosines[3:])
    frames = [frame_of(k, 3 * normal) for k in range(6)]
    grid = images.read_image(enhanced(tmp_path / "x.dcm", frames, block_of(), cosines)).grid
    expected = np.column_stack([1.5 * np.array(cosines[:3]), 0.5 * np.array(cosines[3:]), 3 * normal, (5, 6, 7)])
    np.testing.assert_allclose(grid.affine[:3], expected, atol=1e-9)


def test_each_frame_has_its_own_scale(tmp_path):
    order = [0, 3, 1, 4, 2, 5]
    frames = [frame_of(k, scale=SCALES[k]) for k in order]
    volume = images.read_image(enhanced(tmp_path / "x.dcm", frames, block_of()[order]))
    expected = np.stack([slope * plane + shift for plane, (slope, shift) in zip(block_of(), SCALES, strict=True)])
    np.testing.assert_allclose(volume.data.numpy().transpose(2, 1, 0), expected, atol=1e-4)


def test_an_intercept_that_all_frames_share_keeps_integers(tmp_path):
    frames = [frame_of(k, scale=(1, -1024)) for k in range(6)]
    volume = images.read_image(enhanced(tmp_path / "x.dcm", frames, block_of().astype(np.uint16)))
    assert np.array_equal(volume.data.numpy().transpose(2, 1, 0), block_of() - 1024.0)
    assert volume.dtype == "int16"


def test_compressed_frames_are_decoded(tmp_path):
    """JPEG 2000, lossless, as archives store; with a scale of each frame's own."""
    frames = [frame_of(k, scale=SCALES[k]) for k in range(6)]
    path = enhanced(tmp_path / "x.dcm", frames, block_of())
    image = sitk.GetImageFromArray(block_of().astype(np.uint16))
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "packed.dcm"))
    writer.SetCompressor("JPEG2000")
    writer.UseCompressionOn()
    writer.Execute(image)
    packed, data = pydicom.dcmread(tmp_path / "packed.dcm"), pydicom.dcmread(path)
    assert packed.file_meta.TransferSyntaxUID.is_compressed
    data.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
    data["PixelData"] = copy.deepcopy(packed["PixelData"])
    for tag in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(data, tag, getattr(packed, tag))
    data.save_as(path)
    expected = np.stack([slope * plane + shift for plane, (slope, shift) in zip(block_of(), SCALES, strict=True)])
    np.testing.assert_allclose(images.read_image(path).data.numpy().transpose(2, 1, 0), expected, atol=1e-4)


def unplaced(frame: Dataset) -> Dataset:
    del frame.PlanePositionSequence
    return frame


def turned(frame: Dataset) -> Dataset:
    item = Dataset()
    item.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    frame.PlaneOrientationSequence = Sequence([item])
    return frame


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([frame_of(k) for k in (0, 1, 2, 4, 5, 6)], ["not form a regular block", "missing"]),
        ([frame_of(2 * k) for k in range(6)], ["not form a regular block", "missing"]),  # evenly, but by their numbers
        (
            [frame_of(k, PixelMeasuresSequence_SpacingBetweenSlices=1.0) for k in range(6)],
            ["not form a regular block", "missing"],
        ),
        ([frame_of(k, (0.0, 0.3, 2.0)) for k in range(6)], ["tilted"]),
        ([frame_of(k % 3) for k in range(6)], ["at one place"]),
        ([frame_of(k % 3, FrameContentSequence_StackID=str(k // 3)) for k in range(6)], ["2 stacks"]),
        ([frame_of(k % 3, MREchoSequence_EffectiveEchoTime=10.0 * (k // 3)) for k in range(6)], ["2 echoes"]),
        (
            [frame_of(k // 2, FrameContentSequence_TemporalPositionIndex=1 + k % 2) for k in range(6)],
            ["2 time points"],
        ),
        ([frame_of(k % 2, MRDiffusionSequence_DiffusionBValue=500.0 * (k // 2)) for k in range(6)], ["3 diffusion"]),
        ([frame_of(k) if k else turned(frame_of(k)) for k in range(6)], ["different directions"]),
        ([frame_of(k) if k else unplaced(frame_of(k)) for k in range(6)], ["without a position"]),
        ([frame_of(k) for k in range(5)], ["damaged or incomplete"]),
    ],
)
def test_frames_that_are_not_one_volume_are_refused(tmp_path, frames, words):
    refused(enhanced(tmp_path / "x.dcm", copy.deepcopy(frames), block_of()), *words)


def test_frames_without_functional_groups_are_refused(tmp_path):
    path = enhanced(tmp_path / "x.dcm", [frame_of(k) for k in range(6)], block_of())
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence, data.SharedFunctionalGroupsSequence
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"
    data.save_as(path)
    refused(path, "without a position")


def test_an_enhanced_file_among_scouts_is_the_series(tmp_path):
    path = enhanced(tmp_path / "x.dcm", [frame_of(k) for k in range(6)], block_of())
    series(tmp_path, "s", places=[0])
    assert images.read_image(tmp_path).grid.shape == (10, 12, 6)
    assert images.read_image(path).grid.shape == (10, 12, 6)


@needs_cases
def test_the_shuffled_frames_are_the_same_volume():
    first, second = (images.read_image(CASES / f"enh_{name}.dcm") for name in ("ok", "shuf"))
    assert np.array_equal(first.data, second.data)
    assert first.grid.same_as(second.grid)
