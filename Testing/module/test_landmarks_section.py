"""Landmarks in the panel: chosen as markups, measured by the engine, shown as a table and as arrows."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import worlds
from MorphSeekGui import scene
from MorphSeekGui.registration import register
from MorphSeekGui.scene import InputError
from test_apply_section import engine_ends, markups, points_of  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("kept_engine")


def texts(table, column: int) -> list[str]:
    return [table.item(row, column).text() for row in range(table.rowCount)]


def test_points_of_both_volumes_are_measured_and_shown(stand_in, module):
    view = stand_in.open_views((300, 300))["Red"]
    panels = slicer.modules.MorphSeekWidget.panels
    ui, shown, world = panels["register"].ui, panels["inspect"].ui, worlds.make_world("oblique", amplitude_mm=2.0)
    ui.fixedSelector.setCurrentNode(worlds.add_volume("F", world.fixed))
    ui.movingSelector.setCurrentNode(worlds.add_volume("M", world.moving))
    ui.fixedLandmarksSelector.setCurrentNode(markups("PF", points_of(world)))
    ui.movingLandmarksSelector.setCurrentNode(markups("PM", world.transform.map_points(points_of(world)) + 3.0))
    panels["register"].refresh_models("none")
    ui.fitSelector.currentText = ui.searchSelector.currentText = "Off"
    ui.registerButton.click()
    stand_in.wait(lambda: panels["register"]._run is None)
    assert "mm apart, mean of 3." in ui.statusLabel.text
    shown.landmarksSection.collapsed = False
    assert texts(shown.landmarksTable, 0) == ["PF-1", "PF-2", "PF-3", "Mean"]
    errors = [float(text) for text in texts(shown.landmarksTable, 3)]
    assert errors[3] == pytest.approx(np.mean(errors[:3]), abs=0.01)
    count = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLModelNode")
    before = view.draw()
    shown.landmarksCheckBox.click()
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLModelNode") == count + 1
    assert not np.array_equal(view.draw(), before)
    shown.landmarksTable.setCurrentCell(1, 0)
    panels["inspect"]._landmarks._go_to(1)
    offset = points_of(world)[1] * (-1, -1, 1)
    assert view.logic.GetSliceOffset() == pytest.approx(offset[2], abs=0.01)
    shown.restoreButton.click()
    assert not shown.landmarksCheckBox.checked
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLModelNode") == count


def test_points_count_where_they_stand_in_the_world(stand_in):
    world, frame = worlds.make_world("oblique", amplitude_mm=2.0), worlds.linear_transform("frame")
    node = markups("P", points_of(world))
    node.SetAndObserveTransformNodeID(frame.GetID())
    expected = slicer.util.arrayFromMarkupsControlPoints(node, world=True) * (-1, -1, 1)
    np.testing.assert_allclose(scene.read_points(node)["positions"], expected, atol=1e-6)
    np.testing.assert_allclose(scene.read_points(node, frame)["positions"], points_of(world), atol=1e-6)


def test_points_that_cannot_be_used_are_refused_in_one_sentence(stand_in):
    world = worlds.make_world("oblique")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "empty")
    with pytest.raises(InputError, match="'empty' has no points"):
        register(fixed, moving, fixed_landmarks_node=empty, moving_landmarks_node=empty)
