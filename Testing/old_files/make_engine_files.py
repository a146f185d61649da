"""Make the files of before that the engine reads; in a checkout of commit 78e58be; README.txt says how.

Its imports are those of that commit. It asserts that no setting of the three settings files is left at its default.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from cases import blob_grid, blob_image, blob_labels, write_dataset
from MorphSeekGui import quality
from MorphSeekLib.finetuning import FinetuneConfig
from MorphSeekLib.images import write_image
from MorphSeekLib.sac import SACConfig
from MorphSeekLib.settings import load, to_dict

from MorphSeekLib import report as page
from MorphSeekLib.training import TrainingConfig

HERE = Path(__file__).resolve().parent
CLI = [sys.executable, "-c", "import torch; torch.set_num_threads(1); from MorphSeekLib.cli import main; main()"]
KINDS = {"warmup": TrainingConfig, "finetune": FinetuneConfig, "spac": SACConfig}
SAME = {"preprocessing": ("orientation", "shape", "intensity", "low", "high", "knows")}  # of SPAC, as in the warm-up
WARMUP = {
    "loss": {"regularization": 0.5},
    "model": {
        "backbone_settings": {"encoder": [8, 8], "decoder": [8], "extra": [8], "norm": "instance", "flow_stride": 2}
    },
    "preprocessing": {"spacing": [2.5, 2.5, 2.5], "align": "center"},
    "training": {"iterations": 4, "steps": 1, "validate_every": 2},
    "title": "Blobs",
    "licence": "CC0: made by a program",
}
FINETUNE = {
    "policy": {"trajectories": 4, "weight": 0.1},
    "training": {"iterations": 4, "steps": 2, "validate_every": 2, "save_every": 2},
    "licence": "CC0: made by a program",
}


def main() -> None:
    """Make all."""
    with tempfile.TemporaryDirectory() as name:
        make_settings()
        make_run(Path(name))
        make_reports(Path(name))


def make_settings() -> None:
    """Write beside each settings file what it meant, and the recipes of that commit with what they meant."""
    for name, kind in KINDS.items():
        read = load(kind, HERE / "settings" / f"{name}.toml")
        assert_none_is_default(read, kind(), SAME if name == "spac" else {})
        write(HERE / "settings" / f"{name}.json", to_dict(read))
    recipes = HERE / "recipes"
    shutil.rmtree(recipes, ignore_errors=True)
    recipes.mkdir()
    meant = {}
    for path in sorted(Path("Resources/Training").glob("*.toml")):
        shutil.copy(path, recipes)
        kind = FinetuneConfig if "finetune" in path.stem else SACConfig if "spac" in path.stem else TrainingConfig
        meant[path.name] = {"kind": kind.__name__, "settings": to_dict(load(kind, path))}
    write(recipes / "meant.json", meant)


def assert_none_is_default(given, default, left_out) -> None:
    """Fail where a setting says nothing."""
    for field in dataclasses.fields(given):
        value, usual = getattr(given, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(usual):
            for inner in dataclasses.fields(value):
                if inner.name not in left_out.get(field.name, ()):
                    a, b = getattr(value, inner.name), getattr(usual, inner.name)
                    assert a != b, f"{field.name}.{inner.name} is {a!r}"
        else:
            assert value != usual, f"{field.name} is {value!r}"


def make_run(folder: Path) -> None:
    """Train a run to its end, as the panel starts one: five synthetic cases, a warm-up, a fine-tuning."""
    cases = write_dataset(folder / "blobs", 5)
    run = HERE / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    values = {
        "name": "Blobs of before",
        "dataset": str(cases),
        "model": "blobs.safetensors",
        "init": None,
        "warmup": WARMUP,
        "finetune": FINETUNE,
        "minutes": None,
        "device": "cpu",
        "leave_out": [],
    }
    write(run / "run.json", values)
    subprocess.run([*CLI, "train", str(run)], check=True, stdout=(run / "log.txt").open("w"), stderr=subprocess.STDOUT)
    for curves in run.glob("*.log"):  # TensorBoard's; the curves are in the .jsonl too
        shutil.rmtree(curves)


def make_reports(folder: Path) -> None:
    """Keep report.json of three registrations, and how page and panel of that commit judged them.

    "full" holds all that a report can, "least" the least, "folded" starts from a transform that folds.
    """
    grid = blob_grid()
    for seed, name in ((11, "fixed"), (12, "moving")):
        labels = blob_labels(seed, grid)
        write_image(blob_image(labels, seed), folder / f"{name}.nii.gz")
        write_image(labels, folder / f"{name}-labels.nii.gz")
    images = [str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz")]
    labels = ["--fixed-labels", str(folder / "fixed-labels.nii.gz"), "--moving-labels"]
    labels.append(str(folder / "moving-labels.nii.gz"))
    fit = ["--refine", "5", "--refine-fine", "3", "--inverse"]
    wanted = {
        "full": [*labels, "--align", "rigid", "--steps", "3", *fit],
        "least": ["--align", "none", "--steps", "1"],
        "folded": [*labels, "--steps", "1", "--initial-transform", str(folding_transform(folder, grid))],
    }
    reports, judged = HERE / "reports", {}
    reports.mkdir(exist_ok=True)
    for name, options in wanted.items():
        out, model = folder / name, str(HERE / "run" / "blobs.safetensors")
        command = [*CLI, "register", *images, "-o", str(out), "--model", model, "--device", "cpu", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(out / "report.json", reports / f"{name}.json")
        judged[name] = judgment(json.loads((out / "report.json").read_text(encoding="utf-8")))
    write(reports / "judged.json", judged)


def folding_transform(folder: Path, grid) -> Path:
    """Write a transform of rough noise, which folds here and there."""
    noise = np.random.default_rng(5).normal(0.0, 2.2, (*grid.shape[::-1], 3))
    field = sitk.GetImageFromArray(noise, isVector=True)
    field.SetOrigin([float(x) for x in grid.affine[:3, 3]])
    field.SetSpacing([float(x) for x in grid.spacing])
    sitk.WriteTransform(sitk.DisplacementFieldTransform(field), str(folder / "noise.h5"))
    return folder / "noise.h5"


def judgment(report: dict) -> dict:
    """What the page and the panel of that commit made of a report, by their default limits."""
    figures, found = quality.measure(report), quality.folds(report)
    verdict = quality.judge(figures, quality.DEFAULT_LIMITS, found)
    return {
        "page": page.verdict(report),
        "figures": {figure.key: figure.value for figure in figures},
        "texts": {figure.key: figure.text for figure in figures},
        "folds": found.sentence,
        "color": verdict.color,
        "colors": verdict.colors,
        "reasons": verdict.reasons,
        "regions": [vars(region) for region in quality.folded_regions(report)],
        "structures": quality.structures(report),
    }


def write(path: Path, values) -> None:
    """Write JSON for people."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
