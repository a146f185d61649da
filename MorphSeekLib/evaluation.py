"""Figures of a model over the pairs of a Learn2Reg-style data set."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__
from .checkpoint import software
from .datasets import Dataset, Pair, read_pair
from .events import Event, OnEvent, checkpoint_for, ignore, never
from .files import write_atomically
from .metrics import dice_per_label, hd95_per_label
from .refinement import RefinementSettings
from .registration import LoadedModel, register
from .settings import to_dict

DEFINITIONS = {
    "dice": "mean over labels of 2|A and B| / (|A| + |B|); nearest-neighbour warped labels on the fixed image's grid; "
    "labels absent from the fixed or the unwarped moving image are left out",
    "hd95": "mean over labels of Learn2Reg's 95 % Hausdorff distance, in mm",
    "njd_percent": "share of the fixed image's voxels with a Jacobian determinant <= 0 (central differences, one-sided "
    "at the border)",
    "before": "the images as they come; aligned: after the alignment; warped: after the registration",
}


def evaluate(
    dataset: Dataset,
    split: str,
    model: LoadedModel,
    out: Path | str,
    *,
    steps: int | None = None,
    align: str | None = None,
    refinement: RefinementSettings | None = None,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Register every pair of a split and write the figures.

    Args:
        dataset, split: pairs with label maps on both sides.
        model: from :func:`MorphSeekLib.registration.load_model`.
        out: the JSON file.
        steps, align, refinement: as for :func:`MorphSeekLib.registration.register`.

    Returns:
        what was written: settings, definitions, mean and standard deviation, and a row per pair.

    Raises:
        MorphSeekError: no such split, pairs without labels, unreadable files.
        Cancelled: nothing is written.
    """
    pairs: list[Pair] = dataset.split(split)
    checkpoint = checkpoint_for(cancelled)
    rows = []
    for index, pair in enumerate(pairs):
        checkpoint()
        on_event(Event("step", index / len(pairs), f"Pair {index + 1} of {len(pairs)}", index + 1, len(pairs)))
        rows.append(_figures(pair, dataset, model, steps, align, refinement, cancelled))
    names = [k for k, v in rows[0].items() if isinstance(v, float)]
    result = {
        "dataset": dataset.about.get("name", dataset.path.name),
        "split": split,
        "model": {"name": model.name, "sha256": model.sha256, "title": model.card.title},
        "align": align or model.card.preprocessing.align,
        "steps": steps or model.card.preprocessing.steps,
        "refinement": to_dict(refinement or RefinementSettings()),
        "device": str(model.device),
        "definitions": DEFINITIONS | {"sdlogj": "standard deviation of log J, see folding_definition"},
        "folding_definition": rows[0]["folding_definition"],
        "mean": {k: statistics.fmean(row[k] for row in rows) for k in names},
        "std": {k: statistics.pstdev(row[k] for row in rows) for k in names},
        "pairs": [{k: v for k, v in row.items() if k != "folding_definition"} for row in rows],
        "morphseek": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "software": software(),
    }
    write_atomically(Path(out), json.dumps(result, indent=2).encode())
    on_event(Event("write", 1.0, f"Wrote {out}"))
    return result


def _figures(
    pair: Pair,
    dataset: Dataset,
    model: LoadedModel,
    steps: int | None,
    align: str | None,
    refinement: RefinementSettings | None,
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """One row: the figures of a pair."""
    (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
    result = register(
        fixed,
        moving,
        model,
        steps=steps,
        align=align,
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
        inverse=False,
        refinement=refinement,
        cancelled=cancelled,
    )
    warped = result.warped_labels.data
    scored = dataset.evaluated
    dice = dice_per_label(fixed_labels.data, warped, scored, moving_labels.data)
    distances = hd95_per_label(fixed_labels.data, warped, fixed.grid.spacing, scored, moving_labels.data)
    before = {
        stage: statistics.fmean(result.report["dice"]["labels"][str(label)][stage] for label in dice)
        for stage in ("input", "aligned")
    }
    folding, seconds = result.report["folding"], result.report["seconds"]
    return {
        "fixed": pair.fixed.image.name,
        "moving": pair.moving.image.name,
        "dice_before": before["input"],
        "dice_aligned": before["aligned"],
        "dice": statistics.fmean(dice.values()),
        "hd95": statistics.fmean(distances.values()),
        "njd_percent": folding["njd_percent"],
        "sdlogj": folding["sdlogj"],
        "seconds": float(sum(seconds.values())),
        "dice_per_label": {dataset.labels.get(k, str(k)): v for k, v in dice.items()},
        "folding_definition": folding["definition"],
    }
