"""Two results of one pair, side by side in Inspect."""

from __future__ import annotations

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import worlds
from MorphSeekGui import scene
from test_inspect_panel import folded_result, layers, make_result, one_thread, panel, texts, ui, view  # noqa: F401


@pytest.fixture
def two(stand_in, tmp_path) -> list[scene.RegistrationNodes]:
    """Two results of one pair, the second one smoother and by a model."""
    first = make_result(tmp_path / "one")
    (tmp_path / "two").mkdir()
    result = folded_result(worlds.make_world("upright"), tmp_path / "two")
    report = result["report"]
    changes = {
        "folding": report["folding"] | {"sdlogj": 0.2},
        "model": {"title": "brains", "name": "b"},
        "steps": [{"stage": "align", "step": 0}, {"stage": "fit", "step": 0}],
    }
    second = scene.create_nodes(result | {"report": report | changes}, first.fixed, first.moving)
    return [first, second]


def row(ui, label: str) -> list[str]:  # noqa: F811
    at = texts(ui.compareTable, 0).index(label)
    return [texts(ui.compareTable, column)[at] for column in (1, 2)]


def test_both_results_stand_in_one_table_with_the_better_one_bold(panel, ui, two):  # noqa: F811
    panel.show(two[0])
    ui.compareSection.collapsed = False
    assert not ui.compareTable.isVisibleTo(panel.widget)
    ui.otherResultSelector.setCurrentNode(two[1].transform)
    assert row(ui, "Roughness (SDlogJ)") == ["0.6", "0.2"]
    assert row(ui, "Model") == ["none", "brains"]
    assert row(ui, "Stages") == ["–", "Aligned, Fitted"]
    at = texts(ui.compareTable, 0).index("Roughness (SDlogJ)")
    assert [ui.compareTable.item(at, column).font().bold() for column in (1, 2)] == [False, True]


def test_similarities_inside_different_masks_are_not_compared(stand_in):
    from MorphSeekGui.compare_section import figures

    similar = [{"similarity": {"warped": value}} for value in (0.8, 0.9)]
    masked = similar[1] | {"masks": {"fixed": 1234, "moving": None}}
    for other, better, masks in ((similar[1], 1, "–"), (masked, None, "1,234 / all")):
        rows = {label: (texts, bold) for label, texts, bold in figures(similar[0], other)}
        assert rows["Similarity (1 is best)"] == (("0.800", "0.900"), better)
        assert rows["Voxels that masks leave, fixed / moving"][0] == ("–", masks)


def test_the_two_warped_volumes_flicker_until_all_is_as_before(panel, ui, two, view, stand_in):  # noqa: F811
    before = layers(view)
    panel.show(two[0])
    ui.otherResultSelector.setCurrentNode(two[1].transform)
    ui.rateSlider.value = 3
    ui.compareButton.click()
    names = {node.warped.GetID(): f"Seen: {node.warped.GetName()}" for node in two}
    seen = set()
    stand_in.wait(lambda: seen.add((layers(view)[1], ui.compareSeenLabel.text)) or len(seen) == 2)
    assert seen == set(names.items())
    ui.blendButton.click()
    assert not ui.compareButton.checked
    assert not panel._flicker.active
    ui.restoreButton.click()
    assert layers(view) == before
    assert ui.compareSeenLabel.text == ""


def test_what_cannot_be_compared_is_said(panel, ui, two, tmp_path):  # noqa: F811
    panel.show(two[0])
    ui.otherResultSelector.setCurrentNode(two[0].transform)
    assert "This is the result above" in ui.compareLabel.text
    ui.otherResultSelector.setCurrentNode(make_result(tmp_path / "three", "other").transform)
    assert "a result of other volumes" in ui.compareLabel.text
    assert not ui.compareButton.isVisibleTo(panel.widget)


def test_a_result_that_leaves_the_scene_is_compared_no_longer(panel, ui, two, view):  # noqa: F811
    panel.show(two[0])
    ui.otherResultSelector.setCurrentNode(two[1].transform)
    ui.compareButton.click()
    slicer.mrmlScene.RemoveNode(two[1].warped)
    assert panel._compare.other is None
    assert not ui.compareButton.checked
    assert ui.showSection.enabled


def test_a_report_of_an_earlier_version_has_its_row(two):
    from MorphSeekGui.compare_section import figures

    old = {"steps": [{"step": 0}], "folding": {"njd_percent": 0.1}}
    rows = {label: values for label, values, _better in figures(two[0].report, old)}
    assert rows["Stages"] == ("–", "–")
    assert rows["Seconds"] == ("–", "–")
