"""What correcting by hand gains: label centroids as points in the abdomen, and a brain with a simulated resection.

    python Testing/benchmarks/corrections.py [--shared ../shared] [--split registration_test] [--pairs N] --out FILE

Abdomen (CT from CT): each pair is registered without a model and then corrected by the centroids of the three organs
whose Dice is lowest, as they are and moved at random by 3 mm, stated as an error of 1 and of 3 mm. Told are the change
of Dice of these organs and of the others, and the seconds of the corrected fit over those of the pair's own fit.

Brain: a moving image is made of a fixed one by a known map, in which tissue sags by up to 10 mm toward a cavity of 15
mm that is cut out of it. Six points on the cavity's rim correct the registration; told is the mean distance to the
known map within 25 mm of the cavity, away from the points by more than 5 mm.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from comparison.scoring import score

from MorphSeekLib.data.datasets import Dataset, load_dataset, read_pair, scored_pairs
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.points import PointPairs
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.registration.correction import Correction
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.registration.result import Registration
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, Volume, apply_affine, resample

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = RegistrationOptions(inverse=False)
WORST = 3
MOVED = 3.0  # mm
CAVITY, SAG, WIDTH = 15.0, 10.0, 22.0  # mm
NEAR, POINTS_AWAY = 25.0, 5.0  # mm


def centroid(labels: Volume, value: int) -> np.ndarray:
    """Return the middle of a label, LPS mm."""
    index = (labels.data == value).nonzero().double().mean(dim=0).numpy()
    return apply_affine(labels.grid.affine, index[None])[0]


def corrected(images: tuple[Volume, Volume], first: Registration, points: PointPairs, error: float) -> Registration:
    """Correct a registration by points of the same error."""
    correction = Correction(first.state, points, np.full(len(points.labels), error))
    return register(*images, None, OPTIONS, start=correction)


def abdomen(dataset: Dataset, pair, random: np.random.Generator) -> dict:
    """Return the row of one pair."""
    (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
    first = register(fixed, moving, None, OPTIONS)
    before = score(fixed_labels, moving_labels, first.transform, dataset).dice_per_label
    values = {dataset.label_name(v): v for v in dataset.labels if dataset.label_name(v) in before}
    worst = sorted(values, key=lambda name: before[name])[:WORST]
    row: dict = {"fixed": Path(fixed.name).name, "moving": Path(moving.name).name, "organs": worst}
    for name, length in (("as they are", 0.0), ("moved", MOVED)):
        away = random.normal(size=(WORST, 3))
        away *= length / np.linalg.norm(away, axis=1, keepdims=True)
        at = [np.array([centroid(labels, values[o]) for o in worst]) for labels in (fixed_labels, moving_labels)]
        points = PointPairs(at[0], at[1] + away, tuple(worst))
        second = corrected((fixed, moving), first, points, max(length, 1.0))
        after = score(fixed_labels, moving_labels, second.transform, dataset).dice_per_label
        gains = {o: after[o] - before[o] for o in values}
        row[name] = {
            "gain": float(np.mean([gains[o] for o in worst])),
            "gain_of_others": float(np.mean([gain for o, gain in gains.items() if o not in worst])),
            "time_ratio": second.report["seconds"]["fit"] / first.report["seconds"]["fit"],
            "no_fold_proven": second.report["folding"]["cells"]["no_fold_proven"],
            "points_mm": float(np.mean([p["after"] for p in second.report["corrections"]["points"]])),
        }
    return row


def resected(fixed: Volume, center: np.ndarray) -> tuple[Volume, DenseTransform]:
    """Return the fixed image with tissue that sags toward a cavity, and the map from the fixed image to it."""
    grid = fixed.grid
    at = torch.from_numpy(apply_affine(grid.affine, fields.identity(grid.shape)[0].flatten(1).T.numpy()))
    apart = torch.from_numpy(center) - at
    length = apart.norm(dim=1, keepdim=True)
    # nothing moves in the middle of the cavity, most beside it
    size = SAG * (length / CAVITY).clamp(max=1) * torch.exp(-0.5 * ((length - CAVITY).clamp(min=0) / WIDTH) ** 2)
    moved = apart / length.clamp(min=1e-6) * size
    true = DenseTransform(moved.T.reshape(3, *grid.shape).float().contiguous(), grid)
    moving = resample(fixed, grid, true.inverse(grid))
    cavity = (length[:, 0] < CAVITY - 0.6 * SAG).reshape(grid.shape)
    return Volume(torch.where(cavity, moving.data.min(), moving.data), grid), true


def brain(fixed: Volume, center: np.ndarray) -> dict:
    """Return the row of one brain, resected around a point, LPS mm."""
    moving, true = resected(fixed, center)
    first = register(fixed, moving, None, OPTIONS)
    sides = np.array([side for side in itertools.product((-1, 0, 1), repeat=3) if np.abs(side).sum() == 1])
    places = center + (CAVITY + 2) * sides
    points = PointPairs(places, true.map_points(places), tuple(f"P{n}" for n in range(1, 7)))
    second = corrected((fixed, moving), first, points, 1.0)
    shown = (fixed.data > 0.05 * fixed.data.max()).nonzero().numpy()
    at = apply_affine(fixed.grid.affine, shown)
    apart = np.linalg.norm(at - center, axis=1)
    away = np.linalg.norm(at[:, None] - places[None], axis=2).min(axis=1)
    near = at[(apart > CAVITY) & (apart < CAVITY + NEAR) & (away > POINTS_AWAY)]
    error = [
        float(np.linalg.norm(r.transform.map_points(near) - true.map_points(near), axis=1).mean())
        for r in (first, second)
    ]
    return {
        "brain": Path(fixed.name).name,
        "before_mm": error[0],
        "after_mm": error[1],
        "time_ratio": second.report["seconds"]["fit"] / first.report["seconds"]["fit"],
        "no_fold_proven": second.report["folding"]["cells"]["no_fold_proven"],
    }


def summary(rows: list[dict], brains: list[dict]) -> list[str]:
    """Return lines that say what was measured."""
    lines = []
    for name in ("as they are", "moved"):
        means = [np.mean([row[name][k] for row in rows]) for k in ("gain", "gain_of_others", "time_ratio", "points_mm")]
        proven = sum(row[name]["no_fold_proven"] for row in rows)
        lines.append(
            f"centroids {name:12} three worst organs {means[0]:+.3f} Dice, others {means[1]:+.4f}, time "
            f"{means[2]:.2f} of the fit, points {means[3]:.2f} mm, proven {proven}"
        )
    means = [np.mean([row[k] for row in brains]) for k in ("before_mm", "after_mm", "time_ratio")]
    lines.append(f"resected brains: {means[0]:.2f} mm before, {means[1]:.2f} mm after, time {means[2]:.2f} of the fit")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--split", default="registration_test")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    dataset = load_dataset(arguments.shared / "data/abdomen/dataset_ct.json")
    rows = []
    for pair in scored_pairs(dataset, arguments.split)[: arguments.pairs]:
        rows.append(abdomen(dataset, pair, random))
        print(rows[-1], flush=True)
    brains, seen = [], set()
    for pair in scored_pairs(load_dataset(arguments.shared / "data/brain_oasis/dataset.json"), arguments.split):
        (fixed, _), _ = read_pair(pair)
        if fixed.name in seen or len(seen) == 4:
            continue
        seen.add(fixed.name)
        brains.append(brain(fixed, fixed.grid.center + np.array([25.0, 0.0, 15.0])))
        print(brains[-1], flush=True)
    found = {"abdomen": rows, "brains": brains, "split": arguments.split, "software": software()}
    write_atomically(arguments.out, (to_json(found) + "\n").encode())
    print("\n".join(summary(rows, brains)))


if __name__ == "__main__":
    main()
