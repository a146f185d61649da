"""The compiled kernels: where their cache lies, who fills it, and what happens without numba."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from importlib import util
from typing import get_args

import pytest
import torch
from cases import blob_grid, blob_image, blob_labels

from MorphSeekLib.io import compiled
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.pipeline import register

needs_numba = pytest.mark.skipif(util.find_spec("numba") is None, reason="numba is not installed")
posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture(autouse=True)
def fresh_answers():
    """Let each test find out anew; put back what the process knew, for the tests of other files."""
    functions = (compiled.kernels, compiled.cache_folder)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def kernel_folder(tmp_path, monkeypatch):
    """The folder of kernels, under a cache of the test's own; it is not there yet."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "MorphSeek" / "kernels"


@pytest.fixture
def started(monkeypatch):
    """The commands of processes that would have been started."""
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    return commands


@posix
def test_only_the_user_may_read_and_write_the_folder(kernel_folder):
    before = os.umask(0)
    try:
        assert compiled.cache_folder() == kernel_folder
    finally:
        os.umask(before)
    assert stat.S_IMODE(kernel_folder.stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o750])
def test_a_folder_that_others_may_use_is_refused(kernel_folder, mode, caplog):
    kernel_folder.mkdir(parents=True)
    kernel_folder.chmod(mode)
    folder = compiled.cache_folder()
    assert folder != kernel_folder
    assert compiled.is_own(folder)
    assert "can be written by others" in caplog.text


@posix
def test_a_folder_of_another_user_is_refused(kernel_folder, monkeypatch, caplog):
    kernel_folder.mkdir(parents=True, mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert compiled.cache_folder() != kernel_folder
    assert "belongs to another user" in caplog.text


@posix
def test_a_link_is_refused(kernel_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    kernel_folder.parent.mkdir()
    kernel_folder.symlink_to(elsewhere)
    assert compiled.own_folder() is None


def test_a_folder_that_cannot_be_made_is_a_line_in_the_log(kernel_folder, caplog):
    kernel_folder.parent.write_text("a file where the folder belongs")
    caplog.set_level(logging.INFO)
    assert compiled.cache_folder().is_dir()
    assert "cannot be used for compiled kernels" in caplog.text


def hide_numba(monkeypatch) -> None:
    """Let numba and the modules that need it seem missing."""
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in get_args(compiled.Kernels):
        monkeypatch.delitem(sys.modules, f"MorphSeekLib.{name}", raising=False)


def test_without_numba_a_registration_runs_by_torch_and_the_log_says_so(monkeypatch, caplog):
    hide_numba(monkeypatch)
    caplog.set_level(logging.INFO)
    fixed, moving = (blob_image(blob_labels(n, blob_grid()), n) for n in range(2))
    options = RegistrationOptions(inverse=False, search="on", fit_iterations=(4, 2))
    report = register(fixed, moving, None, options).report
    assert report["fit"]["kernels"] == f"torch {torch.__version__}"
    assert report["similarity"]["warped"] > report["similarity"]["aligned"]
    assert "numba is not installed" in caplog.text


def test_a_numba_that_cannot_be_loaded_is_a_warning(monkeypatch, tmp_path, caplog):
    hide_numba(monkeypatch)
    monkeypatch.delitem(sys.modules, "numba")
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compiled.kernels("registration.kernels") is None
    assert "Numba needs NumPy 2.3 or less" in caplog.text


@needs_numba
def test_kernels_are_compiled_ahead_where_none_are_there(kernel_folder, started):
    compiled.compile_ahead()
    assert [command[-1] for command in started] == ["MorphSeekLib.registration.compile_kernels"]


@needs_numba
def test_kernels_that_are_there_are_not_compiled_ahead(kernel_folder, started):
    kernel_folder.mkdir(parents=True, mode=0o700)
    (kernel_folder / compiled.completion_mark()).touch()
    assert compiled.compile_ahead() is None
    assert started == []


@needs_numba
def test_kernels_of_another_version_are_compiled_ahead(kernel_folder, started, monkeypatch):
    kernel_folder.mkdir(parents=True, mode=0o700)
    (kernel_folder / compiled.completion_mark()).touch()
    monkeypatch.setattr(compiled.metadata, "version", lambda name: "99")
    compiled.compile_ahead()
    assert len(started) == 1


@needs_numba
@posix
def test_nothing_is_compiled_ahead_without_a_folder_to_keep_it(kernel_folder, started):
    kernel_folder.mkdir(parents=True)
    kernel_folder.chmod(0o777)
    assert compiled.compile_ahead() is None
    assert started == []


def test_nothing_is_compiled_ahead_without_numba(kernel_folder, started, monkeypatch):
    hide_numba(monkeypatch)
    assert compiled.compile_ahead() is None
    assert started == []


@needs_numba
def test_compiling_ahead_leaves_the_mark(kernel_folder):
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernel_folder.parents[1]), "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-m", "MorphSeekLib.registration.compile_kernels"]
    subprocess.run(command, env=environment, check=True)
    assert (kernel_folder / compiled.completion_mark()).exists()
