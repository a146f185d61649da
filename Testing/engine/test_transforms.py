"""Transform files: the same points in SimpleITK and in Slicer's MRML, small on disk, refused when they are none."""

from __future__ import annotations

import os
import subprocess

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F

from MorphSeekLib.io.transforms import read_transform, rounded, write_transform
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import DenseTransform, Grid, apply_affine

TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


def dense(shape=(14, 12, 10), handed=1, size_mm=4.0) -> DenseTransform:
    """A smooth random displacement on an oblique, anisotropic grid."""
    grid = Grid.from_parts(shape, (3.0, 2.5, 4.0), TURN @ np.diag([1, 1, handed]), (-30.0, 12.0, 45.0))
    coarse = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0]
    return DenseTransform(size_mm * smooth, grid)


def points_in(grid: Grid, number: int = 100) -> np.ndarray:
    inside = np.random.default_rng(1).random((number, 3)) * (np.array(grid.shape) - 1)
    return apply_affine(grid.affine, inside)


def mapped(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(p) for p in points.tolist()])


@pytest.mark.parametrize("handed", [1, -1])
def test_simpleitk_reads_what_is_written(tmp_path, handed):
    transform = dense(handed=handed)
    write_transform(transform, tmp_path / "t.h5")
    assert os.listdir(tmp_path) == ["t.h5"]
    points = points_in(transform.grid)
    read = sitk.ReadTransform(str(tmp_path / "t.h5"))
    assert read.GetName() == "DisplacementFieldTransform"
    assert np.abs(mapped(read, points) - transform.map_points(points)).max() < 2e-4
    back = read_transform(tmp_path / "t.h5", transform.grid)
    assert float((back.displacement - transform.displacement).abs().max()) < 2e-4


@pytest.mark.parametrize("handed", [1, -1])
def test_slicer_reads_what_is_written(tmp_path, handed):
    slicer = pytest.importorskip("slicer")
    transform = dense(handed=handed)
    write_transform(transform, tmp_path / "t.h5")
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode")
    storage = slicer.vtkMRMLTransformStorageNode()
    scene.AddNode(storage)
    storage.SetFileName(str(tmp_path / "t.h5"))
    assert storage.ReadData(node)
    from_parent = node.GetTransformFromParent()  # resampling direction: fixed -> moving

    def error(points: np.ndarray) -> float:
        found = [np.array(from_parent.TransformPoint(*(p * LPS_TO_RAS))) * LPS_TO_RAS for p in points]
        return float(np.abs(np.array(found) - transform.map_points(points)).max())

    nodes = apply_affine(transform.grid.affine, np.round(points_in(Grid(transform.grid.shape, np.eye(4)))))
    assert error(nodes) < 2e-4
    from_parent.SetInterpolationModeToLinear()  # Slicer reads files as cubic
    assert error(points_in(transform.grid)) < 2e-4


def test_file_is_small(tmp_path):
    shape = (48, 56, 48)
    transform = dense(shape)
    write_transform(transform, tmp_path / "small.h5")
    field = sitk.GetImageFromArray(transform.displacement.double().numpy().transpose(3, 2, 1, 0), isVector=True)
    sitk.WriteTransform(sitk.DisplacementFieldTransform(field), str(tmp_path / "itk.h5"))
    assert (tmp_path / "small.h5").stat().st_size < 0.3 * (tmp_path / "itk.h5").stat().st_size


@pytest.mark.parametrize("ending", ["tfm", "txt", "h5", "mat", "xfm"])
def test_linear_kinds_become_matrices(tmp_path, ending):
    grid = dense().grid
    affine = sitk.AffineTransform((1.1, 0.1, 0, 0, 0.9, 0.2, -0.1, 0, 1.05), (5.0, -6.0, 7.0), (10.0, 20.0, 30.0))
    kinds: list[sitk.Transform] = [affine, sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3, (4, 5, 6))]
    if ending not in ("mat", "xfm"):  # those formats hold one matrix
        kinds += [sitk.CompositeTransform([kinds[1], affine]), sitk.TranslationTransform(3, (1.0, 2.0, 3.0))]
    points = points_in(grid, 10)
    for transform in kinds:
        path = tmp_path / f"t.{ending}"
        sitk.WriteTransform(transform, str(path))
        matrix = read_transform(path, grid)
        assert matrix.shape == (4, 4)
        assert np.abs(apply_affine(matrix, points) - mapped(transform, points)).max() < 1e-6


