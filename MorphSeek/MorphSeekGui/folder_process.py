"""A process of the engine that works in a folder and may outlive Slicer.

The folder is the whole contract, so the work is found again after Slicer or the computer was restarted. The lock, not
the number of the process, says whether it runs: numbers are used again, and a lock is freed however its holder ends.

Neither slicer nor qt is imported.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from MorphSeekLib.protocol.run_folder import KEEP, LOG, STATUS, STOP, is_locked

from .engine_client import default_python, last_words, process_of_its_own
from .faults import Fault, FaultError

_START_SECONDS = 90.0  # after which a process that holds no lock has failed; torch is slow to import


class RunError(FaultError):
    """Work in a folder that cannot be prepared, started or ended."""


class FolderProcess:
    """A folder, and the process that works in it.

    Args:
        folder: it exists.
    """

    ALREADY: Fault
    NOT_STARTED: Fault

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._process: subprocess.Popen | None = None
        self._started = 0.0
        self._log_begin = 0  # of what the process that was started last wrote into log.txt

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.name

    # ------------------------------------------------------------------------------------------------- the process

    def launch(
        self,
        arguments: Sequence[str],
        keep: bool = False,
        python: str | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process.

        Args:
            arguments: of `morphseek`.
            keep: let it go on when Slicer is closed; see :meth:`keep`.
            python: the Python with the engine; Slicer's own by default.
            command: what to run instead of the engine's `morphseek`, for tests.
            environment: the variables for that Python, see :func:`process_of_its_own`.

        Raises:
            RunError: it runs already, or no process can be started.
        """
        if self.is_running():
            raise RunError(self.ALREADY, name=self.name)
        self.keep(keep)
        for name in (STOP, STATUS):
            (self.folder / name).unlink(missing_ok=True)
        command = list(command or [str(python or default_python()), "-m", "MorphSeekLib.app.cli"])
        try:
            with open(self.folder / LOG, "ab") as log:
                self._log_begin = log.tell()
                self._process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    **process_of_its_own(environment),
                )
        except OSError as problem:
            reason = problem.strerror or problem
            raise RunError(self.NOT_STARTED, program=command[0], reason=reason) from problem
        self._started = time.monotonic()

    def keep(self, on: bool) -> None:
        """Choose whether the work goes on without Slicer; may be changed while it runs."""
        if on:
            (self.folder / KEEP).touch()
        else:
            (self.folder / KEEP).unlink(missing_ok=True)

    @property
    def kept(self) -> bool:
        """See :meth:`keep`."""
        return (self.folder / KEEP).exists()

    def stop(self) -> None:
        """Ask it to stop soon; it keeps what is done."""
        (self.folder / STOP).touch()

    def release(self) -> None:
        """Let it go on without this Slicer if it is kept; else it stops."""
        if self._process is not None:
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            # nobody waits for a process that goes on; without this, Python warns when the object is deleted
            self._process.returncode = self._process.poll() or 0
            self._process = None
        if self.is_running() and not self.kept:
            self.stop()

    def is_running(self) -> bool:
        """Return whether a process holds the folder's lock."""
        return is_locked(self.folder)

    # --------------------------------------------------------------------------------------------- what it left

    def judge(self, running: bool, written: str) -> tuple[str, str]:
        """Return the state of the work, and the end of the log of a process that ended before it could say anything.

        Args:
            running: of :meth:`is_running`, asked before the status was read.
            written: the state that is written in the folder; "" where there is none.

        Returns:
            "new" (never started), "starting", "running", "stopping", "stopped", "interrupted" (its process was killed,
            or the computer went off), "failed" or "done"; and the last words, or "".
        """
        if running:
            return "stopping" if (self.folder / STOP).exists() else "running", ""
        code = self._process.poll() if self._process is not None else None
        if written in ("stopped", "failed", "done"):
            return written, ""
        if self._process is not None and code is None and time.monotonic() - self._started < _START_SECONDS:
            return "starting", ""  # the first lock is not taken yet, or the last word not written yet
        if self._process is not None and code not in (None, 0) and not written:
            return "failed", last_words(self.log(begin=self._log_begin))
        return "interrupted" if written or (self.folder / LOG).exists() else "new", ""

    def log(self, lines: int = 40, begin: int = 0) -> list[str]:
        """Return the end of its log, not further back than the byte ``begin``."""
        try:
            with open(self.folder / LOG, "rb") as file:
                file.seek(max(begin, file.seek(0, os.SEEK_END) - 200 * lines))
                return file.read().decode("utf-8", "replace").splitlines()[-lines:]
        except OSError:
            return []
