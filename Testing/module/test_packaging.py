"""The extension's descriptions agree, what they name is there, and CMake takes every file to where it is looked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_pictures_and_licence_are_there():
    cmake = cmake_values()
    for url in [cmake["ICONURL"], *cmake["SCREENSHOTURLS"].split()]:
        path = ROOT / url.partition("/main/")[2]
        assert path.read_bytes().startswith(b"\x89PNG"), path
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


STAND_IN = """
set(Slicer_USE_FILE ${CMAKE_CURRENT_LIST_DIR}/empty.cmake)
set(Slicer_EXTENSION_GENERATE_CONFIG ${CMAKE_CURRENT_LIST_DIR}/empty.cmake)
set(Slicer_EXTENSION_CPACK ${CMAKE_CURRENT_LIST_DIR}/empty.cmake)
set(Slicer_QTSCRIPTEDMODULES_LIB_DIR lib/Slicer/qt-scripted-modules)
function(ctkMacroCompilePythonScript)
  cmake_parse_arguments(A "NO_INSTALL_SUBDIR" "TARGET_NAME;DESTINATION_DIR;INSTALL_DIR" "SCRIPTS;RESOURCES" ${ARGN})
  foreach(file ${A_SCRIPTS} ${A_RESOURCES})
    get_filename_component(folder ${file} DIRECTORY)
    file(COPY ${CMAKE_CURRENT_SOURCE_DIR}/${file} DESTINATION ${A_DESTINATION_DIR}/${folder})
  endforeach()
endfunction()
function(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(M "WITH_GENERIC_TESTS" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  ctkMacroCompilePythonScript(TARGET_NAME ${M_NAME} SCRIPTS ${M_SCRIPTS} RESOURCES ${M_RESOURCES}
    DESTINATION_DIR ${CMAKE_BINARY_DIR}/${Slicer_QTSCRIPTEDMODULES_LIB_DIR})
endfunction()
"""


def test_cmake_lays_out_what_the_module_looks_for(tmp_path):
    """With a Slicer package that only copies: the layout is Slicer's (SlicerMacroBuildScriptedModule.cmake)."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake (pip install cmake)")
    package = tmp_path / "slicer"
    package.mkdir()
    (package / "SlicerConfig.cmake").write_text(STAND_IN)
    (package / "empty.cmake").touch()
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DSlicer_DIR={package}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    laid = tmp_path / "build/lib/Slicer/qt-scripted-modules"
    wanted = {p.relative_to(ROOT) for p in (ROOT / "MorphSeekLib").rglob("*") if p.suffix in (".py", ".j2")}
    wanted |= {p.relative_to(ROOT) for p in (ROOT / "Resources/Checkpoints").glob("*.safetensors")}
    wanted |= {p.relative_to(ROOT) for p in (ROOT / "Resources/Benchmarks").glob("*.toml")}
    module = ROOT / "MorphSeek"
    wanted |= {p.relative_to(module) for p in module.rglob("*") if p.suffix in (".py", ".ui", ".svg", ".png")}
    wanted.add(Path("Resources/requirements.txt"))
    assert {str(p) for p in wanted if not (laid / p).is_file()} == set()
    code = "from MorphSeekGui.engine_client import engine_root; print(engine_root())"
    found = subprocess.run([sys.executable, "-c", code], cwd=laid, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()) == laid.resolve(), "the module finds the engine beside itself"
