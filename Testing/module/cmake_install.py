"""Install the extension with CMake, as Slicer's extension build does, and with a small package in Slicer's place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = Path("lib/Slicer/qt-scripted-modules")

CONFIG = """
set(Slicer_USE_FILE ${CMAKE_CURRENT_LIST_DIR}/UseSlicer.cmake)
set(Slicer_EXTENSION_GENERATE_CONFIG ${CMAKE_CURRENT_LIST_DIR}/empty.cmake)
set(Slicer_EXTENSION_CPACK ${CMAKE_CURRENT_LIST_DIR}/empty.cmake)
set(Slicer_QTSCRIPTEDMODULES_LIB_DIR lib/Slicer/qt-scripted-modules)
set(Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR lib/Slicer/qt-scripted-modules)
"""

# The real one runs ITK's platform checks, whose try_compile ends the configuration of a project without C++. Its macros
# copy each named file when the project is built, these when it is configured, which starts no process for each file;
# both install the whole folder of copies.
USE_FILE = """
try_compile(compiles ${CMAKE_BINARY_DIR}/check ${CMAKE_CURRENT_LIST_DIR}/check.cxx)

function(ctkMacroCompilePythonScript)
  cmake_parse_arguments(A "NO_INSTALL_SUBDIR" "TARGET_NAME;DESTINATION_DIR;INSTALL_DIR" "SCRIPTS;RESOURCES" ${ARGN})
  foreach(file ${A_SCRIPTS} ${A_RESOURCES})
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/${file} ${A_DESTINATION_DIR}/${file} COPYONLY)
  endforeach()
  install(DIRECTORY ${A_DESTINATION_DIR}/ DESTINATION ${A_INSTALL_DIR})
endfunction()

function(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(M "WITH_GENERIC_TESTS" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  ctkMacroCompilePythonScript(TARGET_NAME ${M_NAME} SCRIPTS "${M_SCRIPTS}" RESOURCES "${M_RESOURCES}"
    DESTINATION_DIR ${CMAKE_BINARY_DIR}/${Slicer_QTSCRIPTEDMODULES_LIB_DIR}
    INSTALL_DIR ${Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR} NO_INSTALL_SUBDIR)
endfunction()
"""


def cmake() -> str:
    """Return the CMake of the test extra, else the system's.

    Raises:
        FileNotFoundError: neither is there.
    """
    found = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if found is None:
        raise FileNotFoundError("The test needs CMake; pip install --editable '.[test]'.")
    return found


def install(folder: Path, source: Path = ROOT) -> Path:
    """Configure, build and install the extension.

    No file of it is compiled, so that the compilers are only declared to work, and none needs to be there.

    Args:
        folder: an empty folder to work in.
        source: the checkout.

    Returns:
        The folder in which Slicer would find the installed modules.

    Raises:
        RuntimeError: CMake ends with an error; the text is what it printed.
    """
    package = folder / "slicer"
    package.mkdir()
    (package / "SlicerConfig.cmake").write_text(CONFIG, encoding="utf-8")
    (package / "UseSlicer.cmake").write_text(USE_FILE, encoding="utf-8")
    (package / "check.cxx").write_text("int main() { return 0; }\n", encoding="utf-8")
    (package / "empty.cmake").touch()
    build, target = folder / "build", folder / "installed"
    program = cmake()
    compilers = [f"-DCMAKE_{name}_COMPILER={program}" for name in ("C", "CXX")]
    compilers += [f"-DCMAKE_{name}_COMPILER_WORKS=ON" for name in ("C", "CXX")]
    run(program, "-S", str(source), "-B", str(build), f"-DSlicer_DIR={package}", *compilers)
    run(program, "--build", str(build))
    run(program, "--install", str(build), "--prefix", str(target))
    return target / MODULES


def run(*command: str) -> None:
    """Run a command; RuntimeError with what it printed where it fails."""
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
