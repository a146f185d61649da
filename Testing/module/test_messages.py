"""What the module says can be translated: every sentence passes ``_``, and those of the faults stand twice alike."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "MorphSeek").rglob("*.py"))
TRANSLATE = {"_", "tr", "translate"}
SHOWN = {"text", "toolTip", "title", "placeholderText", "windowTitle"}
SHOW = {
    "say",
    "_say",
    "_tell",
    "_refuse",
    "fail",
    "_fail",
    "_fail_check",
    "setText",
    "setToolTip",
    "InputError",
    "InstallError",
}
SENTENCE = re.compile(r"[A-Za-z']{2,},?( [A-Za-z']{2,},?){2,}")
NOT_SHOWN = {
    "batch_pairs.py": "_write_transform",  # of a file
    "faults.py": "class Fault",  # codes, translated in messages.py
    "nrrd.py": "_header",  # of a file
    "engine_client.py": "last_words",  # what Python writes
}


def untranslated(source: str, left_out: str = "") -> list[str]:
    """The texts of a file that a user would see and a translator would not."""
    tree = ast.parse(source)
    known: set[int] = set()

    def take(node: ast.AST) -> None:
        known.update(id(part) for part in ast.walk(node))

    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                take(first)  # a docstring
            if (
                getattr(node, "name", None) == left_out.removeprefix("class ")
                or getattr(node, "name", "")[-4:] == "Test"
            ):
                take(node)  # Slicer's self tests are not translated
        elif isinstance(node, ast.Call) and _name(node.func) in TRANSLATE:
            for argument in node.args:
                take(argument)
        elif isinstance(node, ast.Call) and _name(node.func) == "compile":
            take(node)  # a regular expression
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in known:
            if SENTENCE.search(re.sub(r"<[^>]*>|\{[^}]*\}", " ", node.value)):
                found.append(node.value)
        elif isinstance(node, ast.Assign) and any(_name(target) in SHOWN for target in node.targets):
            found += _texts(node.value, known)
        elif isinstance(node, ast.Call) and _name(node.func) in SHOW:
            found += [text for argument in node.args for text in _texts(argument, known)]
    return found


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _texts(node: ast.AST, known: set[int]) -> list[str]:
    """Words that an expression can be."""
    parts = [node, *(getattr(node, side) for side in ("body", "orelse") if isinstance(node, ast.IfExp))]
    constants = [part for part in parts if isinstance(part, ast.Constant) and id(part) not in known]
    return [part.value for part in constants if isinstance(part.value, str) and re.search(r"[A-Za-z]{2}", part.value)]


def test_what_is_not_translated_is_found():
    source = '''
"""This docstring is for programmers."""
def f(ui, n):
    ui.label.text = "Cancel"
    ui.label.text = _("Stop") if n else "Go on"
    self._say("Oh")
    x = f"There are {n} of them in here"
    y = _("All of this can be translated").format(n=n)
    raise InputError("Wrong")
'''
    assert sorted(untranslated(source)) == sorted(["Cancel", "Go on", "Oh", " of them in here", "Wrong"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_sentence_passes_tr(path):
    allowed = {"MorphSeek", "The MorphSeek developers"}  # names
    found = untranslated(path.read_text(encoding="utf-8"), NOT_SHOWN.get(path.name, ""))
    assert [text for text in found if text not in allowed] == []


def test_what_slicers_translators_see_of_a_fault_is_its_sentence():
    pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
    from MorphSeekGui import messages
    from MorphSeekGui.faults import Fault

    assert messages._translated() == {fault: fault.value for fault in Fault}


def test_a_fault_is_said_in_the_users_language(monkeypatch):
    pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
    from MorphSeekGui import messages
    from MorphSeekGui.engine_client import EngineClient, EngineDied, EngineError
    from MorphSeekGui.training_run import Fault

    german = {Fault.ENGINE_NOT_STARTED.value: "Kein Start mit {program} ({reason})"}
    monkeypatch.setattr(messages, "_", lambda text: german.get(text, text))
    with pytest.raises(EngineDied, match="could not be started with '/no/such'") as caught:
        EngineClient(python="/no/such").call("hello")
    assert messages.sentence(caught.value) == "Kein Start mit /no/such (No such file or directory)"
    own = "There is no model 'brain-xr'."
    assert messages.sentence(EngineError(own, -32000)) == own, "the engine's own sentences stay English"
