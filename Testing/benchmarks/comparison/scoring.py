"""Figures of any registration method over labeled pairs, from its transforms alone, so that all are judged alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from MorphSeekLib.data.cases import name_of
from MorphSeekLib.data.datasets import Dataset, Pair, read_pair, scored_pairs
from MorphSeekLib.evaluation.evaluate import check_judged, label_maps
from MorphSeekLib.measures.folds import certify
from MorphSeekLib.measures.metrics import folding
from MorphSeekLib.measures.scores import DELIVERED, PairRow, definitions
from MorphSeekLib.measures.scores import score as measured
from MorphSeekLib.protocol.job import SILENT, Job
from MorphSeekLib.space.geometry import DenseTransform, Transform, Volume, dense_from_voxels, jacobian_volume, resample

Method = Callable[[Volume, Volume], Transform]
"""(fixed, moving) -> fixed point -> moving point, LPS mm."""

_TITLES = {"dice": "Dice", "hd95": "HD95", "folded_percent": "folded cells", "njd_percent": "NJD", "sdlogj": "SDlogJ"}
DEFINITIONS = {_TITLES[name]: text for name, text in definitions(DELIVERED, _TITLES).items()}
DEFINITIONS["folded cells"] += "; empty in rows that were measured before 2026-11-26"
ROW = (
    *("fixed", "moving", "dice", "hd95", "lost_labels", "dice_per_label", "folded_percent", "no_fold_proven"),
    *("njd_percent", "sdlogj", "seconds", "cpu_seconds", "peak_gb"),
)
"""The figures of a pair in a result's file."""


def measure(
    dataset: Dataset,
    split: str,
    method: Method,
    *,
    device: torch.device | str = "cpu",
    pairs: int | None = None,
    job: Job = SILENT,
) -> list[PairRow]:
    """Register every pair of a split and score the transforms.

    Args:
        dataset, split: pairs with images and label maps.
        method: what registers.
        device: on whose memory an eye is kept.
        pairs: only the first so many.

    Returns:
        a row a pair: the names of its cases, what :func:`score` measures, and of the method's call alone ``seconds``
        (wall), ``cpu_seconds`` and ``peak_gb`` (None where it cannot be known).

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
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        rows.append(
            dataclasses.replace(
                score(fixed_labels, moving_labels, transform, dataset),
                fixed=name_of(pair.fixed, dataset),
                moving=name_of(pair.moving, dataset),
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                peak_gb=peak(),
            )
        )
    return rows


def score(fixed_labels: Volume, moving_labels: Volume, transform: Transform, dataset: Dataset) -> PairRow:
    """Judge one transform, fixed point -> moving point (LPS mm), on the fixed labels' grid."""
    grid = fixed_labels.grid
    warped = resample(moving_labels, grid, transform, mode="nearest")
    if not isinstance(transform, DenseTransform):
        transform = dense_from_voxels(torch.zeros(1, 3, *grid.shape), grid, transform)
    cells = certify(transform, grid).count
    folds = folding(jacobian=jacobian_volume(transform, grid).data)
    labels = label_maps(fixed_labels, warped, moving_labels, dataset)
    return measured(labels, folds, cells.folded_percent, cells.no_fold_proven)


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
