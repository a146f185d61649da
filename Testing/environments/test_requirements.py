"""What the engine imports comes with Slicer, PyTorch or the panel; `make environment` proves it, slowly."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from make_environment import REQUIREMENTS, changes, normalized, requirement_names

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LISTS = sorted(HERE.glob("slicer-python-*.txt"))
ELSEWHERE = {
    "MorphSeekLib/app/crew.py": {"distributed"},  # a cluster, with a sentence where it is missing
    "MorphSeekLib/data/bids.py": {"ancpbids"},  # the command line of a cohort, with a sentence where it is missing
    "MorphSeekLib/app/demo.py": {"nilearn"},  # the command that shows it off, with a sentence where it is missing
    "MorphSeekLib/report/cohort.py": {"PIL"},  # pillow, which both Slicers have and matplotlib brings
    "MorphSeekLib/training/distributed.py": {"lightning_fabric"},  # many processes: never started by the panel
    # compiled loops, which torch takes the place of
    **{
        f"MorphSeekLib/{name}.py": {"numba"}
        for name in (
            "io/compiled",
            *("measures/descriptor_kernels", "measures/field_kernels", "measures/fold_kernels"),
            *("registration/descent", "registration/kernels", "registration/search_kernels"),
        )
    },
    "MorphSeekLib/protocol/settings_file.py": {"tomli"},  # Python 3.10, which no Slicer has
}
"""What some files import when it is there, and the panel never needs."""


def imports(path: Path) -> set[str]:
    """Return the first names of all absolute imports of a file, wherever in it they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"MorphSeekLib"}


@pytest.mark.parametrize("shipped", LISTS, ids=lambda path: path.stem)
def test_the_engine_imports_nothing_that_the_panel_does_not_install(shipped):
    there = requirement_names(shipped) | requirement_names(REQUIREMENTS) | {"torch"}
    lacking = {}
    for path in sorted((ROOT / "MorphSeekLib").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        left = {module for module in imports(path) - ELSEWHERE.get(name, set()) if normalized(module) not in there}
        if left:
            lacking[name] = sorted(left)
    assert lacking == {}, f"not in {shipped.name}, nor in {REQUIREMENTS.relative_to(ROOT)}"


def test_what_the_panel_installs_is_what_the_package_needs():
    """No bound of requirements.txt may be missing in pyproject.toml, or be another there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    assert [line for line in lines if line and f'"{line.lower()}"' not in text.lower()] == []


def test_a_changed_or_removed_package_is_named():
    assert changes({"numpy": "2.0.2", "six": "1"}, {"numpy": "2.0.2", "six": "1", "rich": "15"}) == []
    assert changes({"numpy": "2.0.2", "six": "1"}, {"numpy": "2.3.5"}) == ["numpy 2.0.2 -> 2.3.5", "six 1 -> removed"]


def test_the_lists_are_those_of_the_shared_folder(shared):
    assert LISTS
    for path in LISTS:
        assert path.read_text(encoding="utf-8") == (shared / path.name).read_text(encoding="utf-8")
