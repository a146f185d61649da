"""The wheel, away from the checkout: it holds what the checkout and the installation in Slicer hold, and works alone.

The environment that it is installed into is made without packages; those that it requires are then taken from the one
that runs the tests, whose folder a .pth file names, since installing PyTorch again would take minutes. MorphSeekLib
comes from the wheel alone: a .pth file brings no editable packages, and the commands run elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import cmake_install
import pytest
from cases import blob_grid, blob_image, blob_labels, write_dataset
from kernel_cache import lend_kernels

from MorphSeekLib.io.images import write_image

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"Models": {".safetensors"}, "Training": {".toml"}}
UNSHIPPED = {".py", ".pyc"}
"""In the folders of models and recipes: scripts that made them."""


def call(*command: object, folder: Path) -> str:
    """Run a command in a folder, with none of this process's ways to find MorphSeekLib; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("MorphSeekLib", "Resources"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("Screenshots"))
    call(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", folder, copy, folder=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of a clean environment with the wheel and what its extra ``demo`` requires."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "-qq")
    call(*pip, "--no-deps", wheel, folder=folder)
    library = call(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder)
    Path(library.strip(), "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(*pip, "morphseek[demo]", folder=folder)  # what the wheel says it needs, as far as it is not there
    found = call(programs / "python", "-c", "import MorphSeekLib; print(MorphSeekLib.__file__)", folder=folder)
    assert Path(found.strip()).is_relative_to(folder)
    lend_kernels(Path(found.strip()).parent)
    return programs


def checkout_files() -> set[str]:
    """What must be everywhere: every file of the engine, every model and recipe."""
    found = {path for path in (ROOT / "MorphSeekLib").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    for name in SHIPPED:
        found |= {path for path in (ROOT / "Resources" / name).rglob("*") if path.suffix not in UNSHIPPED}
    return {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}


def test_the_wheel_holds_the_files_of_the_checkout(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.replace("MorphSeekLib/resources/", "Resources/") for name in names} == checkout_files()


def test_slicer_gets_the_files_of_the_checkout(tmp_path):
    module = ROOT / "MorphSeek"
    files = {path for path in module.rglob("*") if path.is_file() and path.suffix not in {".pyc", ".txt"}}
    own = {path.relative_to(module).as_posix() for path in files} | {"Resources/requirements.txt"}
    laid = cmake_install.install(tmp_path)
    found = {path.relative_to(laid).as_posix() for path in laid.rglob("*") if path.is_file()}
    assert found == checkout_files() | own


def test_what_is_shipped_is_found_by_its_kind():
    found = checkout_files()
    for name, suffixes in SHIPPED.items():
        files = {Path(file) for file in found if file.startswith(f"Resources/{name}/")}
        assert files, name
        assert {file.suffix for file in files} == suffixes


def test_the_wheel_knows_its_models_and_recipes(installed, tmp_path):
    card = json.loads(call(installed / "morphseek", "info", "brain-mr", "--json", folder=tmp_path))
    assert card["model"]["backbone"] == "voxelmorph"
    code = "from MorphSeekLib.protocol.startup import bundled; print(*bundled('recipe'))"
    names = call(installed / "python", "-c", code, folder=tmp_path).split()
    assert {"hippocampus", "finetune-paper"} <= set(names)


def test_the_wheel_registers(installed, tmp_path):
    for seed, name in enumerate(("fixed", "moving")):
        write_image(blob_image(blob_labels(seed, blob_grid()), seed), tmp_path / f"{name}.nii.gz")
    images, options = ("fixed.nii.gz", "moving.nii.gz"), ("--model", "hippocampus-mr", "--device", "cpu", "-o", "out")
    call(installed / "morphseek", "register", *images, *options, folder=tmp_path)
    similarity = json.loads((tmp_path / "out" / "report.json").read_text())["similarity"]
    assert similarity["warped"] > similarity["aligned"]


def test_the_wheel_trains_by_a_recipe_of_its_own(installed, tmp_path):
    dataset = write_dataset(tmp_path / "data")
    options = ("--config", "hippocampus", "--iterations", 2, "--device", "cpu", "--out", "trained.safetensors")
    call(installed / "morphseek", "warmup", dataset, *options, folder=tmp_path)
    rows = (tmp_path / "trained.safetensors.jsonl").read_text().splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [1, 2]
    card = json.loads(call(installed / "morphseek", "info", "trained.safetensors", "--json", folder=tmp_path))
    assert card["title"].startswith("Hippocampus MR")


DEMO = """
from pathlib import Path
from MorphSeekLib.app import cli, demo

demo.COLIN27 = Path("not installed")
cli.main()
"""


def test_the_demo_without_colin27_reports_the_true_error(installed, tmp_path):
    """The whole command, with what the extra ``demo`` brings, on the pair that needs no Debian package."""
    told = call(installed / "python", "-c", DEMO, "demo", "--device", "cpu", folder=tmp_path)
    assert "Fixed: MNI152 T1 template (nilearn)." in told
    errors = re.findall(r"([\d.]+) mm before, ([\d.]+) mm after", told)
    assert len(errors) == 2
    assert all(float(after) < 0.3 * float(before) for before, after in errors)
    for name in ("brain", "abdomen"):
        report = json.loads((tmp_path / "demo-output" / name / "report.json").read_text())
        assert report["folding"]["cells"]["no_fold_proven"]
        assert (tmp_path / "demo-output" / name / "report.html").is_file()
