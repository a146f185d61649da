"""Corrections by hand in the panel: drawn, applied by the engine, taken back, kept in the scene."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import worlds
from MorphSeekGui import corrections, scene
from MorphSeekGui.registration import correct, register
from MorphSeekGui.scene import FLIP, InputError
from test_apply_section import engine_ends, markups, points_of  # noqa: F401 - a fixture
from test_landmarks_section import texts

pytestmark = pytest.mark.usefixtures("kept_engine")


@pytest.fixture
def world():
    return worlds.make_world("oblique", amplitude_mm=2.0)


@pytest.fixture
def panel(stand_in, quick_panel):
    """The section Register with a result of the real engine."""
    quick_panel.ui.registerButton.click()
    stand_in.wait(lambda: quick_panel._run is None)
    quick_panel.ui.correctSection.collapsed = False
    return quick_panel


@pytest.fixture
def ui(panel):
    return panel._correct.ui


def result(panel) -> scene.RegistrationNodes:
    return panel._last[1]


def draw(panel, world, point: np.ndarray) -> tuple:
    """Draw a line from where the place of a fixed point is seen to where it belongs; LPS. Return line and end."""
    panel._correct.ui.drawButton.click()
    line = corrections.lines(result(panel))[-1]
    place = world.transform.map_points(point[None])[0]
    inverse = result(panel).transform.GetTransformToParent()
    seen = np.array(inverse.TransformPoint(FLIP[:3, :3] @ place))
    line.AddControlPointWorld(*seen)
    line.AddControlPointWorld(*(FLIP[:3, :3] @ point))
    return line, place


def wait(stand_in, panel) -> None:
    stand_in.wait(lambda: panel._run is None)


def held(nodes) -> list[np.ndarray]:
    """What a correction changes."""
    point = (0.3, 5.0, 40.0)
    volumes = [slicer.util.arrayFromVolume(node).copy() for node in (nodes.warped, nodes.jacobian, nodes.aligned)]
    ways = [node.GetTransformFromParent().TransformPoint(point) for node in (nodes.transform, nodes.inverse)]
    return [*volumes, np.array(ways)]


def test_a_drawn_line_is_met_and_taken_back(stand_in, panel, ui, world):
    before, report = held(result(panel)), result(panel).report
    assert (ui.correctButton.enabled, ui.undoButton.enabled) == (False, False)
    line, place = draw(panel, world, points_of(world)[1])
    interaction = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLInteractionNode")
    assert interaction.GetCurrentInteractionMode() == interaction.Place
    selection = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSelectionNode")
    assert selection.GetActivePlaceNodeID() == line.GetID()
    assert texts(ui.correctionsTable, 0) == ["Correction 1"]
    assert texts(ui.correctionsTable, 1) == [f"{corrections.length(line):.1f}"]
    ui.errorSpinBox.value = 0.5
    ui.correctButton.click()
    assert ui.correctButton.enabled is False, "while it runs"
    wait(stand_in, panel)
    point = result(panel).report["corrections"]["points"][0]
    assert (point["label"], point["error_mm"]) == ("Correction 1", 0.5)
    np.testing.assert_allclose(point["moving"], place, atol=0.05)
    assert point["after"] < 0.5 < point["before"]
    assert texts(ui.correctionsTable, 2) == [f"{point['after']:.1f}"]
    assert panel._names[-1] == "Corrected"
    assert "Corrections" in panel.ui.statusLabel.text
    inspected = slicer.modules.MorphSeekWidget.panels["inspect"]
    assert texts(inspected.ui.correctionsTable, 0) == ["Correction 1"]
    assert line.GetAttribute(corrections.USED) is not None
    ui.undoButton.click()
    for old, now in zip(before, held(result(panel)), strict=True):
        np.testing.assert_array_equal(old, now)
    assert scene.result_nodes(result(panel).transform).report == report == result(panel).report
    assert result(panel).state is not None
    assert panel._names == ["Aligned"]
    assert panel._steps.count == 1
    assert line.GetAttribute(corrections.USED) is None
    assert (ui.correctButton.enabled, ui.undoButton.enabled) == (True, False)
    assert texts(ui.correctionsTable, 2) == ["–"]


def test_earlier_corrections_hold_while_another_is_made(stand_in, panel, ui, world):
    points = points_of(world)
    _line, place = draw(panel, world, points[0])
    ui.correctButton.click()
    wait(stand_in, panel)
    draw(panel, world, points[2])
    ui.correctButton.click()
    wait(stand_in, panel)
    first, second = result(panel).report["corrections"]["points"]
    np.testing.assert_allclose(first["moving"], place, atol=0.05)
    assert max(first["after"], second["after"]) < 1.0
    assert panel._names == ["Aligned", "Corrected", "Corrected (2)"]
    slicer.mrmlScene.RemoveNode(corrections.lines(result(panel))[1])
    assert len(texts(ui.correctionsTable, 0)) == 2, "the report still names it"
    ui.undoButton.click()
    assert [p["label"] for p in result(panel).report["corrections"]["points"]] == ["Correction 1"]
    ui.undoButton.click()
    assert "corrections" not in result(panel).report


def test_a_canceled_correction_leaves_all_as_it_was(stand_in, panel, ui, world):
    before = held(result(panel))
    draw(panel, world, points_of(world)[1])
    ui.correctButton.click()
    panel.ui.cancelButton.click()
    wait(stand_in, panel)
    assert panel.ui.statusLabel.text == "Canceled; the scene is as it was."
    for old, now in zip(before, held(result(panel)), strict=True):
        np.testing.assert_array_equal(old, now)
    assert (ui.correctButton.enabled, ui.undoButton.enabled) == (True, False)


def test_two_lists_in_their_own_spaces_and_warnings_are_shown(stand_in, panel, ui, world):
    points = points_of(world)[:2]
    fixed = np.vstack([points, points[:1] + 1.0])
    moving = np.vstack([world.transform.map_points(points), world.transform.map_points(points[:1]) + 15.0])
    ui.fixedPointsSelector.setCurrentNode(markups("PF", fixed))
    assert ui.correctButton.enabled is False
    ui.movingPointsSelector.setCurrentNode(markups("PM", moving))
    ui.correctButton.click()
    wait(stand_in, panel)
    assert texts(ui.correctionsTable, 0) == ["PF-1", "PF-2", "PF-3"]
    assert "so they contradict each other" in panel.ui.statusLabel.text


def test_a_result_of_a_scene_is_corrected_with_its_lines(stand_in, panel, ui, world):
    _line, place = draw(panel, world, points_of(world)[1])
    panel._last = None  # as after a scene was loaded: the nodes are there, and no state of the engine
    panel._update()
    assert ui.drawButton.enabled is False
    before = held(scene.result_nodes(slicer.util.getNode("M to F")))
    slicer.modules.MorphSeekWidget.panels["inspect"].show(scene.result_nodes(slicer.util.getNode("M to F")))
    assert texts(ui.correctionsTable, 0) == ["Correction 1"]
    assert panel.ui.moreButton.enabled is False
    ui.correctButton.click()
    wait(stand_in, panel)
    point = result(panel).report["corrections"]["points"][0]
    np.testing.assert_allclose(point["moving"], place, atol=0.05)
    assert point["after"] < 1.0 < point["before"]
    ui.undoButton.click()
    for old, now in zip(before, held(result(panel)), strict=True):
        np.testing.assert_array_equal(old, now)
    assert (panel._steps.count, result(panel).state) == (0, None)


def test_lines_are_saved_with_the_scene_in_the_folder_of_their_result(stand_in, world, tmp_path):
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    nodes = scene.create_nodes(worlds.result_of(world, tmp_path), fixed, moving)
    line = corrections.new_line(nodes)
    for point in points_of(world)[:2]:
        line.AddControlPointWorld(*(FLIP[:3, :3] @ point))
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    folder = hierarchy.GetItemParent(hierarchy.GetItemByDataNode(line))
    assert hierarchy.GetItemName(folder) == nodes.transform.GetName()
    corrections.gather(nodes).keep()
    used, ends = line.GetAttribute(corrections.USED), corrections.ends(line)
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsJsonStorageNode")
    storage.SetFileName(str(tmp_path / "line.mrk.json"))
    line.SetAndObserveStorageNodeID(storage.GetID())
    storage.WriteData(line)
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    slicer.mrmlScene.Commit()
    slicer.mrmlScene.Clear(0)
    slicer.mrmlScene.Connect()
    found = corrections.lines(SimpleNamespace(transform=slicer.util.getNode("M to F")))
    assert [one.GetAttribute(corrections.USED) for one in found] == [used]
    np.testing.assert_allclose(corrections.ends(found[0]), ends, atol=1e-6)


def test_a_scene_s_result_without_a_state_is_corrected_as_a_transform(stand_in, world):
    """Under a linear parent, where the moving volume's own coordinates are not the world's."""
    frame = worlds.linear_transform("frame")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving, frame=frame)
    nodes = register(fixed, moving, model="none", fit="off", search="off", threads=1)
    found = scene.result_nodes(nodes.transform)
    points = points_of(world)
    own = markups("PM", world.transform.map_points(points))
    for start in (found, nodes):
        after = correct(start, markups("PF", points), own, error_mm=0.5, fit="off", threads=1)
        assert after.warped is nodes.warped
        rows = after.report["corrections"]["points"]
        assert max(row["after"] for row in rows) < 0.6
        mapped = [after.transform.GetTransformFromParent().TransformPoint(FLIP[:3, :3] @ p) for p in points]
        to_world = scene.matrix_to_space(moving)
        mapped = np.array(mapped) @ to_world[:3, :3].T + to_world[:3, 3]
        assert np.abs(mapped @ FLIP[:3, :3] - world.transform.map_points(points)).max() < 0.6


def test_what_cannot_be_corrected_by_is_refused_in_one_sentence(stand_in, world):
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "T")
    nodes = scene.RegistrationNodes(fixed, moving, fixed, transform, fixed, None)
    with pytest.raises(InputError, match="There is nothing to correct by"):
        correct(nodes)
    points = markups("P", points_of(world))
    with pytest.raises(InputError, match="Choose points of both volumes"):
        correct(nodes, points)
    with pytest.raises(InputError, match="must be a number of mm above 0"):
        correct(nodes, points, points, error_mm=0.0)
    with pytest.raises(InputError, match="come in pairs"):
        correct(nodes, points, markups("Q", points_of(world)[:2]))
