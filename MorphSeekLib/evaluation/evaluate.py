"""Figures of a model over the pairs of a Learn2Reg-style data set."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from ..data.datasets import Dataset, Pair, given, read_pair, scored_pairs
from ..io.files import write_atomically
from ..measures.metrics import FoldingFigures, deviation, judged_labels, mean
from ..measures.scores import DELIVERED, LabelMaps, PairRow, Value, definitions, score
from ..networks.loading import LoadedModel
from ..networks.model_file import software
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.journal import Journal, followed
from ..protocol.options import RegistrationOptions
from ..protocol.settings import to_dict, to_json
from ..protocol.startup import check_output_file
from ..protocol.version import __version__
from ..registration.pipeline import register
from ..space.geometry import Volume

MEANS = ("dice_before", "dice_aligned", "dice", "hd95", "folded_percent", "njd_percent", "sdlogj", "seconds")
"""The figures of which an evaluation gives means."""
DEFINED = ("dice", "hd95", "lost_labels", "folded_percent", "njd_percent", "before", "mean", "sdlogj")
"""The figures and words of an evaluation that it defines."""
_ROW = (
    *("fixed", "moving", "dice_before", "dice_aligned", "dice", "hd95", "folded_percent", "no_fold_proven"),
    *("njd_percent", "sdlogj", "seconds", "lost_labels", "dice_per_label"),
)
_KEPT = (*_ROW, "folding_definition")
_FAILED = (
    "{} of {} pairs failed, for the reasons below. The others are kept: correct these or leave them out, and run the "
    "same again."
)

Measured = tuple[int, dict[str, Any], str]
"""The number of a pair with its figures, see :func:`measure`, or with what is wrong with it."""
Work = Callable[[Sequence[int]], Iterable[Measured]]
"""Yields the figures of pairs, given by their numbers, as they come."""


class Settings(TypedDict):
    """What the figures of an evaluation depend on, beside the files."""

    dataset: str
    split: str
    model: dict[str, str] | None
    steps: int | None
    options: dict[str, object]
    device: str


class Evaluation(Settings):
    """What an evaluation writes."""

    definitions: dict[str, str]
    folding_definition: str | None
    mean: dict[str, float | None]
    std: dict[str, float | None]
    lost_labels: dict[str, int]
    pairs: list[dict[str, Value]]
    morphseek: str
    date: str
    software: dict[str, str]


def evaluate(
    dataset: Dataset,
    split: str,
    model: LoadedModel | None,
    out: Path | str,
    options: RegistrationOptions | None = None,
    job: Job = SILENT,
    device: torch.device | None = None,
    work: Work | None = None,
) -> Evaluation:
    """Register every pair of a split and write the figures.

    Each pair's row is written to ``out.rows.jsonl`` as soon as it is known; ``out`` itself appears when all are. A call
    that was cancelled, failed or was killed leaves the rows there, and the same call goes on from them; rows of other
    settings, or of files that have changed since, are not taken. A pair that fails does not stop the others, but
    without it there is no result.

    Args:
        dataset, split: pairs with label maps on both sides.
        model: from :func:`MorphSeekLib.networks.loading.load_model`; None: no network.
        out: the JSON file.
        options: of each registration; None for the defaults. No inverse is computed.
        job: told of every pair.
        device: where to compute without a model.
        work: yields the figures of pairs, by their numbers, as they come; None: they are computed here, in turn.

    Returns:
        what was written: settings, definitions, mean and standard deviation, lost labels, and a row per pair.

    Raises:
        MorphSeekError: ``out`` cannot be written, no such split, pairs without labels, or pairs that failed, each with
            its reason.
        Cancelled: the rows so far are kept beside ``out``.
    """
    out = Path(out)
    check_output_file(out, inputs=[dataset.path])
    options = dataclasses.replace(options or RegistrationOptions(), inverse=False)
    pairs = scored_pairs(dataset, split)
    settings: Settings = {
        "dataset": dataset.about.get("name", dataset.path.name),
        "split": split,
        "model": None if model is None else {"name": model.name, "sha256": model.sha256, "title": model.card.title},
        "steps": None if model is None else options.steps or model.card.preprocessing.steps,
        "options": to_dict(options),
        "device": str(device or torch.device("cpu") if model is None else model.device),
    }
    done = _Rows(out, {**settings, "evaluated": dataset.evaluated, "labels": dataset.labels, "software": software()})
    left = [number for number, pair in enumerate(pairs) if done.find(pair) is None]

    def here(numbers: Sequence[int]) -> Iterator[Measured]:
        for number in numbers:
            job.check()
            yield number, *_tried(pairs[number], dataset, model, options, job.heard_by(None), device)

    failed: dict[int, str] = {}
    if left:
        for number, figures, problem in followed((work or here)(left), len(left), job, lambda one: bool(one[2])):
            if problem:
                failed[number] = problem
            else:
                done.add(pairs[number], figures)
    if failed:
        raise MorphSeekError("\n".join([_FAILED.format(len(failed), len(pairs)), *failed.values()]))
    rows = [row for pair in pairs if (row := done.find(pair)) is not None]
    result: Evaluation = {
        **settings,
        "definitions": definitions(DELIVERED, DEFINED),
        "folding_definition": rows[0].folding_definition,
        "mean": {name: mean(row.number(name) for row in rows) for name in MEANS},
        "std": {name: deviation(row.number(name) for row in rows) for name in MEANS},
        "lost_labels": dict(Counter(name for row in rows for name in row.lost_labels or ())),
        "pairs": [row.to_json(_ROW) for row in rows],
        "morphseek": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "software": software(),
    }
    write_atomically(out, to_json(result, indent=2).encode())
    done.remove()
    job.report("write", 1.0, f"Wrote {out}")
    return result


def label_maps(fixed: Volume, warped: Volume, moving: Volume, dataset: Dataset) -> LabelMaps:
    """Return the labels of a pair for :func:`MorphSeekLib.measures.scores.score`, as a data set judges and names them.

    ``moving`` is not warped.
    """
    spacing, evaluated = fixed.grid.spacing, dataset.evaluated
    return LabelMaps(fixed.data, warped.data, moving.data, spacing, evaluated, dataset.label_name)


def check_judged(fixed_labels: Volume, moving_labels: Volume, pair: Pair, dataset: Dataset) -> None:
    """Refuse a pair without a label that can be judged, before the work.

    Raises:
        MorphSeekError: with the names of its label maps.
    """
    if not judged_labels(fixed_labels.data, moving_labels.data, dataset.evaluated):
        some = (
            "" if dataset.evaluated is None else f" among those to evaluate ({', '.join(map(str, dataset.evaluated))})"
        )
        raise MorphSeekError(
            f"{given(pair.fixed.label).name} and {given(pair.moving.label).name} have no label in common{some}; check "
            "that they use the same numbers, or leave this pair out."
        )


def _tried(
    pair: Pair,
    dataset: Dataset,
    model: LoadedModel | None,
    options: RegistrationOptions,
    job: Job,
    device: torch.device | None,
) -> tuple[dict[str, Any], str]:
    """Return the figures of a pair, or the sentence for why there are none."""
    try:
        return measure(pair, dataset, model, options, job, device), ""
    except MorphSeekError as error:
        return {}, str(error)


def measure(
    pair: Pair,
    dataset: Dataset,
    model: LoadedModel | None,
    options: RegistrationOptions,
    job: Job = SILENT,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Register a pair and return its figures: the fields of :class:`MorphSeekLib.measures.scores.PairRow`.

    Raises:
        MorphSeekError: unreadable files, no label to judge, or what :func:`MorphSeekLib.register` refuses.
        Cancelled: the job was.
    """
    (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
    check_judged(fixed_labels, moving_labels, pair, dataset)
    labels = fixed_labels, moving_labels
    result = register(fixed, moving, model, options, job, labels=labels, device=device)
    assert result.warped_labels is not None  # labels were given
    report = result.report
    overlap, folds = report["dice"], report["folding"]
    assert overlap is not None  # as above
    figures = FoldingFigures.from_report(folds)
    cells = folds["cells"]
    maps = label_maps(fixed_labels, result.warped_labels, moving_labels, dataset)
    row = score(maps, figures, cells["folded_percent"], cells["no_fold_proven"])
    judged = judged_labels(fixed_labels.data, moving_labels.data, dataset.evaluated)
    dice = [overlap["labels"][str(label)] for label in judged]
    whole = dataclasses.replace(
        row,
        fixed=given(pair.fixed.image).name,
        moving=given(pair.moving.image).name,
        dice_before=mean(stages["input"] for stages in dice),
        dice_aligned=mean(stages["aligned"] for stages in dice),
        seconds=float(sum(report["seconds"].values())),
    )
    return whole.to_json(_KEPT)


class _Rows:
    """The rows that are done, in a file beside the result: a line of settings, then a line per pair."""

    def __init__(self, out: Path, settings: dict[str, object]) -> None:
        self._journal = Journal(out.with_name(out.name + ".rows.jsonl"))
        head, *lines = [*self._journal.read()] or [None]
        self._rows: dict[str, PairRow] = {}
        if head == json.loads(to_json(settings)):
            self._rows = {to_json(line["files"]): PairRow(**line["row"]) for line in lines}
        else:
            self.remove()
            self._journal.add(settings)

    def find(self, pair: Pair) -> PairRow | None:
        """Return the row of a pair whose files are as they were; None where there is none."""
        return self._rows.get(to_json(_files(pair)))

    def add(self, pair: Pair, figures: dict[str, Any]) -> None:
        """Write the row of a pair.

        Raises:
            MorphSeekError: the disk is full.
        """
        self._journal.add({"files": _files(pair), "row": figures})
        self._rows[to_json(_files(pair))] = PairRow(**figures)

    def remove(self) -> None:
        """Remove the file; the result holds all rows."""
        self._journal.path.unlink(missing_ok=True)


def _files(pair: Pair) -> list[list[object]]:
    """Return what a row depends on: the files of a pair, their sizes and times of change, and the labels that are
    merged."""
    found: list[list[object]] = []
    for case in (pair.fixed, pair.moving):
        for path in (given(case.image), given(case.label)):
            facts = path.stat()
            found.append([str(path), facts.st_size, facts.st_mtime_ns])
        found.append([list(values) for values in case.merged])
    return found
