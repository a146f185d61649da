"""How many alignments are lost where the moving image lies far away and turned.

    python Testing/benchmarks/lost_alignments.py --out FILE --name NAME [--split development|test] [--shared ../shared]
        [--only brain ct mr-ct] [--pairs 10] [--methods auto affine greedy] [--still]

Ten pairs of a data set (development: drawn from the training cases; test: the first of registration_test). Each is
aligned as its files lie, and again after the moving image's header was moved by a random rigid motion: turned by up to
60 degrees about a random axis through its middle and shifted by up to 100 mm. "auto" is what ``register`` does without
a model, "affine" the alignment of that name, "greedy" greedy's own affine from the images' centers. ``--still`` leaves
the motion out, for what a change does to pairs that need none of this.

Where the alignment should lead is known from the labels alone: the rigid motion that brings the centers of the fixed
labels nearest to those of the moving ones (Kabsch). An alignment is lost where it leads the voxels of the fixed labels
on average more than 30 mm from there; a rotation of 60 degrees misses an abdomen by 60 mm and more, and good
alignments, affine against rigid, lie within 20 mm. "astray" counts a second criterion: the mean distance is above 20 mm
from where the same method led without the motion. Rows are kept in FILE under NAME, so that two checkouts can be
compared (run this file with PYTHONPATH on the other one); seconds are processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from MorphSeekLib.data.cases import name_of
from MorphSeekLib.data.datasets import Dataset, Pair, load_dataset, read_pair, scored_pairs, training_pair
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.measures.metrics import dice_per_label
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.registration.pair import Pair as Images
from MorphSeekLib.space.geometry import Grid, Volume, apply_affine, resample

ROOT = Path(__file__).resolve().parents[2]
SETS = {
    "brain": ("brain_oasis/dataset.json", False),
    "ct": ("abdomen/dataset_ct.json", False),
    "mr-ct": ("abdomen/dataset_mrct.json", True),
    "hippocampus": ("hippocampus/dataset.json", False),
}
"""Name -> file under data, and whether greedy must compare two modalities."""
MOVED = ("brain", "ct", "mr-ct")
METHODS = ("auto", "affine", "greedy")
DEGREES, SHIFT = 60.0, 100.0  # at most
LOST, ASTRAY = 30.0, 20.0  # mm


def chosen_pairs(dataset: Dataset, split: str, count: int) -> list[Pair]:
    """Return the pairs of a split; "development": drawn from the training cases, no two the same."""
    if split == "test":
        return scored_pairs(dataset, "registration_test")[:count]
    cases = [case for case in dataset.cases["training"] if case.image is not None and case.label is not None]
    generator = torch.Generator().manual_seed(1)
    pairs: list[Pair] = []
    while len(pairs) < count:
        pair = training_pair(cases, dataset.pairing, generator)
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def motion(about: np.ndarray, seed: int) -> np.ndarray:
    """Return a random rigid motion, (4, 4) LPS mm, that turns about a point."""
    random = np.random.default_rng(seed)
    axis, way = (vector / np.linalg.norm(vector) for vector in random.normal(size=(2, 3)))
    angle, length = np.deg2rad(DEGREES) * random.random(), SHIFT * random.random()
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    matrix = np.eye(4)
    matrix[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    matrix[:3, 3] = about - matrix[:3, :3] @ about + length * way
    return matrix


def by_labels(fixed: Volume, moving: Volume, known: tuple[int, ...] | None) -> np.ndarray:
    """Return the rigid motion that brings the labels' centers together, (4, 4) LPS mm."""
    common = set(fixed.data.unique().tolist()) & set(moving.data.unique().tolist()) - {0}
    values = sorted(common if known is None else common & set(known))
    a, b = (
        np.array([apply_affine(v.grid.affine, (v.data == n).nonzero().double().numpy()).mean(0) for n in values])
        for v in (fixed, moving)
    )
    u, _, v = np.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
    turn = (u @ np.diag([1, 1, np.sign(np.linalg.det(u @ v))]) @ v).T
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, b.mean(0) - turn @ a.mean(0)
    return matrix


