"""Write files that appear whole or not at all, remove what a killed process left, and check file names.

Whatever is being written has a temporary name, ``.morphseek-`` and a number, and beside it a lock file that the writing
process holds (``.morphseek-NUMBER.lock``). The system frees the lock when that process ends, however it ends, so that
the next one to write into the same folder knows what was left behind and removes it; nothing is removed by its age or
its name alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..protocol.errors import MorphSeekError
from ..protocol.lock import try_lock
from ..protocol.startup import shown

_PART = ".morphseek-"
_LOCK = ".lock"


def library_name(path: str | os.PathLike) -> str:
    """Return a file's name as SimpleITK takes it: UTF-8 in every locale. On any other name SimpleITK ends the process.

    Raises:
        MorphSeekError: the bytes of the name are not UTF-8.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise MorphSeekError(
            f"The name of {shown(path)} is not valid UTF-8, so it cannot be opened; rename the file or its folder."
        ) from None


def python_name(name: str) -> str:
    """Return a file's name that SimpleITK gave as Python takes it: :func:`library_name` backwards."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


@contextmanager
def linked(path: Path, ending: str) -> Iterator[str]:
    """Yield another name of a file, with another ending, for a library that goes by it."""
    with tempfile.TemporaryDirectory(prefix="morphseek-") as folder:
        other = Path(folder) / f"file{ending}"
        try:
            other.symlink_to(path.resolve())
        except OSError:  # Windows, without the right to
            shutil.copyfile(path, other)
        yield library_name(other)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file that appears whole or not at all.

    Yields:
        A name in the same folder, with the same endings in lower case, to write to; it takes the place of ``path`` when
        the block ends, and is removed when the block fails.

    Raises:
        MorphSeekError: the disk is full or the folder not writable (OSError and RuntimeError of the block, which is
            what SimpleITK and HDF5 raise, become this).
    """
    path = Path(path)
    library_name(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has this name", str(path))
        with _reserved(path.parent) as stem:
            ending = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
            part = path.with_name(f"{stem}{ending}")
            try:
                yield part
                os.replace(part, path)
            except RuntimeError as error:  # while what fills the disk is still there
                raise _unwritable(path, error) from error
    except OSError as error:
        raise _unwritable(path, error) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content at once, and make its folder if it is missing; on failure the old file stays.

    Raises:
        MorphSeekError: the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def output_folder(path: str | os.PathLike, owns: Collection[str] = (), seal: str = "") -> Iterator[Path]:
    """Write the files of a folder; they appear together or not at all.

    Args:
        path: the folder; made when it is missing.
        owns: names of files that an earlier run wrote there. Those that this one does not write are removed, so that
            the folder never mixes two results.
        seal: the file that says that the others belong together. An earlier one is removed before the first file
            moves and the new one moves last, so that a process that is killed in between leaves none.

    Yields:
        A temporary folder inside ``path`` to write to. Its files move up when the block ends; when it fails (or is
        cancelled) it is removed with everything made for it, and what was in ``path`` before stays.

    Raises:
        MorphSeekError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    library_name(path)
    missing = [p for p in (path, *path.parents) if not p.exists()]
    done = False
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _reserved(path) as stem:
            part = path / stem
            part.mkdir()
            yield part
            written = sorted(part.iterdir(), key=lambda file: (file.name == seal, file.name))
            for file in written:
                if (path / file.name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, "a folder has this name", str(path / file.name))
            if written and written[-1].name == seal:
                (path / seal).unlink(missing_ok=True)
            for name in set(owns) - {file.name for file in written}:
                (path / name).unlink(missing_ok=True)
            for file in written:
                os.replace(file, path / file.name)
        done = True
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if not done:
            for folder in missing:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def _reserved(folder: Path) -> Iterator[str]:
    """Hold a temporary name in a folder, after removing what killed processes left there.

    Yields:
        What the names of temporary files and folders must begin with; whatever does is removed at the end.
    """
    _remove_leftovers(folder)
    stem, file = _hold(folder)
    try:
        yield stem
    finally:
        _remove(folder, stem)
        file.close()
        (folder / f"{stem}{_LOCK}").unlink(missing_ok=True)


def _hold(folder: Path) -> tuple[str, IO]:
    """Make a lock file and take its lock; return the temporary name that it stands for, and the open file."""
    attempts = 0
    while True:
        stem = f"{_PART}{uuid.uuid4().hex}"
        lock = folder / f"{stem}{_LOCK}"
        file = open(lock, "x", encoding="ascii")  # noqa: SIM115 (it stays open as long as the name is held)
        attempts += 1
        # another process may take the new file for a leftover before it is locked; where none of three can be locked,
        # the file system has no locks, and nobody can take anything for a leftover
        if (try_lock(file) or attempts == 3) and _is_same(file, lock):
            return stem, file
        file.close()
        lock.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes that have ended left unfinished in a folder."""
    try:
        locks = [name for name in os.listdir(folder) if name.startswith(_PART) and name.endswith(_LOCK)]
    except OSError:
        return
    for name in locks:
        with contextlib.suppress(OSError):  # its owner has just finished, or another process removes it
            with open(folder / name, "r+", encoding="ascii") as file:
                if not try_lock(file):
                    continue
                _remove(folder, name.removesuffix(_LOCK))
            os.unlink(folder / name)


def _remove(folder: Path, stem: str) -> None:
    """Remove the temporary files and folders of one writer, but not its lock."""
    for name in os.listdir(folder):
        path = folder / name
        if not name.startswith(stem) or name == stem + _LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_same(file: IO, path: Path) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _unwritable(path: Path, error: Exception) -> MorphSeekError:
    """Return one sentence for a failed write."""
    folder = next(p for p in (path, *path.parents) if p.is_dir())
    path = Path(*(part for part in path.parts if not part.startswith(_PART)))  # the name that the user knows
    number = getattr(error, "errno", None)
    # SimpleITK and HDF5 do not always say why
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and shutil.disk_usage(folder).free < 1 << 16):
        return MorphSeekError(
            f"The disk is full: {path} could not be written; free some space or choose another folder."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "the writing failed"
    return MorphSeekError(f"{path} cannot be written ({reason.lower()}); choose a folder that you may write to.")
