"""Load the compiled kernels where numba allows it, and keep what it compiled.

numba keeps compiled functions in files that it unpickles, so they lie in a folder that only the user may write to.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

_LOG = logging.getLogger(__name__)
_PACKAGE = __package__.partition(".")[0]
Kernels = Literal[
    "measures.descriptor_kernels",
    "measures.field_kernels",
    "measures.fold_kernels",
    "registration.kernels",
    "registration.search_kernels",
]
"""The modules of compiled functions."""


@functools.cache
def kernels(name: Kernels) -> ModuleType | None:
    """Return a module of compiled functions.

    Returns:
        None where numba is missing or cannot be loaded; the log says so.
    """
    if util.find_spec("numba") is None:
        _LOG.info("numba is not installed; torch takes its place, which gives the same answer more slowly.")
        return None
    try:
        import numba

        numba.config.CACHE_DIR = str(cache_folder())  # type: ignore[attr-defined]
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except Exception as error:  # numba refuses a numpy or a processor that it does not know in its own ways
        _LOG.warning("numba cannot be used (%s); torch takes its place, more slowly.", error)
        return None


@functools.cache
def cache_folder() -> Path:
    """Return the user's folder of compiled kernels; where none is safe, one that ends with this process."""
    folder = own_folder()
    return folder if folder is not None else Path(_temporary_folder().name)


def own_folder() -> Path | None:
    """Return the user's folder of compiled kernels, which nobody else may read or write; None where that cannot be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    folder = base / "MorphSeek" / "kernels"
    try:
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        if is_own(folder):
            return folder
        _LOG.warning("%s belongs to another user or can be written by others; it is not used for kernels.", folder)
    except OSError as error:
        _LOG.info("%s cannot be used for compiled kernels (%s).", folder, error.strerror)
    return None


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Make a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="morphseek-kernels-")


def is_own(folder: Path) -> bool:
    """Return whether a folder is the user's, and nobody else's to write or read."""
    if os.name != "posix":
        return True  # under the user's profile, whose permissions Windows sees to
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def compile_ahead() -> subprocess.Popen | None:
    """Start a process that compiles the kernels, so that the first registration does not wait for it.

    Returns:
        the process; None without numba, without a folder to keep its work in, or where that is already done.
    """
    if util.find_spec("numba") is None:
        return None
    folder = own_folder()
    if folder is None or (folder / completion_mark()).exists():
        return None
    command = [sys.executable, "-m", f"{_PACKAGE}.registration.compile_kernels"]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null)


def completion_mark() -> str:
    """Return the name of the empty file that says that these kernels were compiled with these versions."""
    room = Path(__file__).parent
    sources = [room.parent.joinpath(*name.split(".")).with_suffix(".py") for name in get_args(Kernels)]
    # numba compiles again where one of these has changed
    states = [(str(source), source.stat().st_mtime, source.stat().st_size) for source in sources]
    text = repr((states, sys.version, metadata.version("numba")))
    return f"compiled-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
