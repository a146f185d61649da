"""The button *Copy details*: beside every error, and what it copies names no patient and no file."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
import worlds

FOREIGN_PYTHON = sys.executable  # of no Slicer: it is read before a test is launched by Slicer's launcher


@pytest.fixture
def logic():
    """A module's logic: Slicer's Python at first."""
    logic = SimpleNamespace(python="", environment=None)
    logic.engine_python = lambda: logic.python
    logic.engine_environment = lambda: slicer.util.startupEnvironment() if logic.python else None
    return logic


@pytest.fixture
def copy(stand_in, logic):
    import qt
    from MorphSeekGui.details import CopyDetails

    button = qt.QPushButton()
    copy = CopyDetails(button, logic)

    def clicked() -> str:
        qt.QApplication.clipboard().setText("")
        button.click()
        assert not button.enabled
        stand_in.wait(lambda: button.enabled)
        return qt.QApplication.clipboard().text()

    yield SimpleNamespace(button=button, details=copy, clicked=clicked)
    copy.close()


def test_the_details_are_copied_without_names(stand_in, copy, mrml):
    world = worlds.make_world("upright")
    node = worlds.add_volume("Erika Mustermann T1", world.fixed)
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLNRRDStorageNode")
    storage.SetFileName("/data/Study 12/Mueller-Hans.nii.gz")
    node.SetAndObserveStorageNodeID(storage.GetID())
    assert not copy.button.visible
    log = ["Erika Mustermann T1 has a strange grid", "cannot read Mueller-Hans", "torch.OutOfMemoryError: CUDA"]
    copy.details.offer("'Erika Mustermann T1' is empty, in /home/hans/Mueller-Hans.nii.gz", log)
    assert not copy.button.isHidden()
    text = copy.clicked()
    assert copy.button.text == "Copied"
    for name in ("Erika", "Mustermann", "Mueller", "Hans", "Study 12"):
        assert name.lower() not in text.lower()
    assert "message: '<name>' is empty, in <path>" in text
    assert "torch.OutOfMemoryError: CUDA" in text
    assert "Slicer: 5.13.0" in text
    assert "engine's Python: Slicer's" in text
    assert "SHA-256" in text
    copy.details.withdraw()
    assert copy.button.isHidden()


def test_the_engines_python_examines_itself(stand_in, copy, logic):
    logic.python = FOREIGN_PYTHON
    copy.details.offer("It failed.")
    assert "engine's Python: chosen\n" in copy.clicked()


def test_an_engine_that_cannot_begin_is_examined_by_slicers_python(stand_in, copy, logic, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'encodings'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    logic.python = str(broken)
    copy.details.offer("It failed.")
    text = copy.clicked()
    assert "engine's Python: chosen, fails: ModuleNotFoundError: No module named 'encodings'" in text
    assert "torch: " in text
    logic.python = str(tmp_path / "gone")
    assert "engine's Python: chosen, fails: No such file or directory" in copy.clicked()


def test_where_no_python_begins_that_is_copied(stand_in, copy, monkeypatch):
    import qt
    from MorphSeekGui import details

    monkeypatch.setattr(details, "default_python", lambda: "/no/such/python")
    copy.details.offer("'Erika' failed.")
    copy.button.click()
    assert qt.QApplication.clipboard().text().startswith("No Python could examine the installation")


def test_every_error_of_the_panel_has_the_button(stand_in, module, monkeypatch):
    panels = slicer.modules.MorphSeekWidget.panels
    register, inspect, training = (panels[name] for name in ("register", "inspect", "training"))
    inspect.ui.exportSection.collapsed = False
    for fail, succeed, button in (
        (lambda: register._fail("no"), lambda: register._status.say("yes"), register.ui.copyDetailsButton),
        (lambda: inspect._say("no"), lambda: inspect._say(""), inspect.ui.copyDetailsButton),
        (
            lambda: inspect._fail_export(OSError("no")),
            lambda: inspect._export_message.say(""),
            inspect.ui.copyExportDetailsButton,
        ),
        (lambda: training._fail_check("no"), lambda: training._checked.say("yes"), training.ui.copyCheckDetailsButton),
        (lambda: training._fail("no"), lambda: training._status.say("yes"), training.ui.copyDetailsButton),
    ):
        assert button.isHidden()
        fail()
        assert not button.isHidden()
        succeed()
        assert button.isHidden()
