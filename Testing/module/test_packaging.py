"""The extension's descriptions agree, what they name is there, and its parts find each other once installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cmake_install import install

ROOT = Path(__file__).resolve().parents[2]


def cmake_values() -> dict[str, str]:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    return dict(re.findall(r'set\(EXTENSION_(\w+) "([^"]*)"\)', text))


def s4ext_values() -> dict[str, str]:
    lines = (ROOT / "MorphSeek.s4ext").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


def test_the_descriptions_agree():
    cmake, s4ext = cmake_values(), s4ext_values()
    entry = json.loads((ROOT / "MorphSeek.json").read_text(encoding="utf-8"))
    for name in ("homepage", "category", "contributors", "description", "iconurl", "screenshoturls", "depends"):
        assert s4ext[name] == cmake[name.upper()], name
    assert entry["category"] == cmake["CATEGORY"]
    assert " ".join(entry["build_dependencies"]) == cmake["DEPENDS"]
    assert (entry["scm_url"], entry["scm_revision"]) == (s4ext["scmurl"], s4ext["scmrevision"])
    assert (entry["build_subdirectory"], str(entry["tier"])) == (s4ext["build_subdirectory"], s4ext["tier"])
    # the catalogue's schema v1.0.2 knows no other keys
    known = {"category", "scm_url", "scm_revision", "scm_type", "build_dependencies", "dicom_support_rule"}
    assert set(entry) <= known | {"$schema", "build_subdirectory", "enabled", "tier"}


def test_pictures_and_license_are_there():
    cmake = cmake_values()
    for url in [cmake["ICONURL"], *cmake["SCREENSHOTURLS"].split()]:
        path = ROOT / url.partition("/main/")[2]
        assert path.read_bytes().startswith(b"\x89PNG"), path
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_installed_module_finds_the_engine_beside_itself(tmp_path):
    laid = install(tmp_path)
    code = "from MorphSeekGui import engine_root; print(engine_root())"
    found = subprocess.run([sys.executable, "-c", code], cwd=laid, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()) == laid.resolve()
    code = "from MorphSeekLib.protocol.startup import find; print(find('brain-mr'), find('hippocampus', 'recipe'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=laid, check=True, capture_output=True, text=True).stdout
    assert all(Path(file).is_relative_to(laid.resolve()) for file in found.split())


def test_a_project_without_languages_is_refused_as_slicer_refuses_it(tmp_path):
    """UseSlicer.cmake runs checks of ITK that compile."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16.3...3.28.0)\nproject(Any LANGUAGES NONE)\n"
        "find_package(Slicer REQUIRED)\ninclude(${Slicer_USE_FILE})\n"
    )
    with pytest.raises(RuntimeError, match="only for enabled languages"):
        install(tmp_path, tmp_path / "source")
