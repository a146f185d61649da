"""Do in an environment of make_environment.py what the panel does in Slicer: start, ask, register, check, train.

    FOLDER/bin/python Testing/environments/use_environment.py

The processes are those of the module's own engine_client and training_run, in the Python that runs this file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# nothing here is compiled yet (see make_environment.py): let the first process do it for those that follow
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "MorphSeek"), str(ROOT / "Testing" / "engine")]

from MorphSeekGui.engine_client import EngineClient, process_of_its_own  # noqa: E402
from MorphSeekGui.training_run import create_run  # noqa: E402

from MorphSeekLib.protocol.options import TrainingOptions  # noqa: E402
from MorphSeekLib.protocol.run_folder import SETTINGS  # noqa: E402

MODEL = "hippocampus-mr"
NETWORK = {"encoder": [8, 8], "decoder": [8], "extra": [8], "norm": "instance", "flow_stride": 2}
STAGE = {"iterations": 5, "steps": 1, "validate_every": 5}  # twice, so ten iterations


def main() -> None:
    """Do all of it; end with an error that names everything that failed."""
    failed = []
    with tempfile.TemporaryDirectory(prefix="morphseek-environment-") as name, EngineClient() as client:
        folder = Path(name)
        steps: list[tuple[str, Callable[[], str]]] = [
            (f"import {module}", lambda module=module: import_alone(module)) for module in started_modules()
        ]
        steps += [
            ("hello", lambda: hello(client)),
            ("networks", lambda: build_networks(client)),
            ("register", lambda: register(client, folder)),
            ("check", lambda: check(client, write_cases(folder))),
            ("train", lambda: train(folder, write_cases(folder))),
        ]
        for step, work in steps:
            begin = time.monotonic()
            try:
                told = work()
            except Exception as problem:
                failed.append(step)
                told = f"FAILED: {type(problem).__name__}: {problem}"
            print(f"{step}: {told} ({time.monotonic() - begin:.1f} s)", flush=True)
    if failed:
        raise SystemExit(f"Slicer's Python cannot do this: {', '.join(failed)}.")


def started_modules() -> list[str]:
    """Return the modules that the Slicer side starts with ``python -m``."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "MorphSeek").rglob("*.py")]
    found = sorted({name for text in sources for name in re.findall(r'"-m",\s*"(MorphSeekLib[\w.]*)"', text)})
    if not found:
        raise SystemExit("No '-m MorphSeekLib...' was found in MorphSeek/; correct started_modules().")
    return found


def import_alone(module: str) -> str:
    """Import a module in a process of its own, as the panel starts it."""
    command = [sys.executable, "-c", f"import {module}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, **process_of_its_own())
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return "imported"


def hello(client: EngineClient) -> str:
    """Ask the worker who it is; it must see the bundled models."""
    answer = client.call("hello")
    names = [model["name"] for model in answer["models"]]
    if MODEL not in names:
        raise RuntimeError(f"the worker sees only these models: {names}")
    return f"Python {answer['python']}, torch {answer['torch']}, SimpleITK {answer['simpleitk']}"


def build_networks(client: EngineClient) -> str:
    """Build every network that the panel offers as it would be trained, and send a small pair through it."""
    import torch
    from cases import TINY

    from MorphSeekLib.backbones import build_backbone

    offered = client.call("hello")["backbones"]
    wrong = []
    for name in offered:
        try:
            with torch.device("meta"):
                build_backbone(name)
            network = build_backbone(name, TINY[name]).eval()
            shape = TINY[name].get("size", [2 * network.multiple_of] * 3)
            moving, fixed = torch.rand(2, 1, 1, *shape)
            with torch.no_grad():
                field = network.decode(*network.encode(moving, fixed))
            if field.shape != (1, 3, *shape):
                raise ValueError(f"a field of shape {tuple(field.shape)}")
        except Exception as problem:
            wrong.append(f"{name}: {type(problem).__name__}: {problem}")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return ", ".join(offered)


def register(client: EngineClient, folder: Path) -> str:
    """Register two small images through the worker."""
    from cases import blob_grid, blob_image, blob_labels

    params: dict = {"model": MODEL, "device": "cpu", "threads": 1, "output": str(folder / "result")}
    (folder / "result").mkdir()
    for seed, name in enumerate(("fixed", "moving")):
        image = blob_image(blob_labels(seed, blob_grid()), seed)
        np.save(folder / f"{name}.npy", image.data.numpy())
        params[name] = {"path": str(folder / f"{name}.npy"), "affine": image.grid.affine.tolist()}
    similarity = client.call("register", params)["report"]["similarity"]
    if not similarity["warped"] > similarity["aligned"]:
        raise RuntimeError(f"the images came no closer: {similarity}")
    return f"similarity {similarity['aligned']:.3f} to {similarity['warped']:.3f}"


def write_cases(folder: Path) -> Path:
    """Write five labeled cases once; return their dataset.json."""
    from cases import write_dataset

    path = folder / "cases" / "dataset.json"
    return path if path.is_file() else write_dataset(path.parent, 5)


def check(client: EngineClient, dataset: Path) -> str:
    """Let the worker look through the cases."""
    report = client.call("check", {"dataset": str(dataset)})
    if report["problems"] or len(report["cases"]) != 5:
        raise RuntimeError(f"{len(report['cases'])} cases, problems: {report['problems']}")
    return f"{len(report['cases'])} cases"


def train(folder: Path, dataset: Path) -> str:
    """Train as the panel does, a warm-up and GRPO, to the figures on the held-out pairs."""
    warmup = {"model": {"backbone_settings": NETWORK}, "preprocessing": {"spacing": [2.5] * 3, "align": "center"}}
    settings = {
        "name": "Blobs",
        "dataset": str(dataset),
        "model": str(folder / "blobs.safetensors"),
        "device": "cpu",
        "warmup": warmup | {"training": STAGE},
        "finetune": {"policy": {"trajectories": 2}, "training": STAGE},
    }
    run = create_run(folder / "runs", TrainingOptions("Blobs", str(dataset), str(folder / "blobs.safetensors")))
    (run.folder / SETTINGS).write_text(json.dumps(settings))  # of a network smaller than the panel can choose
    run.start()
    while (status := run.status()).alive:
        time.sleep(0.1)
    if status.state != "done":
        raise RuntimeError(f"{status.message or status.state}; log: {' / '.join(run.log(3))}")
    figures = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))["mean"]
    iterations = sum(len(run.curves(stage)) for stage in ("warmup", "finetune"))
    if iterations != 10 or not Path(status.model).is_file() or not status.held_out:
        raise RuntimeError(f"{iterations} iterations, {status}")
    return f"{iterations} iterations, held-out Dice {figures['dice_aligned']:.3f} to {figures['dice']:.3f}"


if __name__ == "__main__":
    print(f"Python {sys.version.split()[0]}, {len(list(importlib.metadata.distributions()))} packages")
    main()
