"""Figures, limits, verdict and folded regions: what the numbers say, and what a person may do to the limits."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

import slicer.util
import worlds
from MorphSeekGui import quality, scene
from MorphSeekGui.quality import folded_regions, measure

from MorphSeekLib.protocol import verdict as rule
from MorphSeekLib.protocol.verdict import AMBER, DEFAULT_LIMITS, GREEN, RED, Limits, figures, folds, judge
from MorphSeekLib.report import page

CELLS = {
    "cells": 45_678,
    "proven": 45_445,
    "folded": 230,
    "undecided": 3,
    "folded_percent": 0.5035,
    "smallest_proven": 0.0123,
    "folded_outside": 0,
    "undecided_outside": 0,
    "no_fold_proven": False,
    "definition": "Judged is each cell.",
}
PROVEN = CELLS | {"folded": 0, "undecided": 0, "folded_percent": 0.0, "no_fold_proven": True}
REPORT = {
    "folding": {
        "njd_percent": 0.25,
        "folded_voxels": 1234,
        "min_jacobian": -0.4,
        "max_jacobian": 3.2,
        "sdlogj": 0.31,
        "definition": "J: by central differences.",
        "cells": CELLS,
        "regions": [
            {"voxels": 9, "mm3": 40.5, "determinant": -0.4, "position": [10.0, 20.0, -30.0], "radius_mm": 2.0},
            {"voxels": 1, "mm3": 4.5, "determinant": -0.1, "position": [1.0, 2.0, 3.0], "radius_mm": 0.0},
        ],
        "region_count": 250,
    },
    "dice": {
        "mean": {"input": 0.4, "aligned": 0.61, "warped": 0.75},
        "labels": {"3": {"input": 0.5, "aligned": 0.6, "warped": 0.8}, "7": {"input": 0.3, "warped": None}},
    },
}


def report_with(cells: dict | None) -> dict:
    """The report with other cells; None makes it one of an earlier version."""
    folding = {k: v for k, v in REPORT["folding"].items() if k not in ("cells", "regions", "region_count")}
    if cells is not None:
        folding |= {"cells": cells, "regions": [], "region_count": 0}
    return REPORT | {"folding": folding}


def verdict_of(report: dict, limits=DEFAULT_LIMITS) -> rule.Verdict:
    return judge(figures(report), limits, folds(report))


def said_of_folds(report: dict, limits=DEFAULT_LIMITS) -> tuple[str, str]:
    """The color and the sentence of what is known of folds."""
    return verdict_of(report, limits).folds, quality.folds_sentence(folds(report))


def test_what_slicers_translators_see_are_the_texts_of_the_rule():
    assert quality.labels() == rule.LABELS
    assert list(quality.labels()) == list(rule.LABELS)
    assert quality.headlines() == rule.HEADLINES
    assert quality.beyond() == rule.BEYOND
    assert quality.findings() == {finding: finding.value for finding in rule.Finding}


def test_regions_come_from_the_report_in_ras():
    first, second = folded_regions(REPORT)
    assert first == quality.Region(9, 40.5, -0.4, (-10.0, -20.0, -30.0))
    assert second.position == (-1.0, -2.0, 3.0)
    assert quality.count_regions(REPORT) == 250, "the report lists the largest only"
    assert folded_regions({}) == []
    assert quality.count_regions({}) == 0


@pytest.mark.parametrize("grid", sorted(worlds.GRIDS))
def test_a_region_s_place_is_a_folded_voxel_of_the_folding_node(application, mrml, tmp_path, grid):
    world = worlds.make_world(grid)
    fixed, moving = worlds.add_volume("F", world.fixed), worlds.add_volume("M", world.moving)
    nodes = scene.create_nodes(worlds.result_of(world, tmp_path), fixed, moving)
    folding = scene.read_labels(nodes.folding, fixed).array
    regions = folded_regions(nodes.report)
    assert sum(region.voxels for region in regions) == folding.sum() > 0
    for region in regions:
        index = np.linalg.inv(scene.ijk_to_ras(fixed)) @ [*region.position, 1]
        assert folding[tuple(np.round(index[:3]).astype(int))] == 1


def test_figures_are_read_from_the_report_and_missing_ones_left_open():
    found = {figure.key: figure for figure in measure(REPORT)}
    assert found["folded_percent"].text == "0.5035"
    assert "Judged is each cell." in found["folded_percent"].definition
    assert (found["folded_cells"].text, found["undecided_cells"].text) == ("230", "3")
    assert found["smallest_proven"].text == "0.0123"
    assert found["largest_region_mm3"].value == 40.5
    assert found["dice_change"].text == "+0.140"
    large = REPORT | {"folding": {"regions": [REPORT["folding"]["regions"][0] | {"mm3": 16252.0}]}}
    assert next(f for f in measure(large) if f.key == "largest_region_mm3").text == "16,252"
    assert {figure.text for figure in measure({})} == {"–"}
    assert {figure.key for figure in measure(REPORT) if figure.worse} == set(DEFAULT_LIMITS)


def test_the_estimated_error_is_judged_only_where_it_is_known():
    trust = {"kind": "brain", "near_percent": 70.2, "far_percent": 31.0}
    known, unknown = (figures({"trust": {**trust, "kind": kind}}) for kind in ("brain", None))
    assert (known["near_percent"], known["far_percent"]) == (70.2, 31.0)
    assert (unknown["near_percent"], unknown["far_percent"]) == (None, None)
    verdict = judge(known, DEFAULT_LIMITS)
    assert quality.reasons(verdict) == ["Tissue not to be relied on, % (estimated): 31 is above 20."]


def estimated(kind: str | None) -> dict:
    """A report with an estimated error, in millimeters where the kind is known."""
    known = {"near_mm": 4.03578, "far_mm": 10.08945, "error_mm": {"median": 1.24, "p80": 2.71}}
    region = {"position": [10.0, -20.0, 5.0], "bound_mm": 12.3 if kind else None, "mm3": 812.0, "color": 3}
    section = {"kind": kind, "near_percent": 82.6, "far_percent": 3.2, "regions": [region]}
    return {"trust": section | (known if kind else dict.fromkeys(known))}


def test_the_estimated_error_is_said_as_in_the_report():
    words = quality.estimated_error(estimated("brain"))
    assert words[0] == page.estimated_error(estimated("brain")["trust"]["error_mm"])
    assert words[1] == "83 % of tissue is likely within 4.04 mm. 3 % is not to be relied on (over 10.1 mm)."
    little = estimated("brain")["trust"] | {"far_percent": 0.23}
    assert "0.2 % is not to be relied on" in quality.estimated_error({"trust": little})[1]
    assert words[-1] == quality.estimated_error(estimated(None))[-1] == page.FOOTNOTE
    assert quality.estimated_error(estimated(None))[0].startswith("Colors only, no millimeters")
    assert quality.estimated_error({}) == []
    for kind in ("brain", None):
        legend = page.TrustPicture(None, estimated(kind)["trust"]).legend()
        assert quality.estimated_legend(estimated(kind)) == tuple(text.replace("\n", " ") for text in legend)
    [region] = quality.estimated_regions(estimated("brain"))
    assert region == quality.EstimatedRegion(12.3, 812.0, 3, (-10.0, 20.0, 5.0))


def test_what_is_measured_inside_a_mask_or_the_tissue_stands_beside_it():
    inside = {"voxels": 5000, "folded_voxels": 12, "njd_percent": 0.2, "sdlogj": 0.3, "min_jacobian": -0.1}
    for of, header, words in (("mask", "In mask", "fixed volume's mask"), ("tissue", "In tissue", "it has no mask")):
        report = REPORT | {"folding": REPORT["folding"] | {"region_voxels": 1500, "inside": inside | {"of": of}}}
        found = {figure.key: figure for figure in measure(report)}
        assert (found["folded_voxels"].text, found["folded_voxels"].text_inside) == ("1,500", "12")
        assert (found["njd_percent"].text, found["njd_percent"].text_inside) == ("0.25", "0.2")
        assert found["folded_percent"].text_inside == found["max_jacobian"].text_inside == ""
        assert quality.inside_of(report)[0] == header
        assert words in quality.inside_of(report)[1]
        assert "5,000 voxels" in quality.inside_of(report)[1]
    assert quality.inside_of(REPORT)[1].endswith("register again.")


def test_how_much_lies_beside_the_body_is_said_where_something_does():
    nothing = {"beside_body": {"fixed": None, "moving": None}}
    assert quality.beside_sentence(nothing) == quality.beside_sentence({}) == ""
    assert quality.beside_sentence({"beside_body": {"fixed": 1234.4, "moving": None}}) == (
        "Not compared, as it lies beside the body (table, arms): 1,234 ml of the fixed, nothing of the moving volume."
    )


def test_how_much_masks_leave_is_said_where_there_are_some():
    assert quality.masks_sentence({"masks": {"fixed": None, "moving": None}}) == quality.masks_sentence({}) == ""
    assert quality.masks_sentence({"masks": {"fixed": 1234, "moving": None}}) == (
        "Masks: 1,234 voxels of the fixed and all voxels of the moving volume counted."
    )


def test_what_papers_print_is_called_central_differences_and_not_judged():
    found = {figure.key: figure for figure in measure(REPORT)}
    for key, text in (("njd_percent", "0.25"), ("min_jacobian", "-0.4"), ("max_jacobian", "3.2")):
        assert found[key].text == text
        assert "(central differences)" in found[key].label
        assert "as papers and Learn2Reg print it" in found[key].definition
        assert found[key].worse == ""


def test_the_verdict_is_the_worst_color_and_says_why():
    verdict = verdict_of(REPORT)
    assert verdict.color == AMBER
    assert verdict.colors == {
        "folded_percent": AMBER,
        "largest_region_mm3": GREEN,
        "sdlogj": GREEN,
        "dice": GREEN,
        "dice_change": GREEN,
    }
    assert quality.reasons(verdict) == ["Folded cells, %: 0.5035 is above 0."]
    strict = DEFAULT_LIMITS | {"dice": Limits(0.9, 0.8), "folded_percent": Limits(0.5035, 0.6)}
    verdict = verdict_of(REPORT, strict)
    assert verdict.color == RED
    assert verdict.colors["folded_percent"] == GREEN, "at the limit is not above it"
    assert quality.reasons(verdict) == ["Overlap after (mean Dice): 0.750 is below 0.8."]
    assert verdict_of({}).color is None
    assert verdict_of({}).folds is None


def test_folded_cells_are_counted_and_colored_by_the_limits():
    assert said_of_folds(REPORT) == (
        AMBER,
        "230 of 45,678 cells fold (0.503 %). 3 more are undecided: neither a fold nor a proof was found.",
    )
    assert verdict_of(report_with(CELLS | {"folded_percent": 1.2})).folds == RED


def test_only_what_is_proven_is_called_proven():
    assert said_of_folds(report_with(PROVEN)) == (GREEN, "No fold: proven.")
    assert verdict_of(report_with(PROVEN)).color == GREEN
    edge = report_with(PROVEN | {"folded_outside": 1200, "undecided_outside": 34, "no_fold_proven": False})
    assert said_of_folds(edge) == (
        GREEN,
        "No fold in the fixed volume: proven; 1,234 cells beyond its edge fold or are undecided.",
    )


def test_undecided_cells_are_amber_whatever_the_limits():
    generous = DEFAULT_LIMITS | {"folded_percent": Limits(50, 100)}
    report = report_with(PROVEN | {"undecided": 3, "no_fold_proven": False})
    verdict = verdict_of(report, generous)
    assert verdict.color == verdict.colors["undecided_cells"] == AMBER
    assert said_of_folds(report, generous) == (
        AMBER,
        "No fold was found, but 3 of 45,678 cells are undecided: neither a fold nor a proof was found in them.",
    )


def test_a_report_of_an_earlier_version_is_never_green_for_folds():
    verdict = verdict_of(report_with(None), DEFAULT_LIMITS | {"folded_percent": Limits(50, 100)})
    assert verdict.color == verdict.colors["folded_percent"] == AMBER
    assert "largest_region_mm3" not in verdict.colors, "its regions are not known"
    color, sentence = said_of_folds(report_with(None))
    assert color == AMBER
    assert "by central differences only" in sentence
    assert sentence.endswith("register again.")


def test_limits_are_edited_by_typing_and_refused_in_a_sentence():
    folded, dice = (next(f for f in measure(REPORT) if f.key == key) for key in ("folded_percent", "dice"))
    assert quality.edited_limits(folded, Limits(0.1, 1), "amber", " 0,05 ") == Limits(0.05, 1)
    assert quality.edited_limits(dice, Limits(0.7, 0.5), "red", "0.7") == Limits(0.7, 0.7)
    for text in ("much", "", "nan", "inf"):
        with pytest.raises(ValueError, match="is not a number; type one"):
            quality.edited_limits(folded, Limits(0.1, 1), "red", text)
    with pytest.raises(ValueError, match="Red must not lie below amber for 'Folded cells"):
        quality.edited_limits(folded, Limits(0.1, 1), "red", "0.01")
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
        '{"sdlogj": ["a", 1], "folded_percent": [1], "njd_percent": [0.1, 1], "unknown": [1, 2], "dice": [null, 1]}',
    ):
        assert quality.limits_from_text(text) == DEFAULT_LIMITS


def test_structures_are_called_by_their_names(mrml):
    labels = mrml.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
    labels.CreateDefaultDisplayNodes()
    table = mrml.AddNewNodeByClass("vtkMRMLColorTableNode", "colors")
    table.SetTypeToUser()
    builtin = mrml.GetNodeByID("vtkMRMLColorTableNodeLabels")
    assert builtin.GetColorName(3), "a name that says nothing of our labels"
    labels.GetDisplayNode().SetAndObserveColorNodeID(builtin.GetID())
    assert scene.label_names(labels) == scene.label_names(None) == {}
    table.SetNumberOfColors(4)
    table.SetColor(3, "Hippocampus", 0.1, 0.8, 0.2, 1.0)
    labels.GetDisplayNode().SetAndObserveColorNodeID(table.GetID())
    assert quality.structures(REPORT, scene.label_names(labels)) == [
        ("Hippocampus (3)", 0.5, 0.6, 0.8),
        ("7", 0.3, None, None),
    ]
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
    warped = scene.read_volume(nodes.warped)
    colors = scene.Image(np.ones(warped.array.shape, np.uint8), warped.affine)
    scene.add_estimate(nodes, scene.Estimate(None, colors, estimated(None)["trust"]))
    names = ("fixed", "warped", "jacobian", "trust_colors")
    arrays = {name: np.array(slicer.util.arrayFromVolume(getattr(nodes, name))) for name in names}
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
    assert (found.trust, found.trust_colors.GetName()) == (None, "M estimated error")
    assert [found.fixed.GetName(), found.warped.GetName(), found.folding.GetName()] == ["F", "M warped", "M folding"]
