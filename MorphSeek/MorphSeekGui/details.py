"""The button *Copy details* beside an error: what a question about it needs, on the clipboard.

What is copied comes from ``python -m MorphSeekLib.app.doctor``, a process of its own: so it works beside an engine that
is dead, busy or cannot begin, and one place takes out the names of patients and files. It is in English.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import qt
import slicer
import slicer.util

from .engine_client import default_python, last_words, process_of_its_own
from .scene import _, hierarchy_items

_POLL_MS = 100
_PATIENCE = 120.0  # seconds for a Python that is slow to import torch


class CopyDetails:
    """One button; hidden until :meth:`offer`.

    Args:
        button: of the section's .ui file.
        logic: the module's, for the engine's Python.
        folders: returns what for -> folder that the user has chosen.
    """

    def __init__(self, button, logic, folders: Callable[[], dict[str, str]] = dict) -> None:
        self._button, self._logic, self._folders = button, logic, folders
        self._problem, self._log = "", []
        self._told: dict = {}
        self._attempts: Iterator[tuple[str, Mapping[str, str] | None]] = iter(())
        self._doctor: _Doctor | None = None
        self._timer = qt.QTimer()
        self._timer.setInterval(_POLL_MS)
        self._timer.connect("timeout()", self._poll)
        button.visible = False
        button.connect("clicked(bool)", self.copy)

    def offer(self, problem: str, log: Iterable[str] = ()) -> None:
        """Show the button beside an error.

        Args:
            problem: the sentence that the user sees.
            log: the last lines of the log that belongs to it.
        """
        self._problem, self._log = problem, list(log)
        if self._doctor is None:
            self._button.text, self._button.enabled = _("Copy details"), True
        self._button.visible = True

    def withdraw(self) -> None:
        """Hide the button: there is no error any more."""
        self._button.visible = False

    def close(self) -> None:
        """End what still runs."""
        self._timer.stop()
        if self._doctor is not None:
            self._doctor.end()
            self._doctor = None

    def copy(self, *_arguments) -> None:
        """Examine the installation, without waiting, and put the findings on the clipboard."""
        if self._doctor is not None:
            return
        self._button.text, self._button.enabled = _("Collecting ..."), False
        chosen = self._logic.engine_python()
        self._told = {
            "about": {
                "message": self._problem,
                "Slicer": slicer.app.applicationVersion,
                "engine's Python": "chosen" if chosen else "Slicer's",
            },
            "log": self._log,
            "names": scene_names(),
            "folders": self._folders(),
        }
        attempts = [(chosen, self._logic.engine_environment())] if chosen else []
        self._attempts = iter([*attempts, (default_python(), None)])
        self._try_next()

    def _try_next(self) -> None:
        for python, environment in self._attempts:
            try:
                self._doctor = _Doctor(python, environment, self._told)
            except OSError as problem:
                self._note(str(problem.strerror or problem))
                continue
            self._timer.start()
            return
        self._finish(_("No Python could examine the installation; please report this with Slicer's log."))

    def _note(self, reason: str) -> None:
        """Note that the engine's Python cannot examine itself, which is a finding too."""
        self._told["about"]["engine's Python"] += f", fails: {reason}"

    def _poll(self) -> None:
        if not self._doctor.done():
            return
        self._timer.stop()
        doctor, self._doctor = self._doctor, None
        if doctor.text:
            self._finish(doctor.text)
        else:
            self._note(doctor.reason)
            self._try_next()

    def _finish(self, text: str) -> None:
        qt.QApplication.clipboard().setText(text)
        self._button.text, self._button.enabled = _("Copied"), True


class _Doctor:
    """The process that examines; it reads and writes files, so that no pipe can fill.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, python: str, environment: Mapping[str, str] | None, told: Mapping[str, object]) -> None:
        self.text = self.reason = ""
        self._until = time.monotonic() + _PATIENCE
        self._folder = tempfile.TemporaryDirectory(prefix="morphseek-", ignore_cleanup_errors=True)
        given, out, errors = (Path(self._folder.name) / name for name in ("given", "out", "errors"))
        given.write_text(json.dumps(told), encoding="utf-8")
        command = [str(python), "-m", "MorphSeekLib.app.doctor", "--told"]
        with open(given, "rb") as source, open(out, "wb") as sink, open(errors, "wb") as log:
            pipes = {"stdin": source, "stdout": sink, "stderr": log}
            self._process = subprocess.Popen(command, **pipes, **process_of_its_own(environment))

    def done(self) -> bool:
        """Return whether it has ended; then ``text`` is what it found, or ``reason`` why it found nothing."""
        code = self._process.poll()
        if code is None and time.monotonic() < self._until:
            return False
        if code is None:
            self.reason = f"timeout ({_PATIENCE:g} s)"
        elif code == 0:
            self.text = self._read("out")
        else:
            self.reason = last_words(self._read("errors").splitlines()) or f"exit code {code}"
        self.end()
        return True

    def end(self) -> None:
        """Kill it if it runs, and remove its files."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        self._folder.cleanup()

    def _read(self, name: str) -> str:
        return (Path(self._folder.name) / name).read_text(encoding="utf-8", errors="replace")


def scene_names() -> list[str]:
    """Return the names of data, files and patients in the scene, which nothing that is copied may hold."""
    names = set()
    for node in slicer.util.getNodesByClass("vtkMRMLStorableNode"):
        if not node.IsA("vtkMRMLColorNode"):
            names.add(node.GetName() or "")
    for node in slicer.util.getNodesByClass("vtkMRMLStorageNode"):
        path = Path(node.GetFileName() or "")
        names |= {path.name, path.name.partition(".")[0], path.parent.name}
    hierarchy = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSubjectHierarchyNode")
    if hierarchy is not None:
        names |= {hierarchy.GetItemName(item) for item in hierarchy_items(hierarchy)}
    return sorted(name for name in names if len(name) > 2)
