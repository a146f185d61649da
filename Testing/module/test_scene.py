"""Nodes in and out on a real MRML scene, on awkward grids, compared with the engine's own geometry."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import SimpleITK as sitk
import slicer.util
import vtk
import worlds
from MorphSeekGui import scene
from MorphSeekGui.scene import FLIP, InputError
from vtk.util import numpy_support

from MorphSeekLib.io import transforms
from MorphSeekLib.space import geometry

NAMES = sorted(worlds.GRIDS)


@pytest.fixture(scope="session")
def computed(tmp_path_factory):
    """name -> (world, the worker's answer), computed once."""
    made = {}

    def get(name: str):
        if name not in made:
            world = worlds.make_world(name)
            made[name] = world, worlds.result_of(world, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def resampled_under(transform_node, moving, onto, mode="linear") -> np.ndarray:
    """What MRML makes of the moving volume when it is put under a transform and resampled onto another one."""
    before = moving.GetParentTransformNode()
    moving.SetAndObserveTransformNodeID(transform_node.GetID())
    out = slicer.vtkSlicerVolumesLogic.ResampleVolumeToReferenceVolume(moving, onto)
    moving.SetAndObserveTransformNodeID(before.GetID() if before else None)
    array = slicer.util.arrayFromVolume(out).copy()
    slicer.mrmlScene.RemoveNode(out)
    return array


def points_in(grid: geometry.Grid, count: int = 40) -> np.ndarray:
    """(count, 3) LPS mm of random points inside a grid."""
    index = np.random.default_rng(1).uniform(1, np.array(grid.shape) - 2, (count, 3))
    return geometry.apply_affine(grid.affine, index)


def through(vtk_transform, points: np.ndarray) -> np.ndarray:
    """(n, 3) RAS points through a VTK transform."""
    return np.array([vtk_transform.TransformPoint(p) for p in points])


def to_ras(points: np.ndarray) -> np.ndarray:
    return points * [-1, -1, 1]


# ------------------------------------------------------------------------------------------------------------ volumes


@pytest.mark.parametrize("name", NAMES)
def test_a_volume_is_read_as_it_lies(mrml, name):
    volume = worlds.make_world(name).moving
    image = scene.read_volume(worlds.add_volume("M", volume))
    assert np.array_equal(image.array, volume.data.numpy())
    assert np.allclose(image.affine, volume.grid.affine, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_linear_parents_are_part_of_the_place(mrml, name):
    volume = worlds.make_world(name).moving
    outer = worlds.linear_transform("outer", scale=1.1)
    inner = worlds.linear_transform("inner", degrees=(0, 30, 0), shift=(-8, 2, 1))
    inner.SetAndObserveTransformNodeID(outer.GetID())
    image = scene.read_volume(worlds.add_volume("M", volume, frame=inner))
    assert np.allclose(image.affine, volume.grid.affine, atol=1e-6)


def test_voxels_reach_the_file_uncopied_and_unpermuted(mrml, tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(4, 3, 2)  # (k, j, i)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "V")
    slicer.util.updateVolumeFromArray(node, array)
    image = scene.read_volume(node)
    assert np.shares_memory(image.array, slicer.util.arrayFromVolume(node))
    back = scene.load_image(scene.save_image(image, tmp_path / "v.npy"))
    assert back.array.shape == (2, 3, 4)
    assert back.array[1, 2, 3] == array[3, 2, 1]
    assert isinstance(back.array, np.memmap)


@pytest.mark.parametrize(
    ("vtk_type", "expected"),
    [
        (vtk.VTK_UNSIGNED_CHAR, np.uint8),
        (vtk.VTK_SHORT, np.int16),
        (vtk.VTK_UNSIGNED_SHORT, np.uint16),
        (vtk.VTK_LONG_LONG, np.int64),
        (vtk.VTK_UNSIGNED_INT, np.uint32),
        (vtk.VTK_FLOAT, np.float32),
        (vtk.VTK_DOUBLE, np.float64),
    ],
)
def test_every_number_type_goes_to_the_engine_as_it_is(mrml, vtk_type, expected):
    image = vtk.vtkImageData()
    image.SetDimensions(2, 3, 4)
    image.AllocateScalars(vtk_type, 1)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "V")
    node.SetAndObserveImageData(image)
    slicer.util.arrayFromVolume(node)[:] = np.arange(24).reshape(4, 3, 2)
    array = scene.read_volume(node).array
    assert array.dtype == expected
    assert array[1, 2, 3] == 23


def test_empty_vector_and_missing_volumes_are_refused(mrml):
    empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Hollow")
    with pytest.raises(InputError, match="'Hollow' is empty"):
        scene.read_volume(empty)
    vector = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", "Photo")
    image = vtk.vtkImageData()
    image.SetDimensions(4, 4, 4)
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 3)
    vector.SetAndObserveImageData(image)
    with pytest.raises(InputError, match=r"'Photo' has 3 values in each voxel .* choose"):
        scene.read_volume(vector)
    with pytest.raises(InputError, match="Choose a fixed and a moving volume"):
        scene.read_volume(None)


def test_a_nonlinear_parent_is_refused_with_advice(mrml, computed):
    world, result = computed("oblique")
    moving, fixed = worlds.add_volume("M", world.moving), worlds.add_volume("F", world.fixed)
    nodes = scene.create_nodes(result, fixed, moving)
    below = worlds.linear_transform("below")
    below.SetAndObserveTransformNodeID(nodes.transform.GetID())
    moving.SetAndObserveTransformNodeID(below.GetID())
    with pytest.raises(InputError, match=r"'M' is under the non-linear transform 'M to F': harden it"):
        scene.read_volume(moving)
    assert np.allclose(  # up to that transform the way is linear, which is what an initial transform needs
        scene.matrix_to_space(moving, nodes.transform), slicer.util.arrayFromTransformMatrix(below), atol=1e-9
    )


# ------------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("name", NAMES)
def test_the_transform_node_maps_points_as_the_engine_does(mrml, computed, name):
    world, result = computed(name)
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving))
    points = points_in(world.fixed.grid)
    expected = to_ras(world.transform.map_points(points))
    found = through(nodes.transform.GetTransformFromParent(), to_ras(points))
    assert np.abs(found - expected).max() < 1e-3
    assert nodes.transform.GetTransformFromParent().GetClassName() == "vtkOrientedGridTransform"
    assert not slicer.vtkMRMLTransformNode.IsAbstractTransformComputedFromInverse(
        nodes.transform.GetTransformFromParent()
    )