def test_composite_with_a_field_is_sampled(tmp_path):
    transform = dense()
    grid = transform.grid
    write_transform(transform, tmp_path / "t.h5")
    chain = sitk.CompositeTransform(
        [sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3), sitk.ReadTransform(str(tmp_path / "t.h5"))]
    )
    sitk.WriteTransform(chain, str(tmp_path / "chain.h5"))
    read = read_transform(tmp_path / "chain.h5", grid)
    assert isinstance(read, DenseTransform)
    points = points_in(grid)
    # the field is applied first, then the rotation; both linear between the nodes
    assert np.abs(read.map_points(points) - mapped(chain, points)).max() < 1e-3


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd", "mha"])
def test_displacement_field_images(tmp_path, ending):
    transform = dense()
    grid = transform.grid
    field = sitk.GetImageFromArray(transform.displacement.numpy().transpose(3, 2, 1, 0), isVector=True)
    field.SetSpacing(grid.spacing.tolist())
    field.SetOrigin(grid.origin.tolist())
    field.SetDirection(grid.direction.ravel().tolist())
    sitk.WriteImage(field, str(tmp_path / f"f.{ending}"))
    read = read_transform(tmp_path / f"f.{ending}", grid)
    assert float((read.displacement - transform.displacement).abs().max()) < 1e-3


def test_field_that_slicer_saved_as_nifti_means_the_same(tmp_path):
    slicer = pytest.importorskip("slicer")
    transform = dense()
    write_transform(transform, tmp_path / "t.h5")
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode")
    for name, action in (("t.h5", "ReadData"), ("t.nii.gz", "WriteData")):
        storage = slicer.vtkMRMLTransformStorageNode()
        scene.AddNode(storage)
        storage.SetFileName(str(tmp_path / name))
        assert getattr(storage, action)(node)
    read = read_transform(tmp_path / "t.nii.gz", transform.grid)
    assert float((read.displacement - transform.displacement).abs().max()) < 1e-3


HEAD = "#Insight Transform File V1.0\n#Transform 0\nTransform: {}\nParameters: {}\nFixedParameters: 0 0 0\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tfm", "hello", "cannot be read as a transform"),
        ("a.h5", "hello", "cannot be read as a transform"),
        ("a.mat", "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "of another program"),
        ("a.lta", "type = 1", "of another program"),
        ("a.tfm", HEAD.format("AffineTransform_double_3_3", "1 0 0"), "cannot be read as a transform"),
        ("a.tfm", HEAD.format("AffineTransform_double_3_3", "0 0 0 0 1 0 0 0 1 0 0 0"), "singular"),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, words)


def test_more_bad_files(tmp_path):
    refused(tmp_path / "none.h5", "does not exist")
    refused(tmp_path, "is a folder")
    write_transform(dense(), tmp_path / "t.h5")
    (tmp_path / "t.h5").write_bytes((tmp_path / "t.h5").read_bytes()[:-2000])
    refused(tmp_path / "t.h5", "damaged")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_dataset("a", data=[1.0])
    refused(tmp_path / "other.h5", "cannot be read as a transform")
    sitk.WriteImage(sitk.GetImageFromArray(np.random.rand(4, 4, 4)), str(tmp_path / "scan.nii.gz"))
    refused(tmp_path / "scan.nii.gz", "1 instead of 3 numbers")
    sitk.WriteTransform(sitk.Euler2DTransform(), str(tmp_path / "flat.tfm"))
    refused(tmp_path / "flat.tfm", "2D transform")
    with pytest.raises(MorphSeekError, match=r"\.h5"):
        write_transform(dense(), tmp_path / "t.tfm")


def refused(path, words: str) -> None:
    with pytest.raises(MorphSeekError) as caught:
        read_transform(path, dense().grid)
    text = str(caught.value)
    assert str(path) in text
    assert words in text
    assert "\n" not in text


