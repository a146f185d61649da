"""A batch: many pairs that are registered alike, and the folder that keeps what became of each.

| file in the folder | what it is |
|---|---|
| batch.json | the settings that all pairs share: :class:`BatchSettings` |
| rows.jsonl | a line for each attempt at a pair, the latest counts: :class:`Outcome` |
| lock | held by the process that works in the folder |
| status.json | how far that process is, or how it ended: :class:`BatchStatus` |
| stop, keep | as in the folder of a training, see :mod:`MorphSeekLib.protocol.run_folder` |
| NAME/ | the results of a pair, as `morphseek register` writes them |
| cohort.csv, cohort.html | a row for each pair, for programs and for people |
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import MorphSeekError
from .journal import Journal
from .options import RegistrationOptions
from .settings import from_dict, to_dict, to_json
from .settings_file import RegistrationSettings
from .startup import check_model_choice, check_readable, transform_paths

SETTINGS, ROWS, LOCK = "batch.json", "rows.jsonl", "lock"
REPORT, TABLE = "cohort.html", "cohort.csv"
KEPT: dict[str, tuple[str, ...]] = {
    "warped": ("warped.nii.gz",),
    "transform": ("transform.h5",),
    "inverse": ("inverse.h5",),
    "jacobian": ("jacobian.nii.gz",),
    "folding": ("folding.nii.gz",),
    "trust": ("trust.nii.gz", "trust-colors.nii.gz"),
    "labels": ("warped-labels.nii.gz",),
    "report": ("report.html",),
}
"""What can be kept of each pair, by its name in --keep; report.json always is."""
ROOM: dict[str, tuple[float, float]] = {
    "warped": (0, 2),
    "transform": (5e5, 0.8),
    "inverse": (4e5, 0.8),
    "jacobian": (0, 3.3),
    "folding": (0, 0.01),
    "trust": (0, 1.1),
    "labels": (0, 0.1),
    "report": (4.4e6, 0),
}
"""About how many bytes each takes: of every pair, and of each voxel of its fixed image (1 mm brains)."""
FILES = (
    *("fixed", "moving", "initial_transform", "fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks"),
    *("fixed_mask", "moving_mask", "ignore", "ignore_moving"),
)
"""The columns that name files; an initial transform may be several, as in `morphseek apply`."""
State = Literal["done", "failed"]
_SAFE = re.compile(r"[^\w.+-]+")
IMAGE_ENDING = re.compile(r"\.(nii\.gz|nii|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)


def input_paths(files: Mapping[str, str]) -> list[Path]:
    """Return every file of a pair, given by the names of :data:`FILES`."""
    paths: list[Path] = []
    for name in FILES:
        if name in files:
            paths += transform_paths(files[name]) if name == "initial_transform" else [Path(files[name])]
    return paths


@dataclass(frozen=True)
class BatchPair:
    """A row of a batch.

    Attributes:
        name: of its folder.
        files: by the column's name, see :data:`FILES`.
        settings: the batch's, with what the row says otherwise.
        problems: sentences that say why it cannot be registered.
    """

    name: str
    files: Mapping[str, str]
    settings: RegistrationSettings
    problems: tuple[str, ...] = ()

    def inputs(self) -> list[Path]:
        """Return every file that is read."""
        return input_paths(self.files)

    def key(self) -> str:
        """Return a text that changes with the settings, the names, the sizes or the times of the files."""
        facts = [(str(path), stat.st_size, stat.st_mtime_ns) for path in self.inputs() if (stat := path.stat())]
        return to_json([facts, self.settings.model, to_dict(self.settings.options)])


@dataclass(frozen=True)
class BatchSettings:
    """What all pairs of a batch share; a folder holds one batch.

    Attributes:
        model: as for `morphseek register`.
        options: the choices of each registration where its row does not say otherwise.
        keep: names of :data:`KEPT`.
        nifti_form: which form places NIfTI files that have both.
    """

    model: str = "auto"
    options: RegistrationOptions = field(default_factory=RegistrationOptions)
    keep: tuple[str, ...] = tuple(KEPT)
    nifti_form: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.keep) - set(KEPT)):
            raise MorphSeekError(f"'{unknown[0]}' cannot be kept; choose from {', '.join(KEPT)}.")


@dataclass(frozen=True)
class Outcome:
    """What became of a pair.

    Attributes:
        name: the pair's.
        state: done or failed.
        key: of :meth:`BatchPair.key` when it was registered.
        problem: of a failed pair, what is wrong and what to do.
        figures: the row of cohort.csv.
    """

    name: str
    state: State
    key: str = ""
    problem: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchStatus:
    """status.json: how far the process is that works in a batch's folder, or how it ended.

    Attributes:
        state: "running", "stopped", "failed" (it could not begin, or go on) or "done" (some pairs may have failed);
            "running" without a held lock is a batch that was killed.
        message: the last sentence for the user; of a failed batch, what is wrong and what to do.
        done: pairs that were tried since it was started.
        count: pairs that were left then.
        begun, written: when it began with the first pair, and when this was written; seconds since 1970.
    """

    state: Literal["running", "stopped", "failed", "done"] = "running"
    message: str = ""
    done: int = 0
    count: int = 0
    begun: float = 0.0
    written: float = 0.0

    def seconds_left(self, now: float) -> float | None:
        """Return about how long it will still take; None while nobody can know."""
        if not self.done or self.written <= self.begun:
            return None
        return max(0.0, (self.written - self.begun) / self.done * (self.count - self.done) - (now - self.written))


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV or TSV file; paths in it are relative to its folder.

    Raises:
        MorphSeekError: it cannot be read, or lacks the columns fixed and moving.
    """
    check_readable(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MorphSeekError(f"{path} cannot be read ({error}); save it as CSV or TSV in UTF-8.") from error
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(text.splitlines(), delimiter=separator)
    names = [name.strip() for name in reader.fieldnames or ()]
    if missing := sorted({"fixed", "moving"} - set(names)):
        raise MorphSeekError(
            f"{path} has no column '{missing[0]}' (it has {', '.join(names) or 'none'}); name the columns in its first "
            "line, at least fixed and moving."
        )
    reader.fieldnames = names
    rows = []
    for row in reader:
        values = {name: value.strip() for name, value in row.items() if name and value and value.strip()}
        for column in FILES:
            if column in values:
                chain = column == "initial_transform"
                parts = values[column].split(",") if chain else [values[column]]
                values[column] = ",".join(str(path.parent / part.strip()) for part in parts)
        rows.append(values)
    return rows


def globbed(fixed: Path, pattern: str) -> list[dict[str, str]]:
    """Return a row for each file of a pattern, registered to one image.

    Raises:
        MorphSeekError: no file matches.
    """
    found = sorted(glob.glob(pattern, recursive=True))
    found = [path for path in found if not Path(path).exists() or not Path(path).samefile(fixed)]
    if not found:
        raise MorphSeekError(f"No file matches '{pattern}'; check it, and put it in quotation marks.")
    names = _shortest_names(found)
    return [{"fixed": str(fixed), "moving": path, "name": name} for path, name in zip(found, names, strict=True)]


def _shortest_names(paths: Sequence[str]) -> list[str]:
    """Return the parts of paths in which they differ."""
    parts = [Path(IMAGE_ENDING.sub("", path)).parts for path in paths]
    if len(parts) == 1 or len({len(each) for each in parts}) > 1:
        return [_SAFE.sub("-", "-".join(each[-2:])) for each in parts]
    kept = [index for index, same in enumerate(zip(*parts, strict=True)) if len(set(same)) > 1]
    return [_SAFE.sub("-", "-".join(each[index] for index in kept)) for each in parts]


def plan(rows: Iterable[Mapping[str, str]], settings: BatchSettings) -> list[BatchPair]:
    """Return the pairs of a batch, each with what is wrong with it; nothing is raised for a bad row."""
    pairs = [_pair(number, row, settings) for number, row in enumerate(rows, 1)]
    counts = Counter(pair.name.casefold() for pair in pairs)
    models: dict[str, str] = {}
    checked: dict[Path, str] = {}
    planned = []
    for pair in pairs:
        problems = list(pair.problems)
        if counts[pair.name.casefold()] > 1:
            problems.append(f"Several rows are named '{pair.name}'; give each its own name in the column name.")
        for path in pair.inputs():
            if path not in checked:
                checked[path] = _problem(check_readable, path)
            problems.append(checked[path])
        model = pair.settings.model
        if model not in models:
            models[model] = _problem(check_model_choice, model)
        problems.append(models[model])
        planned.append(dataclasses.replace(pair, problems=tuple(filter(None, problems))))
    return planned


def _problem(check: Any, value: object) -> str:
    """Return the sentence of a check that refuses; empty where it does not."""
    try:
        check(value)
    except MorphSeekError as error:
        return str(error)
    return ""


def _pair(number: int, row: Mapping[str, str], settings: BatchSettings) -> BatchPair:
    files = {name: row[name] for name in FILES if row.get(name)}
    given = row.get("name") or "-".join(
        IMAGE_ENDING.sub("", Path(files[n]).name) for n in ("moving", "fixed") if n in files
    )
    name = _SAFE.sub("-", given).strip(".-") or f"row-{number}"
    problems = [f"Row {number} has no {side} image." for side in ("fixed", "moving") if side not in files]
    chosen = RegistrationSettings("", row.get("model") or settings.model, settings.options)
    known = {option.name for option in dataclasses.fields(RegistrationOptions)}
    if unknown := sorted(set(row) - known - set(FILES) - {"name", "model"}):
        problems.append(f"There is no option '{unknown[0]}'; remove the column or correct its name.")
    try:
        values = {key: _value(key, row[key]) for key in known & set(row) if row[key] != ""}
        options = from_dict(RegistrationOptions, values, f"row {number}", settings.options)
        chosen = dataclasses.replace(chosen, options=options)
    except (MorphSeekError, ValueError) as error:
        problems.append(str(error))
    return BatchPair(name, files, chosen, tuple(problems))


def _value(name: str, text: Any) -> Any:
    """Return the value of an option as a table has it."""
    if not isinstance(text, str):
        return text
    if name == "fit_iterations":
        return [int(part) for part in text.split("/")]
    if name == "steps":
        return int(text)
    if name in ("inverse", "stop_early"):
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    return text


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """Return the latest outcome of each pair; a line that a killed process left unfinished is passed over."""
    found: dict[str, Outcome] = {}
    for line in Journal(folder / ROWS).read():
        try:
            outcome = Outcome(**line)
        except TypeError:
            continue
        found[outcome.name] = outcome
    return found


def waiting(pairs: Iterable[BatchPair], outcomes: Mapping[str, Outcome], folder: Path, retry: bool) -> list[BatchPair]:
    """Return the pairs that are still to be registered.

    Args:
        pairs: those without problems.
        outcomes: from :func:`read_outcomes`.
        folder: the batch's.
        retry: also those that failed before.
    """
    left = []
    for pair in pairs:
        outcome = outcomes.get(pair.name)
        if outcome is not None and outcome.key == pair.key():
            whole = outcome.state == "done" and (folder / pair.name / "report.json").is_file()
            if whole or (outcome.state == "failed" and not retry):
                continue
        left.append(pair)
    return left
