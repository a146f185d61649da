"""The documents: their links lead somewhere, their options and commands exist, their Python runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import MorphSeekLib
from MorphSeekLib.app.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "Resources" / "Docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """(page's name, code) of all code blocks of a language."""
    return [(page.name, m[2]) for page in PAGES for m in BLOCK.finditer(page.read_text("utf-8")) if m[1] == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_readme_is_a_page_and_a_half():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 9000


def test_every_page_is_in_the_site():
    listed = (ROOT / "Resources" / "Docs" / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"Docs/{page.name}" not in listed] == []


def test_the_reference_names_every_public_name():
    reference = (ROOT / "Resources" / "Docs" / "reference.md").read_text(encoding="utf-8")
    wanted = {f"::: MorphSeekLib.{MorphSeekLib._HOME[n]}.{n}" for n in MorphSeekLib.__all__ if n != "__version__"}
    assert set(re.findall(r"^::: \S+", reference, re.MULTILINE)) == wanted


def shell_lines() -> list[str]:
    lines = [line for _, code in blocks("") for line in code.splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?morphseek ", line)]


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_and_option_of_the_documents_exists(line):
    command = line.partition("#")[0].split()
    shown = CliRunner().invoke(app, [command[1], "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, line
    for word in command[2:]:
        if word.startswith("--"):
            assert word in shown.output, f"{line}: {word}"


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_of_the_documents_is_python_and_imports_what_there_is(page, code):
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "MorphSeekLib":
            for alias in node.names:
                assert hasattr(MorphSeekLib, alias.name), f"{page}: {alias.name}"


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    """On two tiny images in the place of the user's, with a small model in the place of the bundled one."""
    from cases import blob_grid, blob_image, blob_labels
    from test_registration import random_model

    labels = [blob_labels(seed, blob_grid()) for seed in (0, 1)]
    for name, volume, seed in (("fixed", labels[0], 0), ("moving", labels[1], 1)):
        MorphSeekLib.write_image(blob_image(volume, seed), tmp_path / f"{name}.nii.gz")
    random_model(tmp_path / "small.safetensors")
    [code] = [code for page, code in blocks("python") if page == "README.md"]
    monkeypatch.chdir(tmp_path)
    said: list[tuple] = []
    exec(code.replace('"brain-mr"', '"small.safetensors"'), {"print": lambda *words: said.append(words)})
    [(folded, points)] = said
    assert 0 <= folded <= 100
    assert points.shape == (1, 3)
