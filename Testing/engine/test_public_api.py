"""The public names of the engine, and what is not loaded before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import MorphSeekLib

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "SimpleITK", "scipy")


def run(code: str, *options: str) -> str:
    """What a fresh Python prints."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MorphSeekLib.__all__)
def test_every_public_name_resolves(name):
    assert getattr(MorphSeekLib, name) is not None
    assert name in dir(MorphSeekLib)


def test_type_checkers_see_the_same_names():
    """The imports under TYPE_CHECKING and the table that resolves names say the same."""
    tree = ast.parse((ROOT / "MorphSeekLib" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in block.body for alias in node.names}
    assert static == MorphSeekLib._HOME
    assert set(MorphSeekLib.__all__) == {*static, "__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = MorphSeekLib.nothing


def test_the_names_of_the_first_readme_still_work_with_a_warning():
    lines = (
        "from MorphSeekLib.images import read_image",
        "from MorphSeekLib.registration import load_model, register",
        "from MorphSeekLib.devices import use_threads",
    )
    tries = "".join(f"try:\n    {line}\nexcept DeprecationWarning as told: print(told)\n" for line in lines)
    told = run(f"import warnings; warnings.simplefilter('error', DeprecationWarning)\n{tries}").splitlines()
    assert ["is now MorphSeekLib." in sentence for sentence in told] == [True] * len(lines)
    run("; ".join(lines))


def test_the_protocol_needs_the_standard_library_alone():
    """Without site-packages: what Slicer's bare Python, or any other, has."""
    modules = [path.stem for path in (ROOT / "MorphSeekLib" / "protocol").glob("*.py") if path.stem != "__init__"]
    assert modules
    run("; ".join(f"import MorphSeekLib.protocol.{name}" for name in modules), "-I", "-S")


@pytest.mark.parametrize("arguments", [["--help"], ["register", "--help"], ["register", "no.nii", "no.nii", "-o", "x"]])
def test_the_command_line_starts_without_the_heavy_libraries(arguments):
    code = (
        "from MorphSeekLib.app.cli import main\n"
        f"sys.argv = ['morphseek', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "[]"