def test_full_disk(tmp_path):
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(MorphSeekError, match=r"The disk is full: .*t\.h5"):
            write_transform(dense((40, 40, 40)), tmp_path / "t.h5")
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(("spacing", "step"), [(1.5, 2**-12), (1000.0, 2**-12), (0.1, 2**-16), (0.001, 2**-22)])
def test_displacements_are_rounded_in_proportion_to_the_nodes_distance(tmp_path, spacing, step):
    grid = Grid.from_parts((5, 6, 7), (spacing,) * 3, np.eye(3), (0.0, 0.0, 0.0))
    generator = torch.Generator().manual_seed(0)
    transform = DenseTransform(spacing * torch.randn(3, 5, 6, 7, generator=generator), grid)
    found = rounded(transform)
    assert float((found.displacement - transform.displacement).abs().max()) <= step / 2
    assert step <= max(spacing, 1.0) / 4096
    assert torch.equal(found.displacement / step, (found.displacement / step).round())
    write_transform(transform, tmp_path / "t.h5")
    read = sitk.DisplacementFieldTransform(sitk.ReadTransform(str(tmp_path / "t.h5"))).GetDisplacementField()
    written = sitk.GetArrayFromImage(read).transpose(3, 2, 1, 0)
    assert np.array_equal(written, found.displacement.double().numpy()), "what rounded() gives is what is written"


def oblique_field(seed: int, size_mm: float = 3.0) -> tuple[sitk.Transform, Grid]:
    """A rough displacement field of ITK on an oblique, anisotropic, left-handed grid, and that grid."""
    grid = Grid.from_parts((9, 7, 6), (4.0, 6.5, 3.0), TURN @ np.diag([1, 1, -1]), (-20.0, 10.0, 55.0))
    values = np.random.default_rng(seed).normal(size=(*grid.shape[::-1], 3)) * size_mm
    return sitk.DisplacementFieldTransform(placed(sitk.GetImageFromArray(values, isVector=True), grid)), grid


def bspline(seed: int, size_mm: float = 3.0) -> tuple[sitk.Transform, Grid]:
    """A B-spline of ITK over an oblique box, and the grid between whose outermost nodes ITK knows it."""
    mesh, spacing = np.array([3, 4, 5]), np.array([12.0, 9.0, 7.0])
    spline = sitk.BSplineTransform(3, 3)
    spline.SetTransformDomainOrigin((-25.0, 12.0, 40.0))
    spline.SetTransformDomainDirection(TURN.ravel().tolist())
    spline.SetTransformDomainPhysicalDimensions((mesh * spacing).tolist())
    spline.SetTransformDomainMeshSize(mesh.tolist())
    parameters = np.random.default_rng(seed).normal(size=len(spline.GetParameters())) * size_mm
    spline.SetParameters(parameters.tolist())
    return spline, Grid.from_parts(mesh + 1, spacing, TURN, (-25.0, 12.0, 40.0))


def placed(image: sitk.Image, grid: Grid) -> sitk.Image:
    image.SetSpacing(grid.spacing.tolist())
    image.SetOrigin(grid.origin.tolist())
    image.SetDirection(grid.direction.ravel().tolist())
    return image


def random_affine(seed: int) -> sitk.AffineTransform:
    random = np.random.default_rng(seed)
    matrix = np.eye(3) + 0.1 * random.normal(size=(3, 3))
    return sitk.AffineTransform(matrix.ravel().tolist(), (4 * random.normal(size=3)).tolist(), (0.0, 20.0, 50.0))


def continued(transform: sitk.Transform, domain: Grid, points: np.ndarray) -> np.ndarray:
    """Points moved as the nearest points of the domain are; those a hair inside it, where ITK knows the transform."""
    inset = 1e-6
    index = apply_affine(np.linalg.inv(domain.affine), points)
    held = apply_affine(domain.affine, index.clip(inset, np.array(domain.shape) - 1 - inset))
    return points + mapped(transform, held) - held


def far_grid() -> Grid:
    """An oblique grid that reaches far beyond the domains of :func:`oblique_field` and :func:`bspline`."""
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    return Grid.from_parts(
        (13, 14, 12), (7.0, 7.5, 6.5), turn, np.array([-20.0, 36.0, 52.0]) - turn @ [42, 48.75, 35.75]
    )


