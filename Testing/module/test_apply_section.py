"""A registration applied to other nodes: from the panel, and from a script."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import torch
import vtk
import worlds
from MorphSeekGui import applying, scene
from MorphSeekGui.engine_client import close_shared_client
from MorphSeekGui.scene import InputError
from test_inspect_panel import one_thread, panel, ui  # noqa: F401 - fixtures

from MorphSeekLib.space import geometry

pytestmark = pytest.mark.usefixtures("kept_engine")


@pytest.fixture
def world():
    return worlds.make_world("oblique", amplitude_mm=2.0)


@pytest.fixture
def nodes(stand_in, world, tmp_path):
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    return scene.create_nodes(worlds.result_of(world, tmp_path), fixed, moving)


@pytest.fixture(autouse=True)
def engine_ends():
    yield
    close_shared_client()


def points_of(world) -> np.ndarray:
    """Some points of the fixed volume, LPS."""
    index = np.array([[10.0, 12.0, 8.0], [20.0, 25.0, 12.0], [30.0, 20.0, 15.0]])
    return geometry.apply_affine(world.fixed.grid.affine, index)


def markups(name: str, points: np.ndarray):
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name)
    for point in points * [-1, -1, 1]:
        node.AddControlPoint(*point)
    return node


def positions(node) -> np.ndarray:
    return slicer.util.arrayFromMarkupsControlPoints(node, world=True) * [-1, -1, 1]


def test_a_volume_becomes_what_the_registration_made_of_the_moving_one(panel, ui, nodes, world, stand_in):  # noqa: F811
    panel.show(nodes)
    ui.applySection.collapsed = False
    assert not ui.interpolationSelector.isVisibleTo(panel.widget)
    ui.applyNodeSelector.setCurrentNode(nodes.moving)
    assert ui.interpolationSelector.isVisibleTo(panel.widget)
    ui.applyButton.click()
    stand_in.wait(lambda: "Made" in ui.applyLabel.text or ui.copyApplyDetailsButton.visible)
    assert ui.applyLabel.text == "Made 'M on F'."
    made = slicer.util.getNode("M on F")
    expected = world.fixed.data.numpy()
    inside = np.abs(expected) > 0
    assert np.abs(slicer.util.arrayFromVolume(made).transpose(2, 1, 0) - expected)[inside].max() < 0.05
    np.testing.assert_allclose(scene.ijk_to_ras(made), scene.ijk_to_ras(nodes.warped), atol=1e-6)


def test_labels_keep_their_values_on_the_way_there_and_back(nodes, world):
    labels = worlds.add_volume(
        "L", geometry.Volume(world.moving_labels, world.moving.grid), kind="vtkMRMLLabelMapVolumeNode"
    )
    there = applying.apply(nodes, labels)
    expected = geometry.resample(
        geometry.Volume(world.moving_labels, world.moving.grid), world.fixed.grid, world.transform, mode="nearest"
    )
    found = slicer.util.arrayFromVolume(there).transpose(2, 1, 0)
    assert there.IsA("vtkMRMLLabelMapVolumeNode")
    assert (found != expected.data.numpy()).mean() < 1e-3
    back = slicer.util.arrayFromVolume(applying.apply(nodes, there, backward=True)).transpose(2, 1, 0)
    both = (back == 3) & (world.moving_labels.numpy() == 3)
    assert 2 * both.sum() / ((back == 3).sum() + int((world.moving_labels == 3).sum())) > 0.85


def test_markups_models_and_segments_move_with_the_moving_volume(nodes, world):
    fixed = points_of(world)
    there = world.transform.map_points(fixed)
    moved = applying.apply(nodes, markups("P", there))
    assert np.abs(positions(moved) - fixed).max() < 0.01
    assert np.abs(positions(applying.apply(nodes, moved, backward=True)) - there).max() < 0.01
    model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", "sphere")
    source = vtk.vtkSphereSource()
    source.SetCenter(*(there[0] * [-1, -1, 1]))
    source.SetRadius(1.0)
    source.Update()
    model.SetAndObserveMesh(source.GetOutput())
    center = np.array(applying.apply(nodes, model).GetPolyData().GetCenter()) * [-1, -1, 1]
    assert np.abs(center - fixed[0]).max() < 0.3
    assert np.allclose(model.GetPolyData().GetCenter(), there[0] * [-1, -1, 1])  # the old one stays


def test_a_segmentation_keeps_its_segments(nodes, world):
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "S")
    for value in (3, 7):
        mask = scene.Image((world.moving_labels == value).to(torch.uint8).numpy(), world.moving.grid.affine)
        scene.add_segment(segmentation, mask, f"part {value}", (1, 0, 0))
    moved = applying.apply(nodes, segmentation)
    labels = scene.read_labels(moved, nodes.warped)
    expected = geometry.resample(
        geometry.Volume(world.moving_labels, world.moving.grid), world.fixed.grid, world.transform, mode="nearest"
    ).data.numpy()
    assert [name for name, _color in labels.names.values()] == ["part 3", "part 7"]
    for found, value in ((1, 3), (2, 7)):
        both = (labels.array == found) & (expected == value)
        assert 2 * both.sum() / ((labels.array == found).sum() + (expected == value).sum()) > 0.9


def test_what_lies_under_the_same_transforms_as_the_moving_volume_is_the_same(nodes, world):
    """Also after the moving volume was put under the result, as the documents advise."""
    fixed = points_of(world)
    node = markups("P", world.transform.map_points(fixed))
    nodes.moving.SetAndObserveTransformNodeID(nodes.transform.GetID())
    assert np.abs(positions(applying.apply(nodes, node)) - fixed).max() < 0.01
    node.SetAndObserveTransformNodeID(nodes.transform.GetID())
    assert np.abs(positions(applying.apply(nodes, node)) - fixed).max() < 0.01
    nodes.moving.SetAndObserveTransformNodeID(None)
    with pytest.raises(InputError, match="non-linear transform lies between"):
        applying.apply(nodes, node)


def test_a_node_that_cannot_be_moved_is_refused_in_one_sentence(panel, ui, nodes):  # noqa: F811
    with pytest.raises(InputError, match="cannot be moved by a registration"):
        applying.apply(nodes, slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box"))
    panel.show(nodes)
    empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "nothing in it")
    ui.applyNodeSelector.setCurrentNode(empty)
    ui.applyButton.click()
    assert "'nothing in it' is empty" in ui.applyLabel.text
