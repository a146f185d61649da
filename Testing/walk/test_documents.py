"""The documents: their links lead somewhere, their code runs, what they name exists, every function has its entry.

All code blocks of README and Resources/Docs are run: those of the how-to pages by test_how_to.py, the others here, in a
folder that holds what they assume. The bundled models, which are slow on one thread, are replaced by a small one, and
trainings take two iterations. A block that cannot be run says why in a comment before it, and stands in ``NOT_RUN``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import SimpleITK as sitk
import torch
from blocks import DOCS, HOW_TO, PAGES, ROOT, Block, blocks
from cases import write_dataset
from test_registration import random_model
from typer.testing import CliRunner

import MorphSeekLib
from MorphSeekLib.app.cli import app
from MorphSeekLib.app.settings_file import load
from MorphSeekLib.backbones import build_backbone
from MorphSeekLib.protocol.settings import override

BLOCKS = [block for page in PAGES if page not in HOW_TO for block in blocks(page)]
NOT_RUN = {
    "morphseek batch --fixed template.nii.gz --moving 'scans/*/T1.nii.gz' -o study",
    "morphseek batch --bids /data/study --suffix T1w --longitudinal -o study",
    "morphseek batch pairs.csv -o /shared/study --cluster tls://scheduler:8786 --cluster-security tls.json",
    "morphseek batch pairs.csv -o /shared/study --scheduler-file /shared/scheduler.json",
    "morphseek evaluate dataset.json --model site.safetensors --out figures.json --scheduler-file "
    "/shared/scheduler.json",
    "python Testing/benchmarks/hippocampus.py gain ../shared/data/hippocampus/dataset.json --runs gain",
    "python Testing/benchmarks/main_table.py main-table --data ../shared/data --out main-table",
    "python Testing/benchmarks/without_model.py --out test-pairs.json",
}
NAMED_FILE = re.compile(r"`((?:MorphSeekLib|MorphSeek|Resources|Testing)/[\w./-]+)`")
NAMED_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OF_OTHER_PROGRAMS = {
    *("--logdir", "--nthreads"),
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"),  # torchrun
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal"),  # SLURM
}
SHORT = ["--iterations", "2"]
LIGHTER = {"register": ["--model", "small.safetensors"], "warmup": SHORT, "finetune": SHORT, "spac": SHORT}
TRAINED_SHORTLY = ["--options", "short.json"]
SETTINGS = """
preprocessing = { spacing = [2.5, 2.5, 2.5] }
[model.backbone_settings]
encoder = [8, 8]
decoder = [8, 8]
extra = [8]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the documents assume: two images with labels, a data set, settings, models, official weights."""
    folder = tmp_path_factory.mktemp("documents")
    write_dataset(folder)
    for number, name in enumerate(("fixed", "moving")):
        shutil.copy(folder / f"image_{number}.nii.gz", folder / f"{name}.nii.gz")
        shutil.copy(folder / f"label_{number}.nii.gz", folder / f"{name}-labels.nii.gz")
    for number in range(4):
        for kind in ("image", "label"):
            (folder / "cases" / f"{kind}s").mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{kind}_{number}.nii.gz", folder / "cases" / f"{kind}s" / f"{number}.nii.gz")
    for block in blocks(DOCS / "training.md"):
        if block.file:
            (folder / block.file).write_text(block.text)
    (folder / "short.json").write_text('{"iterations": 2, "steps": 1, "trajectories": 2, "device": "cpu"}')
    (folder / "settings.toml").write_text(SETTINGS)
    (folder / "brain.toml").write_text('model = "small.safetensors"\nsearch = "off"\nfit = "off"\n')
    (folder / "pairs.csv").write_text("name,fixed,moving\nfirst,fixed.nii.gz,moving.nii.gz\n")
    for name in ("points", "fixed", "moving"):
        (folder / f"{name}.csv").write_text("label,x,y,z\ntip,2.0,-4.0,1.0\nbase,-5.0,3.0,2.0\n")
    sitk.WriteTransform(sitk.Euler3DTransform((0.0, 0.0, 0.0), 0.02, 0.0, 0.0), str(folder / "rigid.tfm"))
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 0.0, -1.0)), str(folder / "warp.h5"))
    random_model(folder / "small.safetensors")
    torch.save(official_names(build_backbone("lapirn").state_dict()), folder / "official.pt")
    return folder


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return LapIRN's weights by the names that its official code gives them."""
    renamed = {}
    for name, value in state.items():
        _, level, rest = name.split(".", 2)
        rest = re.sub(r"^enter\b", "input_encoder_lvl1", rest)
        rest = re.sub(r"^down\b", "down_conv", rest)
        rest = re.sub(r"^join\b", "output_lvl1.0", rest)
        rest = re.sub(r"^out\b", "output_lvl1.2", rest)
        rest = re.sub(r"^blocks\.(\d+)", lambda number: f"resblock_group_lvl1.{2 * int(number[1])}", rest)
        renamed[("model_lvl2.model_lvl1.", "model_lvl2.", "")[int(level)] + rest] = value
    return renamed


def small(code: str) -> str:
    """Return code with a small model in place of the bundled one, and two iterations in place of an hour."""
    code = code.replace("brain-mr", "small.safetensors").replace(" --minutes 60", "")
    return code.replace("minutes=60", "minutes=None, iterations=2")


