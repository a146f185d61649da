"""Tables whose methods run one after the other on each pair, so that ratios of their seconds hold on any machine.

A table's file has every row of every pair; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from MorphSeekLib.data.cases import name_of
from MorphSeekLib.data.datasets import Case, Dataset, Pair, paired_sides, read_pair
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.registration.compile_kernels import main as compile_kernels
from MorphSeekLib.registration.descent import kernels_used
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Grid, Transform, Volume

from .changes import Change
from .scoring import DEFINITIONS, ROW, Method, score

ROOT = Path(__file__).resolve().parents[3]
SETS = {
    "brain": ("brain_oasis/dataset.json", False),
    "ct": ("abdomen/dataset_ct.json", False),
    "mr-ct": ("abdomen/dataset_mrct.json", True),
    "hippocampus": ("hippocampus/dataset.json", False),
}
"""Name -> file under data, and whether the classical methods must compare two modalities."""
MEANS = ("dice", "hd95", "folded_percent", "sdlogj", "cpu_seconds")


@dataclass(frozen=True)
class Arm:
    """A method on images as they are, or after a change, for which no time is counted.

    Attributes:
        method: what registers.
        fixed, moving: what is done to an image before.
    """

    method: Method
    fixed: Change | None = None
    moving: Change | None = None


@dataclass(frozen=True)
class Task:
    """A row of a table: pairs, and the arms that run on each.

    Attributes:
        cut: what an image's and its labels' grid is cut to; None: they stay whole.
        told: what else is written of a pair, from its images.
    """

    dataset: Dataset
    pairs: Sequence[Pair]
    arms: Mapping[str, Arm]
    cut: Callable[[Volume], Volume] | None = None
    told: Callable[[Volume, Volume], dict] | None = None


def without_model(fixed: Volume, moving: Volume, **choices) -> Transform:
    """Register without a model, by the options that are given."""
    return register(fixed, moving, None, RegistrationOptions(inverse=False, **choices)).transform


def development_pairs(dataset: Dataset, count: int) -> list[Pair]:
    """Return validation pairs, and then training cases in turn, each with the next; none of a test pair."""
    pairs: list[Pair] = list(dataset.split("registration_val"))
    cases: list[Case] = dataset.split("training", "cases")
    if dataset.pairing is None:
        sides = cases, cases[1:]
    else:
        sides = paired_sides(cases, dataset.pairing)
    pairs += [Pair(fixed, moving) for fixed, moving in zip(*sides, strict=False)]
    return [pair for pair in pairs if pair.fixed.label and pair.moving.label][:count]


def cropped(volume: Volume, size: float) -> Volume:
    """Cut a cube of this many mm out of the middle of a volume."""
    count = [min(n, round(size / s)) for n, s in zip(volume.grid.shape, volume.grid.spacing, strict=True)]
    begin = [(n - c) // 2 for n, c in zip(volume.grid.shape, count, strict=True)]
    part = volume.data[tuple(slice(b, b + c) for b, c in zip(begin, count, strict=True))].contiguous()
    affine = volume.grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ begin
    return dataclasses.replace(volume, data=part, grid=Grid(tuple(count), affine), elsewhere=None)


def run_pair(task: Task, pair: Pair, left: Mapping[str, Arm]) -> dict:
    """Register a pair by some arms; return a row each under "methods", an error's text where a method failed."""
    volumes = [volume if task.cut is None else task.cut(volume) for side in read_pair(pair) for volume in side]
    fixed, fixed_labels, moving, moving_labels = volumes
    rows: dict[str, dict] = {}
    for name, arm in left.items():
        images = []
        for image, change, case in ((fixed, arm.fixed, pair.fixed), (moving, arm.moving, pair.moving)):
            side = "fixed" if image is fixed else "moving"
            images.append(image if change is None else change(image, f"{case.file.name} {side}"))
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            transform = arm.method(*images)
        except RuntimeError as error:  # greedy, where its affine alignment fails
            rows[name] = {"error": str(error).splitlines()[0]}
            continue
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        scored = score(fixed_labels, moving_labels, transform, task.dataset)
        row = dataclasses.replace(scored, seconds=seconds, cpu_seconds=cpu_seconds)
        rows[name] = row.to_json(name for name in ROW if name not in ("fixed", "moving"))
    return {"methods": rows, **({} if task.told is None else task.told(fixed, moving))}


def means(pairs: Sequence[dict]) -> dict[str, dict]:
    """Return of each method means over the pairs where it did not fail."""
    found = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair["methods"]):
        rows = [pair["methods"][name] for pair in pairs if name in pair["methods"]]
        good = [row for row in rows if "error" not in row]
        if not good:
            continue
        found[name] = {
            "pairs": len(good),
            "failed": len(rows) - len(good),
            **{key: statistics.fmean(row[key] for row in good) for key in MEANS},
            "proven": sum(row["no_fold_proven"] for row in good),
        }
    return found


def fill(
    out: Path, tasks: Mapping[str, Task], about: dict, summary: Callable[[Sequence[dict]], dict[str, dict]] = means
) -> dict:
    """Do what is not done of a table, with one thread, and print it; return what its file holds.

    Args:
        out: the file; written after every pair.
        tasks: name -> row of the table.
        about: what the rows depend on; a file of another kind is refused.
        summary: rows of a task -> its figures by method.

    Raises:
        SystemExit: the file holds rows that were made otherwise.
    """
    torch.set_num_threads(1)
    compile_kernels()
    _warm_up()
    result: dict = {"sets": {}}
    if out.is_file():
        result = json.loads(out.read_text(encoding="utf-8"))
        if any(result.get(key) != value for key, value in about.items()):
            raise SystemExit(f"{out} was made with other settings than {about}; give another --out.")
    for name, task in tasks.items():
        rows = result["sets"].setdefault(name, {"pairs": []})["pairs"]
        for pair in task.pairs:
            names = {"fixed": name_of(pair.fixed, task.dataset), "moving": name_of(pair.moving, task.dataset)}
            known = next((row for row in rows if {k: row[k] for k in names} == names), None)
            if known is None:
                known = {**names, "methods": {}}
                rows.append(known)
            left = {key: arm for key, arm in task.arms.items() if key not in known["methods"]}
            if not left:
                continue
            found = run_pair(task, pair, left)
            known |= found | {"methods": known["methods"] | found["methods"]}
            result["sets"][name]["mean"] = summary(rows)
            result |= about | {"definitions": DEFINITIONS, "kernels": kernels_used(torch.device("cpu"))}
            result |= {"date": time.strftime("%Y-%m-%d"), "software": software()}
            write_atomically(out, to_json(result, indent=1).encode())
            figures = {key: round(row.get("dice", -1), 4) for key, row in known["methods"].items()}
            print(name, *names.values(), figures, flush=True)
        for method, row in summary(rows).items():
            print(f"{name:12} {method:20}", {k: round(v, 4) for k, v in row.items()})
    return result


def _warm_up() -> None:
    """Load what a first registration loads, which would be counted with the first pair."""
    points = fields.identity((24, 24, 24))[0]
    grid = Grid.from_parts((24, 24, 24), (2, 2, 2), np.eye(3), (0, 0, 0))
    images = [Volume(100 * torch.exp(-(points - center).square().sum(dim=0) / 60), grid) for center in (11.0, 12.0)]
    without_model(*images, search="on")


by_preset = {preset: partial(without_model, preset=preset) for preset in ("best", "fast")}
"""Both presets, without a model."""
