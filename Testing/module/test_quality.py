"""Figures, limits, verdict and folded regions: what the numbers say, and what a person may do to the limits."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer.util
import torch
import worlds
from MorphSeekGui import quality, scene
from MorphSeekGui.quality import AMBER, DEFAULT_LIMITS, GREEN, RED, Limits, folded_regions, judge, measure

from MorphSeekLib import geometry

REPORT = {
    "folding": {
        "njd_percent": 0.25,
        "folded_voxels": 1234,
        "min_jacobian": -0.4,
        "max_jacobian": 3.2,
        "sdlogj": 0.31,
        "definition": "J: by central differences.",
    },
    "dice": {
        "mean": {"input": 0.4, "aligned": 0.61, "warped": 0.75},
        "labels": {"3": {"input": 0.5, "aligned": 0.6, "warped": 0.8}, "7": {"input": 0.3, "warped": None}},
    },
}


@pytest.mark.parametrize("grid", sorted(worlds.GRIDS))
def test_regions_are_found_whole_where_they_are(mrml, grid):
    onto = worlds.GRIDS[grid][0]
    jacobian = np.ones(onto.shape, np.float32)
    jacobian[5:8, 6:9, 3:5] = -0.5  # 18 voxels
    jacobian[8, 9, 5] = 0.0  # touches it by a corner, and 0 is folded
    jacobian[20, 30, 10:12] = -2.0
    jacobian[0, 0, 0] = -0.1  # in the very corner of the volume
    node = worlds.add_volume("J", geometry.Volume(torch.from_numpy(jacobian), onto))
    regions = folded_regions(node)
    assert [region.voxels for region in regions] == [19, 2, 1]
    assert [region.min_jacobian for region in regions] == pytest.approx([-0.5, -2.0, -0.1])
    voxel = abs(np.linalg.det(onto.affine[:3, :3]))
    assert [region.mm3 for region in regions] == pytest.approx([19 * voxel, 2 * voxel, voxel])
    for region in regions:  # each place is a folded voxel of the region
        index = np.linalg.inv(scene.FLIP @ onto.affine) @ [*region.position, 1]
        assert np.allclose(index, np.round(index), atol=1e-6)
        assert jacobian[tuple(np.round(index[:3]).astype(int))] <= 0
    corner = scene.FLIP @ onto.affine @ [0, 0, 0, 1]
    assert regions[2].position == pytest.approx(corner[:3])


def test_no_folding_no_region(mrml):
    onto = worlds.GRIDS["upright"][0]
    assert folded_regions(worlds.add_volume("J", geometry.Volume(torch.ones(onto.shape), onto))) == []


def test_many_regions_are_found_in_little_time(mrml):
    onto = geometry.Grid.from_parts((160, 160, 120), (1, 1, 1), np.eye(3), (0, 0, 0))
    jacobian = np.ones(onto.shape, np.float32)
    jacobian[::4, ::4, ::4] = -1
    regions = folded_regions(worlds.add_volume("J", geometry.Volume(torch.from_numpy(jacobian), onto)))
    assert len(regions) == 40 * 40 * 30
    assert {region.voxels for region in regions} == {1}


def test_figures_are_read_from_the_report_and_missing_ones_left_open():
    figures = {figure.key: figure for figure in measure(REPORT, [quality.Region(9, 40.5, -0.4, (0, 0, 0))])}
    assert figures["njd_percent"].text == "0.25"
    assert "J: by central differences." in figures["njd_percent"].definition
    assert figures["folded_voxels"].text == "1,234"
    assert figures["largest_region_mm3"].value == 40.5
    assert figures["dice_change"].text == "+0.140"
    large = measure(REPORT, [quality.Region(9, 16252.0, -0.4, (0, 0, 0))])
    assert next(f for f in large if f.key == "largest_region_mm3").text == "16,252"
    bare = {figure.key: figure for figure in measure({}, [])}
    assert bare["njd_percent"].text == bare["dice"].text == "–"
    assert {figure.key for figure in measure(REPORT, []) if figure.worse} == set(DEFAULT_LIMITS)


def test_the_verdict_is_the_worst_color_and_says_why():
    figures = measure(REPORT, [])
    verdict = judge(figures, DEFAULT_LIMITS)
    assert verdict.color == AMBER
    assert verdict.colors == {
        "njd_percent": AMBER,
        "largest_region_mm3": GREEN,
        "sdlogj": GREEN,
        "dice": GREEN,
        "dice_change": GREEN,
    }
    assert verdict.reasons == ["Folded voxels (NJD), %: 0.25 is above 0.1."]
    strict = DEFAULT_LIMITS | {"dice": Limits(0.9, 0.8), "njd_percent": Limits(0.25, 0.5)}
    verdict = judge(figures, strict)
    assert verdict.color == RED
    assert verdict.colors["njd_percent"] == GREEN, "at the limit is not above it"
    assert verdict.reasons == ["Overlap after (mean Dice): 0.750 is below 0.8."]
    assert judge(measure({}, []), {"njd_percent": Limits(0, 0)}).color is None


def test_limits_are_edited_by_typing_and_refused_in_a_sentence():
    njd, dice = (next(f for f in measure(REPORT, []) if f.key == key) for key in ("njd_percent", "dice"))
    assert quality.edited_limits(njd, Limits(0.1, 1), "amber", " 0,05 ") == Limits(0.05, 1)
    assert quality.edited_limits(dice, Limits(0.7, 0.5), "red", "0.7") == Limits(0.7, 0.7)
    for text in ("much", "", "nan", "inf"):
        with pytest.raises(ValueError, match="is no number; type one"):
            quality.edited_limits(njd, Limits(0.1, 1), "red", text)
    with pytest.raises(ValueError, match="Red must not lie below amber for 'Folded voxels"):
        quality.edited_limits(njd, Limits(0.1, 1), "red", "0.01")
    with pytest.raises(ValueError, match="Red must not lie above amber for 'Overlap after"):
        quality.edited_limits(dice, Limits(0.7, 0.5), "red", "0.8")


def test_limits_survive_the_settings_and_nonsense_there():
    limits = DEFAULT_LIMITS | {"sdlogj": Limits(0.2, 0.3)}
    assert quality.limits_from_text(quality.limits_to_text(limits)) == limits
    for text in (
        None,
        "",
        "{",
        "[1]",
        '{"sdlogj": ["a", 1], "njd_percent": [1], "unknown": [1, 2], "dice": [null, 1]}',
    ):
        assert quality.limits_from_text(text) == DEFAULT_LIMITS


def test_structures_are_called_by_their_names(mrml):
    table = mrml.AddNewNodeByClass("vtkMRMLColorTableNode", "colors")
    table.SetTypeToUser()
    builtin = mrml.GetNodeByID("vtkMRMLColorTableNodeLabels")
    assert builtin.GetColorName(3), "a name that says nothing of our labels"
    assert quality.structures(REPORT, builtin)[0][0] == "3"
    table.SetNumberOfColors(4)
    table.SetColor(3, "Hippocampus", 0.1, 0.8, 0.2, 1.0)
    assert quality.structures(REPORT, table) == [("Hippocampus (3)", 0.5, 0.6, 0.8), ("7", 0.3, None, None)]
    assert quality.structures(REPORT)[0][0] == "3"
    assert quality.structures({}) == []


def test_a_result_is_found_again_from_its_transform(application, mrml, tmp_path):
    world = worlds.make_world("oblique")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    nodes = scene.create_nodes(worlds.result_of(world, tmp_path), fixed, moving)
    assert scene.result_nodes(nodes.transform) == nodes
    assert nodes.aligned is not None
    mrml.RemoveNode(nodes.inverse)
    found = scene.result_nodes(nodes.transform)
    assert (found.inverse, found.jacobian, found.report) == (None, nodes.jacobian, nodes.report)
    mrml.RemoveNode(nodes.jacobian)
    assert scene.result_nodes(nodes.transform) is None
    assert scene.result_nodes(mrml.AddNewNodeByClass("vtkMRMLTransformNode")) is None
    assert scene.result_nodes(None) is None


def test_a_saved_scene_still_knows_its_results(application, mrml, tmp_path):
    world = worlds.make_world("upright")
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    nodes = scene.create_nodes(worlds.result_of(world, tmp_path), fixed, moving)
    arrays = {
        name: np.array(slicer.util.arrayFromVolume(getattr(nodes, name))) for name in ("fixed", "warped", "jacobian")
    }
    report = nodes.report
    mrml.SetSaveToXMLString(1)
    mrml.Commit()
    text = mrml.GetSceneXMLString()
    mrml.Clear(True)
    mrml.SetLoadFromXMLString(1)
    mrml.SetSceneXMLString(text)
    mrml.Connect()
    transforms = [
        node
        for node in (
            mrml.GetNthNodeByClass(n, "vtkMRMLTransformNode")
            for n in range(mrml.GetNumberOfNodesByClass("vtkMRMLTransformNode"))
        )
        if node.GetAttribute(scene.REPORT) is not None
    ]
    assert len(transforms) == 1
    assert scene.result_nodes(transforms[0]) is None, "the files of the voxels are missing"
    for name, array in arrays.items():  # what reading the files would do
        node = transforms[0].GetNodeReference(f"MorphSeek.{name}")
        slicer.util.updateVolumeFromArray(node, array)
    found = scene.result_nodes(transforms[0])
    assert found.report == report
    assert [found.fixed.GetName(), found.warped.GetName(), found.folding.GetName()] == ["F", "M warped", "M folding"]
