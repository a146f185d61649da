"""The contract of geometry.py against Slicer's real MRML: what the engine writes is what Slicer shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from MorphSeekLib.space import fields, geometry
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume, apply_affine

slicer = pytest.importorskip("slicer", reason="needs slicer-core")
vtk = pytest.importorskip("vtk", reason="needs slicer-core")
numpy_support = pytest.importorskip("vtk.util.numpy_support", reason="needs slicer-core")

LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def vtk_matrix(matrix: np.ndarray):
    result = vtk.vtkMatrix4x4()
    result.DeepCopy(matrix.ravel().tolist())
    return result


def volume_node(scene, volume: Volume):
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    slicer.util.updateVolumeFromArray(node, volume.data.permute(2, 1, 0).contiguous().numpy())
    node.SetIJKToRASMatrix(vtk_matrix(LPS_RAS @ volume.grid.affine))
    return node


def transform_node(scene, transform: DenseTransform):
    """FromParent: from the fixed image's space to the moving image's, RAS."""
    grid = Grid(transform.grid.shape, LPS_RAS @ transform.grid.affine)
    vectors = transform.displacement.permute(3, 2, 1, 0).numpy() * np.array([-1, -1, 1], dtype=np.float32)
    data = vtk.vtkImageData()
    data.SetDimensions(grid.shape)
    data.SetSpacing(grid.spacing.tolist())
    data.SetOrigin(grid.origin.tolist())
    scalars = numpy_support.numpy_to_vtk(np.ascontiguousarray(vectors.reshape(-1, 3)), deep=True)
    data.GetPointData().SetScalars(scalars)
    direction = np.eye(4)
    direction[:3, :3] = grid.direction
    displacement = slicer.vtkOrientedGridTransform()
    displacement.SetDisplacementGridData(data)
    displacement.SetGridDirectionMatrix(vtk_matrix(direction))
    displacement.SetInterpolationModeToLinear()
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode")
    node.SetAndObserveTransformFromParent(displacement)
    return node


def case(name: str) -> tuple[Grid, Volume, DenseTransform]:
    """A fixed grid, a moving volume and a transform with nodes of its own, coarser and differently oriented."""
    rng = np.random.default_rng(len(name))
    turned = [Rotation.from_rotvec(rng.uniform(-0.5, 0.5, 3)).as_matrix() for _ in range(2)]
    left = [1, 1, -1]
    at = np.array([1500.0, -1400.0, 1600.0]) if "far" in name else np.array([12.0, -30.0, 55.0])
    first, second = {
        "straight": (np.eye(3), np.eye(3)),
        "flipped": (geometry.orientation_matrix("PIR"), geometry.orientation_matrix("RAS")),
        "oblique": (turned[0], turned[1]),
        "left-handed fixed": (turned[0] * left, turned[1]),
        "left-handed moving": (turned[0], turned[1] * left),
        "left-handed far": (turned[0] * left, turned[1] * left),
    }[name]

    def centered(shape, spacing, direction):
        return Grid.from_parts(shape, spacing, direction, at - direction @ ((np.array(shape) - 1) * spacing / 2))

    fixed, grid = centered((20, 24, 15), (1.1, 0.9, 2.3), first), centered((28, 25, 30), (1.0, 1.2, 1.3), second)
    moving = Volume(torch.from_numpy(rng.uniform(100, 900, grid.shape).astype(np.float32)), grid)
    work = geometry.covering_grid(fixed, (2.5, 3.0, 3.5), "RAS", multiple_of=4)
    spread = np.stack(np.meshgrid(*[np.linspace(0, 3, n) for n in work.shape], indexing="ij"))
    u = np.stack([map_coordinates(rng.uniform(-1, 1, (4, 4, 4)), spread, order=3) for _ in range(3)])
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec([0.1, -0.2, 0.15]).as_matrix() @ np.diag([1.05, 0.95, 1.1])
    matrix[:3, 3] = at - matrix[:3, :3] @ at + [2, -1, 3]
    return fixed, moving, geometry.dense_from_voxels(torch.from_numpy(u)[None], work, matrix)


CASES = ["straight", "flipped", "oblique", "left-handed fixed", "left-handed moving", "left-handed far"]


@pytest.fixture
def scene():
    slicer.mrmlScene = slicer.vtkMRMLScene()  # slicer.util looks here
    yield slicer.mrmlScene
    slicer.mrmlScene.Clear(True)


@pytest.mark.parametrize("name", CASES)
def test_points(scene, name):
    fixed, _, transform = case(name)
    node = transform_node(scene, transform)
    rng = np.random.default_rng(0)
    inside = apply_affine(fixed.affine, rng.uniform(-0.5, np.array(fixed.shape) - 0.5, (200, 3)))
    nodes = apply_affine(transform.grid.affine, rng.integers(0, transform.grid.shape, (50, 3)))
    # beyond the nodes MRML holds the edge value, and so do we
    outside = apply_affine(transform.grid.affine, rng.uniform(-9, np.array(transform.grid.shape) + 9, (50, 3)))
    from_parent = node.GetTransformFromParent()
    for points in (inside, nodes, outside):
        ras = np.array([from_parent.TransformPoint(p.tolist()) for p in points * [-1, -1, 1]])
        assert np.abs(transform.map_points(points) - ras * [-1, -1, 1]).max() < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_resampling(scene, name):
    fixed, moving, transform = case(name)
    fixed_node = volume_node(scene, Volume(torch.zeros(fixed.shape), fixed))
    moving_node = volume_node(scene, moving)
    moving_node.SetAndObserveTransformNodeID(transform_node(scene, transform).GetID())
    theirs = slicer.vtkSlicerVolumesLogic.ResampleVolumeToReferenceVolume(moving_node, fixed_node)
    theirs = slicer.util.arrayFromVolume(theirs).transpose(2, 1, 0)
    ours = geometry.resample(moving, fixed, transform).data.numpy()
    at = geometry.index_points(fixed, transform, moving.grid)[0].numpy()
    last = np.array(moving.grid.shape).reshape(3, 1, 1, 1) - 1
    inside = ((at >= 0) & (at <= last)).all(axis=0)
    assert inside.mean() > 0.5
    assert np.abs(ours - theirs)[inside].max() < 1e-3 * float(np.ptp(moving.data.numpy()))
    far_out = ((at < -1) | (at > last + 1)).any(axis=0)
    assert not ours[far_out].any()
    assert not theirs[far_out].any()


def test_the_jacobian_is_that_of_the_mapped_corners(scene):
    """The volume of a small parallelepiped, carried through Slicer's transform, is det J times its own."""
    fixed, _, transform = case("left-handed fixed")
    from_parent = transform_node(scene, transform).GetTransformFromParent()
    jacobian = fields.jacobian_determinant(geometry.voxel_displacement(transform, fixed))[0, 0]
    rng = np.random.default_rng(1)
    for index in rng.integers(1, np.array(fixed.shape) - 1, (30, 3)):
        edges = []
        for axis in np.eye(3):
            ends = apply_affine(LPS_RAS @ fixed.affine, np.stack([index - axis, index + axis]))
            before, after = (np.array(from_parent.TransformPoint(p.tolist())) for p in ends)
            edges.append((after - before) / 2)
        ratio = np.linalg.det(np.array(edges).T) / np.linalg.det(LPS_RAS[:3, :3] @ fixed.affine[:3, :3])
        assert float(jacobian[tuple(index)]) == pytest.approx(ratio, abs=1e-3)
