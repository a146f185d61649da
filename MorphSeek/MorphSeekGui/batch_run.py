"""A batch as Slicer sees it: a folder, and `morphseek batch`, which works in it and may outlive Slicer.

The folder is the whole contract with the engine (:mod:`MorphSeekLib.protocol.batch`). Three files more make it whole,
so that the batch can be continued after Slicer was restarted:

| file in the folder | what it is |
|---|---|
| pairs.csv | the pairs, with the paths of their files |
| settings.json | model and options, as the section Register saves them |
| start.json | :class:`Start` |

Neither slicer nor qt is imported.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from MorphSeekLib.protocol.batch import (
    REPORT,
    ROWS,
    SETTINGS,
    TABLE,
    BatchPair,
    BatchSettings,
    BatchStatus,
    globbed,
    plan,
    read_outcomes,
    read_table,
)
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.run_folder import STATUS, read_json
from MorphSeekLib.protocol.settings_file import RegistrationSettings, read_settings, settings_text

from .faults import Fault
from .folder_process import FolderProcess, RunError

PAIRS, CHOICES, START = "pairs.csv", "settings.json", "start.json"
IMAGES = "images"  # the folder for what was written from a scene
_WORST_FIRST = ("failed", "red", "amber", "", "green", "waiting")


@dataclass(frozen=True)
class Start:
    """How the process is started; what the results do not depend on.

    Attributes:
        device: auto, cpu or cuda:N.
        threads: of each worker; None for an equal share of the processor.
        workers: how many pairs are registered at once.
    """

    device: str = "auto"
    threads: int | None = None
    workers: int = 1


@dataclass(frozen=True)
class BatchRow:
    """A pair, and what became of it so far.

    Attributes:
        name: of its folder.
        state: waiting, failed or done.
        problem: of a failed pair, what is wrong and what to do.
        figures: of a done pair, as in cohort.csv.
        files: of its images, by the columns of the table; empty where they are not known.
    """

    name: str
    state: Literal["waiting", "failed", "done"] = "waiting"
    problem: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def color(self) -> str:
        """One of "waiting", "failed", "green", "amber" and "red"; "" where nothing was judged."""
        return self.state if self.state != "done" else self.figures.get("color") or ""


@dataclass
class BatchState:
    """Where a batch stands.

    Attributes:
        state: as :meth:`FolderProcess.judge` has it.
        status: what its process wrote last.
        last_words: the end of the log of a process that ended before it could write anything.
    """

    state: str
    status: BatchStatus = field(default_factory=BatchStatus)
    last_words: str = ""

    @property
    def alive(self) -> bool:
        """Whether a process is at work."""
        return self.state in ("starting", "running", "stopping")


class BatchRun(FolderProcess):
    """A batch's folder, made by :func:`create_batch` or by `morphseek batch`."""

    ALREADY, NOT_STARTED = Fault.BATCH_ALREADY, Fault.BATCH_NOT_STARTED

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        self._planned: list[BatchPair] | None = None

    @property
    def startable(self) -> bool:
        """Whether this folder says what is to be done; one that the command line made does not."""
        return all((self.folder / name).is_file() for name in (PAIRS, CHOICES, START))

    def start(
        self,
        keep: bool = True,
        retry: bool = False,
        python: str | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it, or continue it.

        Args:
            keep, python, command, environment: as for :meth:`FolderProcess.launch`.
            retry: register those again that failed.

        Raises:
            RunError: it runs already, or no process can be started.
        """
        start = read_json(self.folder / START)
        folder = str(self.folder)
        arguments = ["batch", str(self.folder / PAIRS), "-o", folder, "--options", str(self.folder / CHOICES)]
        arguments += ["--device", str(start.get("device") or "auto"), "--workers", str(start.get("workers") or 1)]
        arguments += ["--threads", str(start["threads"])] if start.get("threads") else []
        arguments += ["--retry"] if retry else []
        self._planned = None
        self.launch([*arguments, "--while-open"], keep, python, command, environment)

    def state(self) -> BatchState:
        """Return where it stands, by its folder and, if this Slicer started it, by its process."""
        running = self.is_running()
        values = read_json(self.folder / STATUS)
        known = {f.name: values[f.name] for f in dataclasses.fields(BatchStatus) if f.name in values}
        status = BatchStatus(**known)
        written = status.state if known else ""
        if not written and not running and not self.startable:
            written = "done"  # of a version of the command line that wrote no status
        state, words = self.judge(running, written)
        return BatchState(state, status, words)

    def stamp(self) -> tuple[object, ...]:
        """Return something that changes when :meth:`rows` would."""
        found: list[object] = [self._planned is None]
        for name in (PAIRS, ROWS, TABLE):
            try:
                stat = (self.folder / name).stat()
                found.append((stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)

    def rows(self) -> list[BatchRow]:
        """Return a row for each pair, in the order of the table."""
        outcomes, failed = read_outcomes(self.folder), self._failed()
        pairs = self._pairs()
        names = [pair.name for pair in pairs] or list(dict.fromkeys([*outcomes, *failed]))
        known = {pair.name: pair for pair in pairs}
        rows = []
        for name in names:
            files = known[name].files if name in known else {}
            problems = " ".join(known[name].problems) if name in known else failed.get(name, "")
            outcome = outcomes.get(name)
            if outcome is not None:
                rows.append(BatchRow(name, outcome.state, outcome.problem, outcome.figures, files))
            elif problems:
                rows.append(BatchRow(name, "failed", problems, {}, files))
            else:
                rows.append(BatchRow(name, files=files))
        return rows

    def _pairs(self) -> list[BatchPair]:
        """Return the pairs with what was wrong with each when this was first asked; none where they are not known."""
        if self._planned is None:
            try:
                chosen = read_settings(self.folder / CHOICES)
                self._planned = plan(read_table(self.folder / PAIRS), BatchSettings(chosen.model, chosen.options))
            except MorphSeekError:
                return []
        return self._planned

    def _failed(self) -> dict[str, str]:
        """Return the problems of the failed pairs in cohort.csv, where alone those are that were never begun."""
        try:
            with open(self.folder / TABLE, encoding="utf-8", newline="") as file:
                return {row["name"]: row["problem"] for row in csv.DictReader(file) if row["state"] == "failed"}
        except (OSError, KeyError, csv.Error):
            return {}

    @property
    def report(self) -> Path | None:
        """The page for people, once there is one."""
        path = self.folder / REPORT
        return path if path.is_file() else None

    def nifti_form(self) -> str | None:
        """Return which form places the NIfTI files of its images that have both; None for the one ITK takes."""
        return read_json(self.folder / SETTINGS).get("nifti_form")


def worst_first(rows: Sequence[BatchRow]) -> list[BatchRow]:
    """Return rows with those first that need a look; else their order stays."""
    return sorted(rows, key=lambda row: _WORST_FIRST.index(row.color))


def create_batch(root: Path | str, name: str, settings: RegistrationSettings, start: Start) -> BatchRun:
    """Create the folder of a batch under ``root``; :func:`write_pairs` makes it whole.

    Args:
        root: where batches are kept; made when missing.
        name: of the folder, with the date before it.
        settings: model and options.
        start: the rest.

    Raises:
        RunError: the folder cannot be written.
    """
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "batch"
    folder, number = Path(root) / f"{time.strftime('%Y-%m-%d')}-{stem}", 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{time.strftime('%Y-%m-%d')}-{stem}-{number}")
    try:
        folder.mkdir(parents=True)
        (folder / CHOICES).write_text(settings_text(settings, folder / CHOICES), encoding="utf-8")
        (folder / START).write_text(json.dumps(dataclasses.asdict(start)), encoding="utf-8")
    except OSError as problem:
        raise RunError(Fault.BATCH_FOLDER, folder=folder, reason=problem.strerror) from problem
    return BatchRun(folder)


def write_pairs(run: BatchRun, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the pairs of a batch.

    Args:
        run: the batch.
        rows: by the columns of the table, with absolute paths.

    Raises:
        RunError: there is no pair, or the file cannot be written.
    """
    if not rows:
        raise RunError(Fault.BATCH_NO_PAIRS)
    columns = list(dict.fromkeys(["name", "fixed", "moving", *(column for row in rows for column in row)]))
    part = run.folder / f"{PAIRS}.part"
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, run.folder / PAIRS)
    except OSError as problem:
        raise RunError(Fault.BATCH_FOLDER, folder=run.folder, reason=problem.strerror) from problem


