"""Which model ``--model auto`` takes, and the Dice of its answer against ``--model none``.

    python Testing/benchmarks/auto_model.py [--shared ../shared] [--pairs 12] [--split registration_test]
        [--only hippocampus brain ...] [--out FILE]

Rows: hippocampus, brains at 2 mm, CT, MR from CT, MR from MR (of the abdomen; pairs are made of the split's MRs), and
cubes of 150 mm out of the middle of the brains. On each pair both run one after the other, by the defaults. "short" is
how much lower the mean Dice of auto is than that of none; at most 0.005 is asked. Rows that are in FILE are not done
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path

from comparison.side_by_side import ROOT, SETS, Arm, Task, cropped, fill, means, without_model

from MorphSeekLib.data.datasets import Dataset, Pair, load_dataset, scored_pairs
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.startup import AUTO
from MorphSeekLib.registration.choice import chosen_model
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Transform, Volume

CUBE = 150.0  # mm
ROWS: dict[str, tuple[str, Callable[[Volume], Volume] | None]] = {
    "hippocampus": ("hippocampus", None),
    "brain": ("brain", None),
    "ct": ("ct", None),
    "mr-ct": ("mr-ct", None),
    "mr-mr": ("mr-ct", None),
    "brain-crops": ("brain", partial(cropped, size=CUBE)),
}
"""Name -> data set, and what its images are cut to."""


def by_auto(fixed: Volume, moving: Volume) -> Transform:
    """Register as the command line does by its defaults; the choice of the model is a part of it."""
    model, device, _ = chosen_model(AUTO, (fixed, moving), "cpu")
    return register(fixed, moving, model, RegistrationOptions(inverse=False), device=device).transform


def told(fixed: Volume, moving: Volume) -> dict:
    """Return what is said of the choice."""
    return {"model": chosen_model(AUTO, (fixed, moving), "cpu")[2]}


def pairs_of(name: str, dataset: Dataset, split: str) -> list[Pair]:
    """Return the pairs of a row."""
    pairs = scored_pairs(dataset, split)
    if name != "mr-mr":
        return pairs
    fixed = list(dict.fromkeys(pair.fixed for pair in pairs))
    if len(fixed) < 2:  # the validation pairs have one MR
        fixed += [case for case in dataset.split("training", "cases") if case.file.name.startswith("mr_")][:3]
    return [Pair(*two) for two in permutations(fixed, 2)]


def summary(pairs: Sequence[dict]) -> dict[str, dict]:
    """Return means over the pairs, how often each model was taken, and what auto lacks to none."""
    found = means(pairs)
    if "auto" in found and "none" in found:
        found["auto"]["short"] = found["none"]["dice"] - found["auto"]["dice"]
    for pair in pairs:
        taken = pair["model"].split(",")[0].removesuffix(".")
        found["auto"][taken] = found["auto"].get(taken, 0) + 1
    return found


def main() -> None:
    """Do what is not done, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--split", default="registration_test")
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("auto_model.json"))
    options = parser.parse_args()
    arms = {"auto": Arm(by_auto), "none": Arm(without_model)}
    tasks = {}
    for name in options.only:
        file, cut = ROWS[name]
        dataset = load_dataset(options.shared / "data" / SETS[file][0])
        tasks[name] = Task(dataset, pairs_of(name, dataset, options.split)[: options.pairs], arms, cut, told)
    fill(options.out, tasks, {"split": options.split}, summary)


if __name__ == "__main__":
    main()
