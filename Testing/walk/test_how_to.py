"""The how-to pages, done as they say in a copy of the checkout: each addition appears where a user would see it.

A block with a file's name is that file, or, as a diff, a change of it; shell blocks are run. The copy holds what the
pages assume: a data set ``cases/dataset.json``, images ``fixed.nii.gz`` and ``moving.nii.gz``, a model
``start.safetensors``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blocks import DOCS, HOW_TO, ROOT, Block, blocks
from cases import write_dataset
from kernel_cache import lend_kernels
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_registration import random_model

from MorphSeekLib import load_model, read_image, register
from MorphSeekLib.protocol.startup import read_header

COPIED = ("MorphSeekLib", "MorphSeek", "Resources", "Testing", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("results", "Screenshots", "Docs", "__pycache__", "*.pyc")
SHELL = f"""set -euo pipefail
python() {{ "{sys.executable}" "$@"; }}
morphseek() {{ python -m MorphSeekLib.app.cli "$@"; }}
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What the pages assume."""
    folder = tmp_path_factory.mktemp("given")
    write_dataset(folder / "cases", 3)
    for seed, name in enumerate(("fixed", "moving")):
        shutil.copy(folder / "cases" / f"image_{seed}.nii.gz", folder / f"{name}.nii.gz")
    random_model(folder / "start.safetensors")
    return folder


@pytest.fixture
def checkout(given, tmp_path) -> Path:
    """A copy of the checkout to extend."""
    copy = tmp_path / "checkout"
    shutil.copytree(given, copy)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, copy / name)
    lend_kernels(copy / "MorphSeekLib")
    return copy


def sh(checkout: Path, commands: str, code: int = 0) -> str:
    """Run shell commands in the copy; return what they print."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the copy is compiled once, not once for each command
    done = subprocess.run(
        ["bash", "-c", SHELL + commands], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{commands}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert " skipped" not in done.stdout, done.stdout
    return done.stdout + done.stderr


def change(file: Path, diff: str) -> None:
    """Apply a diff without line numbers: what it keeps and takes away stands exactly once in the file."""
    lines = diff.splitlines(keepends=True)
    assert all(line[0] in " +-\n" for line in lines), f"{file.name}: not a diff"
    before, after = ("".join(line[1:] or "\n" for line in lines if line[0] != sign) for sign in "+-")
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file} has {text.count(before)} times\n{before}"
    file.write_text(text.replace(before, after), encoding="utf-8")


def follow(checkout: Path, page: str) -> None:
    """Do what a page says."""
    for block in blocks(DOCS / "extend" / page):
        do(checkout, block)


def do(checkout: Path, block: Block) -> None:
    """Do what a block says."""
    assert block.reason == "", "everything in a how-to is run"
    if block.language == "sh":
        sh(checkout, block.text)
        return
    file = checkout / block.file
    assert block.file, f"{block.page}: a block without its file's name\n{block.text}"
    if block.language == "diff":
        change(file, block.text)
    else:
        assert not file.exists(), f"{block.page}: {block.file} is there already"
        file.write_text(block.text, encoding="utf-8")


def seen_in_the_panel(checkout: Path, test: str) -> None:
    """Run a test of seen_in_the_panel.py on the copy's module, on the stand-in for Slicer's windows."""
    shutil.copy(ROOT / "Testing" / "walk" / "seen_in_the_panel.py", checkout / "Testing" / "module" / "test_seen.py")
    sh(checkout, f"python -m pytest Testing/module/test_seen.py::{test}")


def test_every_how_to_page_is_followed():
    followed = {name.removeprefix("test_").replace("_", "-") for name in globals()}
    assert [page.stem for page in HOW_TO if page.stem not in followed] == []


def test_every_python_file_of_the_pages_is_formatted_as_this_project(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "MorphSeekLib", tmp_path / "MorphSeekLib", ignore=LEFT_OUT)
    for page in HOW_TO:
        for block in blocks(page):
            if block.language == "python":
                (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_backbone(checkout):
    follow(checkout, "backbone.md")
    model = read_header(checkout / "shallow.safetensors")["model"]
    assert (model["backbone"], model["backbone_settings"]) == ("shallow", {"width": 8})
    seen_in_the_panel(checkout, "test_a_backbone_is_in_the_list")


def test_reward(checkout):
    follow(checkout, "reward.md")
    settings = read_header(checkout / "smooth.safetensors")["provenance"]["settings"]
    assert settings["reward"]["weights"]["smoothness"] == 0.1
    (checkout / "smooth.toml").write_text("[reward.weights]\nsmothness = 1.0\n")
    command = "morphseek finetune cases/dataset.json --init start.safetensors --config smooth.toml --out x.safetensors"
    assert "smoothness" in sh(checkout, command, code=2).replace("\n", " ")


def test_loss(checkout):
    follow(checkout, "loss.md")
    events = EventAccumulator(str(checkout / "bending.safetensors.log")).Reload()
    [curve] = [tag for tag in events.Tags()["scalars"] if tag.endswith("bending")]
    assert len(events.Scalars(curve)) >= 1


def test_similarity(checkout):
    follow(checkout, "similarity.md")
    assert "ngf (across modalities)" in sh(checkout, "morphseek register --help")
    report = json.loads((checkout / "by-edges" / "report.json").read_text())
    assert report["fit"]["similarity"] == "ngf"
    (checkout / "ngf.toml").write_text(
        '[loss]\nsimilarity = "ngf"\n[training]\niterations = 2\n[preprocessing]\nspacing = [2.5, 2.5, 2.5]\n'
        "[model.backbone_settings]\nencoder = [8, 8]\ndecoder = [8, 8]\nextra = [8]\n"
    )
    sh(checkout, "morphseek warmup cases/dataset.json --config ngf.toml --out ngf.safetensors")
    seen_in_the_panel(checkout, "test_a_similarity_is_in_both_lists")


def test_panel_control(checkout):
    """The page's own test opens the panel and uses the control."""
    follow(checkout, "panel-control.md")


def test_file_format(checkout):
    follow(checkout, "file-format.md")
    images = [read_image(checkout / f"{name}.nii.gz") for name in ("fixed", "moving")]
    for name, image in zip(("fixed", "moving"), images, strict=True):
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.grid.affine
        np.savez(checkout / f"{name}.npz", image=image.data.numpy(), affine=affine)
    sh(checkout, "morphseek register fixed.npz moving.npz -o result --model start.safetensors")
    report = json.loads((checkout / "result" / "report.json").read_text())
    same = register(*images, load_model(checkout / "start.safetensors", "cpu"))
    assert report["similarity"] == pytest.approx(same.report["similarity"])
