"""Whether structures that a network learns to find in synthetic brains help a fit of real ones.

    python Testing/benchmarks/brain_features.py train [--shared ../shared] [--minutes 90] [--init MODEL] [--rate R]
        --out MODEL.safetensors
    python Testing/benchmarks/brain_features.py measure MODEL.safetensors [--shared ../shared] [--pairs 4] [--out FILE]

``train`` learns from 14 label maps by brain_features.toml, for so many minutes of processor time of one
thread; the same command resumes. ``measure`` says how well real scans are segmented (OASIS, mean Dice by structure; its
labels are of another protocol), and fits development pairs by intensities, by features beside them on all levels
(weight 8) and on coarse ones alone (weight 2), and by features alone: T1 from T1, from inverted T1, and from T1 through
a T2-like curve.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from comparison.changes import inverted, t2_like
from comparison.side_by_side import ROOT, SETS, Arm, Task, development_pairs, fill, means, without_model

from MorphSeekLib.app.settings_file import load as load_settings
from MorphSeekLib.data.datasets import Case, Pair, load_dataset, read_pair
from MorphSeekLib.networks.loading import LoadedModel, load_model
from MorphSeekLib.protocol.job import SILENT, Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import override
from MorphSeekLib.registration import pair as pairs
from MorphSeekLib.registration.learned import Features
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Transform, Volume, resample
from MorphSeekLib.space.preprocessing import normalized
from MorphSeekLib.training.segmentation import Segmentation, SegmentationConfig
from MorphSeekLib.training.trainer import Trainer

STRUCTURES = {
    "white matter": (44, 45),
    "cortex": (100, 101),
    "lateral ventricle": (51, 52),
    "inferior lateral ventricle": (49, 50),
    "cerebellar white matter": (40, 41),
    "cerebellar cortex": (38, 39),
    "thalamus": (59, 60),
    "caudate": (36, 37),
    "putamen": (57, 58),
    "pallidum": (55, 56),
    "third ventricle": (4,),
    "fourth ventricle": (11,),
    "brain stem": (35,),
    "hippocampus": (47, 48),
    "amygdala": (31, 32),
    "accumbens": (23, 30),
    "ventral DC": (61, 62),
}
"""What the channels from 1 on stand for -> label values of brain_oasis."""
WAYS = {"both": ("both", 8.0, (0, 1, 2)), "both, coarse": ("both", 2.0, (1, 2)), "features": ("features", 8.0, ())}
"""What is compared, the weight of features beside intensities, and the levels."""


def train(shared: Path, minutes: float, rate: float | None, init: Path | None, out: Path) -> None:
    """Learn from the label maps, or go on."""
    config = load_settings(SegmentationConfig, Path(__file__).with_suffix(".toml"))
    changes = {} if rate is None else {"learning_rate": rate, "seed": 1}
    config = override(config, "training", minutes=minutes, **changes)
    task = Segmentation(load_dataset(shared / "data" / "brain_labels"), config, torch.device("cpu"), init)
    Trainer(task, out, Job(lambda event: print(event.message, flush=True)), clock=time.process_time).run()


def segmented(model: LoadedModel, cases: Sequence[Case]) -> dict[str, float]:
    """Return the mean Dice of each structure over labeled cases."""
    rows = []
    for case in cases:
        (image, labels), _ = read_pair(Pair(case, case))
        preprocessing = model.card.preprocessing
        seen = normalized(image, preprocessing, "The image")
        found = Features.of(model.network, seen, preprocessing, SILENT)
        best = torch.cat([1 - found.maps.sum(dim=1, keepdim=True), found.maps], dim=1).argmax(dim=1)[0]
        there = resample(Volume(best.int(), found.grid), image.grid, mode="nearest").data
        row = {}
        for channel, (name, values) in enumerate(STRUCTURES.items(), start=1):
            known, own = torch.isin(labels.data, torch.tensor(values, dtype=labels.data.dtype)), there == channel
            row[name] = float(2 * (known & own).sum() / (known.sum() + own.sum()).clamp(min=1))
        rows.append(row)
    return {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in STRUCTURES}


def by_features(fixed: Volume, moving: Volume, model: LoadedModel, way: str) -> Transform:
    """Register by one of :data:`WAYS`."""
    compare, pairs.BESIDE_WEIGHT, pairs.BESIDE_LEVELS = WAYS[way]
    told = replace(model, card=replace(model.card, compare=compare))
    return register(fixed, moving, told, RegistrationOptions(inverse=False)).transform


def measure(shared: Path, path: Path, count: int, out: Path) -> None:
    """Do what is not done, and print a table."""
    model = load_model(str(path), "cpu")
    dataset = load_dataset(shared / "data" / SETS["brain"][0])
    chosen = development_pairs(dataset, count)
    arms = {"none": without_model} | {way: partial(by_features, model=model, way=way) for way in WAYS}
    changes = {"t1": None, "t1-inverted": inverted, "t1-t2-like": t2_like}
    tasks = {
        name: Task(dataset, chosen, {way: Arm(method, moving=change) for way, method in arms.items()})
        for name, change in changes.items()
    }
    dice = segmented(model, [pair.fixed for pair in chosen])
    print("segmentation", dice)
    fill(out, tasks, {"model": model.sha256, "segmentation_dice": dice}, means)


def main() -> None:
    """The verbs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    learning = verbs.add_parser("train", help="learn from label maps")
    learning.add_argument("--minutes", type=float, default=90.0)
    learning.add_argument("--init", type=Path, help="a model of these features to go on from")
    learning.add_argument("--rate", type=float, help="the learning rate to go on at")
    learning.add_argument("--out", type=Path, required=True)
    measuring = verbs.add_parser("measure", help="segment and fit real scans")
    measuring.add_argument("model", type=Path)
    measuring.add_argument("--pairs", type=int, default=4)
    measuring.add_argument("--out", type=Path, default=Path("brain_features.json"))
    for verb in (learning, measuring):
        verb.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.verb == "train":
        train(options.shared, options.minutes, options.rate, options.init, options.out)
    else:
        measure(options.shared, options.model, options.pairs, options.out)


if __name__ == "__main__":
    main()
