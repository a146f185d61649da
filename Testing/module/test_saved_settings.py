"""Settings saved by a name in the panel, and taken from a colleague's file."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
from PySide6 import QtWidgets

from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings_file import read_settings

pytestmark = pytest.mark.usefixtures("kept_engine")


@pytest.fixture
def panel(stand_in, module):
    from MorphSeekGui.saved_settings import folder

    shutil.rmtree(folder(), ignore_errors=True)
    panel = slicer.modules.MorphSeekWidget.panels["register"]
    panel._saved.refresh()
    yield panel
    shutil.rmtree(folder(), ignore_errors=True)


def choose(monkeypatch, name: str, path) -> None:
    """Let the user choose a file in a dialog."""
    monkeypatch.setattr(QtWidgets.QFileDialog, name, lambda *_: (str(path), ""))


def items(selector) -> list[str]:
    return [selector.itemText(n) for n in range(selector.count)]


def test_choices_are_saved_by_a_name_and_chosen_again(panel, monkeypatch):
    from MorphSeekGui.saved_settings import folder

    ui, parameters = panel.ui, panel._parameters
    assert items(ui.savedSettingsSelector) == ["none saved"]
    panel.refresh_models("none")
    ui.fitSelector.currentText, ui.presetSelector.currentText = "Off", "Fast"
    choose(monkeypatch, "getSaveFileName", folder() / "knees")
    ui.saveSettingsButton.click()
    assert ui.savedSettingsSelector.currentText == "knees"
    saved = read_settings(folder() / "knees.toml")
    assert (saved.model, saved.options) == ("none", RegistrationOptions(fit="off", preset="fast"))
    panel.refresh_models("auto")
    ui.fitSelector.currentText, ui.presetSelector.currentText = "On", "Best"
    ui.savedSettingsSelector.setCurrentIndex(1)
    ui.savedSettingsSelector.activated(1)
    assert (parameters.model, ui.fitSelector.currentText, ui.presetSelector.currentText) == ("none", "Off", "Fast")
    assert "'knees' are chosen" in ui.statusLabel.text


def test_a_colleagues_file_is_opened_with_what_no_widget_shows(panel, monkeypatch, tmp_path):
    from MorphSeekGui.parameters import chosen_options

    path = tmp_path / "abdomen.toml"
    path.write_text('name = "Abdomen"\nmodel = "brain-mr"\nalign = "rigid"\nsteps = 5\nfit_iterations = [4, 2, 1]\n')
    choose(monkeypatch, "getOpenFileName", path)
    panel.ui.openSettingsButton.click()
    assert "The settings 'Abdomen' are chosen. Iterations of the fit: 4/2/1." in panel.ui.statusLabel.text
    expected = RegistrationOptions(align="rigid", steps=5, fit_iterations=(4, 2, 1))
    assert chosen_options(panel._parameters) == expected
    assert panel._parameters.model == "brain-mr"
    assert panel.ui.savedSettingsSelector.currentText == "abdomen"
    panel.ui.savedSettingsSelector.activated(0)
    assert chosen_options(panel._parameters) == RegistrationOptions(align="rigid", steps=5)


def test_a_file_that_cannot_be_used_changes_nothing(panel, monkeypatch, tmp_path):
    from MorphSeekGui.parameters import chosen_options

    before = chosen_options(panel._parameters), panel._parameters.model
    for text, words in (("algin = 'rigid'", "no setting 'algin'"), ("model = 'mine'", "There is no model 'mine'")):
        (tmp_path / "s.toml").write_text(text)
        choose(monkeypatch, "getOpenFileName", tmp_path / "s.toml")
        panel.ui.openSettingsButton.click()
        assert words in panel.ui.statusLabel.text
    assert (chosen_options(panel._parameters), panel._parameters.model) == before
