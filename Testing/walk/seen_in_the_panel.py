"""The additions of the how-to pages in the panel; test_how_to.py runs these tests in its copy of the checkout."""

from __future__ import annotations

from pathlib import Path

import slicer

CASES = Path(__file__).resolve().parents[2] / "cases"
MODULE = Path(__file__).resolve().parents[2] / "MorphSeek" / "MorphSeek.py"


def entries(box) -> list[str]:
    return [box.itemText(n) for n in range(box.count)]


def panels(stand_in, tmp_path, monkeypatch) -> dict:
    """The sections of the module, with Fine-tune switched on."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    slicer.app.userSettings().setValue("MorphSeek/Training", True)
    module = stand_in.load_module(MODULE)
    stand_in.show(module.widgetRepresentation())
    module.widgetRepresentation().enter()
    return module.widgetRepresentation().python.panels


def test_a_backbone_is_in_the_list(stand_in, tmp_path, monkeypatch):
    panel = panels(stand_in, tmp_path, monkeypatch)["training"]
    panel.ui.casesFolder.directory = str(CASES)
    panel.ui.checkButton.click()
    stand_in.wait(lambda: panel.ui.checkButton.text == "Check the cases")
    assert "shallow" in entries(panel.ui.backboneBox)


def test_a_similarity_is_in_both_lists(stand_in, tmp_path, monkeypatch):
    both = panels(stand_in, tmp_path, monkeypatch)
    assert "Edges (NGF)" in entries(both["register"].ui.similaritySelector)
    assert "ngf" in entries(both["training"].ui.similarityBox)
