"""A training run as Slicer sees it: a folder, and the process that works in it and may outlive Slicer.

The folder is the whole contract with the engine (:mod:`MorphSeekLib.protocol.run_folder`). Nothing else is remembered,
so a run is found again after Slicer or the computer was restarted. The lock, not the number of the process, says
whether it runs: numbers are used again, and a lock is freed however its holder ends.

Neither slicer nor qt is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from MorphSeekLib.protocol.options import TrainingOptions
from MorphSeekLib.protocol.run_folder import (
    KEEP,
    LOG,
    SETTINGS,
    STAGES,
    STATUS,
    STOP,
    HeldOut,
    curves_file,
    holder,
    is_locked,
    read_json,
)
from MorphSeekLib.protocol.settings import to_dict

from .engine_client import default_python, last_words, process_of_its_own
from .faults import Fault, FaultError

_START_SECONDS = 90.0  # after which a process that holds no lock has failed; torch is slow to import


class RunError(FaultError):
    """A run that cannot be made, started or ended."""


@dataclass
class RunStatus:
    """Where a run stands.

    Attributes:
        state: "new" (never started), "starting", "running", "stopping", "stopped", "interrupted" (its process was
            killed, or the computer went off), "failed" or "done".
        stage: "features", "warmup", "finetune", "evaluate", "final" or "".
        fraction: share that is done, 0 to 1.
        message: the engine's sentence for the user; "" when its process did not get that far.
        last_words: the end of the log of a process that ended before it could write its status.
        held_out: figures before and after on the held-out pairs, when done.
        model: the file of the finished model, when done.
    """

    state: str
    stage: str = ""
    fraction: float = 0.0
    message: str = ""
    last_words: str = ""
    held_out: HeldOut = field(default_factory=HeldOut)
    model: str = ""

    @property
    def alive(self) -> bool:
        """Whether a process is at work."""
        return self.state in ("starting", "running", "stopping")

    @property
    def resumable(self) -> bool:
        """Whether it can be started or resumed."""
        return self.state in ("new", "stopped", "interrupted", "failed")


class TrainingRun:
    """One run's folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._process: subprocess.Popen | None = None
        self._started = 0.0
        self._log_begin = 0  # of what the process that was started last wrote into log.txt
        self._curves: dict[str, _Lines] = {stage: _Lines(curves_file(self.folder, stage)) for stage in STAGES}

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.settings().get("name") or self.folder.name

    def settings(self) -> Mapping[str, Any]:
        """Return run.json; empty if it cannot be read."""
        return read_json(self.folder / SETTINGS)

    # ------------------------------------------------------------------------------------------------- the process

    def start(
        self,
        keep: bool = False,
        python: str | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it, or resume it.

        Args:
            keep: let it go on when Slicer is closed; see :meth:`keep`.
            python: the Python with the engine; Slicer's own by default.
            command: what to run instead of the engine's `morphseek`, for tests.
            environment: the variables for that Python, see :func:`process_of_its_own`.

        Raises:
            RunError: it runs already, or no process can be started.
        """
        if self.is_running():
            raise RunError(Fault.RUN_ALREADY, name=self.name)
        self.keep(keep)
        for name in (STOP, STATUS):
            (self.folder / name).unlink(missing_ok=True)
        command = list(command or [str(python or default_python()), "-m", "MorphSeekLib.app.cli"])
        try:
            with open(self.folder / LOG, "ab") as log:
                self._log_begin = log.tell()
                self._process = subprocess.Popen(
                    [*command, "train", str(self.folder), "--while-open"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    **process_of_its_own(environment),
                )
        except OSError as problem:
            reason = problem.strerror or problem
            raise RunError(Fault.RUN_NOT_STARTED, program=command[0], reason=reason) from problem
        self._started = time.monotonic()

    def keep(self, on: bool) -> None:
        """Choose whether the training goes on without Slicer; may be changed while it runs."""
        if on:
            (self.folder / KEEP).touch()
        else:
            (self.folder / KEEP).unlink(missing_ok=True)

    @property
    def kept(self) -> bool:
        """See :meth:`keep`."""
        return (self.folder / KEEP).exists()

    def stop(self) -> None:
        """Ask it to stop after the iteration under way; it keeps its state."""
        (self.folder / STOP).touch()

    def kill(self) -> None:
        """End its process at once; it resumes from the last state it saved.

        Raises:
            RunError: it runs on another computer.
        """
        held = holder(self.folder) if self.is_running() else {}
        if held and held.get("host") != socket.gethostname():
            raise RunError(Fault.RUN_ELSEWHERE, host=held.get("host"))
        number = held.get("pid")
        if number is None and self._process is not None and self._process.poll() is None:
            number = self._process.pid
        if number is None:
            return
        if sys.platform == "win32":
            subprocess.run(
                ["taskkill", "/F", "/T", "/PID", str(number)],
                capture_output=True,
                check=False,
                creationflags=subprocess.CREATE_NO_WINDOW,
            )
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)

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
        """Return whether a process holds the run's lock."""
        return is_locked(self.folder)

    # --------------------------------------------------------------------------------------------- what it left

    def status(self) -> RunStatus:
        """Return where it stands, by its folder and, if this Slicer started it, by its process."""
        running = self.is_running()
        values = read_json(self.folder / STATUS)
        known = {name: values[name] for name in RunStatus.__dataclass_fields__ if name in values}
        status = RunStatus(**({"state": "new"} | known))
        if running:
            status.state = "stopping" if (self.folder / STOP).exists() else "running"
            return status
        code = self._process.poll() if self._process is not None else None
        if status.state in ("stopped", "failed", "done"):
            return status
        if self._process is not None and code is None and time.monotonic() - self._started < _START_SECONDS:
            # the first lock is not taken yet, or the last word not written yet
            status.state, status.message = "starting", ""
        elif self._process is not None and code not in (None, 0) and not values:
            status.state, status.last_words = "failed", last_words(self.log(begin=self._log_begin))
        elif values or self._begun():
            status.state, status.message = "interrupted", ""
        return status

    def curves(self, stage: str) -> list[dict[str, float]]:
        """Return a row of figures per iteration; what was read before is not read again."""
        return self._curves[stage].read()

    def log(self, lines: int = 40, begin: int = 0) -> list[str]:
        """Return the end of its log, not further back than the byte ``begin``."""
        try:
            with open(self.folder / LOG, "rb") as file:
                file.seek(max(begin, file.seek(0, os.SEEK_END) - 200 * lines))
                return file.read().decode("utf-8", "replace").splitlines()[-lines:]
        except OSError:
            return []

    def _begun(self) -> bool:
        return (self.folder / LOG).exists()


def create_run(root: Path | str, options: TrainingOptions) -> TrainingRun:
    """Create the folder of a run under ``root``, named after the model, with its run.json.

    Args:
        root: where runs are kept; made when missing.
        options: what to train.

    Raises:
        RunError: the folder cannot be written.
    """
    stem = re.sub(r"[^\w.-]+", "-", options.name).strip("-.") or "training"
    folder, number = Path(root) / f"{time.strftime('%Y-%m-%d')}-{stem}", 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{time.strftime('%Y-%m-%d')}-{stem}-{number}")
    try:
        folder.mkdir(parents=True)
        (folder / SETTINGS).write_text(json.dumps(to_dict(options), indent=1), encoding="utf-8")
    except OSError as problem:
        raise RunError(Fault.RUN_FOLDER, folder=folder, reason=problem.strerror) from problem
    return TrainingRun(folder)


def find_runs(*roots: Path | str) -> list[TrainingRun]:
    """Return all runs in folders, the newest first: the panel's, and those of `morphseek train` beside their models."""
    found = {path.parent for root in roots for path in Path(root).glob(f"*/{SETTINGS}")}
    return [TrainingRun(f) for f in sorted(found, key=lambda f: (f / SETTINGS).stat().st_mtime_ns, reverse=True)]


class _Lines:
    """A growing file of JSON lines, read bit by bit; a resumed run writes again what it had beyond its state."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0
        self.rows: list[dict[str, float]] = []

    def read(self) -> list[dict[str, float]]:
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self.rows, self._offset = [], 0
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return self.rows
        whole = new[: new.rfind(b"\n") + 1]  # the last line may be half written
        rows = [json.loads(line) for line in whole.splitlines()]
        if rows and self.rows and rows[0]["iteration"] != self.rows[-1]["iteration"] + 1:
            self.rows, self._offset = [], 0  # written again meanwhile
            return self.read()
        self._offset += len(whole)
        self.rows += rows
        return self.rows
