"""Transforms applied to images, labels and points: as SimpleITK does it, and backward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from test_cli import run
from test_transforms import dense, mapped, points_in

from MorphSeekLib import apply_transforms, map_points, write_transform
from MorphSeekLib.io.images import read_image, read_labels, sitk_from_volume, write_image
from MorphSeekLib.io.points import read_points
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.space.geometry import Grid, Volume, apply_affine

FIELD = dense(size_mm=2.5)
REFERENCE = Grid.from_parts(
    (26, 24, 20), (1.1, 1.0, 1.3), FIELD.grid.direction, apply_affine(FIELD.grid.affine, np.array([[2.2, 1.8, 1.5]]))[0]
)
BOX = Grid.from_parts((40, 44, 38), (1.2, 1.1, 1.3), np.eye(3), REFERENCE.center - 22)
EULER = sitk.Euler3DTransform((-20, 30, 60), 0.1, -0.05, 0.08, (1.0, -2.0, 1.5))


def image(kind: str = "float32") -> Volume:
    """Smooth structure in 0 to 1000, black around it."""
    i, j, k = np.indices(BOX.shape) / 6
    values = 500 + 200 * (np.sin(i) + np.cos(j) + np.sin(k) * np.cos(i))
    values[[0, -1]] = values[:, [0, -1]] = values[:, :, [0, -1]] = -1000.0
    return Volume(torch.from_numpy(values.astype(np.float32)), BOX, dtype=kind)


def spline() -> sitk.BSplineTransform:
    """A B-spline over the reference and some way around it."""
    corners = REFERENCE.corners()
    size = np.ptp(corners, axis=0) + 40
    coefficients = np.random.default_rng(2).normal(0, 1.5, 3 * 8**3)
    fixed = sitk.BSplineTransform(3, 3)
    fixed.SetTransformDomainOrigin((corners.min(axis=0) - 20).tolist())
    fixed.SetTransformDomainPhysicalDimensions(size.tolist())
    fixed.SetTransformDomainMeshSize([5, 5, 5])
    fixed.SetParameters(coefficients.tolist())
    return fixed


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """A transform file of each kind, and a chain in one file."""
    affine = sitk.AffineTransform((1.05, 0.1, 0, 0, 0.95, 0.05, -0.05, 0, 1.02), (1.0, 2.0, -1.0), (-20, 30, 60))
    field = tmp_path / "field.h5"
    write_transform(FIELD, field)
    chain = sitk.CompositeTransform([affine, sitk.ReadTransform(str(field)), EULER])
    kinds = {"affine.tfm": affine, "spline.tfm": spline(), "composite.h5": chain, "rigid.tfm": EULER}
    for name, transform in kinds.items():
        sitk.WriteTransform(transform, str(tmp_path / name))
    return {"field": field} | {name.partition(".")[0]: tmp_path / name for name in kinds}


@pytest.mark.parametrize("interpolation", ["linear", "nearest", "bspline"])
@pytest.mark.parametrize("names", [["affine"], ["field"], ["spline"], ["composite"], ["rigid", "field", "spline"]])
def test_an_image_is_what_simpleitk_makes_of_it(files, names, interpolation):
    kinds = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline}
    read = [sitk.ReadTransform(str(files[name])) for name in names]
    grid = sitk_from_volume(Volume(torch.zeros(REFERENCE.shape), REFERENCE))
    chain = sitk.CompositeTransform(read[::-1])  # ITK applies the last one first
    expected = sitk.Resample(sitk_from_volume(image()), grid, chain, kinds[interpolation], -1000.0)
    found = apply_transforms(image(), [files[name] for name in names], REFERENCE, interpolation=interpolation)
    off = np.abs(found.data.numpy() - sitk.GetArrayFromImage(expected).transpose(2, 1, 0))
    assert off.max() <= 1e-5 * 2000
    assert found.notices == ()


@pytest.mark.parametrize("names", [["affine"], ["field"], ["spline"], ["composite"], ["rigid", "field", "spline"]])
def test_points_go_where_simpleitk_takes_them_and_come_back(files, names):
    points = points_in(REFERENCE, 50)
    expected = points
    for name in names:
        expected = mapped(sitk.ReadTransform(str(files[name])), expected)
    paths = [files[name] for name in names]
    found = map_points(points, paths)
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(map_points(found, paths, inverse=True) - points).max() < 1e-3


def test_files_matrices_and_dense_transforms_are_the_same_chain(files):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = np.reshape(EULER.GetMatrix(), (3, 3)), EULER.TransformPoint((0.0, 0.0, 0.0))
    points = points_in(REFERENCE, 20)
    assert (
        np.abs(map_points(points, [matrix, FIELD]) - map_points(points, [files["rigid"], files["field"]])).max() < 1e-3
    )


def test_the_inverse_of_an_image_is_the_image_at_the_inverse_points(files):
    paths = [files["field"], files["rigid"]]
    onto = Grid.from_parts((10, 9, 8), (2.0, 2.0, 2.0), np.eye(3), map_points([REFERENCE.center], paths)[0] - 9)
    source = Volume(torch.arange(np.prod(REFERENCE.shape)).reshape(REFERENCE.shape).float(), REFERENCE)
    found = apply_transforms(source, paths, onto, inverse=True)
    index = np.indices(onto.shape).reshape(3, -1).T
    there = map_points(apply_affine(onto.affine, index), paths, inverse=True)
    i, j, k = apply_affine(np.linalg.inv(REFERENCE.affine), there).T
    inside = (np.minimum(np.minimum(i, j), k) > 0) & (i < 25) & (j < 23) & (k < 19)
    assert inside.sum() > 400
    expected = i * 480 + j * 20 + k  # linear in the index, so interpolation keeps it
    assert np.abs(found.data.numpy().ravel() - expected)[inside].max() < 0.2


def test_the_warped_image_of_a_registration_is_made_again(tmp_path, files):
    """Number type and air value included."""
    ct = image("int16")
    write_image(ct, tmp_path / "ct.nrrd")
    write_image(Volume(torch.ones(REFERENCE.shape), REFERENCE), tmp_path / "constant.nrrd")
    out = run(
        "apply", f"{files['rigid']},{files['field']}", tmp_path / "ct.nrrd", "--reference",
        tmp_path / "constant.nrrd", "-o", tmp_path / "out.nrrd",
    )  # fmt: skip
    assert "Wrote" in out
    written = read_image(tmp_path / "out.nrrd")
    assert written.dtype == "int16"
    assert written.grid.same_as(REFERENCE)
    found = apply_transforms(read_image(tmp_path / "ct.nrrd"), [files["rigid"], files["field"]], REFERENCE)
    assert float((written.data - found.data).abs().max()) <= 0.5001
    far = np.eye(4)
    far[:3, 3] = 15
    assert float(apply_transforms(ct, [far], REFERENCE).data.min()) == -1000


def test_labels_keep_their_values(tmp_path, files):
    labels = Volume((image().data > 500).int() * 300 + (image().data > 700).int(), BOX)
    write_image(labels, tmp_path / "labels.nii.gz")
    write_image(Volume(torch.ones(REFERENCE.shape), REFERENCE), tmp_path / "reference.nii.gz")
    run(
        "apply", files["field"], tmp_path / "labels.nii.gz", "--labels", "--reference", tmp_path / "reference.nii.gz",
        "-o", tmp_path / "out.nii.gz",
    )  # fmt: skip
    assert set(read_labels(tmp_path / "out.nii.gz").data.unique().tolist()) == {0, 300, 301}


def test_points_are_written_as_they_were_given(tmp_path, files):
    """Voxels of the reference become voxels of the image; beside an image the points have a name of their own."""
    write_image(image(), tmp_path / "moving.nii.gz")
    write_image(Volume(torch.ones(REFERENCE.shape), REFERENCE), tmp_path / "fixed.nii.gz")
    index = np.array([[3.0, 4.0, 5.0], [10.5, 11.0, 12.0]])
    (tmp_path / "p.csv").write_text("i,j,k,label\n3,4,5,a\n10.5,11,12,b\n")
    common = [
        files["field"], tmp_path / "moving.nii.gz", "--reference", tmp_path / "fixed.nii.gz", "--points",
        tmp_path / "p.csv",
    ]  # fmt: skip
    run("apply", *common, "-o", tmp_path / "out.nii.gz")
    moved = read_points(tmp_path / "out-points.csv", BOX)
    assert moved.labels == ("a", "b")
    assert (tmp_path / "out-points.csv").read_text().startswith("label,i,j,k\n")
    expected = map_points(apply_affine(REFERENCE.affine, index), [files["field"]])
    np.testing.assert_allclose(moved.positions, expected, atol=1e-5)
    run("apply", *common, "-o", tmp_path / "only.mrk.json")
    np.testing.assert_allclose(read_points(tmp_path / "only.mrk.json", BOX).positions, expected, atol=1e-9)
    assert sorted(p.name for p in tmp_path.glob("o*")) == ["only.mrk.json", "out-points.csv", "out.nii.gz"]


def test_a_reference_beyond_a_field_is_said(files):
    wide = Grid.from_parts((20, 20, 20), (3.0, 3.0, 3.0), np.eye(3), FIELD.grid.center - 28)
    [notice] = apply_transforms(image(), [files["field"]], wide).notices
    assert notice.code == "beyond-domain"


def test_a_transform_that_folds_says_where_it_has_no_inverse():
    folded = dense(size_mm=25.0)
    notices = apply_transforms(image(), [folded], REFERENCE, inverse=True).notices
    assert [notice.code for notice in notices] == ["no-inverse"]
    with pytest.raises(MorphSeekError, match="points have no inverse, the first at"):
        map_points(points_in(REFERENCE, 300), [folded], inverse=True)


@pytest.mark.parametrize("inverse", [False, True])
def test_it_can_be_cancelled(files, inverse):
    with pytest.raises(Cancelled):
        apply_transforms(image(), [files["field"]], REFERENCE, inverse=inverse, job=Job(None, lambda: True))


def test_bad_input_is_refused_in_one_sentence(tmp_path, files):
    far = np.eye(4)
    far[:3, 3] = 5000
    singular = np.zeros((4, 4))
    singular[3, 3] = 1
    for transforms, words in (
        ([far], "has nothing where the reference is"),
        ([tmp_path / "none.h5"], "does not exist"),
        ([], "There is no transform to apply"),
        ([np.full((4, 4), np.nan)], "not finite"),
    ):
        with pytest.raises(MorphSeekError, match=words):
            apply_transforms(image(), transforms, REFERENCE)
    with pytest.raises(MorphSeekError, match="singular"):
        apply_transforms(image(), [singular], REFERENCE, inverse=True)
    with pytest.raises(MorphSeekError, match="no interpolation 'cubic'"):
        apply_transforms(image(), [FIELD], REFERENCE, interpolation="cubic")
    write_image(image(), tmp_path / "a.nii.gz")
    common = ["apply", files["field"], tmp_path / "a.nii.gz", "--reference", tmp_path / "a.nii.gz", "-o"]
    assert "no format to write an image" in run(*common, tmp_path / "out.xyz", code=2).replace("\n", " ")
    assert "would be overwritten" in run(*common, tmp_path / "a.nii.gz", code=2).replace("\n", " ")
    assert "add --points FILE" in run(*common, tmp_path / "out.csv", code=2).replace("\n", " ")
