"""Figures of a model over the pairs of a Learn2Reg-style data set."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..data.datasets import Dataset, Pair, given, read_pair, scored_pairs
from ..io.files import write_atomically
from ..measures.metrics import LABEL_DEFINITIONS, LabelFigures, deviation, judged_labels, label_figures, mean
from ..networks.loading import LoadedModel
from ..networks.model_file import software
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..protocol.settings import to_dict, to_json
from ..protocol.startup import check_output_file
from ..protocol.version import __version__
from ..registration.pipeline import register
from ..space.geometry import Volume

DEFINITIONS = LABEL_DEFINITIONS | {
    "folded_percent": "share of the cells of the delivered transform that fold; no_fold_proven: whether every cell is "
    "proven not to (MorphSeekLib.measures.folds)",
    "njd_percent": "share of the fixed image's voxels with a Jacobian determinant <= 0 (central differences, one-sided "
    "at the border)",
    "before": "the images as they come; aligned: after the alignment; warped: after the registration",
    "mean": "over the pairs that have the figure; null where none has it; std: standard deviation over the same pairs",
}


def evaluate(
    dataset: Dataset,
    split: str,
    model: LoadedModel,
    out: Path | str,
    options: RegistrationOptions | None = None,
    job: Job = SILENT,
) -> dict[str, Any]:
    """Register every pair of a split and write the figures.

    Each pair's row is written to ``out.rows.jsonl`` as soon as it is known; ``out`` itself appears when all are. A call
    that was cancelled, failed or was killed leaves the rows there, and the same call goes on from them; rows of other
    settings, or of files that have changed since, are not taken.

    Args:
        dataset, split: pairs with label maps on both sides.
        model: from :func:`MorphSeekLib.networks.loading.load_model`.
        out: the JSON file.
        options: of each registration; None for the defaults. No inverse is computed.
        job: told of every pair.

    Returns:
        what was written: settings, definitions, mean and standard deviation, lost labels, and a row per pair.

    Raises:
        MorphSeekError: ``out`` cannot be written, no such split, pairs without labels, unreadable files.
        Cancelled: the rows so far are kept beside ``out``.
    """
    out = Path(out)
    check_output_file(out, inputs=[dataset.path])
    options = dataclasses.replace(options or RegistrationOptions(), inverse=False)
    pairs = scored_pairs(dataset, split)
    settings = {
        "dataset": dataset.about.get("name", dataset.path.name),
        "split": split,
        "model": {"name": model.name, "sha256": model.sha256, "title": model.card.title},
        "align": options.align or model.card.preprocessing.align,
        "steps": options.steps or model.card.preprocessing.steps,
        "refinement": to_dict(options.fit),
        "device": str(model.device),
    }
    done = _Rows(out, settings | {"evaluated": dataset.evaluated, "labels": dataset.labels, "software": software()})
    rows = []
    for index, pair in enumerate(pairs):
        job.check()
        job.report("step", index / len(pairs), f"Pair {index + 1} of {len(pairs)}", index + 1, len(pairs))
        row = done.find(pair)
        if row is None:
            row = _figures(pair, dataset, model, options, job.heard_by(None))
            done.add(pair, row)
        rows.append(row)
    names = [k for k, v in rows[0].items() if v is None or isinstance(v, float)]
    result = settings | {
        "definitions": DEFINITIONS | {"sdlogj": "standard deviation of log J, see folding_definition"},
        "folding_definition": rows[0]["folding_definition"],
        "mean": {k: mean(row[k] for row in rows) for k in names},
        "std": {k: deviation(row[k] for row in rows) for k in names},
        "lost_labels": dict(Counter(name for row in rows for name in row["lost_labels"])),
        "pairs": [{k: v for k, v in row.items() if k != "folding_definition"} for row in rows],
        "morphseek": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "software": software(),
    }
    write_atomically(out, to_json(result, indent=2).encode())
    done.remove()
    job.report("write", 1.0, f"Wrote {out}")
    return result


def label_row(figures: LabelFigures, dataset: Dataset) -> dict[str, Any]:
    """What a row says of the labels of a pair: "dice", "hd95" (None where all are lost), "lost_labels" (names) and
    "dice_per_label"."""
    return {
        "dice": figures.mean_dice,
        "hd95": figures.mean_hd95,
        "lost_labels": [dataset.label_name(label) for label in figures.lost],
        "dice_per_label": {dataset.label_name(label): value for label, value in figures.dice.items()},
    }


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


def _figures(
    pair: Pair,
    dataset: Dataset,
    model: LoadedModel,
    options: RegistrationOptions,
    job: Job,
) -> dict[str, Any]:
    """One row: the figures of a pair."""
    (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
    check_judged(fixed_labels, moving_labels, pair, dataset)
    result = register(fixed, moving, model, options, job, labels=(fixed_labels, moving_labels))
    assert result.warped_labels is not None  # labels were given
    found = label_figures(
        fixed_labels.data, result.warped_labels.data, moving_labels.data, fixed.grid.spacing, dataset.evaluated
    )
    before = {
        stage: mean(result.report["dice"]["labels"][str(label)][stage] for label in found.dice)
        for stage in ("input", "aligned")
    }
    labels = label_row(found, dataset)
    folding, seconds = result.report["folding"], result.report["seconds"]
    return {
        "fixed": given(pair.fixed.image).name,
        "moving": given(pair.moving.image).name,
        "dice_before": before["input"],
        "dice_aligned": before["aligned"],
        "dice": labels["dice"],
        "hd95": labels["hd95"],
        "folded_percent": folding["cells"]["folded_percent"],
        "no_fold_proven": folding["cells"]["no_fold_proven"],
        "njd_percent": folding["njd_percent"],
        "sdlogj": folding["sdlogj"],
        "seconds": float(sum(seconds.values())),
        "lost_labels": labels["lost_labels"],
        "dice_per_label": labels["dice_per_label"],
        "folding_definition": folding["definition"],
    }


class _Rows:
    """The rows that are done, in a file beside the result: a line of settings, then a line per pair."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self._path = out.with_name(out.name + ".rows.jsonl")
        head = to_json(settings)
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines() if self._path.is_file() else []
        self._rows: dict[str, dict[str, Any]] = {}
        if lines[:1] == [head]:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:  # the last line of a process that was killed
                    continue
                self._rows[to_json(entry["files"])] = entry["row"]
        kept = [to_json({"files": json.loads(files), "row": row}) for files, row in self._rows.items()]
        write_atomically(self._path, "".join(f"{line}\n" for line in [head, *kept]).encode())

    def find(self, pair: Pair) -> dict[str, Any] | None:
        """Return the row of a pair whose files are as they were; None where there is none."""
        return self._rows.get(to_json(_files(pair)))

    def add(self, pair: Pair, row: dict[str, Any]) -> None:
        """Write the row of a pair.

        Raises:
            MorphSeekError: the disk is full.
        """
        line = to_json({"files": _files(pair), "row": row})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise MorphSeekError(f"{self._path} cannot be written ({error.strerror}); free some space.") from error

    def remove(self) -> None:
        """Remove the file; the result has all."""
        self._path.unlink(missing_ok=True)


def _files(pair: Pair) -> list[list[Any]]:
    """What a row depends on: the files of a pair, their sizes and times of change, and the labels that are merged."""
    found: list[list[Any]] = []
    for case in (pair.fixed, pair.moving):
        for path in (given(case.image), given(case.label)):
            facts = path.stat()
            found.append([str(path), facts.st_size, facts.st_mtime_ns])
        found.append([list(values) for values in case.merged])
    return found