@pytest.mark.parametrize("name", NAMES)
def test_applying_the_transform_in_mrml_gives_the_warped_volume(mrml, computed, name):
    world, result = computed(name)
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    nodes = scene.create_nodes(result, fixed, moving)
    warped = slicer.util.arrayFromVolume(nodes.warped)
    assert np.abs(resampled_under(nodes.transform, moving, fixed) - warped).max() < 1e-3 * np.ptp(warped)
    assert np.array_equal(
        warped.transpose(2, 1, 0), geometry.resample(world.moving, world.fixed.grid, world.transform).data
    )


@pytest.mark.parametrize("name", NAMES)
def test_with_parents_on_both_sides_the_transform_still_gives_the_warped_volume(mrml, computed, name):
    world, result = computed(name)
    below_fixed, below_moving = worlds.linear_transform("P"), worlds.linear_transform("Q", (20, -5, 3), (1, 2, 30), 0.9)
    fixed = worlds.add_volume("F", world.fixed, frame=below_fixed)
    moving = worlds.add_volume("M", world.moving, frame=below_moving)
    nodes = scene.create_nodes(result, fixed, moving, scene.matrix_to_space(moving))
    warped = slicer.util.arrayFromVolume(nodes.warped)
    assert nodes.warped.GetParentTransformNode() is None
    assert np.allclose(scene.read_volume(nodes.warped).affine, scene.read_volume(fixed).affine, atol=1e-6)
    # a float image of 600 gray values: 1e-3 of its range
    assert np.abs(resampled_under(nodes.transform, moving, nodes.warped) - warped).max() < 1e-3 * np.ptp(warped)
    # the inverse is the transform's: there and back again
    inside = points_in(world.fixed.grid)
    there = through(nodes.transform.GetTransformFromParent(), to_ras(inside))
    assert (
        np.median(np.linalg.norm(through(nodes.inverse.GetTransformFromParent(), there) - to_ras(inside), axis=1)) < 0.3
    )


