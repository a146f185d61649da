"""The house rules (Docs/architecture.md): what each room may import. Read from the source, so that nothing is
installed.

- Rooms of the engine lie above each other; a room imports from those below it only, and no circle lies within one.
- The engine (MorphSeekLib) never imports Slicer or a user interface: it runs on a server.
- The module (MorphSeek) never imports torch, and of the engine its protocol alone: a crash of the engine must not take
  Slicer down.
- SimpleITK is met in seven files only: images, dicom, transforms, chain, apply, alignment and page (pictures of the
  report).
- Nothing is unpickled from a file that a user picked.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = sorted((ROOT / "MorphSeekLib").rglob("*.py"))
MODULE = sorted((ROOT / "MorphSeek").rglob("*.py"))
INTERFACE = {"slicer", "vtk", "vtkmodules", "qt", "ctk", "mrml", "PySide6", "PySide2", "PyQt5", "PyQt6", "MorphSeekGui"}
SIMPLEITK_FILES = {"apply.py", "chain.py", "images.py", "dicom.py", "transforms.py", "alignment.py", "page.py"}
ROOMS = (  # from the ground up
    *("protocol", "space", "io", "measures", "backbones", "networks", "registration"),
    *("data", "training", "evaluation", "report", "app"),
)


@functools.cache
def imported(path: Path) -> set[str]:
    """First names of all absolute imports of a file, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value).split(".")[0])
    return names


def arrows(source: str, room: str) -> set[tuple[str, str]]:
    """(room, file) of all that a file of a room imports from the engine, wherever in it the import stands."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [room][: 2 - node.level]
            for alias in node.names:
                place = [*base, *(node.module.split(".") if node.module else []), alias.name]
                found.add((place[0], place[1] if len(place) > 1 else ""))
    return found


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / "MorphSeekLib" / room).rglob("*.py"))


def refuse(files: list[Path], forbidden: set[str]) -> None:
    found = [(path.relative_to(ROOT), sorted(imported(path) & forbidden)) for path in files]
    wrong = [f"{path} imports {', '.join(names)}" for path, names in found if names]
    assert not wrong, "; ".join(wrong)


def test_imports_are_found(tmp_path):
    source = tmp_path / "a.py"
    source.write_text(
        "import torch.nn as n\nfrom .b import c\n"
        "def f():\n    from vtk.util import d\n    import importlib\n    importlib.import_module('qt.x')\n"
    )
    assert imported(source) == {"torch", "vtk", "importlib", "qt"}


def test_engine_knows_no_slicer():
    assert ENGINE
    refuse(ENGINE, INTERFACE | {"MorphSeek"})


def test_module_knows_no_torch_and_of_the_engine_its_protocol_alone():
    assert MODULE
    refuse(MODULE, {"torch"})
    for path in MODULE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if name.partition(".")[0] == "MorphSeekLib":
                    assert name.startswith("MorphSeekLib.protocol."), f"{path.name} imports {name}"


def test_simpleitk_stays_in_its_files():
    elsewhere = [path for path in ENGINE if path.name not in SIMPLEITK_FILES]
    refuse(elsewhere, {"SimpleITK", "itk"})


def test_every_room_is_known():
    folders = {path.name for path in (ROOT / "MorphSeekLib").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS)
    assert [path.name for path in (ROOT / "MorphSeekLib").glob("*.py")] == ["__init__.py"]


def test_arrows_are_found():
    source = "from ..space import fields\nfrom ..io.files import a\nfrom .b import c\nfrom .. import moved\n"
    assert arrows(source, "app") == {("space", "fields"), ("io", "files"), ("app", "b"), ("moved", "")}


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrow_between_rooms_runs_up(room):
    """But for the old names of README's examples, which the package's own table (`moved`) knows."""
    below = ROOMS[: ROOMS.index(room)]
    for path in files_of(room):
        for other, name in arrows(path.read_text(encoding="utf-8"), room):
            assert other in (room, "moved") or other in below, f"{room}/{path.name} imports {other}.{name}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_lies_within_a_room(room):
    above: dict[str, set[str]] = {
        path.stem: {name for other, name in arrows(path.read_text(encoding="utf-8"), room) if other == room}
        for path in files_of(room)
        if path.stem != "__init__"
    }
    while above:
        ground = {name for name, needs in above.items() if not needs & above.keys()}
        assert ground, f"{room}: {sorted(above)} import each other"
        above = {name: needs for name, needs in above.items() if name not in ground}


def test_greedy_and_ants_are_no_part_of_the_product():
    refuse(ENGINE + MODULE, {"ants", "picsl_greedy", "benchmarks", "comparison"})


def unsafe_loads(path: Path) -> list[str]:
    """Calls of torch.load without weights_only=True, and of any load with allow_pickle=True."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            torch_load = getattr(node.func.value, "id", "") == "torch"
            if given.get("allow_pickle") is True or (torch_load and given.get("weights_only") is not True):
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_nothing_is_unpickled(tmp_path):
    refuse(ENGINE + MODULE, {"pickle", "dill", "joblib", "cloudpickle"})
    assert [call for path in ENGINE + MODULE for call in unsafe_loads(path)] == []
    source = tmp_path / "a.py"
    source.write_text("torch.load(a)\ntorch.load(a, weights_only=True)\nnp.load(a, allow_pickle=True)\nnp.load(a)\n")
    assert unsafe_loads(source) == ["a.py:1", "a.py:3"]


def test_the_ground_needs_little():
    """Fields and geometry need torch and numpy, fields not even geometry; what comes first needs neither."""
    allowed = {"space/fields.py": {"torch", "collections", "__future__"}}
    names = ("__future__", "collections", "hashlib", "json", "os", "pathlib", "struct", "tempfile", "typing")
    allowed["protocol/startup.py"] = set(names)
    allowed["space/geometry.py"] = allowed["space/fields.py"] | {"numpy", "math", "dataclasses"}
    for name, names in allowed.items():
        assert imported(ROOT / "MorphSeekLib" / name) <= names
