"""``morphseek register --model none`` on whole 1 mm brains as a user calls it, against greedy on its own files.

    python Testing/benchmarks/native_command.py [--shared ../shared] [--pairs 20] [--threads 1] [--torch] [--noise]
        [--out FILE]

Every ordered pair of the five native scans. Both are processes of their own, with the same number of threads; counted
are user + system seconds of the process and its children, start, reading and writing included. greedy: affine from the
images' centers, NCC 2x2x2, 100x50x10. The kernels' cache is filled before. ``--torch`` hides numba from the engine.
``--noise`` does each pair once more, "morphseek, noise", with 1 % Rician noise and a smooth field from 0.8 to 1.2 in
both images (comparison/changes.py), rounded as scanners do.
Rows that are in FILE are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from comparison.changes import shaded_and_noisy
from comparison.command import Cost, command_line, fill_cache, greedy_command, run
from comparison.scoring import ROW, score

from MorphSeekLib.data.datasets import Dataset
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.images import read_image, read_labels, write_image
from MorphSeekLib.io.transforms import read_transform
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.space.geometry import Volume

ROOT = Path(__file__).resolve().parents[2]


def row_of(transform, fixed_labels: Volume, moving_labels: Volume, cost: Cost) -> dict:
    """Return the figures of a transform."""
    found = score(fixed_labels, moving_labels, transform, Dataset(Path()))
    row = found.to_json(name for name in ROW if name not in ("fixed", "moving", "peak_gb"))
    return {**row, "cpu_seconds": cost.cpu_seconds, "seconds": cost.seconds}


def changed(path: Path, folder: Path, side: str) -> Path:
    """Write an image with noise and a bias field; return its file."""
    image = shaded_and_noisy(read_image(path), f"{path.name} {side}")
    write_image(Volume(image.data.round(), image.grid, dtype="int16"), folder / f"{side}.nii.gz")
    return folder / f"{side}.nii.gz"


def measure(command: list[str], labels: list[Volume], folder: Path) -> dict:
    """Run the command line without a model; return the figures of its transform."""
    cost = run([*command, "--model", "none", "-o", f"{folder}/out"])
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    transform = read_transform(folder / "out" / "transform.h5", labels[0].grid)
    cells = report["folding"]["cells"]  # of the transform as it is written, not as it is sampled here
    folds = {name: cells[name] for name in ("no_fold_proven", "folded_percent")}
    return {**row_of(transform, *labels, cost), **folds, "phases": report["seconds"]}


def main() -> None:
    """Do what is not done, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="best")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--no-greedy", action="store_true")
    parser.add_argument("--noise", action="store_true", help="do each pair with noise, too")
    parser.add_argument("--out", type=Path, default=Path("native_command.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    native = options.shared / "data" / "brain_oasis" / "native"
    scans = sorted(path.name.removesuffix("_t1.nii.gz") for path in native.glob("*_t1.nii.gz"))
    start = command_line(options.torch)
    if not options.torch:
        fill_cache()
    result = {"pairs": []}
    if options.out.is_file():
        result = json.loads(options.out.read_text(encoding="utf-8"))
    for fixed, moving in list(itertools.permutations(scans, 2))[: options.pairs]:
        if any((row["fixed"], row["moving"]) == (fixed, moving) for row in result["pairs"]):
            continue
        images = [native / f"{name}_t1.nii.gz" for name in (fixed, moving)]
        labels = [read_labels(native / f"{name}_seg.nii.gz") for name in (fixed, moving)]
        choices = ["--threads", str(options.threads), "--preset", options.preset]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = {"morphseek": measure([*start, "register", *map(str, images), *choices], labels, folder)}
            if options.noise:
                noisy = [changed(path, folder, side) for path, side in zip(images, ("fixed", "moving"), strict=True)]
                command = [*start, "register", *map(str, noisy), *choices]
                rows["morphseek, noise"] = measure(command, labels, folder)
            if not options.no_greedy:
                cost = run(greedy_command(*images, folder, options.threads))
                transform = read_transform(folder / "whole.nii.gz", read_image(images[0]).grid)
                rows["greedy"] = row_of(transform, *labels, cost)
        result["pairs"].append({"fixed": fixed, "moving": moving, "methods": rows})
        result |= {"threads": options.threads, "preset": options.preset, "torch_alone": options.torch}
        result |= {"date": time.strftime("%Y-%m-%d"), "software": software(), "mean": means(result["pairs"])}
        write_atomically(options.out, to_json(result, indent=1).encode())
        print(
            fixed, moving, {k: (round(v["dice"], 4), round(v["cpu_seconds"], 1)) for k, v in rows.items()}, flush=True
        )
    print(json.dumps(result["mean"], indent=1))


def means(pairs: list[dict]) -> dict[str, dict]:
    """Return means over the pairs, and the ratio of seconds."""
    found = {}
    for name in pairs[0]["methods"]:
        rows = [pair["methods"][name] for pair in pairs]
        found[name] = {
            k: sum(row[k] for row in rows) / len(rows)
            for k in ("dice", "hd95", "folded_percent", "sdlogj", "cpu_seconds", "seconds")
        }
        found[name]["proven"] = sum(row["no_fold_proven"] for row in rows)
    phases = [pair["methods"]["morphseek"]["phases"] for pair in pairs]
    found["morphseek"]["phases"] = {k: sum(p[k] for p in phases) / len(phases) for k in phases[0]}
    if noisy := found.get("morphseek, noise"):
        plain = found["morphseek"]
        noisy |= {
            "dice_lost": plain["dice"] - noisy["dice"],
            "times_clean": noisy["cpu_seconds"] / plain["cpu_seconds"],
        }
    if "greedy" in found:
        found["times_greedy"] = {k: found["morphseek"][k] / found["greedy"][k] for k in ("cpu_seconds", "seconds")}
    return found


if __name__ == "__main__":
    main()