def of_language(language: str, page: str = "") -> list[Block]:
    """Return the blocks of a language that are run, of one page or of all."""
    return [b for b in BLOCKS if b.language == language and not b.reason and (not page or b.page == page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HOW_TO], ids=lambda page: page.name)
def test_files_and_options_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    assert [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()] == []
    assert set(NAMED_OPTION.findall(text)) - all_options() - OF_OTHER_PROGRAMS == set()


@cache
def all_options() -> set[str]:
    """Return the options of all commands, and of the benchmarks that the pages name."""
    commands = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    shown = [CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).output for name in commands]
    shown += [path.read_text(encoding="utf-8") for path in (ROOT / "Testing" / "benchmarks").glob("*.py")]
    return {option for text in shown for option in NAMED_OPTION.findall(text)}


def test_the_readme_is_a_page_and_a_half():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 9000


def test_every_block_is_run_or_says_why_not():
    for block in BLOCKS:
        assert block.language in ("sh", "python", "text") or block.file, f"{block.page}:\n{block.text}"
    fences = sum(page.read_text(encoding="utf-8").count("\n```") for page in PAGES)
    assert fences == 2 * sum(len(blocks(page)) for page in PAGES), "a fence that is not recognized as a block"
    not_run = [block for block in BLOCKS if block.reason and "#SBATCH" not in block.text]
    assert {command for block in not_run for command in block.commands} == NOT_RUN


@pytest.mark.parametrize("block", of_language("sh"), ids=lambda block: f"{block.page}: {block.commands[0]}")
def test_shell_commands_of_a_page_run(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for command in block.commands:
        words = shlex.split(small(command).removeprefix(".venv/bin/"))
        if words[0] == "make":  # these run the demo and this very test: here it must do that make knows them
            done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            continue
        assert words[0] == "morphseek", command
        more = TRAINED_SHORTLY if words[1] == "train" and "--out" in words else LIGHTER.get(words[1], [])
        done = CliRunner().invoke(app, words[1:] + more)
        assert done.exit_code == 0, f"{command}\n{done.output}"


@pytest.mark.parametrize("block", [b for b in of_language("python") if b.page != "slicer.md"], ids=lambda b: b.page)
def test_python_of_a_page_runs(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree(results(folder), "result", dirs_exist_ok=True)
    code = small(block.text).replace('load(TrainingConfig, "settings.toml")', "shortest")
    printed: list[tuple] = []
    exec(code, {"print": lambda *words: printed.append(words), "shortest": shortest()})
    assert printed


def results(folder: Path) -> Path:
    """Return a folder with the results of a registration, made once."""
    made = folder / "made"
    if not made.exists():
        options = ["-o", str(made), "--preset", "fast", *LIGHTER["register"]]
        done = CliRunner().invoke(app, ["register", "fixed.nii.gz", "moving.nii.gz", *options])
        assert done.exit_code == 0, done.output
    return made


def shortest() -> MorphSeekLib.TrainingConfig:
    """Return the settings of the fixture ``folder``, with two iterations."""
    return override(load(MorphSeekLib.TrainingConfig, "settings.toml"), "training", iterations=2)


def test_python_of_the_slicer_page_runs(folder, monkeypatch):
    """In the console of the stand-in for Slicer, with a worker process."""
    pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
    pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")
    import SlicerStandIn

    monkeypatch.syspath_prepend(ROOT / "MorphSeek")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Path, "home", lambda: folder)  # where batches are kept
    application = SlicerStandIn.start()
    application.fresh()
    printed: list[tuple] = []
    with application.qt.launcher.launched():
        import slicer
        import worlds

        world = worlds.make_world("upright")
        atlas = worlds.add_volume("MorphSeekFixed", world.fixed)
        worlds.add_volume("MorphSeekMoving", world.moving)
        scan = worlds.add_volume("Scan", world.moving)
        labels = MorphSeekLib.Volume(world.moving_labels, world.moving.grid)
        worlds.add_volume("Labels", labels, kind="vtkMRMLLabelMapVolumeNode")
        console = {"getNode": slicer.util.getNode, "atlas": atlas, "scans": [scan]}
        [block] = of_language("python", "slicer.md")
        code = block.text.replace("brain-mr", str(folder / "small.safetensors"))
        exec(code, console | {"print": lambda *words: printed.append(words)})
        application.unload()
    assert application.take_errors() == []
    [[folded], [name, outcome]] = printed
    assert name == "Scan"
    assert all(isinstance(percent, int | float) for percent in (folded, outcome)), printed


def documented(module: ModuleType) -> list[str]:
    """Return the full names of the public functions and classes that a module defines."""
    return [
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> set[str]:
    """The names that have an entry in the site, which is built without a warning."""
    pytest.importorskip("mkdocs", reason="needs the documents' tools: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", DOCS / "mkdocs.yml", "-d", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (folder / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(index).decode().splitlines()}


def test_every_public_name_has_its_entry(site):
    homes = {f"MorphSeekLib.{home}.{name}" for name, home in MorphSeekLib._HOME.items()}
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: (\S+)", page, re.MULTILINE)) == homes
    assert homes - site == set()


def test_every_function_has_its_entry(site):
    missing = []
    for info in pkgutil.walk_packages(MorphSeekLib.__path__, "MorphSeekLib."):
        if not info.ispkg:
            missing += [name for name in documented(importlib.import_module(info.name)) if name not in site]
    assert missing == []


def test_every_page_is_in_the_site():
    listed = (DOCS / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"Docs/{page.relative_to(DOCS).as_posix()}" not in listed] == []
