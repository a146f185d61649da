"""Registration without a model against greedy, on the test pairs of every data set.

    python Testing/benchmarks/without_model.py [--shared ../shared] [--out FILE] [--only brain ct] [--split ...]
        [--pairs N] [--methods best fast greedy greedy-as-given]

On each pair the methods run one after the other in one process with one thread, so that the ratios of their processor
seconds hold on any machine: MorphSeek from images in memory to the delivered transform's figures, greedy from images in
memory to its transform (with the writing of its files, which is a hundredth). "greedy" finds an affine transform of its
own first, "greedy-as-given" takes the images as they lie; the better by mean Dice is what a row is compared with.
Dice, folding and seconds are those of the other tables (comparison/scoring.py). Rows that are in FILE are not done
again. The native row of the command line, start and files included, is that of ``native_command.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import torch
from comparison.classical import greedy
from comparison.scoring import DEFINITIONS, ROW, Method, score

from MorphSeekLib.data.cases import name_of
from MorphSeekLib.data.datasets import Dataset, load_dataset, read_pair, scored_pairs
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.registration.compile_kernels import main as compile_kernels
from MorphSeekLib.registration.descent import kernels_used
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Transform, Volume

ROOT = Path(__file__).resolve().parents[2]
SETS = {
    "brain": ("brain_oasis/dataset.json", False),
    "ct": ("abdomen/dataset_ct.json", False),
    "mr-ct": ("abdomen/dataset_mrct.json", True),
    "hippocampus": ("hippocampus/dataset.json", False),
}
"""Name -> file under data, and whether the classical methods must compare two modalities."""


def by_preset(fixed: Volume, moving: Volume, preset: str) -> Transform:
    """Register without a model."""
    options = RegistrationOptions(preset=preset, inverse=False)  # type: ignore[arg-type]
    return register(fixed, moving, None, options).transform


def methods(multimodal: bool) -> dict[str, Method]:
    """Every method by its name."""
    return {
        "best": partial(by_preset, preset="best"),
        "fast": partial(by_preset, preset="fast"),
        "greedy": partial(greedy, affine=True, multimodal=multimodal),
        "greedy-as-given": partial(greedy, affine=False, multimodal=multimodal),
    }


def run_pair(dataset: Dataset, pair, chosen: dict[str, Method]) -> dict[str, dict]:
    """Register a pair by every method; return a row each, an error's text where a method failed."""
    (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
    rows: dict[str, dict] = {}
    for name, method in chosen.items():
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            transform = method(fixed, moving)
        except RuntimeError as error:  # greedy, where its affine alignment fails
            rows[name] = {"error": str(error).splitlines()[0]}
            continue
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        row = dataclasses.replace(
            score(fixed_labels, moving_labels, transform, dataset), seconds=seconds, cpu_seconds=cpu_seconds
        )
        rows[name] = row.to_json(name for name in ROW if name not in ("fixed", "moving"))
    return rows


def summary(pairs: list[dict]) -> dict[str, dict]:
    """Return means over the pairs, and the ratio of seconds to those of the better greedy."""
    found = {}
    for name in pairs[0]["methods"]:
        rows = [pair["methods"][name] for pair in pairs]
        good = [row for row in rows if "error" not in row]
        if not good:
            continue
        found[name] = {
            "pairs": len(good),
            "failed": len(rows) - len(good),
            **{k: sum(row[k] for row in good) / len(good) for k in ("dice", "hd95", "folded_percent", "sdlogj")},
            "proven": sum(row["no_fold_proven"] for row in good),
            "cpu_seconds": sum(row["cpu_seconds"] for row in good) / len(good),
        }
    classical = [row for name, row in found.items() if name.startswith("greedy") and not row["failed"]]
    if classical:
        best = max(classical, key=lambda row: row["dice"])
        for row in found.values():
            row["times_greedy"] = row["cpu_seconds"] / best["cpu_seconds"]
    return found


def main() -> None:
    """Do what is not done, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("without_model.json"))
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--split", default="registration_test")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--methods", nargs="+", default=list(methods(False)), choices=list(methods(False)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    compile_kernels()
    result = {"sets": {}}
    if options.out.is_file():
        result = json.loads(options.out.read_text(encoding="utf-8"))
    for name in options.only:
        file, multimodal = SETS[name]
        dataset = load_dataset(options.shared / "data" / file)
        chosen = {key: method for key, method in methods(multimodal).items() if key in options.methods}
        rows = result["sets"].setdefault(name, {"pairs": []})["pairs"]
        for pair in scored_pairs(dataset, options.split)[: options.pairs]:
            names = {"fixed": name_of(pair.fixed, dataset), "moving": name_of(pair.moving, dataset)}
            known = next((row for row in rows if {k: row[k] for k in names} == names), None)
            if known is None:
                known = {**names, "methods": {}}
                rows.append(known)
            left = {key: method for key, method in chosen.items() if key not in known["methods"]}
            known["methods"] |= run_pair(dataset, pair, left)
            result["sets"][name]["mean"] = summary(rows)
            result |= {
                "split": options.split,
                "definitions": DEFINITIONS,
                "kernels": kernels_used(torch.device("cpu")),
                "date": time.strftime("%Y-%m-%d"),
                "software": software(),
            }
            write_atomically(options.out, to_json(result, indent=1).encode())
            print(
                name, *names.values(), {k: round(v.get("dice", -1), 4) for k, v in known["methods"].items()}, flush=True
            )
        for method, row in result["sets"][name]["mean"].items():
            print(f"{name:12} {method:16}", {k: round(v, 4) for k, v in row.items()})


if __name__ == "__main__":
    main()
