"""Whether two checkouts compute the same: registrations and short trainings, side by side.

    python Testing/benchmarks/unchanged.py BEFORE AFTER [--shared ../shared] [--only NAME ...] [--iterations 20]

Each checkout runs the same commands in processes of its own, on one thread, in float32; both must know their options.
Registrations (a hippocampus pair with and without a fit, a native 1 mm brain, MR from CT) must agree to 1e-4 mm at
every node of transform.h5 and in every figure of the report that is a similarity, a share of folds or a Dice; trainings
(warm-up, fine-tuning with the policy on the latent and on the field, SPAC) with one seed must end with the same
weights, bit for bit. The last line says how many agree; the exit code is 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from safetensors.numpy import load_file

TOLERANCE_MM = 1e-4
NETWORK = 'encoder = [8, 16, 16]\ndecoder = [16, 16]\nextra = [8]\nnorm = "instance"\nflow_stride = 2\n'
COMMON = '[preprocessing]\nspacing = [1.0, 1.0, 1.0]\nshape = [48, 64, 48]\nalign = "center"\n'
RUN = "[training]\niterations = {n}\nsteps = 2\nvalidate_every = {n}\nvalidation_pairs = 2\nseed = 3\n"
WARMUP = f'[model]\nbackbone = "voxelmorph"\n[model.backbone_settings]\n{NETWORK}{COMMON}{RUN}'
FINETUNE = {
    "finetune-field": RUN,
    "finetune-latent": RUN + '[policy]\nplace = "latent"\nweight = 0.05\ntrajectories = 4\n',
}
SPAC = COMMON + "[training]\niterations = {n}\nsteps = 2\nvalidate_every = {n}\nvalidation_pairs = 2\nseed = 3\n"


def run(checkout: Path, *arguments: str | Path) -> None:
    """Run a command of a checkout's command line.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    rooms = (checkout / "MorphSeekLib" / "app" / "cli.py").is_file()
    module = "MorphSeekLib.app.cli" if rooms else "MorphSeekLib.cli"
    settings = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MORPHSEEK_PRECISION": "float32"}
    command = [sys.executable, "-m", module, *map(str, arguments), "--device", "cpu", "--threads", "1"]
    done = subprocess.run(command, cwd=checkout, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def registrations(data: Path) -> dict[str, list[str | Path]]:
    """Name -> the arguments of `register` but for the output; of those whose data are here."""
    found: dict[str, list[str | Path]] = {}
    for name, dataset, options in (
        ("hippocampus", "hippocampus/dataset.json", ["--model", "hippocampus-mr", "--search", "off", "--fit", "off"]),
        ("hippocampus fitted", "hippocampus/dataset.json", ["--model", "hippocampus-mr", "--fit", "on"]),
        ("mr from ct", "abdomen/dataset_mrct.json", ["--model", "none", "--similarity", "mind"]),
    ):
        path = data / dataset
        if path.is_file():
            pair = json.loads(path.read_text(encoding="utf-8"))["registration_test"][0]
            found[name] = [path.parent / pair["fixed"], path.parent / pair["moving"], *options]
    native = data / "brain_oasis" / "native"
    if native.is_dir():
        images = [native / f"oasis_{number}_t1.nii.gz" for number in (1009, 1107)]
        found["native brain"] = [*images, "--model", "brain-mr", "--align", "affine"]
    return found


def figures(report: dict[str, Any]) -> dict[str, float]:
    """The figures of a report that a change must not move."""
    found = {f"similarity of step {row['step']}": row["similarity"] for row in report["steps"]}
    found["similarity"] = report["similarity"]["warped"]
    found["NJD"] = report["folding"]["njd_percent"]
    found["folded cells"] = report["folding"]["cells"]["folded"]
    return found


def compare_registration(folders: list[Path]) -> tuple[bool, str]:
    """Whether two output folders hold the same transform and figures, and in words."""
    fields = []
    for folder in folders:
        transform = sitk.ReadTransform(str(folder / "transform.h5"))
        field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        fields.append(sitk.GetArrayFromImage(field))
    apart = (
        float(np.linalg.norm(fields[0] - fields[1], axis=-1).max()) if fields[0].shape == fields[1].shape else np.inf
    )
    reports = [figures(json.loads((folder / "report.json").read_text(encoding="utf-8"))) for folder in folders]
    differing = [
        name for name, value in reports[0].items() if not np.isclose(value, reports[1].get(name, np.nan), 1e-4)
    ]
    words = f"{apart:.2g} mm apart at most" + (f"; figures differ: {', '.join(differing)}" if differing else "")
    return apart <= TOLERANCE_MM and not differing, words


def compare_weights(files: list[Path]) -> tuple[bool, str]:
    """Whether two model files hold the same weights, and in words."""
    weights = [load_file(file) for file in files]
    if weights[0].keys() != weights[1].keys():
        return False, "other weights"
    apart = max(float(np.abs(weights[0][name] - weights[1][name]).max()) for name in weights[0])
    return apart == 0, "equal" if apart == 0 else f"{apart:.2g} apart at most"


def train(checkout: Path, folder: Path, dataset: Path, iterations: int) -> None:
    """Train every stage into a folder."""
    folder.mkdir()
    configs = {"warmup": WARMUP, **FINETUNE, "spac": SPAC}
    for name, text in configs.items():
        (folder / f"{name}.toml").write_text(text.format(n=iterations), encoding="utf-8")
    start = folder / "warmup.safetensors"
    for name in configs:
        command = name.split("-")[0]
        options = ["--init", start] if command == "finetune" else []
        out = folder / f"{name}.safetensors"
        run(checkout, command, dataset, "--out", out, "--config", folder / f"{name}.toml", *options)


def main() -> None:
    """Run both checkouts and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[3] / "shared")
    parser.add_argument("--only", nargs="*", help="names of registrations, or trainings")
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    checkouts = [options.before.resolve(), options.after.resolve()]
    data = options.shared.resolve() / "data"
    results: list[bool] = []

    def tell(name: str, same: bool, words: str) -> None:
        results.append(same)
        print(f"{'same' if same else 'DIFFERENT':<10}{name}: {words}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        for name, arguments in registrations(data).items():
            if not options.only or name in options.only:
                folders = [Path(scratch) / f"{name} {n}" for n in range(2)]
                for checkout, folder in zip(checkouts, folders, strict=True):
                    run(checkout, "register", *arguments, "--no-inverse", "--output", folder)
                tell(name, *compare_registration(folders))
        dataset = data / "hippocampus" / "dataset.json"
        if dataset.is_file() and (not options.only or "trainings" in options.only):
            folders = [Path(scratch) / f"trainings {n}" for n in range(2)]
            for checkout, folder in zip(checkouts, folders, strict=True):
                train(checkout, folder, dataset, options.iterations)
            for file in sorted(folders[0].glob("*.safetensors")):
                tell(f"training {file.stem}", *compare_weights([file, folders[1] / file.name]))
    print(f"same {sum(results)}, different {len(results) - sum(results)}")
    raise SystemExit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
