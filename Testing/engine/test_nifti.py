"""Two places in one NIfTI header: which is taken, what is said, what is written."""

from __future__ import annotations

import gzip
import itertools
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from test_images import edit, grid_of, refused, sitk_of, volume_of

from MorphSeekLib.io import images, nifti
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import Grid, Volume

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases beside the checkout")
CODES = list(itertools.product((0, 1, 2, 4), repeat=2))
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHEAR = np.array([[1, 0.3, 0, 5], [0, 1.5, 0, -8], [0, 0, 2.5, 3], [0, 0, 0, 1.0]])  # LPS


def turned(degrees: float, shift: float) -> np.ndarray:
    """(4, 4) about z, then along x."""
    angle = np.radians(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[0, 3] = shift
    return matrix


def two_forms(path: Path, codes: tuple[int, int], sform: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Write a NIfTI file whose sform (LPS) is not its qform; returns both, LPS."""
    volume = volume_of()
    images.write_image(volume, path)
    qform = volume.grid.affine
    sform = turned(30, 15) @ qform if sform is None else sform

    def change(data: bytearray) -> None:
        struct.pack_into("<2h", data, 252, *codes)
        struct.pack_into("<12f", data, 280, *(LPS @ sform)[:3].ravel())

    edit(path, change)
    return qform, sform


def itk_affine(path: Path) -> np.ndarray:
    """(4, 4) where ITK, and so Slicer, places a file."""
    image = sitk.ReadImage(str(path))
    return Grid.from_parts(
        image.GetSize(), image.GetSpacing(), np.array(image.GetDirection()), image.GetOrigin()
    ).affine


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_by_default_an_image_lies_where_itk_places_it(tmp_path, codes, ending):
    path = tmp_path / f"x{ending}"
    forms = two_forms(path, codes)
    volume = images.read_image(path)
    np.testing.assert_allclose(volume.grid.affine, itk_affine(path), atol=1e-5)
    if min(codes) == 0:
        assert volume.notices == ()
        return
    (notice,) = volume.notices
    taken = min((0, 1), key=lambda n: np.abs(forms[n] - volume.grid.affine).max())
    assert notice.code == "nifti-forms"
    assert f"The {nifti.FORMS[taken]} was taken, as ITK and Slicer do" in notice.message
    assert f"--nifti-form {nifti.FORMS[1 - taken]}" in notice.message
    assert "30.0 degrees" in notice.message


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("form", nifti.FORMS)
def test_the_form_that_is_asked_for_is_taken_where_it_is_there(tmp_path, codes, form):
    path = tmp_path / "x.nii.gz"
    forms = dict(zip(nifti.FORMS, two_forms(path, codes), strict=True))
    for volume in (images.read_image(path, form), images.read_labels(as_labels(path), form)):
        expected = forms[form] if codes[nifti.FORMS.index(form)] else itk_affine(path)
        np.testing.assert_allclose(volume.grid.affine, expected, atol=1e-5)
        if min(codes) > 0:
            said = volume.notices[0].message
            assert f"The {form} was taken, as asked" in said
            elsewhere = np.abs(itk_affine(path) - volume.grid.affine).max() > 1
            assert elsewhere == ("load warped.nii.gz instead" in said)


def as_labels(path: Path) -> Path:
    """The same header with whole numbers."""
    target = path.with_name(f"labels-{path.name}")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[352:] = (np.frombuffer(raw[352:], "<f4") > 0.5).astype("<f4").tobytes()
    target.write_bytes(gzip.compress(bytes(raw)))
    return target


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_lies_on_an_image_is_written_with_its_codes_and_equal_forms(tmp_path, codes, ending):
    two_forms(tmp_path / "x.nii.gz", codes)
    for form in (None, *nifti.FORMS):
        grid = images.read_image(tmp_path / "x.nii.gz", form).grid
        path = tmp_path / f"y{ending}"
        images.write_image(Volume(torch.rand(grid.shape), grid), path)
        written = nibabel.load(path).header
        assert (int(written["qform_code"]), int(written["sform_code"])) == codes
        np.testing.assert_allclose(written.get_qform(), LPS @ grid.affine, atol=1e-4)
        np.testing.assert_allclose(written.get_sform(), LPS @ grid.affine, atol=1e-4)
        np.testing.assert_allclose(itk_affine(path), grid.affine, atol=1e-4)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_file_of_another_format_takes_no_notice_of_the_choice(tmp_path):
    volume = volume_of()
    images.write_image(volume, tmp_path / "x.nrrd")
    assert images.read_image(tmp_path / "x.nrrd", "sform").grid.same_as(volume.grid, 1e-4)
    with pytest.raises(MorphSeekError, match="no NIfTI form 'both'; choose qform or sform"):
        images.read_image(tmp_path / "x.nrrd", "both")


def test_forms_that_differ_by_rounding_are_not_worth_a_word(tmp_path):
    two_forms(tmp_path / "x.nii.gz", (1, 2), turned(0, 0.02) @ grid_of().affine)
    assert images.read_image(tmp_path / "x.nii.gz").notices == ()


def test_forms_that_mirror_each_other_are_said_to(tmp_path):
    two_forms(tmp_path / "x.nii.gz", (1, 2), np.diag([-1.0, 1, 1, 1]) @ grid_of().affine)
    assert "degrees apart and mirrored" in images.read_image(tmp_path / "x.nii.gz").notices[0].message


@pytest.mark.parametrize("codes", [(1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("form", [None, *nifti.FORMS])
@pytest.mark.parametrize("kept", nifti.FORMS)
def test_labels_with_one_of_the_two_forms_go_with_their_image(tmp_path, codes, form, kept):
    """As programs save a segmentation that go by one form and write that one alone."""
    path = tmp_path / "x.nii.gz"
    two_forms(path, codes)
    label_path = as_labels(path)
    left = (codes[0], 0) if kept == "qform" else (0, codes[1])

    def change(data: bytearray) -> None:
        struct.pack_into("<2h", data, 252, *left)

    edit(label_path, change)
    image, labels = images.read_image(path, form), images.read_labels(label_path, form)
    found = images.check_labels(labels, image, "l.nii.gz")
    assert found.grid is image.grid or found is labels
    assert found.grid.same_as(image.grid)
    assert torch.equal(found.data, labels.data), "voxel for voxel"
    assert [n.code for n in found.notices] == ([] if labels.grid.same_as(image.grid) else ["labels-place"])


def test_a_sheared_sform_alone_is_refused_until_it_is_asked_for(tmp_path):
    path = tmp_path / "x.nii.gz"
    two_forms(path, (0, 1), SHEAR)
    refused(path, "right angles", "--nifti-form sform")
    refused(path, "right angles", "--nifti-form sform", read=lambda path: images.read_image(path, "qform"))


@pytest.mark.parametrize("codes", [(0, 1), (0, 4), (1, 1), (2, 1), (1, 2)])
def test_a_sheared_sform_that_is_asked_for_is_resampled_onto_right_angles(tmp_path, codes):
    """A linear ramp in space: resampled, it is the same ramp."""
    path = tmp_path / "x.nii.gz"
    ramp = np.array([1.0, 2.0, -0.5])
    index = np.indices((12, 11, 10)).reshape(3, -1)
    values = ramp @ (SHEAR[:3, :3] @ index + SHEAR[:3, 3:])
    images.write_image(
        Volume(torch.from_numpy(values.reshape(12, 11, 10)).float(), Grid((12, 11, 10), np.eye(4))), path
    )

    def change(data: bytearray) -> None:
        struct.pack_into("<2h", data, 252, *codes)
        struct.pack_into("<12f", data, 280, *(LPS @ SHEAR)[:3].ravel())

    edit(path, change)
    volume = images.read_image(path, "sform")
    grid = volume.grid
    assert not nifti.is_sheared(grid.affine)
    assert [notice.code for notice in volume.notices] == ["nifti-forms", "resampled-shear"]
    assert "sheared" in volume.notices[0].message
    points = (grid.affine[:3, :3] @ np.indices(grid.shape).reshape(3, -1)) + grid.affine[:3, 3:]
    there = np.linalg.inv(SHEAR)[:3, :3] @ (points - SHEAR[:3, 3:])
    inside = ((there >= 0) & (there <= np.array([[11], [10], [9]]))).all(axis=0)
    found = volume.data.numpy().ravel()
    np.testing.assert_allclose(found[inside], (ramp @ points)[inside], atol=1e-3)
    assert inside.sum() > 500
    corners = SHEAR[:3, :3] @ np.array(list(itertools.product((0, 11), (0, 10), (0, 9)))).T + SHEAR[:3, 3:]
    at = np.linalg.inv(grid.affine)[:3, :3] @ (corners - grid.affine[:3, 3:])
    assert (at > -0.5).all()
    assert (at < np.array(grid.shape)[:, None] - 0.5).all()
    labels = images.read_labels(whole_numbers(path), "sform")
    assert labels.grid.same_as(grid)


def whole_numbers(path: Path) -> Path:
    """The same header with a box of ones in the middle."""
    target = path.with_name("labels.nii.gz")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    array = np.zeros((10, 11, 12), "<f4")
    array[3:7, 3:7, 3:7] = 1
    raw[352:] = array.tobytes()
    target.write_bytes(gzip.compress(bytes(raw)))
    return target


def test_the_header_alone_says_it_for_a_program_that_has_read_the_file(tmp_path):
    two_forms(tmp_path / "x.nii.gz", (1, 2))
    assert images.form_notices(tmp_path / "x.nii.gz") == images.read_image(tmp_path / "x.nii.gz").notices
    images.write_image(volume_of(), tmp_path / "y.nii.gz")
    (tmp_path / "z.nii.gz").write_bytes(b"x" * 10)
    for name in ("y.nii.gz", "z.nii.gz", "none.nii.gz", "x.nrrd"):
        assert images.form_notices(tmp_path / name) == ()


@pytest.mark.parametrize("unit", [1, 2, 3])
def test_a_unit_of_length_counts_in_both_forms(tmp_path, unit):
    """Meters and micrometers, as ITK takes them."""
    path = tmp_path / "x.nii"
    two_forms(path, (1, 2))

    def change(data: bytearray) -> None:
        data[123] = unit

    edit(path, change)
    header = nifti.read_header(path)
    np.testing.assert_allclose(header.qform, itk_affine(path), rtol=1e-5)
    apart = nifti.disagreement(header)
    assert apart.degrees == pytest.approx(30, abs=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_the_qform_is_that_of_nibabel(tmp_path, seed):
    generator = np.random.default_rng(seed)
    rotation = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    if seed < 6:  # half a turn and a mirror, where the quaternion's first number is 0
        rotation = np.diag(np.array(list(itertools.product((1.0, -1.0), repeat=3)))[seed])
    grid = grid_of(direction=rotation, spacing=generator.uniform(0.5, 3, 3))
    images.write_image(volume_of(grid), tmp_path / "x.nii")
    header = nifti.read_header(tmp_path / "x.nii")
    np.testing.assert_allclose(header.qform, LPS @ nibabel.load(tmp_path / "x.nii").get_qform(), atol=1e-5)
    np.testing.assert_allclose(header.sform, grid.affine, atol=1e-4)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_nifti_2_file_is_read_like_its_nifti_1_twin(tmp_path, ending, order):
    """ITK does not know it."""
    array = np.random.default_rng(0).integers(0, 1000, (6, 7, 8)).astype(order + "i2")
    affine = nibabel.affines.from_matvec(np.diag([1.5, -2.0, 3.0]), [10, -20, 30])
    found = []
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        image = kind(array, affine, kind.header_class(endianness=order))
        image.header.set_slope_inter(0.5, 3)
        image.set_qform(affine, 1)
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"voxels begin later"))
        nibabel.save(image, tmp_path / f"{kind.__name__}{ending}")
        found.append(images.read_image(tmp_path / f"{kind.__name__}{ending}"))
    first, second = found
    assert torch.equal(first.data, second.data)
    assert second.data.std() > 100
    np.testing.assert_array_equal(first.grid.affine, second.grid.affine)
    assert first.grid.nifti_codes == second.grid.nifti_codes
    assert first.dtype == second.dtype


def test_numbers_of_a_nifti_2_file_beyond_single_precision_are_refused_where_they_matter(tmp_path):
    nibabel.save(nibabel.Nifti2Image(np.ones((6, 7, 8), np.float32), np.eye(4)), tmp_path / "x.nii")
    whole = bytearray((tmp_path / "x.nii").read_bytes())
    struct.pack_into("<d", whole, 104 + 7 * 8, 1e300)  # the size along an axis that the image does not have
    (tmp_path / "x.nii").write_bytes(whole)
    assert nifti.read_header(tmp_path / "x.nii").shape == (6, 7, 8)
    struct.pack_into("<d", whole, 104 + 8, 1e300)
    (tmp_path / "x.nii").write_bytes(whole)
    refused(tmp_path / "x.nii", "voxels measure inf x 1 x 1 mm")


def test_a_nifti_2_file_cut_short_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti2Image(np.ones((6, 7, 8), np.float32), np.eye(4)), tmp_path / "x.nii")
    whole = (tmp_path / "x.nii").read_bytes()
    for length in (400, len(whole) - 10):
        (tmp_path / "x.nii").write_bytes(whole[:length])
        refused(tmp_path / "x.nii", "damaged or incomplete")


@needs_cases
def test_the_file_with_two_places_is_read_as_asked():
    path = CASES / "qs_fix.nii.gz"
    by_nibabel = LPS @ nibabel.load(path).affine
    np.testing.assert_allclose(images.read_image(path, "sform").grid.affine, by_nibabel, atol=1e-4)
    np.testing.assert_allclose(images.read_image(path).grid.affine, itk_affine(path), atol=1e-6)
    assert "up to 29.8 mm and 30.0 degrees apart" in images.read_image(path).notices[0].message


def test_nan_is_found_where_the_file_has_it(tmp_path):
    array = np.random.default_rng(0).random((4, 5, 6))
    array[1, 2, 3] = np.nan
    sitk.WriteImage(sitk_of(array), str(tmp_path / "x.nii.gz"))
    header, missing, infinite = nifti.scan(tmp_path / "x.nii.gz")
    assert (missing, infinite) == (1, 0)
    assert np.argwhere(nifti.nan_voxels(tmp_path / "x.nii.gz", header)).tolist() == [[3, 2, 1]]
