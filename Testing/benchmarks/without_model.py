"""Registration without a model against greedy, on the test pairs of every data set.

    python Testing/benchmarks/without_model.py [--shared ../shared] [--out FILE] [--only brain ct] [--split ...]
        [--pairs N] [--methods best fast greedy greedy-as-given] [--change noise table]

On each pair the methods run one after the other in one process with one thread, so that the ratios of their processor
seconds hold on any machine: MorphSeek from images in memory to the delivered transform's figures, greedy from images in
memory to its transform (with the writing of its files, which is a hundredth). "greedy" finds an affine transform of its
own first, "greedy-as-given" takes the images as they lie; the better by mean Dice is what a row is compared with.
Dice, folding and seconds are those of the other tables (comparison/scoring.py). Rows that are in FILE are not done
again. The native row of the command line, start and files included, is that of ``native_command.py``.

With ``--change`` each method also runs on both images after a change (comparison/changes.py), and is compared with
itself on the images as they are:

- noise: 1 % Rician noise and a smooth field from 0.8 to 1.2;
- table (CT alone): a wider field of view with a table and arms, elsewhere in each image, in Hounsfield units as a
  scanner writes them; "padded" is the field alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from comparison.changes import Change, hounsfield, padded, shaded_and_noisy, table_and_arms
from comparison.classical import greedy
from comparison.side_by_side import ROOT, SETS, Arm, Task, by_preset, fill, means

from MorphSeekLib.data.datasets import load_dataset, scored_pairs

CHANGES: dict[str, dict[str, Change]] = {
    "noise": {"noise": shaded_and_noisy},
    "table": {
        "padded": lambda image, name: hounsfield(padded(image), name),
        "table": lambda image, name: hounsfield(table_and_arms(image, name), name),
    },
}
METHODS = ("best", "fast", "greedy", "greedy-as-given")


def arms_of(name: str, methods: Sequence[str], changes: Sequence[str]) -> dict[str, Arm]:
    """Return every method by its name, as it is and after the changes that there are for a data set."""
    classical = {
        "greedy": partial(greedy, affine=True, multimodal=SETS[name][1]),
        "greedy-as-given": partial(greedy, affine=False, multimodal=SETS[name][1]),
    }
    chosen = {key: method for key, method in (by_preset | classical).items() if key in methods}
    arms = {key: Arm(method) for key, method in chosen.items()}
    for change in changes:
        if change == "table" and name != "ct":
            continue
        for title, function in CHANGES[change].items():
            arms |= {f"{key}, {title}": Arm(method, function, function) for key, method in chosen.items()}
    return arms


def summary(pairs: Sequence[dict]) -> dict[str, dict]:
    """Return means over the pairs; beside them the ratio of seconds to those of the better greedy, and what a change
    costs: Dice less than without it, and the ratio of seconds."""
    found = means(pairs)
    classical = [row for name, row in found.items() if name in METHODS[2:] and not row["failed"]]
    if classical:
        best = max(classical, key=lambda row: row["dice"])
        for row in found.values():
            row["times_greedy"] = row["cpu_seconds"] / best["cpu_seconds"]
    for name, row in found.items():
        plain = found.get(name.split(", ")[0])
        if plain is not None and plain is not row:
            row["dice_lost"] = plain["dice"] - row["dice"]
            row["times_clean"] = row["cpu_seconds"] / plain["cpu_seconds"]
    return found


def main() -> None:
    """Do what is not done, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("without_model.json"))
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--split", default="registration_test")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; with --change: best and fast")
    parser.add_argument("--change", nargs="+", default=[], choices=list(CHANGES))
    options = parser.parse_args()
    methods = options.methods or (METHODS[:2] if options.change else METHODS)
    tasks = {}
    for name in options.only:
        dataset = load_dataset(options.shared / "data" / SETS[name][0])
        pairs = scored_pairs(dataset, options.split)[: options.pairs]
        tasks[name] = Task(dataset, pairs, arms_of(name, methods, options.change))
    fill(options.out, tasks, {"split": options.split}, summary)


if __name__ == "__main__":
    main()
