"""Files in and out: what is read lies where it should, what is wrong is refused with one sentence."""

from __future__ import annotations

import gzip
import logging
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from MorphSeekLib import images
from MorphSeekLib.errors import MorphSeekError
from MorphSeekLib.geometry import DenseTransform, Grid, Volume

TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])


def grid_of(shape=(6, 7, 8), spacing=(1.0, 1.5, 2.5), direction=TURN, origin=(10.0, -20.0, 30.0)) -> Grid:
    return Grid.from_parts(shape, spacing, direction, origin)


def volume_of(grid: Grid | None = None, seed: int = 0) -> Volume:
    grid = grid or grid_of()
    return Volume(torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)), grid)


def sitk_of(array: np.ndarray, vector: bool = False) -> sitk.Image:
    return sitk.GetImageFromArray(array, isVector=vector)


def edit(path: Path, change) -> None:
    """Change the bytes of a file, inside its gzip when there is one."""
    raw = path.read_bytes()
    packed = raw[:2] == b"\x1f\x8b"
    data = bytearray(gzip.decompress(raw) if packed else raw)
    change(data)
    path.write_bytes(gzip.compress(bytes(data)) if packed else bytes(data))


def nifti(path: Path, *, codes=None, rows=None, pixdim=None, array=None) -> Path:
    """A NIfTI file whose header fields are then set by hand."""
    array = np.random.default_rng(0).random((8, 7, 6), dtype=np.float32) if array is None else array
    sitk.WriteImage(sitk_of(array), str(path))

    def change(data: bytearray) -> None:
        if pixdim is not None:
            struct.pack_into("<3f", data, 80, *pixdim)
        if codes is not None:
            struct.pack_into("<2h", data, 252, *codes)
        if rows is not None:
            struct.pack_into("<12f", data, 280, *np.ravel(rows))

    edit(path, change)
    return path


