"""Files in and out: what is read lies where it should, what is wrong is refused with one sentence."""

from __future__ import annotations

import dataclasses
import gzip
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from MorphSeekLib.io import images
from MorphSeekLib.io.files import output_folder
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume

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
        (np.full((5, 5, 5), np.nan), False, ["every voxel is NaN"]),
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
    named = [dataclasses.replace(volume, name=name) for volume, name in ((fixed, "a.nii"), (away, "b.nii"))]
    with pytest.raises(MorphSeekError, match=r"a.nii\) and the moving image \(b.nii\) .*: \d+ mm .*--align center"):
        images.check_overlap(*named)
    dense = DenseTransform(
        torch.tensor([120.0, 0, 0]).view(3, 1, 1, 1).expand(3, 4, 4, 4), grid_of((4, 4, 4), (10,) * 3)
    )
    images.check_overlap(fixed, away, dense)
    with pytest.raises(MorphSeekError, match=r" 60 mm lie"):
        images.check_overlap(
            fixed, volume_of(grid_of((10, 10, 10), (2, 2, 2), np.eye(3), (100.5, 0, 0)))
        )  # faces at 39.5 + 0.5 and 100.5 - 1, between centers of 39 and the face


def test_labels_on_the_grid_of_their_image_stay_as_they_are():
    image = volume_of(grid_of((10, 10, 10), (1, 1, 1), np.eye(3), (0, 0, 0)))
    same = Volume(torch.ones(10, 10, 10, dtype=torch.int32), image.grid)
    assert images.check_labels(same, image, "l.nii") is same


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_labels_with_their_axes_turned_are_turned_back(order, signs):
    """The same voxels at the same places, stored along other axes: nothing is resampled and nothing is said."""
    image = volume_of(grid_of((5, 6, 7)))
    data = torch.arange(210, dtype=torch.int32).reshape(5, 6, 7)
    stored = Volume(data, image.grid)
    to_stored = np.zeros((4, 4))  # index in the turned array -> index in the image
    to_stored[3, 3] = 1
    turned = data.permute(order)
    for axis, (of, sign) in enumerate(zip(order, signs, strict=True)):
        to_stored[of, axis] = sign
        to_stored[of, 3] = 0 if sign > 0 else image.grid.shape[of] - 1
    turned = turned.flip([axis for axis in range(3) if signs[axis] < 0])
    labels = Volume(turned, Grid(turned.shape, image.grid.affine @ to_stored))
    found = images.check_labels(labels, image, "l.nii")
    assert torch.equal(found.data, stored.data)
    assert found.grid.same_as(image.grid)
    assert found.notices == ()


def test_labels_on_another_grid_are_resampled_and_a_notice_says_so():
    image = volume_of(grid_of((10, 10, 10), (1, 1, 1), np.eye(3), (0, 0, 0)))
    coarse = Volume(torch.zeros(6, 6, 6, dtype=torch.int32), grid_of((6, 6, 6), (2, 2, 2), np.eye(3), (0, 0, 0)))
    coarse.data[1, 2, 3], coarse.data[5, 5, 5] = 5, 5
    found = images.check_labels(coarse, image, "l.nii")
    assert int(found.data[2, 4, 6]) == 5
    assert [n.code for n in found.notices] == ["labels-grid"]
    assert "l.nii has another grid (6 x 6 x 6 voxels of 2 x 2 x 2 mm)" in found.notices[0].message
    assert "50.0 %" in found.notices[0].message


def test_labels_beside_their_image_are_refused():
    image = volume_of(grid_of((10, 10, 10), (1, 1, 1), np.eye(3), (0, 0, 0)))
    far = Volume(torch.ones(10, 10, 10, dtype=torch.int32), grid_of((10, 10, 10), (1, 1, 1), np.eye(3), (100, 0, 0)))
    with pytest.raises(MorphSeekError, match=r"l\.nii labels nothing in its image"):
        images.check_labels(far, image, "l.nii")


@pytest.mark.parametrize(
    ("value", "words"),
    [(-7, ["label -7", "must not be negative"]), (2**31, ["label 2147483648", "larger than 2147483647"])],
)
def test_labels_that_do_not_fit_are_refused_by_what_they_are(tmp_path, value, words):
    path = tmp_path / "l.nii.gz"
    array = np.zeros((4, 5, 6))
    array[1, 2, 3] = value
    sitk.WriteImage(sitk_of(array), str(path))
    refused(path, *words, read=images.read_labels)


def test_the_largest_label_keeps_its_value(tmp_path):
    array = np.zeros((4, 5, 6))
    array[1, 2, 3] = 2**31 - 1
    sitk.WriteImage(sitk_of(array), str(tmp_path / "l.nii.gz"))
    assert int(images.read_labels(tmp_path / "l.nii.gz").data.max()) == 2**31 - 1


