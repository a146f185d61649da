"""A training run as Slicer sees it: a folder, and the process that works in it and may outlive Slicer.

The folder is the whole contract with the engine (:mod:`MorphSeekLib.protocol.run_folder`). Neither slicer nor qt is
imported.
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
from MorphSeekLib.protocol.run_folder import SETTINGS, STAGES, STATUS, HeldOut, curves_file, holder, read_json
from MorphSeekLib.protocol.settings import to_dict

from .faults import Fault
from .folder_process import FolderProcess, RunError


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


class TrainingRun(FolderProcess):
    """One run's folder."""

    ALREADY, NOT_STARTED = Fault.RUN_ALREADY, Fault.RUN_NOT_STARTED

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
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
            keep, python, command, environment: as for :meth:`FolderProcess.launch`.

        Raises:
            RunError: it runs already, or no process can be started.
        """
        self.launch(["train", str(self.folder), "--while-open"], keep, python, command, environment)

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

    # --------------------------------------------------------------------------------------------- what it left

    def status(self) -> RunStatus:
        """Return where it stands, by its folder and, if this Slicer started it, by its process."""
        running = self.is_running()
        values = read_json(self.folder / STATUS)
        status = RunStatus(**({"state": "new"} | {n: values[n] for n in RunStatus.__dataclass_fields__ if n in values}))
        state, status.last_words = self.judge(running, status.state if values else "")
        if state in ("starting", "interrupted"):
            status.message = ""
        status.state = state
        return status

    def curves(self, stage: str) -> list[dict[str, float]]:
        """Return a row of figures per iteration; what was read before is not read again."""
        return self._curves[stage].read()


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
