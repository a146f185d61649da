"""How often a fine-tuning by GRPO stays stable, with a warm-up before it and without one.

    python Testing/benchmarks/stability.py [--shared ../shared] [--out FILE] [--seeds 0 1 2] [--form paper]

The paper says 33 % of the runs are stable without a warm-up and 79 % with one. For each seed the small VoxelMorph of
the main table is fine-tuned on the hippocampus cases from fresh weights, and from those of a warm-up without labels, by
the policy of that table's arm (``paper``, or ``morphseek`` for ours): everything else is the same. A run is stable
where every loss is a finite number and no validation (eight pairs of registration_val, before the first iteration and
after every few) falls by more than 0.05 of Dice below the first. Runs that are in the file are not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from comparison.main_table import shipped_settings
from comparison.side_by_side import ROOT

from MorphSeekLib.data.datasets import Dataset, load_dataset
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.networks.model_file import Card, save, software
from MorphSeekLib.networks.policy import RegistrationModel
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.job import SILENT, Event, Job
from MorphSeekLib.protocol.settings import override, to_json
from MorphSeekLib.training.finetuning import Finetuning
from MorphSeekLib.training.trainer import Trainer
from MorphSeekLib.training.warmup import Warmup

FALL = 0.05
"""Of validation Dice below that of the start: such a run is not stable."""
WARMED, TUNED, VALIDATED, EVERY = 120, 48, 8, 8
"""Iterations of the warm-up and of the fine-tuning, pairs that are validated on, and iterations between validations."""
STARTS = ("fresh weights", "warm-up")


def started(dataset: Dataset, start: str, seed: int, out: Path) -> None:
    """Write the model that a fine-tuning starts from."""
    settings = shipped_settings("main-table")
    task, arm = settings.tasks["hippocampus"], settings.arms["warm-up"]
    model = settings.networks["voxelmorph"].model
    if start == "fresh weights":
        torch.manual_seed(seed)
        preprocessing = dataclasses.replace(task.preprocessing, steps=1)
        save(out, RegistrationModel(model), Card(title="fresh", preprocessing=preprocessing))
        return
    assert arm.warmup is not None
    config = dataclasses.replace(arm.warmup, model=model, preprocessing=task.preprocessing)
    config = override(
        config, "training", seed=seed, iterations=WARMED, validate_every=WARMED, validation_pairs=1, centered=True
    )
    Trainer(Warmup(dataset, config, None, torch.device("cpu")), out).run()


def tuned(dataset: Dataset, form: str, start: str, seed: int) -> dict:
    """Fine-tune from a start; return the validations and whether the run was stable."""
    config = shipped_settings("main-table").arms[form].finetune
    assert config is not None
    config = override(
        config,
        "training",
        seed=seed,
        iterations=TUNED,
        validate_every=EVERY,
        validation_pairs=VALIDATED,
        centered=True,
    )
    begin, losses = time.process_time(), [0.0]
    with tempfile.TemporaryDirectory() as folder:
        init = Path(folder) / "start.safetensors"
        started(dataset, start, seed, init)
        warmed = time.process_time()
        task = Finetuning(dataset, config, init, torch.device("cpu"))
        curve = [task.validate(SILENT)["dice"]]

        def hear(event: Event) -> None:
            if "loss" in event.metrics:
                losses.append(event.metrics["loss"])
            if "validation/dice" in event.metrics:
                curve.append(event.metrics["validation/dice"])

        error = ""
        try:
            Trainer(task, Path(folder) / "tuned.safetensors", Job(hear)).run()
        except MorphSeekError as found:  # a loss that is not a number, or a policy that has collapsed
            error = str(found)
    finite = not error and all(math.isfinite(value) for value in (*losses, *curve))
    return {
        "dice": curve,
        "error": error,
        "stable": finite and min(curve) >= curve[0] - FALL,
        "minutes": [(warmed - begin) / 60, (time.process_time() - warmed) / 60],
    }


def main() -> None:
    """Do the runs that are not done, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("stability.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--form", choices=("paper", "morphseek"), default="paper")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(options.shared / "data" / "hippocampus" / "dataset.json")
    done: dict = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": {}}
    for seed in options.seeds:
        for start in STARTS:
            name = f"{options.form}, {start}, seed {seed}"
            if name not in done["runs"]:
                done["runs"][name] = tuned(dataset, options.form, start, seed)
                print(name, done["runs"][name], flush=True)
                stable = {
                    f"{form}, {way}": [row["stable"] for key, row in done["runs"].items() if f"{form}, {way}," in key]
                    for form in ("paper", "morphseek")
                    for way in STARTS
                }
                done["stable"] = {key: f"{sum(found)} of {len(found)}" for key, found in stable.items() if found}
                done |= {"software": software(), "iterations": [WARMED, TUNED]}
                write_atomically(options.out, to_json(done, indent=1).encode())
    print(done.get("stable"))


if __name__ == "__main__":
    main()