def test_the_inverse_node_is_what_the_engine_computed(mrml, computed):
    world, result = computed("left-handed")
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving))
    back = world.transform.inverse(geometry.covering_grid(world.moving.grid, spacing=(4.0, 4.0, 4.0)))
    points = points_in(world.moving.grid)
    found = through(nodes.inverse.GetTransformFromParent(), to_ras(points))
    assert np.abs(found - to_ras(back.map_points(points))).max() < 1e-3


def saved_and_loaded(node, folder):
    """A transform node as Slicer loads it from the file that it saved it to."""
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformStorageNode")
    storage.SetFileName(str(folder / f"{node.GetName()}.h5"))
    assert storage.WriteData(node)
    assert storage.ReadData(node)
    return node.GetTransformFromParentAs("vtkOrientedGridTransform", False)


def test_transforms_that_were_loaded_become_the_linear_maps_that_were_judged(mrml, computed, tmp_path):
    world, result = computed("oblique")
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving))
    points = to_ras(points_in(world.fixed.grid))
    expected = to_ras(world.transform.map_points(to_ras(points)))
    grids = [saved_and_loaded(node, tmp_path) for node in (nodes.transform, nodes.inverse)]
    assert [grid.GetInterpolationModeAsString() for grid in grids] == ["Cubic", "Cubic"], "as Slicer reads files"
    assert np.abs(through(nodes.transform.GetTransformFromParent(), points) - expected).max() > 0.01
    nodes = scene.result_nodes(nodes.transform)
    assert [grid.GetInterpolationModeAsString() for grid in grids] == ["Linear", "Linear"]
    assert np.abs(through(nodes.transform.GetTransformFromParent(), points) - expected).max() < 1e-3


def test_an_inverted_result_is_kept_linear_too(mrml, computed, tmp_path):
    world, result = computed("oblique")
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving))
    grid = saved_and_loaded(nodes.transform, tmp_path)
    nodes.transform.Inverse()
    scene.keep_results_linear(mrml)
    assert grid.GetInterpolationModeAsString() == "Linear"
    other = mrml.AddNewNodeByClass("vtkMRMLTransformNode", "someone else's")
    cubic = scene.grid_transform(scene.load_image(result["displacement"]))
    cubic.SetInterpolationModeToCubic()
    other.SetAndObserveTransformFromParent(cubic)
    scene.keep_results_linear(mrml)
    assert cubic.GetInterpolationModeAsString() == "Cubic", "what is not ours stays as it is"


def test_jacobian_folding_and_labels_lie_on_the_fixed_grid(mrml, application, computed):
    world, result = computed("oblique")
    moving, fixed = worlds.add_volume("M", world.moving), worlds.add_volume("F", world.fixed)
    labels = scene.Labels(
        world.moving_labels.numpy(), {3: ("putamen", (0.1, 0.5, 0.9)), 7: ("pallidum", (0.9, 0.2, 0.3))}
    )
    nodes = scene.create_nodes(result, fixed, moving, labels=labels)
    jacobian = slicer.util.arrayFromVolume(nodes.jacobian).transpose(2, 1, 0)
    assert np.array_equal(jacobian, np.load(result["jacobian"]["path"]))
    assert np.allclose(scene.read_volume(nodes.jacobian).affine, world.fixed.grid.affine, atol=1e-9)
    folded = np.load(result["folding"]["path"])
    assert 0 < folded.sum() < folded.size
    assert np.array_equal(scene.read_labels(nodes.folding, fixed).array, folded)
    assert isinstance(nodes.warped_labels, slicer.vtkMRMLSegmentationNode), "as the labels were given"
    warped_labels = np.load(result["warped_labels"]["path"])
    found = scene.read_labels(nodes.warped_labels, fixed, {"putamen": 3, "pallidum": 7})
    assert np.array_equal(found.array, warped_labels)
    assert np.allclose(found.names[3][1], (0.1, 0.5, 0.9), atol=1e-6)
    assert scene.label_names(nodes.warped_labels) == {3: "putamen", 7: "pallidum"}
    assert nodes.report == result["report"] == json.loads(nodes.transform.GetAttribute("MorphSeek.Report"))
    # MRML's own warp of the label map agrees
    label_node = worlds.add_volume(
        "L", geometry.Volume(world.moving_labels, world.moving.grid), "vtkMRMLLabelMapVolumeNode"
    )
    mrml_labels = resampled_under(nodes.transform, label_node, fixed)
    assert (mrml_labels.transpose(2, 1, 0) != warped_labels).mean() < 1e-3  # ties at half a voxel


