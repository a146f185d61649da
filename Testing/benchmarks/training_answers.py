"""What a site's training comes to: features learned from thirty cases, and the answer of a fit that compares them.

    python Testing/benchmarks/training_answers.py [--shared ../shared] [--out FILE] [--draws 0 1 2] [--minutes 60]
        [--cases 30] [--unlabeled 0] [--split registration_test] [--keep FOLDER]

For each draw, hippocampus cases are drawn by its number from the split training (with ``--unlabeled`` others too, whose
labels are not read), and features are trained with the defaults of ``morphseek train`` for so many minutes of processor
time of one thread, validated on twelve pairs of registration_val. By six of these it is chosen, as a training does,
what the fit compares and whether a search comes before it. Then the pairs of ``--split`` are registered by the finished
model. The curve holds the validations by minutes: Dice of pairs that are fitted by the features, without the unfolding.
Draws that are in FILE are not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from comparison.side_by_side import ROOT

from MorphSeekLib.app.runs import choose_answer, stage_settings
from MorphSeekLib.data.datasets import Dataset, load_dataset
from MorphSeekLib.evaluation.evaluate import evaluate
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.networks.devices import network_precision
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import read_card, software
from MorphSeekLib.protocol.job import SILENT, Event, Job
from MorphSeekLib.protocol.options import TrainingOptions
from MorphSeekLib.protocol.settings import override, to_dict, to_json
from MorphSeekLib.training.segmentation import Segmentation, SegmentationConfig, suited
from MorphSeekLib.training.trainer import Trainer

SPACING = 1.0  # mm, as `morphseek check` suggests for these cases
VALIDATED = 12
FIGURES = ("dice", "hd95", "folded_percent", "njd_percent", "sdlogj", "dice_aligned", "dice_before")


def drawn(dataset: Dataset, draw: int, count: int, unlabeled: int) -> Dataset:
    """Return the data set with so many of its training cases, and so many others without their labels."""
    cases = sorted(dataset.split("training", "cases"), key=lambda case: str(case.image))
    random.Random(draw).shuffle(cases)
    others = [dataclasses.replace(case, label=None) for case in cases[count : count + unlabeled]]
    return dataclasses.replace(dataset, cases={"training": cases[:count] + others})


def measured(dataset: Dataset, draw: int, minutes: float, split: str, keep: Path | None) -> dict:
    """Train on the cases of a data set; return the curve and the figures of the finished model."""
    options = TrainingOptions("site", "", "site.safetensors", stages=("features",), spacing=SPACING, seed=draw)
    config = stage_settings(options)["features"]
    assert isinstance(config, SegmentationConfig)
    config = suited(config, dataset)
    config = override(config, "training", minutes=minutes, validation_pairs=VALIDATED)
    begin, curve = time.process_time(), []

    def hear(event: Event) -> None:
        if "validation/dice" in event.metrics:
            figures = {name: event.metrics.get(f"validation/{name}") for name in ("dice", "sdlogj", "folded_percent")}
            row = {"minutes": (time.process_time() - begin) / 60, "iterations": event.step, **figures}
            print(f"draw {draw}:", {name: round(value or 0, 4) for name, value in row.items()}, flush=True)
            curve.append(row)

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "site.safetensors"
        task = Segmentation(dataset, config, torch.device("cpu"))
        Trainer(task, out, Job(hear), clock=time.process_time).run()
        spent = (time.process_time() - begin) / 60
        few = dataclasses.replace(dataset, pairs={"registration_val": dataset.pairs["registration_val"][:VALIDATED]})
        choose_answer(Path(folder), few, out, "cpu", SILENT)
        card = read_card(out)
        table = evaluate(dataset, split, load_model(str(out), "cpu"), Path(folder) / "figures.json")
        size = out.stat().st_size
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(out, keep / f"draw-{draw}.safetensors")
    return {
        "minutes_of_training": spent,
        "curve": curve,
        "dice_of_choice": {name: value for name, value in card.results["with_fit"].items() if name.startswith("dice")},
        "search": card.search,
        "compare": card.compare,
        "mean": {name: table["mean"][name] for name in FIGURES},
        "std": {name: table["std"][name] for name in FIGURES},
        "pairs": len(table["pairs"]),
        "bytes": size,
        "settings": to_dict(config),
    }


def main() -> None:
    """Do the draws that are not done, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("training_answers.json"))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--unlabeled", type=int, default=0)
    parser.add_argument("--split", default="registration_test")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(options.shared / "data" / "hippocampus" / "dataset.json")
    done: dict = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": {}}
    for draw in options.draws:
        bare = f" + {options.unlabeled} without labels" if options.unlabeled else ""
        name = f"{options.cases} cases{bare}, draw {draw}, {options.minutes:g} minutes, {options.split}"
        if name in done["rows"]:
            continue
        cases = drawn(dataset, draw, options.cases, options.unlabeled)
        row = measured(cases, draw, options.minutes, options.split, options.keep)
        row["precision"] = str(network_precision(torch.device("cpu"))).removeprefix("torch.")
        done["rows"][name] = row
        done["software"] = software()
        write_atomically(options.out, to_json(done, indent=1).encode())
    for name, row in done["rows"].items():
        print(name, {key: round(value, 4) for key, value in row["mean"].items()})


if __name__ == "__main__":
    main()
