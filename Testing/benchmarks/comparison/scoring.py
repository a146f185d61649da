"""Figures of any registration method over labeled pairs, from its transforms alone, so that all are judged alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from MorphSeekLib.data.cases import name_of
from MorphSeekLib.data.datasets import Dataset, Pair, read_pair, scored_pairs
from MorphSeekLib.evaluation.evaluate import check_judged, label_row
from MorphSeekLib.measures.folds import certify
from MorphSeekLib.measures.metrics import LABEL_DEFINITIONS, folding, label_figures
from MorphSeekLib.protocol.job import SILENT, Job
from MorphSeekLib.space.geometry import DenseTransform, Transform, Volume, dense_from_voxels, jacobian_volume, resample

Method = Callable[[Volume, Volume], Transform]
"""(fixed, moving) -> fixed point -> moving point, LPS mm."""

DEFINITIONS = {
    "Dice": f"{LABEL_DEFINITIONS['dice']}; moving labels warped nearest-neighbor onto the fixed image's grid",
    "HD95": LABEL_DEFINITIONS["hd95"],
    "folded cells": "share of the cells of the delivered transform in which a determinant <= 0 was found, alignment "
    "included (MorphSeekLib.measures.folds); empty in rows that were measured before 2026-11-26",
    "NJD": "share of the fixed image's voxels with a Jacobian determinant <= 0 of the whole transform, alignment "
    "included (central differences, one-sided at the border)",
    "SDlogJ": "standard deviation of the logarithm of that determinant over the voxels where it is above 0",
}


def measure(
    dataset: Dataset,
    split: str,
    method: Method,
    *,
    device: torch.device | str = "cpu",
    pairs: int | None = None,
    job: Job = SILENT,
) -> list[dict[str, Any]]:
    """Register every pair of a split and score the transforms.

    Args:
        dataset, split: pairs with images and label maps.
        method: what registers.
        device: on whose memory an eye is kept.
        pairs: only the first so many.

    Returns:
        a row a pair: "fixed", "moving" (cases), what :func:`score` measures, and of the method's call alone
        "seconds" (wall), "cpu_seconds" and "peak_gb" (None where it cannot be known).

    Raises:
        MorphSeekError: no such split, pairs without labels, unreadable files, pairs without a label in common.
        Cancelled: the person stopped it.
    """
    wanted: list[Pair] = scored_pairs(dataset, split)[:pairs]
    rows = []
    for number, pair in enumerate(wanted, start=1):
        job.check()
        job.report("step", (number - 1) / len(wanted), f"Pair {number} of {len(wanted)}", number, len(wanted))
        (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
        check_judged(fixed_labels, moving_labels, pair, dataset)
        begin, cpu = time.perf_counter(), time.process_time()
        with peak_memory(device) as peak:
            transform = method(fixed, moving)
        spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        figures = score(fixed_labels, moving_labels, transform, dataset)
        names = {"fixed": name_of(pair.fixed, dataset), "moving": name_of(pair.moving, dataset)}
        rows.append(names | figures | spent | {"peak_gb": peak()})
    return rows


def score(fixed_labels: Volume, moving_labels: Volume, transform: Transform, dataset: Dataset) -> dict[str, Any]:
    """Judge one transform, fixed point -> moving point (LPS mm), on the fixed labels' grid.

    Returns:
        what :func:`MorphSeekLib.evaluation.evaluate.label_row` says of the labels, "folded_percent" and
        "no_fold_proven" (:mod:`MorphSeekLib.measures.folds`), "njd_percent" and "sdlogj".
    """
    grid = fixed_labels.grid
    warped = resample(moving_labels, grid, transform, mode="nearest").data
    found = label_figures(fixed_labels.data, warped, moving_labels.data, grid.spacing, dataset.evaluated)
    if not isinstance(transform, DenseTransform):
        transform = dense_from_voxels(torch.zeros(1, 3, *grid.shape), grid, transform)
    cells = certify(transform, grid).count
    folds = folding(jacobian=jacobian_volume(transform, grid).data)
    return label_row(found, dataset) | {
        "folded_percent": cells.folded_percent,
        "no_fold_proven": cells.no_fold_proven,
        "njd_percent": folds.njd_percent,
        "sdlogj": folds.sdlogj,
    }


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Callable[[], float | None]]:
    """Gives a function that tells, after the block, the largest memory within it in GB.

    On a GPU what PyTorch had allocated; else the resident set of this process, where the system tells it (Linux).
    """
    device = torch.device(device)
    found: float | None = None
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif reset.exists():
        reset.write_text("5")
    yield lambda: found
    if device.type == "cuda":
        found = torch.cuda.max_memory_allocated(device) / 2**30
    elif reset.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        found = int(line.split()[1]) / 2**20
