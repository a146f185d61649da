"""Whether numba's kernels can be used, and where what it compiled is kept.

numba keeps compiled functions in files that it unpickles, so they lie in a folder of the user's own that nobody else
may write to.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path
from types import ModuleType

_LOG = logging.getLogger(__name__)


@functools.cache
def kernels(name: str) -> ModuleType | None:
    """Return a module of compiled functions, "kernels" or "search_kernels".

    Returns:
        None where numba is missing or cannot be loaded, which the log says.
    """
    if util.find_spec("numba") is None:
        _LOG.info("numba is not installed; search and fit use torch, which gives the same answer more slowly.")
        return None
    try:
        import numba

        numba.config.CACHE_DIR = str(cache_folder())  # type: ignore[attr-defined]
        return importlib.import_module(f".{name}", __package__)
    except Exception as error:  # numba refuses a numpy or a processor that it does not know in its own ways
        _LOG.warning("numba cannot be used (%s); torch takes its place, more slowly.", error)
        return None


@functools.cache
def cache_folder() -> Path:
    """Return the folder of compiled kernels, which only the user may read and write; a new one where that cannot be."""
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
        _LOG.warning("%s belongs to somebody else, or others may write to it; kernels are compiled anew.", folder)
    except OSError as error:
        _LOG.info("%s cannot be made (%s); kernels are compiled anew.", folder, error.strerror)
    return Path(tempfile.mkdtemp(prefix="morphseek-kernels-"))


def is_own(folder: Path) -> bool:
    """Return whether a folder is the user's, and nobody else's to write or read."""
    if os.name != "posix":
        return True  # under the user's profile, whose permissions Windows sees to
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def compile_ahead() -> subprocess.Popen | None:
    """Start a process that compiles the kernels, so that the first user does not wait for it.

    Returns:
        the process; None without numba, or where they are there.
    """
    if util.find_spec("numba") is None or any(cache_folder().rglob("*.nbc")):
        return None
    command = [sys.executable, "-m", __name__.replace("compiled", "compile_kernels")]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