def aligned(method: str, fixed: Volume, moving: Volume, multimodal: bool) -> np.ndarray:
    """Align two images by a method, (4, 4) LPS mm, fixed point -> moving point."""
    if method == "greedy":
        from comparison.classical import greedy_affine

        return greedy_affine(fixed, moving, multimodal=multimodal)
    pair = Images(fixed, moving)
    pair.align(method, None)
    assert isinstance(pair.alignment.transform, np.ndarray)
    return pair.alignment.transform


def run_pair(dataset: Dataset, pair: Pair, methods: list[str], multimodal: bool, seed: int, still: bool) -> dict:
    """Align a pair by every method, as it lies and moved; return rows by method."""
    (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
    true = by_labels(fixed_labels, moving_labels, dataset.evaluated)
    points = apply_affine(fixed.grid.affine, (fixed_labels.data > 0).nonzero().double().numpy()[::20])

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(apply_affine(one, points) - apply_affine(other, points), axis=1).mean())

    moves = {"still": np.eye(4)} | ({} if still else {"moved": motion(moving.grid.center, seed)})
    rows: dict[str, dict] = {}
    for method in methods:
        rows[method] = {}
        home = None
        for name, move in moves.items():
            image = Volume(moving.data, Grid(moving.grid.shape, move @ moving.grid.affine))
            begin = time.process_time()
            try:
                found = np.linalg.inv(move) @ aligned(method, fixed, image, multimodal)
            except RuntimeError as error:  # greedy, where it finds none
                rows[method][name] = {"error": str(error).splitlines()[0]}
                continue
            seconds = time.process_time() - begin
            home = found if name == "still" else home
            warped = resample(moving_labels, fixed.grid, found, mode="nearest").data
            dice = dice_per_label(fixed_labels.data, warped, dataset.evaluated, moving_labels.data)
            rows[method][name] = {
                "dice": float(np.mean(list(dice.values()))),
                "error_mm": apart(found, true),
                "from_still_mm": apart(found, home) if home is not None else None,
                "mirrored": bool(np.linalg.det(found[:3, :3]) < 0),
                "cpu_seconds": seconds,
            }
    return rows


def summary(rows: list[dict]) -> dict[str, dict]:
    """Return counts and means by method and motion."""
    found: dict[str, dict] = {}
    for method in METHODS:
        for name in ("still", "moved"):
            all_rows = [row["methods"][method][name] for row in rows if name in row["methods"].get(method, {})]
            good = [row for row in all_rows if "error" not in row]
            if good:
                found[f"{method} {name}"] = {
                    "pairs": len(all_rows),
                    "lost": sum(row["error_mm"] > LOST for row in good) + len(all_rows) - len(good),
                    "astray": sum((row["from_still_mm"] or 0) > ASTRAY for row in good),
                    "mirrored": sum(row["mirrored"] for row in good),
                    "dice": float(np.mean([row["dice"] for row in good])),
                    "error_mm": float(np.median([row["error_mm"] for row in good])),
                    "cpu_seconds": float(np.mean([row["cpu_seconds"] for row in good])),
                }
    return found


def main() -> None:
    """Do what is not done, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("lost-alignments.json"))
    parser.add_argument("--name", default="now")
    parser.add_argument("--split", default="development", choices=["development", "test"])
    parser.add_argument("--only", nargs="+", default=list(MOVED), choices=list(SETS))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--still", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for name in options.only:
        file, multimodal = SETS[name]
        dataset = load_dataset(options.shared / "data" / file)
        entry = result.setdefault(options.split, {}).setdefault(options.name, {}).setdefault(name, {"pairs": []})
        for number, pair in enumerate(chosen_pairs(dataset, options.split, options.pairs)):
            if number < len(entry["pairs"]):
                continue
            names = {"fixed": name_of(pair.fixed, dataset), "moving": name_of(pair.moving, dataset)}
            rows = run_pair(dataset, pair, options.methods, multimodal, number, options.still)
            entry["pairs"].append({**names, "methods": rows})
            entry["mean"] = summary(entry["pairs"])
            result |= {"date": time.strftime("%Y-%m-%d"), "software": software()}
            write_atomically(options.out, to_json(result, indent=1).encode())
        for method, row in entry["mean"].items():
            print(f"{options.name:8} {name:12} {method:14}", {k: round(v, 3) for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