def with_nan(kind=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(k, j, i) an image with a box of NaN at one end, and where that is."""
    array = np.random.default_rng(0).integers(1, 90, (6, 7, 8)).astype(kind)
    array[:, :2] = 0
    where = np.zeros(array.shape, bool)
    where[4:, 3:, 5:] = True
    array[where] = np.nan
    return array, where


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_nan_is_background_and_counted(tmp_path, ending, kind):
    array, where = with_nan(kind)
    array -= 1000
    sitk.WriteImage(sitk_of(array), str(tmp_path / f"x{ending}"))
    volume = images.read_image(tmp_path / f"x{ending}")
    expected = np.where(where, images.air_value(torch.from_numpy(array)), array)
    assert np.array_equal(volume.data.numpy().transpose(2, 1, 0), expected)
    assert -1001 < volume.data.min() <= expected[where][0] < -900
    assert [n.code for n in volume.notices] == ["nan"]
    assert f"{where.sum()} voxels" in volume.notices[0].message


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_nan_in_labels_is_background(tmp_path, ending):
    array, where = with_nan()
    sitk.WriteImage(sitk_of(array), str(tmp_path / f"x{ending}"))
    labels = images.read_labels(tmp_path / f"x{ending}")
    assert np.array_equal(labels.data.numpy().transpose(2, 1, 0), np.where(where, 0, array))
    assert f"{where.sum()} voxels" in labels.notices[0].message


def test_nan_in_a_displacement_field_is_refused(tmp_path):
    field = np.zeros((4, 4, 4, 3), np.float32)
    field[1, 1, 1, 1] = np.nan
    sitk.WriteImage(sitk_of(field, vector=True), str(tmp_path / "x.nii.gz"))
    refused(tmp_path / "x.nii.gz", "1 voxels", "NaN", read=lambda path: images.read_sitk(path, components=3))


@pytest.mark.parametrize("air", [-1024.0, 0.0, 500.0])
def test_a_stray_voxel_is_not_the_air(air):
    data = torch.full((30, 30, 30), air)
    data[8:22, 8:22, 8:22] += 100
    assert images.air_value(data) == air
    data[3, 3, 3] = -1e6
    assert images.air_value(data) == air


def test_air_of_a_cropped_image_is_its_lower_end():
    data = torch.rand((40, 40, 40), generator=torch.Generator().manual_seed(0)) + 7
    data[2, 3, 4] = -1e6
    assert 7 <= images.air_value(data) < 7.01


@pytest.mark.parametrize(
    ("dtype", "kind", "ending"),
    [
        ("uint8", sitk.sitkUInt8, ".nii.gz"),
        ("int8", sitk.sitkInt8, ".nrrd"),
        ("int16", sitk.sitkInt16, ".nii.gz"),
        ("uint16", sitk.sitkUInt16, ".mha"),
        ("uint32", sitk.sitkUInt32, ".nii"),
        ("int64", sitk.sitkInt64, ".nrrd"),
        ("float32", sitk.sitkFloat32, ".nii.gz"),
    ],
)
def test_what_is_made_of_an_image_is_written_in_its_number_type(tmp_path, dtype, kind, ending):
    limits = np.iinfo(dtype) if kind != sitk.sitkFloat32 else np.finfo(dtype)
    array = np.arange(60, dtype=dtype).reshape(3, 4, 5)
    sitk.WriteImage(sitk_of(array), str(tmp_path / f"x{ending}"))
    volume = images.read_image(tmp_path / f"x{ending}")
    assert volume.dtype == dtype
    volume.data[0, 0, 0], volume.data[1, 0, 0] = 2.6, 1e20
    images.write_image(volume, tmp_path / f"y{ending}")
    back = sitk.ReadImage(str(tmp_path / f"y{ending}"))
    assert back.GetPixelID() == kind
    assert back.GetPixel(0, 0, 0) == (3 if limits.dtype.kind in "iu" else pytest.approx(2.6))
    if limits.dtype.kind in "iu":
        assert back.GetPixel(1, 0, 0) == pytest.approx(float(limits.max), rel=1e-6), "clipped, not wrapped"
    assert back.GetPixel(4, 3, 2) == 59


@pytest.mark.parametrize("name", ["x.NII", "x.NII.GZ", "x.Nii.gz", "x.NRRD", "x.MHA"])
def test_upper_case_endings_are_read_and_written(tmp_path, name):
    volume = volume_of()
    images.write_image(volume, tmp_path / name)
    assert torch.equal(images.read_image(tmp_path / name).data, volume.data)


def test_a_gzip_that_is_named_nii_is_read(tmp_path):
    volume = volume_of()
    images.write_image(volume, tmp_path / "x.nii.gz")
    (tmp_path / "x.nii.gz").rename(tmp_path / "x.nii")
    assert torch.equal(images.read_image(tmp_path / "x.nii").data, volume.data)


def test_an_mgz_file_is_refused_with_what_converts_it(tmp_path):
    (tmp_path / "x.mgz").write_bytes(gzip.compress(bytes(1000)))
    refused(tmp_path / "x.mgz", "FreeSurfer", "mri_convert")


def test_a_name_without_a_format_is_refused(tmp_path):
    with pytest.raises(MorphSeekError, match="end its name with"):
        images.write_image(volume_of(), tmp_path / "x.png")
    with pytest.raises(MorphSeekError, match="cannot be written"):
        images.write_image(volume_of(), tmp_path / "none" / "x.nii")


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
        with output_folder(small_disk / "out") as part:
            images.write_image(volume_of(), part / "fits.nii.gz")
            images.write_image(volume, part / f"x{ending}")

    with pytest.raises(MorphSeekError, match=rf"The disk is full: .*/out/x\{ending} could"):
        fill()
    assert os.listdir(small_disk) == []


def test_a_transform_of_nan_does_not_pass_for_an_overlap():
    volume = Volume(torch.rand(4, 4, 4), Grid((4, 4, 4), np.eye(4)))
    with pytest.raises(MorphSeekError, match="not made of finite numbers"):
        images.check_overlap(volume, volume, np.full((4, 4), np.nan))
