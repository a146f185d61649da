"""The estimated error in the panel: made by the engine after the result is shown, seen in Inspect, never of another
result."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import worlds
from MorphSeekGui import estimating, quality, scene
from MorphSeekGui.engine_client import EngineError

from MorphSeekLib.protocol.options import RegistrationOptions

pytestmark = pytest.mark.usefixtures("kept_engine")


@pytest.fixture
def world():
    return worlds.make_world("oblique", amplitude_mm=2.0)


@pytest.fixture
def panel(quick_panel):
    quick_panel.ui.presetSelector.currentText = "Fast"
    return quick_panel


@pytest.fixture
def inspect(panel):
    return slicer.modules.MorphSeekWidget.panels["inspect"]


def register(stand_in, panel, estimate: str) -> scene.RegistrationNodes:
    panel.ui.estimateSelector.currentText = estimate
    panel.ui.registerButton.click()
    stand_in.wait(lambda: panel._run is None)
    return panel._last[1]


def settled(panel):
    return lambda: panel._estimate._run is None


def labels(table, column: int) -> list[str]:
    return [table.item(row, column).text() for row in range(table.rowCount)]


def test_the_result_is_shown_first_and_its_error_comes_later(stand_in, panel, inspect):
    view, ui = stand_in.open_views((120, 120))["Red"], inspect.ui
    nodes = register(stand_in, panel, "On")
    assert nodes.trust_colors is None
    assert inspect._nodes.transform is nodes.transform, "it is shown"
    assert not ui.trustButton.enabled
    assert panel.ui.cancelEstimateButton.visible
    assert not panel.ui.estimateButton.visible
    ui.jacobianButton.click()
    stand_in.wait(settled(panel))
    assert "Not a measurement" in panel.ui.estimateLabel.text
    assert "millimeters" in panel.ui.estimateLabel.text, "of no known kind"
    assert ui.jacobianButton.checked, "what is looked at stays"
    assert nodes.trust is None
    colors = slicer.util.arrayFromVolume(nodes.trust_colors)
    assert colors.shape == slicer.util.arrayFromVolume(nodes.warped).shape
    assert set(np.unique(colors)) <= {0, 1, 2, 3}
    assert scene.result_nodes(nodes.transform).report["trust"] == nodes.report["trust"]
    before = view.draw()
    ui.trustButton.click()
    assert view.composite.GetForegroundVolumeID() == nodes.trust_colors.GetID()
    assert not np.array_equal(view.draw(), before)
    assert ui.legendLabel.text.startswith("Blue: likely near. Yellow: in between. Red: do not rely on this.")
    ui.opacitySlider.value = 0.25
    assert view.composite.GetForegroundOpacity() == 0.25
    regions = quality.estimated_regions(nodes.report)
    assert labels(ui.trustTable, 1) == [quality.estimated_legend(nodes.report)[r.color - 1] for r in regions]


def test_it_is_offered_where_it_would_take_long_and_can_be_canceled(stand_in, panel, monkeypatch):
    monkeypatch.setattr("MorphSeekGui.register_panel.is_quick", lambda report: False)
    nodes = register(stand_in, panel, "Automatic")
    ui, report = panel.ui, nodes.report
    assert ui.estimateButton.visible
    assert not ui.estimateProgressBar.visible
    ui.estimateButton.click()
    assert ui.estimateProgressBar.visible
    ui.cancelEstimateButton.click()
    stand_in.wait(settled(panel))
    assert ui.estimateLabel.text == "Canceled; the result is as it was."
    assert (nodes.trust_colors, nodes.report) == (None, report)
    ui.estimateButton.click()
    stand_in.wait(settled(panel))
    assert nodes.trust_colors is not None
    assert not ui.estimateButton.visible


def test_nothing_is_offered_where_it_is_switched_off(stand_in, panel):
    register(stand_in, panel, "Off")
    panel.ui.estimateSelector.currentText = "Automatic"
    assert not panel.ui.estimateButton.visible, "the engine kept nothing for it"


def test_another_registration_or_a_closed_scene_cancels_it(stand_in, panel):
    register(stand_in, panel, "On")
    assert panel._estimate._run is not None
    panel.ui.moreButton.click()
    assert panel._estimate._run is None
    stand_in.wait(lambda: panel._run is None)
    assert panel._estimate._run is not None, "that of the longer fit"
    nodes = panel._last[1]
    slicer.mrmlScene.Clear(0)
    assert panel._estimate._run is None
    assert not panel.ui.estimateLabel.isVisibleTo(panel.widget)
    assert nodes.trust_colors is None


def test_a_correction_removes_it_and_undo_brings_it_back(stand_in, panel, world):
    from test_correct_section import draw

    nodes = register(stand_in, panel, "On")
    stand_in.wait(settled(panel))
    colors = slicer.util.arrayFromVolume(nodes.trust_colors).copy()
    panel.ui.correctSection.collapsed = False
    draw(panel, world, world.fixed.grid.center)
    panel._correct.ui.correctButton.click()
    stand_in.wait(lambda: panel._run is None)
    corrected = panel._last[1]
    assert corrected.trust_colors is None
    assert "trust" not in corrected.report
    assert not slicer.mrmlScene.GetNodesByName("M estimated error").GetNumberOfItems()
    assert not panel.ui.estimateButton.visible
    panel._correct.ui.undoButton.click()
    back = scene.result_nodes(nodes.transform)
    assert np.array_equal(slicer.util.arrayFromVolume(back.trust_colors), colors)
    assert "trust" in back.report


def test_an_estimate_is_not_added_to_a_result_that_changed_meanwhile(stand_in, panel):
    nodes = register(stand_in, panel, "On")
    nodes.transform.SetAttribute(scene.REPORT, "{}")
    stand_in.wait(settled(panel))
    assert "changed or removed meanwhile" in panel.ui.estimateLabel.text
    assert nodes.trust_colors is None


def test_automatic_is_at_once_where_less_time_is_expected_than_was_taken():
    seconds = {"search": 1.0, "network": 0.5, "fit": 2.5, "total": 7.0}
    assert estimating.expected_seconds({"seconds": seconds}) == 6.0
    assert estimating.is_quick({"seconds": seconds})
    assert not estimating.is_quick({"seconds": seconds | {"total": 5.0}})
    assert not estimating.is_quick({})
    assert not estimating.is_quick({"seconds": {"search": 1.0, "total": 5.0}}), "nothing tells how long a fit takes"


def test_a_batch_and_saved_settings_have_it_where_it_is_on(panel):
    from MorphSeekGui.parameters import chosen_options, shared_options, use_options

    p = panel.logic.getParameterNode()
    for text, trust in (("Automatic", "off"), ("On", "on"), ("Off", "off")):
        panel.ui.estimateSelector.currentText = text
        assert (shared_options(p).trust, chosen_options(p).trust) == (trust, "off")
    use_options(p, RegistrationOptions(trust="on"))
    assert panel.ui.estimateSelector.currentText == "On"
    use_options(p, RegistrationOptions())
    assert panel.ui.estimateSelector.currentText == "Automatic"


def test_the_engine_forgets_the_images_of_a_closed_scene(stand_in, panel, monkeypatch):
    monkeypatch.setattr("MorphSeekGui.register_panel.is_quick", lambda report: False)
    register(stand_in, panel, "Automatic")
    client, (of, nodes) = panel.logic.client(), panel._estimate._offered
    slicer.mrmlScene.Clear(0)
    job = estimating.Estimating(of, nodes)
    with pytest.raises(EngineError, match="no longer has the images"):
        client.call("estimate", job.params)
    job.discard()
