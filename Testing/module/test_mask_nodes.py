"""Masks in the panel: chosen as segmentations or label maps, taken by the engine, shown beside the whole grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import torch
import worlds
from MorphSeekGui import scene
from MorphSeekGui.registration import register
from MorphSeekGui.scene import InputError
from test_inspect_panel import row_of
from test_scene import segmentation_of

from MorphSeekLib.space.geometry import Grid, Volume, resample

pytestmark = pytest.mark.usefixtures("kept_engine")
FAST = {"model": "none", "preset": "fast", "search": "off", "align": "none", "inverse": False}
SELECTORS = ("fixedMaskSelector", "fixedIgnoreSelector", "movingMaskSelector", "movingIgnoreSelector")


@pytest.fixture
def world(stand_in):
    return worlds.make_world("oblique", amplitude_mm=2.0)


def box(grid: Grid, low: float = 0.2, high: float = 0.8) -> Volume:
    """A label map of a box in the middle of a grid; its ends in shares of the axes."""
    marks = torch.zeros(grid.shape, dtype=torch.int32)
    marks[tuple(slice(int(low * n), int(high * n)) for n in grid.shape)] = 4
    return Volume(marks, grid)


def add_mask(name: str, mask: Volume, frame=None):
    return worlds.add_volume(name, mask, "vtkMRMLLabelMapVolumeNode", frame)


def test_a_mask_counts_where_it_stands_in_the_world_on_any_grid(world):
    fixed = worlds.add_volume("F", world.fixed, frame=worlds.linear_transform("P"))
    mask = box(world.moving.grid, 0.3, 0.7)
    expected = resample(mask, world.fixed.grid, mode="nearest").data.numpy() != 0
    other = worlds.linear_transform("Q", (5, 6, 7))
    for node in (add_mask("map", mask, other), segmentation_of("segments", mask, {"a": 4}, frame=other)):
        found = scene.read_mask(node, fixed)
        assert found.dtype == np.uint8
        assert ((found != 0) != expected).mean() < 1e-3, node.GetName()  # ties at half a voxel


def test_of_a_segmentation_the_visible_segments_count(world):
    moving = worlds.add_volume("M", world.moving)
    labels = world.moving_labels.numpy()
    node = segmentation_of("S", Volume(world.moving_labels, world.moving.grid), {"a": 3, "b": 7})
    assert np.array_equal(scene.read_mask(node, moving) != 0, labels > 0)
    display, segments = node.GetDisplayNode(), node.GetSegmentation()
    display.SetVisibility(False)  # so that it does not cover the image
    display.SetSegmentVisibility(segments.GetNthSegmentID(0), False)
    assert np.array_equal(scene.read_mask(node, moving) != 0, labels == 7)
    display.SetSegmentVisibility(segments.GetNthSegmentID(1), False)
    with pytest.raises(InputError, match="All segments of 'S' are hidden; show those that are meant"):
        scene.read_mask(node, moving)


def test_masks_that_cannot_be_used_are_refused_in_one_sentence(world):
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    mask = box(world.fixed.grid)
    shifted = mask.grid.affine.copy()
    shifted[:3, 3] += 500
    far = add_mask("far", replace(mask, grid=Grid(mask.grid.shape, shifted)))
    empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "none")
    for side in ("fixed", "moving"):
        volume = {"fixed": "F", "moving": "M"}[side]
        for node in (far, empty):
            with pytest.raises(
                InputError, match=f"^'{node.GetName()}' marks nothing inside the volume '{volume}'; choose one"
            ):
                register(fixed, moving, **{f"{side}_mask_node": node})
    with pytest.raises(InputError, match="'F' holds values that are not whole numbers"):
        register(fixed, moving, moving_ignore_node=fixed)


def test_what_the_engine_refuses_is_shown_as_it_says(stand_in, module, world):
    ui = panels_with(world)["register"].ui
    whole = add_mask("whole", Volume(torch.ones(world.fixed.grid.shape, dtype=torch.int32), world.fixed.grid))
    ui.fixedIgnoreSelector.setCurrentNode(whole)
    ui.registerButton.click()
    stand_in.wait(lambda: slicer.modules.MorphSeekWidget.panels["register"]._run is None)
    assert "leaves nothing of that image; check whether you meant it as a mask." in ui.statusLabel.text


def panels_with(world) -> dict:
    """The panels, with the pair of a world chosen and the fit that is done soonest."""
    panels = slicer.modules.MorphSeekWidget.panels
    ui = panels["register"].ui
    ui.fixedSelector.setCurrentNode(worlds.add_volume("F", world.fixed))
    ui.movingSelector.setCurrentNode(worlds.add_volume("M", world.moving))
    panels["register"].refresh_models("none")
    ui.presetSelector.currentText, ui.searchSelector.currentText = "Fast", "Off"
    ui.alignSelector.currentText = "Nothing"
    return panels


def test_masks_that_are_chosen_count_and_are_shown(stand_in, module, world):
    panels = panels_with(world)
    ui, shown = panels["register"].ui, panels["inspect"].ui
    mask, ignored = box(world.fixed.grid), box(world.moving.grid, 0.4, 0.6)
    ui.fixedMaskSelector.setCurrentNode(segmentation_of("mask", mask, {"a": 4}))
    ui.movingIgnoreSelector.setCurrentNode(add_mask("lesion", ignored))
    ui.registerButton.click()
    stand_in.wait(lambda: panels["register"]._run is None)
    inside = int((mask.data > 0).sum())
    assert (
        f"Masks: {inside:,} voxels of the fixed and {int((ignored.data == 0).sum()):,} voxels of the moving volume "
        "counted." in ui.statusLabel.text
    )
    table = shown.figuresTable
    assert table.horizontalHeaderItem(2).text() == "In mask"
    row = row_of(table, "Roughness (SDlogJ)")
    figures = panels["inspect"]._nodes.report["folding"]
    assert figures["inside"]["voxels"] == inside
    assert table.item(row, 2).text() == f"{figures['inside']['sdlogj']:.3g}"
    assert f"inside the fixed volume's mask: {inside:,} voxels." in table.item(row, 2).toolTip()
    assert table.item(row_of(table, "Folded cells, %"), 2).text() == ""
    assert ui.moreButton.enabled
    ui.fixedMaskSelector.setCurrentNode(None)
    assert not ui.moreButton.enabled, "a result of other masks is not gone on from"


def test_a_mask_changes_the_result(world):
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    wrong = torch.where(box(world.fixed.grid, 0.4, 0.7).data > 0, world.fixed.data.flip(0), world.fixed.data)
    disturbed = worlds.add_volume("D", replace(world.fixed, data=wrong))
    lesion = add_mask("lesion", box(world.fixed.grid, 0.38, 0.72))
    found = [
        slicer.util.arrayFromVolume(register(onto, moving, **FAST, **choices).warped).copy()
        for onto, choices in (
            (fixed, {"fixed_ignore_node": lesion}),
            (disturbed, {"fixed_ignore_node": lesion}),
            (disturbed, {}),
        )
    ]
    assert np.array_equal(found[0], found[1]), "what the lesion shows does not count"
    assert not np.allclose(found[1], found[2], atol=1.0)


def test_chosen_masks_live_in_the_scene(stand_in, module, world, tmp_path):
    ui = panels_with(world)["register"].ui
    mask = add_mask("mask", box(world.fixed.grid))
    chosen = (mask, segmentation_of("S", box(world.fixed.grid), {"a": 4}), None, mask)
    for name, node in zip(SELECTORS, chosen, strict=True):
        getattr(ui, name).setCurrentNode(node)
    names = [node and node.GetName() for node in chosen]
    slicer.mrmlScene.SetURL(str(tmp_path / "scene.mrml"))
    slicer.mrmlScene.Commit()
    slicer.mrmlScene.Clear(0)
    slicer.modules.MorphSeekWidget.enter()
    assert [getattr(ui, name).currentNode() for name in SELECTORS] == [None] * 4
    slicer.mrmlScene.Connect()
    slicer.modules.MorphSeekWidget.enter()
    found = [getattr(ui, name).currentNode() for name in SELECTORS]
    assert [node and node.GetName() for node in found] == names