def test_a_registration_without_folding_has_an_empty_segment(mrml, application, computed, tmp_path):
    world, result = computed("oblique")
    np.save(tmp_path / "none.npy", np.zeros(world.fixed.grid.shape, np.uint8))
    result = {**result, "folding": {**result["folding"], "path": str(tmp_path / "none.npy")}, "inverse": None}
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving))
    assert nodes.folding.GetSegmentation().GetNumberOfSegments() == 1
    assert nodes.inverse is None
    nodes.folding.CreateClosedSurfaceRepresentation()


def test_the_warped_volume_is_shown_with_the_moving_window(mrml, computed):
    world, result = computed("oblique")
    moving = worlds.add_volume("M", world.moving)
    moving.CreateDefaultDisplayNodes()
    moving.GetDisplayNode().AutoWindowLevelOff()
    moving.GetDisplayNode().SetWindowLevel(321, 123)
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), moving)
    display = nodes.warped.GetDisplayNode()
    assert (display.GetWindow(), display.GetLevel()) == (321, 123)


@pytest.mark.parametrize("broken", ["warped", "displacement", "jacobian", "folding", "warped_labels"])
def test_a_result_that_cannot_be_read_leaves_nothing(mrml, computed, broken, tmp_path):
    world, result = computed("oblique")
    moving, fixed = worlds.add_volume("M", world.moving), worlds.add_volume("F", world.fixed)
    before = mrml.GetNumberOfNodes()
    with pytest.raises(OSError):
        scene.create_nodes({**result, broken: {**result[broken], "path": str(tmp_path / "gone.npy")}}, fixed, moving)
    assert mrml.GetNumberOfNodes() == before


def test_a_failure_midway_removes_what_was_made(mrml, computed, monkeypatch):
    world, result = computed("oblique")
    moving, fixed = worlds.add_volume("M", world.moving), worlds.add_volume("F", world.fixed)
    before = {mrml.GetNthNode(n).GetID() for n in range(mrml.GetNumberOfNodes())}
    seen = []

    def full(*_arguments):
        seen.append(mrml.GetNumberOfNodes())
        raise MemoryError

    monkeypatch.setattr(scene, "_fill_labels", full)
    with pytest.raises(MemoryError):
        scene.create_nodes(result, fixed, moving)
    assert seen[0] > len(before)
    assert {mrml.GetNthNode(n).GetID() for n in range(mrml.GetNumberOfNodes())} == before


# ------------------------------------------------------------------------------------------------------------- labels


def add_labels(name: str, volume: geometry.Volume, frame=None):
    return worlds.add_volume(name, volume, "vtkMRMLLabelMapVolumeNode", frame)