def dicom(
    folder: Path, name: str = "a", *, places=None, normal_step=(0.0, 0.0, 2.0), direction="1\\0\\0\\0\\1\\0"
) -> Path:
    """A series of slices, whose positions follow ``places`` times ``normal_step``."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    block = np.random.default_rng(0).integers(0, 1000, (6, 12, 10)).astype(np.int16)
    for k, place in enumerate(range(6) if places is None else places):
        image = sitk_of(block[k])
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
        writer.SetFileName(str(folder / f"{name}{9 - k}.dcm"))  # names in the wrong order
        writer.Execute(image)
    return folder


def refused(path: Path, *words: str, read=images.read_image) -> None:
    """The file is refused with one sentence that names it."""
    with pytest.raises(MorphSeekError) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")
    assert all(word in text for word in words), text


@pytest.mark.parametrize("ending", images.WRITABLE)
@pytest.mark.parametrize("handed", [1, -1])
def test_round_trip(tmp_path, ending, handed):
    volume = volume_of(grid_of(direction=TURN @ np.diag([1, 1, handed])))
    path = tmp_path / f"x{ending}"
    images.write_image(volume, path)
    back = images.read_image(path)
    assert back.grid.same_as(volume.grid, 1e-4)
    assert torch.equal(back.data, volume.data)
    assert back.data.dtype == torch.float32
    assert os.listdir(tmp_path) == [path.name]


def test_axis_i_is_the_x_axis_of_itk():
    image = sitk_of(np.arange(24, dtype=np.float32).reshape(4, 3, 2))
    volume = images.volume_from_sitk(image)
    assert volume.grid.shape == image.GetSize() == (2, 3, 4)
    assert float(volume.data[1, 2, 3]) == image.GetPixel(1, 2, 3)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (torch.tensor([0, 255]), sitk.sitkUInt8),
        (torch.tensor([-1, 300], dtype=torch.int32), sitk.sitkInt16),
        (torch.tensor([0, 70000]), sitk.sitkInt32),
        (torch.tensor([False, True]), sitk.sitkUInt8),
        (torch.tensor([0.5, 1.0], dtype=torch.float64), sitk.sitkFloat32),
    ],
)
def test_written_type_is_the_smallest_that_holds(values, kind):
    data = values.repeat(4).reshape(2, 2, 2)
    assert images.sitk_from_volume(Volume(data, grid_of((2, 2, 2)))).GetPixelID() == kind


def test_labels(tmp_path):
    path = tmp_path / "labels.nii.gz"
    sitk.WriteImage(sitk_of(np.arange(24.0).reshape(4, 3, 2)), str(path))
    labels = images.read_labels(path)
    assert labels.data.dtype == torch.int32
    assert int(labels.data[1, 2, 3]) == 23
    sitk.WriteImage(sitk_of(np.arange(24.0).reshape(4, 3, 2) / 2), str(path))
    refused(path, "whole numbers", read=images.read_labels)
    sitk.WriteImage(sitk_of(np.zeros((4, 3, 2))), str(path))
    refused(path, "no label", read=images.read_labels)


def test_dicom_folder(tmp_path):
    volume = images.read_image(dicom(tmp_path / "d"))
    assert volume.grid.shape == (10, 12, 6)
    assert np.allclose(volume.grid.affine[:3], [[1.5, 0, 0, 5], [0, 0.5, 0, 6], [0, 0, 2, 7]])
    block = np.random.default_rng(0).integers(0, 1000, (6, 12, 10))
    assert np.array_equal(volume.data.numpy(), block.transpose(2, 1, 0))


def test_dicom_folder_of_two_series_is_refused_and_a_file_chooses(tmp_path):
    folder = dicom(dicom(tmp_path / "d", "a"), "b", normal_step=(0.0, 0.0, 3.0))
    refused(folder, "2 DICOM series", "series a", "series b", "one file")
    assert images.read_image(folder / "b7.dcm").grid.spacing[2] == 3.0


def test_dicom_scout_beside_a_series_is_passed_over(tmp_path):
    folder = dicom(dicom(tmp_path / "d", "a"), "s", places=[0])
    assert images.read_image(folder).grid.shape == (10, 12, 6)


def test_dicom_that_is_no_regular_block(tmp_path):
    refused(dicom(tmp_path / "gap", places=[0, 1, 2, 4, 5, 6]), "slices missing")
    refused(dicom(tmp_path / "tilt", normal_step=(0.0, 0.3, 2.0)), "tilted")
    refused(dicom(tmp_path / "time", places=[0, 1, 2, 0, 1, 2]), "one place")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "without DICOM")


def test_missing_empty_and_foreign_files(tmp_path):
    refused(tmp_path / "none.nii.gz", "does not exist")
    for name in ("x.nii", "x.nii.gz", "x.nrrd", "x.mha"):
        (tmp_path / name).touch()
        refused(tmp_path / name, "0 bytes")
    (tmp_path / "x.txt").write_text("hello" * 200)
    refused(tmp_path / "x.txt", "known format")
    (tmp_path / "y.nii.gz").write_text("hello" * 200)
    refused(tmp_path / "y.nii.gz", "known format")


@pytest.mark.parametrize("ending", images.WRITABLE)
def test_truncated(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    images.write_image(volume_of(), path)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    refused(path, "damaged or incomplete")


def test_mhd_without_its_raw(tmp_path):
    sitk.WriteImage(sitk_of(np.random.rand(4, 4, 4)), str(tmp_path / "x.mhd"))
    (tmp_path / "x.raw").unlink()
    refused(tmp_path / "x.mhd", "beside it")


@pytest.mark.parametrize(
    ("array", "vector", "words"),
    [
        (np.random.rand(5, 5), False, ["2D"]),
        (np.random.rand(3, 5, 5, 5), False, ["4D", "5 x 5 x 5 x 3"]),
        (np.random.rand(5, 5, 5, 3), True, ["3 numbers"]),
        (np.random.rand(1, 5, 5), False, ["only 1 voxel", "third"]),
        (np.zeros((5, 5, 5)), False, ["every voxel is 0"]),
        (np.full((5, 5, 5), 7, np.uint8), False, ["every voxel is 7"]),
        (np.where(np.eye(5)[None].repeat(5, 0) > 0, np.nan, 1.0), False, ["25 voxels", "NaN"]),
        (np.where(np.eye(5)[None].repeat(5, 0) > 0, np.inf, 1.0).astype(np.float32), False, ["25 voxels", "infinite"]),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
def test_wrong_kinds(tmp_path, array, vector, words, ending):
    path = tmp_path / f"x{ending}"
    sitk.WriteImage(sitk_of(array, vector), str(path))
    refused(path, *words)


def test_complex(tmp_path):
    sitk.WriteImage(sitk_of(np.random.rand(5, 5, 5) + 1j), str(tmp_path / "x.nii.gz"))
    refused(tmp_path / "x.nii.gz", "complex")


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_one_time_point_is_a_volume(tmp_path, ending):
    array = np.random.rand(1, 4, 5, 6).astype(np.float32)
    sitk.WriteImage(sitk_of(array), str(tmp_path / f"x{ending}"))
    assert np.array_equal(images.read_image(tmp_path / f"x{ending}").data.numpy(), array[0].transpose(2, 1, 0))


def test_no_place_in_space(tmp_path):
    path = tmp_path / "x.nii.gz"
    sheared = [[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    flat = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    refused(nifti(path, pixdim=(0, 1, 1)), "0 x 1 x 1 mm")
    refused(nifti(path, pixdim=(1, np.nan, 1)), "nan")
    refused(nifti(path, codes=(0, 1), rows=flat), "singular")
    refused(nifti(path, codes=(0, 1), rows=np.full((3, 4), np.nan)), "singular")
    refused(nifti(path, codes=(0, 1), rows=sheared), "right angles")
    refused(nifti(path, codes=(0, 1), rows=2 * np.eye(3, 4)), "two voxel sizes")
    for ending, before in ((".mha", b"TransformMatrix = 1 0 0"), (".nrrd", b"(1,0,0)")):
        path = tmp_path / f"x{ending}"
        for after, words in ((b"0 0 0", ()), (b"1 1 0", ("right angles",))):
            sitk.WriteImage(sitk_of(np.random.rand(4, 4, 4)), str(path))
            new = before.replace(b"1 0 0", after).replace(b"1,0,0", after.replace(b" ", b","))
            raw = path.read_bytes()
            assert before in raw
            path.write_bytes(raw.replace(before, new))
            refused(path, *words)
    path = tmp_path / "spacing.mha"
    sitk.WriteImage(sitk_of(np.random.rand(4, 4, 4)), str(path))
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1"))
    refused(path, "0 x 1 x 1 mm")


def test_overlap():
    fixed = volume_of(grid_of((40, 40, 40), (1, 1, 1), np.eye(3), (0, 0, 0)))
    small = volume_of(grid_of((2, 2, 2), (0.01, 0.01, 0.01), np.eye(3), (20.3, 20.3, 20.3)))
    images.check_overlap(fixed, small)
    images.check_overlap(small, fixed)
    away = volume_of(grid_of((10, 10, 10), (2, 2, 2), TURN, (140.0, 0, 0)))
    back = np.eye(4)
    back[0, 3] = 120.0
    images.check_overlap(fixed, away, back)
    with pytest.raises(MorphSeekError, match=r"a.nii\) and the moving .*: \d+ mm .*--align center"):
        images.check_overlap(fixed, away, names=("a.nii", "b.nii"))
    dense = DenseTransform(
        torch.tensor([120.0, 0, 0]).view(3, 1, 1, 1).expand(3, 4, 4, 4), grid_of((4, 4, 4), (10,) * 3)
    )
    images.check_overlap(fixed, away, dense)
    with pytest.raises(MorphSeekError, match=r" 60 mm lie"):
        images.check_overlap(
            fixed, volume_of(grid_of((10, 10, 10), (2, 2, 2), np.eye(3), (100.5, 0, 0)))
        )  # faces at 39.5 + 0.5 and 100.5 - 1, between centres of 39 and the face


def test_labels_on_another_grid(caplog):
    image = volume_of(grid_of((10, 10, 10), (1, 1, 1), np.eye(3), (0, 0, 0)))
    same = Volume(torch.ones(10, 10, 10, dtype=torch.int32), image.grid)
    assert images.check_labels(same, image, "l.nii") is same
    # the same labels stored with flipped axes, half of the block beyond the image
    flipped = Volume(
        torch.zeros(10, 10, 10, dtype=torch.int32), grid_of((10, 10, 10), (1, 1, 1), -np.eye(3), (9, 9, 9))
    )
    flipped.data[0, 1, 2] = 5
    with caplog.at_level(logging.WARNING):
        found = images.check_labels(flipped, image, "l.nii")
    assert int(found.data[9, 8, 7]) == 5
    assert int(found.data.sum()) == 5
    assert "l.nii has another grid" in caplog.text
    assert "0.0 %" in caplog.text
    far = Volume(flipped.data, grid_of((10, 10, 10), (1, 1, 1), np.eye(3), (100, 0, 0)))
    with pytest.raises(MorphSeekError, match=r"l\.nii labels nothing in its image"):
        images.check_labels(far, image, "l.nii")


def test_nothing_is_left_of_a_failed_write(tmp_path):
    target = tmp_path / "x.nii"
    target.write_text("before")

    def fail() -> None:
        with images.whole_file(target) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["x.nii"]
    with pytest.raises(MorphSeekError, match="end its name with"):
        images.write_image(volume_of(), tmp_path / "x.png")
    with pytest.raises(MorphSeekError, match="cannot be written"):
        images.write_image(volume_of(), tmp_path / "none" / "x.nii")


def test_output_folder_is_all_or_nothing(tmp_path):
    folder = tmp_path / "deep" / "out"

    def fail() -> None:
        with images.output_folder(folder) as part:
            (part / "a.txt").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == []
    with images.output_folder(folder, owns=["a.txt", "b.txt"]) as part:
        (part / "a.txt").write_text("1")
        (part / "b.txt").write_text("1")
        assert not (folder / "a.txt").exists()
    (folder / "mine.txt").write_text("kept")
    with images.output_folder(folder, owns=["a.txt", "b.txt"]) as part:
        (part / "a.txt").write_text("2")
    # b.txt belonged to the earlier run, whose result is gone
    assert sorted(os.listdir(folder)) == ["a.txt", "mine.txt"]
    assert (folder / "a.txt").read_text() == "2"
    with pytest.raises(KeyError):
        fail()
    assert sorted(os.listdir(folder)) == ["a.txt", "mine.txt"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/morphseek")):
        with (
            pytest.raises(MorphSeekError, match=r"cannot be written \(.*\); choose a folder"),
            images.output_folder(path),
        ):
            pass


@pytest.fixture
def small_disk(tmp_path):
    """A folder with 64 kB of room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("ending", images.WRITABLE)
def test_full_disk(small_disk, ending):
    volume = volume_of(grid_of((40, 40, 40)))
    with pytest.raises(MorphSeekError, match=r"The disk is full: .*x\."):
        images.write_image(volume, small_disk / f"x{ending}")
    assert os.listdir(small_disk) == []

    def fill() -> None:
        with images.output_folder(small_disk / "out") as part:
            images.write_image(volume_of(), part / "fits.nii.gz")
            images.write_image(volume, part / f"x{ending}")

    with pytest.raises(MorphSeekError, match=rf"The disk is full: .*/out/x\{ending} could"):
        fill()
    assert os.listdir(small_disk) == []


def test_a_transform_of_nan_does_not_pass_for_an_overlap():
    volume = Volume(torch.rand(4, 4, 4), Grid((4, 4, 4), np.eye(4)))
    with pytest.raises(MorphSeekError, match="not made of finite numbers"):
        images.check_overlap(volume, volume, np.full((4, 4), np.nan))
