"""What ``--similarity auto`` takes, against lncc and mind, on images of one and of two contrasts.

    python Testing/benchmarks/contrasts.py [--shared ../shared] [--pairs 6] [--preset best] [--only t1 ct ...]
        [--out FILE]

Rows: T1 from T1, CT from CT, hippocampus, MR from CT, T1 from inverted T1, T1 from T1 through a T2-like curve (fluid
bright, grey matter middle, white dark: comparison/changes.py). Pairs are for development: the validation pairs of a
data set, then its training cases, each with the next. On each pair the three run one after the other, without a model.
"short" is how much lower the mean Dice of auto is than the better of the two; at most 0.005 is asked. Rows that are in
FILE are not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from comparison.changes import Change, inverted, t2_like
from comparison.side_by_side import ROOT, SETS, Arm, Task, development_pairs, fill, means, without_model

from MorphSeekLib.data.datasets import load_dataset

ROWS: dict[str, tuple[str, Change | None]] = {
    "t1": ("brain", None),
    "ct": ("ct", None),
    "hippocampus": ("hippocampus", None),
    "mr-ct": ("mr-ct", None),
    "t1-inverted": ("brain", inverted),
    "t1-t2-like": ("brain", t2_like),
}
"""Name -> data set, and what is done to the moving image."""
SIMILARITIES = ("auto", "lncc", "mind")


def summary(pairs: Sequence[dict]) -> dict[str, dict]:
    """Return means over the pairs, and what auto lacks to the better of the others."""
    found = means(pairs)
    others = [found[name]["dice"] for name in SIMILARITIES[1:] if name in found]
    if "auto" in found and others:
        found["auto"]["short"] = max(others) - found["auto"]["dice"]
    return found


def main() -> None:
    """Do what is not done, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--preset", default="best")
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("contrasts.json"))
    options = parser.parse_args()
    tasks = {}
    for name in options.only:
        file, change = ROWS[name][0], ROWS[name][1]
        dataset = load_dataset(options.shared / "data" / SETS[file][0])
        arms = {
            similarity: Arm(partial(without_model, similarity=similarity, preset=options.preset), moving=change)
            for similarity in SIMILARITIES
        }
        tasks[name] = Task(dataset, development_pairs(dataset, options.pairs), arms)
    fill(options.out, tasks, {"preset": options.preset}, summary)


if __name__ == "__main__":
    main()
