"""T-step inference at 160x192x224 beside greedy and ANTs SyN: seconds, peak memory, ratios; all in one run.

    python Testing/benchmarks/inference.py [--shape 160 192 224] [--steps 1 2 3] [--model brain-mr]

The pair is the MNI152 template (nilearn) and a smoothly deformed copy of it, resampled to the shape; alignment is off.
MorphSeek is timed twice: at the model's own working grid, which is what `morphseek register` does, and with the network
on the full grid (VoxelMorph at 1 mm). greedy (NCC, radius 2, 100x50x10) and ANTs SyN (its default schedule) do the
deformable part alone, like MorphSeek here. Every method runs in a process of its own, so that peak memory is its own;
each method's time leaves out imports and file reading. Needs: pip install -e '.[demo,benchmark]'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = "--child"


def make_pair(folder: Path, shape: list[int]) -> None:
    """Fixed and moving images as files."""
    from MorphSeekLib.app.demo import deformed, template
    from MorphSeekLib.io.images import write_image
    from MorphSeekLib.space.geometry import Grid, resample

    fixed = template()
    spacing = fixed.grid.spacing * fixed.grid.shape / shape
    start = fixed.grid.center - fixed.grid.direction @ (spacing * ([n - 1 for n in shape]) / 2)
    grid = Grid.from_parts(shape, spacing, fixed.grid.direction, start)
    moving, _ = deformed(fixed)
    write_image(resample(fixed, grid), folder / "fixed.nii.gz")
    write_image(resample(moving, grid), folder / "moving.nii.gz")


def child_morphseek(folder: Path, model: str, steps: int, full: bool) -> dict:
    """One registration, alignment off; with ``full`` the network works on the image's own grid."""
    import dataclasses

    from MorphSeekLib.io.images import read_image
    from MorphSeekLib.networks.loading import load_model
    from MorphSeekLib.protocol.options import RegistrationOptions
    from MorphSeekLib.registration.pipeline import register

    fixed, moving = read_image(folder / "fixed.nii.gz"), read_image(folder / "moving.nii.gz")
    loaded = load_model(model, "cpu")
    if full:
        preprocessing = dataclasses.replace(loaded.card.preprocessing, spacing=None, shape=None)
        loaded = dataclasses.replace(loaded, card=dataclasses.replace(loaded.card, preprocessing=preprocessing))
    begin = time.perf_counter()
    result = register(fixed, moving, loaded, RegistrationOptions(steps=steps, align="none", inverse=False))
    return {"seconds": time.perf_counter() - begin, "network_seconds": result.report["seconds"]["network"]}


def child_greedy(folder: Path) -> dict:
    """greedy, deformable."""
    from picsl_greedy import Greedy3D

    begin = time.perf_counter()
    Greedy3D().execute(
        f"-d 3 -i {folder}/fixed.nii.gz {folder}/moving.nii.gz -o {folder}/greedy.nii.gz -m NCC 2x2x2 -n 100x50x10 "
        f"-threads {os.environ['OMP_NUM_THREADS']}"
    )
    return {"seconds": time.perf_counter() - begin}


def child_syn(folder: Path) -> dict:
    """ANTs SyN without its affine stage."""
    import ants

    fixed, moving = ants.image_read(f"{folder}/fixed.nii.gz"), ants.image_read(f"{folder}/moving.nii.gz")
    begin = time.perf_counter()
    ants.registration(fixed, moving, type_of_transform="SyNOnly", initial_transform=None)
    return {"seconds": time.perf_counter() - begin}


def measure(
    arguments: list[str], threads: int, script: str = __file__, variables: dict[str, str] | None = None
) -> dict:
    """A method in a process of its own, which ``script`` runs: what it prints, and its peak memory.

    ``variables`` are added to its environment.
    """
    environment = (
        os.environ
        | (variables or {})
        | {
            "OMP_NUM_THREADS": str(threads),
            "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(threads),
        }
    )
    command = [sys.executable, script, CHILD, *arguments]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        lines = output.read().strip().splitlines()
    if status != 0:
        return {"seconds": float("nan"), "peak_gb": float("nan"), "failed": True}
    return json.loads(lines[-1]) | {"peak_gb": usage.ru_maxrss / 2**20}


def main() -> None:
    """Measure every method in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 192, 224])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", default="brain-mr")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder), options.shape)
        for steps in options.steps:
            arguments = ["morphseek", folder, options.model, str(steps)]
            rows[f"MorphSeek, T = {steps}"] = measure([*arguments, "working"], options.threads)
            rows[f"MorphSeek, T = {steps}, network at full size"] = measure([*arguments, "full"], options.threads)
        rows["greedy"] = measure(["greedy", folder], options.threads)
        rows["ANTs SyN"] = measure(["syn", folder], options.threads)
    print(
        f"{'x'.join(map(str, options.shape))}, {options.threads} threads, {platform.processor() or platform.machine()}"
    )
    print(f"{'method':<44}{'seconds':>9}{'network':>9}{'peak GB':>9}{'x greedy':>10}{'x SyN':>8}")
    for name, row in rows.items():
        row["ratio_to_greedy"] = row["seconds"] / rows["greedy"]["seconds"]
        row["ratio_to_syn"] = row["seconds"] / rows["ANTs SyN"]["seconds"]
        network = f"{row['network_seconds']:.1f}" if "network_seconds" in row else "-"
        print(
            f"{name:<44}{row['seconds']:>9.1f}{network:>9}{row['peak_gb']:>9.2f}"
            f"{row['ratio_to_greedy']:>10.3f}{row['ratio_to_syn']:>8.3f}"
        )
    if options.out:
        settings = {"shape": options.shape, "threads": options.threads, "model": options.model}
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == CHILD:
        kind, place, *rest = sys.argv[2:]
        if kind == "morphseek":
            figures = child_morphseek(Path(place), rest[0], int(rest[1]), rest[2] == "full")
        else:
            figures = {"greedy": child_greedy, "syn": child_syn}[kind](Path(place))
        print("\n" + json.dumps(figures))
    else:
        main()
