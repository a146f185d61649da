"""The house rules of DESIGN.md: what each room may import. Read from the source, so that nothing needs to be installed.

- The engine (MorphSeekLib) never imports Slicer or a user interface: it runs on a server.
- The module (MorphSeek) never imports torch or the engine: a crash of the engine must not take Slicer down.
- SimpleITK is met in five rooms only: images, dicom, transforms (files), alignment (initial alignment) and report
  (pictures).
- Nothing is unpickled from a file that a person picked.
- The benchmark stands on the engine, never the engine on it; its optional packages are met in one room.
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
SIMPLEITK_ROOMS = {"images.py", "dicom.py", "transforms.py", "alignment.py", "report.py"}


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


def imported_rooms(path: Path) -> set[str]:
    """First names of all relative imports of a file, from wherever in the package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            names |= {name.split(".")[0] for name in ([node.module] if node.module else [a.name for a in node.names])}
    return names


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


def test_module_knows_no_torch_and_no_engine():
    if not MODULE:
        pytest.skip("MorphSeek/ has no Python file yet")
    refuse(MODULE, {"torch", "MorphSeekLib"})


def test_simpleitk_stays_in_its_rooms():
    elsewhere = [path for path in ENGINE if path.name not in SIMPLEITK_ROOMS]
    refuse(elsewhere, {"SimpleITK", "itk"})


def test_the_benchmark_stands_on_the_engine():
    """Only the command line opens it, when it is asked for; greedy and ANTs are called from one room."""
    rooms = sorted((ROOT / "MorphSeekLib" / "benchmark").glob("*.py"))
    assert rooms
    others = [path for path in ENGINE if path not in rooms]
    opening = [path.name for path in others if "benchmark" in imported_rooms(path)]
    assert opening == ["cli.py"]
    for node in ast.parse((ROOT / "MorphSeekLib" / "cli.py").read_text(encoding="utf-8")).body:
        assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmark"))
    refuse([path for path in ENGINE if path.name != "classical.py"], {"ants", "picsl_greedy"})


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


def test_fields_and_geometry_stand_on_the_ground():
    """The two lowest rooms need torch and numpy, fields not even geometry; what comes first needs neither."""
    allowed = {"fields.py": {"torch", "collections", "__future__"}}
    names = ("__future__", "collections", "hashlib", "json", "os", "pathlib", "struct", "tempfile", "typing")
    allowed["startup.py"] = set(names)
    allowed["geometry.py"] = allowed["fields.py"] | {"numpy", "math", "dataclasses"}
    for name, names in allowed.items():
        assert imported(ROOT / "MorphSeekLib" / name) <= names