def discard(run: BatchRun) -> None:
    """Remove the folder of a batch that could not be started."""
    shutil.rmtree(run.folder, ignore_errors=True)


def table_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the user's table, with absolute paths.

    Raises:
        MorphSeekError: it cannot be read, or lacks a column.
    """
    return read_table(path.resolve())


def folder_rows(template: Path, folder: Path, pattern: str) -> list[dict[str, str]]:
    """Return a row for each image of a folder, registered to a template.

    Args:
        template: the image that stays.
        folder: with the others.
        pattern: of their names, such as ``*/T1.nii.gz``.

    Raises:
        MorphSeekError: no image has such a name.
    """
    return globbed(template.resolve(), str(Path(_escaped(folder.resolve())) / pattern))


def _escaped(folder: Path) -> str:
    return re.sub(r"([\[*?])", r"[\1]", str(folder))


def find_batches(root: Path | str, others: Iterable[Path | str] = ()) -> list[BatchRun]:
    """Return the batches in a folder and some others, the newest first.

    Args:
        root: the folder of batches.
        others: folders of single batches elsewhere; those that are gone are left out.
    """
    found = {path.parent for name in (PAIRS, SETTINGS) for path in Path(root).glob(f"*/{name}")}
    found |= {Path(folder) for folder in others if is_batch(folder)}
    return [BatchRun(folder) for folder in sorted(found, key=_age)]


def is_batch(folder: Path | str) -> bool:
    """Return whether a folder is a batch's."""
    return any((Path(folder) / name).is_file() for name in (PAIRS, SETTINGS))


def _age(folder: Path) -> int:
    times = [(folder / name).stat().st_mtime_ns for name in (PAIRS, SETTINGS) if (folder / name).is_file()]
    return -min(times)