def nodes_moved(read: DenseTransform) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) the nodes of a transform, and where they go."""
    nodes = apply_affine(read.grid.affine, np.indices(read.grid.shape).reshape(3, -1).T)
    return nodes, nodes + read.displacement.double().numpy().reshape(3, -1).T


def share_inside(domain: Grid, points: np.ndarray) -> float:
    index = apply_affine(np.linalg.inv(domain.affine), points)
    return float(((index >= 0) & (index <= np.array(domain.shape) - 1)).all(axis=1).mean())


@pytest.mark.parametrize("made", [oblique_field, bspline])
@pytest.mark.parametrize("ending", ["h5", "tfm"])
def test_beyond_its_domain_a_transform_moves_points_as_its_edge_does(tmp_path, made, ending):
    transform, domain = made(seed=0)
    sitk.WriteTransform(transform, str(tmp_path / f"t.{ending}"))
    nodes, found = nodes_moved(read_transform(tmp_path / f"t.{ending}", far_grid()))
    assert 0.02 < share_inside(domain, nodes) < 0.3
    assert np.abs(found - continued(transform, domain, nodes)).max() < 1e-4


@pytest.mark.parametrize("ending", ["nrrd", "mha", "nii.gz"])
def test_beyond_its_grid_a_displacement_field_image_moves_points_as_its_edge_does(tmp_path, ending):
    transform, domain = oblique_field(seed=1)
    image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
    sitk.WriteImage(image, str(tmp_path / f"f.{ending}"))
    nodes, found = nodes_moved(read_transform(tmp_path / f"f.{ending}", far_grid()))
    assert np.abs(found - continued(transform, domain, nodes)).max() < 1e-4


@pytest.mark.parametrize("made", [oblique_field, bspline])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_within_its_domain_a_chain_maps_points_as_simpleitk_does(tmp_path, made, seed):
    transform, domain = made(seed)
    chain = sitk.CompositeTransform([random_affine(seed + 10), transform, random_affine(seed + 20)])
    sitk.WriteTransform(chain, str(tmp_path / "chain.h5"))
    nodes, found = nodes_moved(read_transform(tmp_path / "chain.h5", far_grid()))
    reached = apply_affine(np.linalg.inv(domain.affine), mapped(random_affine(seed + 20), nodes))
    inside = ((reached >= 0) & (reached <= np.array(domain.shape) - 1)).all(axis=1)
    assert inside.sum() > 10
    assert np.abs(found - mapped(chain, nodes))[inside].max() < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_at_any_place_of_a_chain_the_edge_goes_on(tmp_path, seed):
    (field, grid), (spline, box) = oblique_field(seed), bspline(seed)
    first, last = random_affine(seed), random_affine(seed + 1)
    # ITK applies the last one first
    sitk.WriteTransform(sitk.CompositeTransform([last, spline, first, field]), str(tmp_path / "chain.h5"))
    nodes, found = nodes_moved(read_transform(tmp_path / "chain.h5", far_grid()))
    expected = continued(field, grid, nodes)
    expected = continued(spline, box, mapped(first, expected))
    assert np.abs(found - mapped(last, expected)).max() < 3e-4


def test_a_field_of_one_slice_moves_all_points_as_that_slice_does(tmp_path):
    grid = Grid.from_parts((5, 4, 1), (4.0, 5.0, 2.0), TURN, (0.0, 20.0, 50.0))
    values = np.random.default_rng(0).normal(size=(1, 4, 5, 3))
    sitk.WriteImage(placed(sitk.GetImageFromArray(values, isVector=True), grid), str(tmp_path / "f.nrrd"))
    nodes, found = nodes_moved(read_transform(tmp_path / "f.nrrd", far_grid()))
    dense = DenseTransform(torch.from_numpy(values.transpose(3, 2, 1, 0).copy()), grid)
    assert np.abs(found - dense.map_points(nodes)).max() < 1e-4


def test_a_chain_of_files_is_the_transforms_one_after_another(tmp_path):
    transform = dense()
    write_transform(transform, tmp_path / "dense.h5")
    sitk.WriteTransform(sitk.TranslationTransform(3, (3.0, -2.0, 1.0)), str(tmp_path / "shift.tfm"))
    chain = [tmp_path / "shift.tfm", tmp_path / "dense.h5"]
    found = read_transform(chain, transform.grid)
    points = apply_affine(transform.grid.affine, np.argwhere(np.ones((14, 12, 10)))[::37])
    shifted = points + np.array([3.0, -2.0, 1.0])
    expected = transform.map_points(shifted)
    index = apply_affine(np.linalg.inv(transform.grid.affine), shifted)
    inside = ((index >= 0) & (index <= np.array(transform.grid.shape) - 1)).all(axis=1)
    np.testing.assert_allclose(found.map_points(points)[inside], expected[inside], atol=2e-3)
    shift = read_transform([tmp_path / "shift.tfm"] * 2, transform.grid)
    np.testing.assert_allclose(shift[:3, 3], (6.0, -4.0, 2.0), atol=1e-6)


def test_an_empty_chain_is_refused():
    with pytest.raises(MorphSeekError, match="no transform to read"):
        read_transform([], dense().grid)