def segmentation_of(name: str, volume: geometry.Volume, segments: dict[str, int], frame=None):
    """A segmentation node with the given label values as segments, on the volume's grid."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    node.CreateDefaultDisplayNodes()
    affine = FLIP @ volume.grid.affine
    if frame is not None:
        affine = np.linalg.inv(slicer.util.arrayFromTransformMatrix(frame, toWorld=True)) @ affine
        node.SetAndObserveTransformNodeID(frame.GetID())
    for segment, value in segments.items():
        image = slicer.vtkOrientedImageData()
        image.SetDimensions(*volume.grid.shape)
        voxels = (volume.data.numpy() == value).astype(np.uint8).ravel(order="F")
        image.GetPointData().SetScalars(vtk.util.numpy_support.numpy_to_vtk(voxels, deep=True))
        image.SetImageToWorldMatrix(scene.to_vtk(affine))
        node.AddSegmentFromBinaryLabelmapRepresentation(image, segment, [0.2, 0.4, 0.6])
    return node


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_read_on_the_volume_they_belong_to(mrml, application, name):
    world = worlds.make_world(name)
    volume = geometry.Volume(world.moving_labels, world.moving.grid)
    moving = worlds.add_volume("M", world.moving, frame=worlds.linear_transform("P"))
    for node in (
        add_labels("same grid", volume, frame=moving.GetParentTransformNode()),
        add_labels("same place, no parent", volume),
        segmentation_of("segments", volume, {"a": 3, "b": 7}, frame=worlds.linear_transform("Q", (5, 6, 7))),
    ):
        found = scene.read_labels(node, moving, {"a": 3, "b": 7})
        assert np.array_equal(found.array, world.moving_labels.numpy()), node.GetName()


@pytest.mark.parametrize("name", NAMES)
def test_labels_on_another_grid_are_resampled(mrml, application, name):
    world = worlds.make_world(name)
    volume = geometry.Volume(world.moving_labels, world.moving.grid)
    fixed = worlds.add_volume("F", world.fixed)
    expected = geometry.resample(volume, world.fixed.grid, mode="nearest").data.numpy()
    assert expected.any()
    for node in (add_labels("labels", volume), segmentation_of("segments", volume, {"a": 3, "b": 7})):
        found = scene.read_labels(node, fixed, {"a": 3, "b": 7}).array
        assert (found != expected).mean() < 1e-3, node.GetName()  # ties at half a voxel


def test_overlapping_segments_are_named_with_what_they_lose(mrml, application):
    """A later segment covers a part of an earlier one: the labels say whose voxels it took, and how many."""
    world = worlds.make_world("upright")
    moving = worlds.add_volume("M", world.moving)
    nested = geometry.Volume((world.moving_labels == 3).int(), world.moving.grid)
    node = segmentation_of("S", nested, {"liver": 1})
    nested.data[:, : nested.data.shape[1] // 2] = 0
    part = segmentation_of("part", nested, {"tumor": 1})
    node.GetSegmentation().CopySegmentFromSegmentation(
        part.GetSegmentation(), part.GetSegmentation().GetNthSegmentID(0)
    )
    lost = int(nested.data.sum())
    assert lost > 0
    found = scene.read_labels(node, moving)
    assert found.warning.startswith("Segments of 'S' overlap, but")
    assert f"lost were {lost} voxels of 'liver'." in found.warning
    apart = segmentation_of("apart", geometry.Volume(world.moving_labels, world.moving.grid), {"a": 3, "b": 7})
    assert scene.read_labels(apart, moving).warning == ""


def test_segments_are_matched_by_name(mrml, application):
    world = worlds.make_world("oblique")
    volume = geometry.Volume(world.moving_labels, world.moving.grid)
    moving = worlds.add_volume("M", world.moving)
    one = segmentation_of("one", volume, {"liver": 3, "spleen": 7})
    two = segmentation_of("two", volume, {"kidney": 3, "spleen": 7})
    first, second = scene.read_label_pair(one, moving, two, moving)
    assert {v: n for v, (n, _c) in first.names.items()} == {1: "liver", 2: "spleen"}
    assert {v: n for v, (n, _c) in second.names.items()} == {3: "kidney", 2: "spleen"}
    assert np.array_equal(first.array == 2, second.array == 2)
    assert np.array_equal(second.array == 3, world.moving_labels.numpy() == 3)
    alone = scene.read_label_pair(None, moving, two, moving)
    assert alone[0] is None
    assert set(np.unique(alone[1].array)) == {0, 1, 2}


def test_labels_that_would_be_misread_are_refused(mrml, application, computed):
    world, result = computed("oblique")
    volume = geometry.Volume(world.moving_labels, world.moving.grid)
    moving = worlds.add_volume("M", world.moving)
    label_map, segments = add_labels("map", volume), segmentation_of("seg", volume, {"a": 3})
    with pytest.raises(InputError, match="One of 'map' and 'seg' is a segmentation, the other a label map"):
        scene.read_label_pair(label_map, moving, segments, moving)
    with pytest.raises(InputError, match="no segment name in common"):
        scene.read_label_pair(segments, moving, segmentation_of("other", volume, {"b": 3}), moving)
    twins = segmentation_of("twins", volume, {"a": 3, "b": 7})
    twins.GetSegmentation().GetNthSegment(1).SetName("a")
    with pytest.raises(InputError, match="two segments named 'a'"):
        scene.read_labels(twins, moving)
    half = worlds.add_volume("half", geometry.Volume(world.moving_labels / 2, world.moving.grid))
    with pytest.raises(InputError, match="values that are not whole numbers"):
        scene.read_labels(half, moving)
    shifted = world.moving.grid.affine.copy()
    shifted[:3, 3] += 500
    far = add_labels("far", geometry.Volume(world.moving_labels, geometry.Grid(world.moving.grid.shape, shifted)))
    with pytest.raises(InputError, match="'far' has no label inside the volume 'M'"):
        scene.read_labels(far, moving)
    with pytest.raises(InputError, match="holds no labels"):
        scene.read_labels(worlds.linear_transform("T"), moving)
    empty = mrml.AddNewNodeByClass("vtkMRMLSegmentationNode", "none")
    with pytest.raises(InputError, match="'none' has no label inside"):
        scene.read_labels(empty, moving)
    nodes = scene.create_nodes(result, worlds.add_volume("F", world.fixed), moving)
    label_map.SetAndObserveTransformNodeID(nodes.transform.GetID())
    with pytest.raises(InputError, match="A non-linear transform lies between 'map' and 'M'"):
        scene.read_labels(label_map, moving)


# ----------------------------------------------------------------------------------------------- initial transforms


def test_a_linear_initial_transform_is_a_matrix(mrml):
    world = worlds.make_world("oblique")
    outer, inner = worlds.linear_transform("outer"), worlds.linear_transform("inner", (30, 0, 0), (0, 5, 0), 1.2)
    inner.SetAndObserveTransformNodeID(outer.GetID())
    moving = worlds.add_volume("M", world.moving)
    matrix = scene.read_transform(inner, scene.read_volume(worlds.add_volume("F", world.fixed)))
    moving.SetAndObserveTransformNodeID(inner.GetID())
    under = scene.read_volume(moving)  # where the moving volume lies under it
    assert np.allclose(np.linalg.inv(under.affine) @ np.eye(4), np.linalg.inv(world.moving.grid.affine) @ matrix)


@pytest.mark.parametrize("name", NAMES)
def test_a_nonlinear_initial_transform_is_sampled_on_the_fixed_grid(mrml, computed, name):
    world, result = computed(name)
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    node = scene.create_nodes(result, fixed, moving).transform
    node.SetAndObserveTransformNodeID(worlds.linear_transform("above").GetID())
    sampled = scene.read_transform(node, scene.read_volume(fixed))
    assert sampled.array.shape == (3, *world.fixed.grid.shape)
    from_world = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(from_world)
    index = np.random.default_rng(0).integers(0, world.fixed.grid.shape, (30, 3))
    points = geometry.apply_affine(sampled.affine, index)
    expected = to_ras(through(from_world, to_ras(points)))
    found = points + np.array([sampled.array[:, i, j, k] for i, j, k in index])
    assert np.abs(found - expected).max() < 1e-3


def test_a_large_fixed_grid_is_sampled_coarsely_but_wholly(mrml, computed, monkeypatch):
    monkeypatch.setattr(scene, "_MOST_SAMPLES", 5000)
    world, result = computed("oblique")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    node = scene.create_nodes(result, fixed, moving).transform
    sampled = scene.read_transform(node, scene.read_volume(fixed))
    assert sampled.array[0].size <= 5000
    grid = geometry.Grid(sampled.array.shape[1:], sampled.affine)
    index = geometry.apply_affine(np.linalg.inv(grid.affine), world.fixed.grid.corners())
    assert (index > -1e-6).all()
    assert (index < np.array(grid.shape) - 1 + 1e-6).all()
    points = geometry.apply_affine(grid.affine, [[2, 3, 1]])
    assert np.allclose(points[0] + sampled.array[:, 2, 3, 1], world.transform.map_points(points)[0], atol=1e-3)


def itk_transform(kind: str, fixed: geometry.Grid) -> sitk.Transform:
    """A transform of ITK whose domain lies in the middle of a grid and does not cover it."""
    random = np.random.default_rng(0)
    if kind == "B-spline":
        transform = sitk.BSplineTransform(3, 3)
        transform.SetTransformDomainDirection(worlds.rotation((10, 20, -15)).ravel().tolist())
        transform.SetTransformDomainPhysicalDimensions((12.0, 14.0, 15.0))
        transform.SetTransformDomainOrigin((fixed.center - 7).tolist())
        transform.SetTransformDomainMeshSize((2, 3, 4))
        transform.SetParameters(random.normal(scale=2, size=len(transform.GetParameters())).tolist())
        return transform
    if kind == "grid":
        image = sitk.GetImageFromArray(random.normal(scale=2, size=(4, 5, 6, 3)), isVector=True)
        image.SetDirection(worlds.rotation((-10, 5, 25)).ravel().tolist())
        image.SetSpacing((3.0, 4.0, 5.0))
        image.SetOrigin((fixed.center - 8).tolist())
        return sitk.DisplacementFieldTransform(image)
    turn = sitk.Euler3DTransform(fixed.center.tolist(), 0.1, -0.2, 0.05, (1.0, 2.0, 3.0))
    return sitk.CompositeTransform([turn, itk_transform("B-spline", fixed), turn, itk_transform("grid", fixed)])


@pytest.mark.parametrize("kind", ["B-spline", "grid", "chain"])
def test_an_initial_transform_means_the_same_in_slicer_and_on_the_command_line(mrml, tmp_path, kind):
    world = worlds.make_world("oblique")
    path = tmp_path / "t.h5"
    sitk.WriteTransform(itk_transform(kind, world.fixed.grid), str(path))
    node = mrml.AddNewNodeByClass("vtkMRMLTransformNode")
    storage = mrml.AddNewNodeByClass("vtkMRMLTransformStorageNode")
    storage.SetFileName(str(path))
    assert storage.ReadData(node)
    links = vtk.vtkCollection()
    slicer.vtkMRMLTransformNode.FlattenGeneralTransform(links, node.GetTransformFromParent())
    for n in range(links.GetNumberOfItems()):
        if isinstance(links.GetItemAsObject(n), slicer.vtkOrientedGridTransform):
            links.GetItemAsObject(n).SetInterpolationModeToLinear()
    sampled = scene.read_transform(node, scene.read_volume(worlds.add_volume("F", world.fixed)))
    expected = transforms.read_transform(path, world.fixed.grid)
    assert np.abs(sampled.array - expected.displacement.numpy()).max() < 1e-3


@pytest.mark.parametrize("kind", ["B-spline", "grid"])
def test_an_inverted_initial_transform_is_as_slicer_has_it(mrml, kind):
    world = worlds.make_world("oblique")
    node = mrml.AddNewNodeByClass("vtkMRMLTransformNode")
    if kind == "grid":
        displacement = np.random.default_rng(0).normal(scale=0.1, size=(3, *world.fixed.grid.shape))
        node.SetAndObserveTransformFromParent(
            scene.grid_transform(scene.Image(displacement.astype(np.float32), world.fixed.grid.affine))
        )
    else:
        spline = slicer.vtkOrientedBSplineTransform()
        coefficients = vtk.vtkImageData()
        coefficients.SetDimensions(6, 6, 6)
        coefficients.SetSpacing(20, 20, 20)
        coefficients.SetOrigin(to_ras(world.fixed.grid.center) - 50)
        values = np.random.default_rng(0).normal(size=(216, 3))
        coefficients.GetPointData().SetScalars(numpy_support.numpy_to_vtk(values, deep=True))
        spline.SetCoefficientData(coefficients)
        node.SetAndObserveTransformFromParent(spline)
    node.Inverse()
    sampled = scene.read_transform(node, scene.read_volume(worlds.add_volume("F", world.fixed)))
    from_world = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(from_world)
    index = np.random.default_rng(0).integers(0, world.fixed.grid.shape, (30, 3))
    points = geometry.apply_affine(sampled.affine, index)
    found = points + np.array([sampled.array[:, i, j, k] for i, j, k in index])
    assert np.abs(found - to_ras(through(from_world, to_ras(points)))).max() < 1e-3


@pytest.mark.parametrize("value", [-7, 2.0**31])
def test_label_values_that_do_not_fit_are_refused_by_what_they_are(mrml, application, computed, value):
    world, _result = computed("oblique")
    data = world.moving_labels.double()
    data[data == 3] = value
    moving = worlds.add_volume("M", world.moving)
    labels = worlds.add_volume("L", geometry.Volume(data, world.moving.grid))
    with pytest.raises(InputError, match=rf"'L' has labels from .*{int(value)}.*; use numbers from 0 to 2147483647"):
        scene.read_labels(labels, moving)


def test_nan_in_a_label_map_is_background(mrml, application, computed):
    world, _result = computed("oblique")
    data = world.moving_labels.double()
    data[:3] = float("nan")
    moving = worlds.add_volume("M", world.moving)
    found = scene.read_labels(worlds.add_volume("L", geometry.Volume(data, world.moving.grid)), moving)
    assert np.array_equal(found.array, np.nan_to_num(data.numpy()))


def test_a_volume_of_no_file_says_none(mrml, application, computed):
    assert scene.file_of(worlds.add_volume("M", computed("oblique")[0].moving)) == {}
