"""Memory and seconds of ``morphseek register --model none`` as a user calls it, with one thread and with all.

    python Testing/benchmarks/command_cost.py [--shared ../shared] [--only brain large] [--threads 1 2] [--rounds 3]
        [--preset best] [--torch] [--out FILE]

"brain" is the first pair of the native 1 mm scans. "large" is a CT of 512x512x300 voxels (the example CT, interpolated,
with noise, so that its file is as hard to read as a scanner's) and the same CT moved by the demo's known deformation.
Counted is the process with its children, start, reading, the inverse and writing included; the kernels' cache is filled
before. The numbers of threads take turns, so that the ratio of their seconds holds where the machine is not quiet for
long; rows that are in FILE are not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from comparison.command import ROOT, command_line, fill_cache, run

from MorphSeekLib.app.demo import known_map
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.images import read_image, write_image
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.space.geometry import Grid, Volume, resample

LARGE = (512, 512, 300)
NOISE = 10.0  # HU
KINDS = ("brain", "large")


def make_large(shared: Path, folder: Path) -> None:
    """Write the large pair: the example CT on a fine grid, and moved by a known map."""
    ct = read_image(shared / "data" / "ct_abdomen" / "example_ct.nii.gz")
    extent = ct.grid.spacing * ct.grid.shape
    spacing = extent / LARGE
    corner = ct.grid.origin + ct.grid.direction @ ((spacing - ct.grid.spacing) / 2)
    grid = Grid.from_parts(LARGE, spacing, ct.grid.direction, corner)
    generator = torch.Generator().manual_seed(0)
    for name, transform in (("fixed", None), ("moving", known_map(grid))):
        data = resample(ct, grid, transform, background=-1000.0).data
        data += NOISE * torch.randn(data.shape, generator=generator)
        write_image(Volume(data.round_().clamp_(-1024, 3071), grid, dtype="int16"), folder / f"{name}.nii.gz")


def pair_of(kind: str, shared: Path, folder: Path) -> list[Path]:
    """Return the two files of a pair, made first if need be."""
    if kind == "brain":
        return sorted((shared / "data" / "brain_oasis" / "native").glob("*_t1.nii.gz"))[:2]
    if not (folder / "moving.nii.gz").is_file():
        # by a process of its own: a child's peak begins with what its parent has used
        own = [sys.executable, __file__, "--shared", str(shared), "--make", str(folder)]
        subprocess.run(own, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return [folder / "fixed.nii.gz", folder / "moving.nii.gz"]


def measure(kind: str, pair: list[Path], threads: int, options: argparse.Namespace) -> dict:
    """Register a pair; return what the process took and what its report says."""
    with tempfile.TemporaryDirectory() as out:
        command = [*command_line(options.torch), "register", *map(str, pair), "-o", out, "--model", "none"]
        cost = run([*command, "--threads", str(threads), "--preset", options.preset])
        report = json.loads((Path(out) / "report.json").read_text(encoding="utf-8"))
    return {
        **dataclasses.asdict(cost),
        "shape": report["fixed"]["shape"],
        "no_fold_proven": report["folding"]["cells"]["no_fold_proven"],
        "phases": report["seconds"],
        "load": os.getloadavg()[0],
    }


def summary(rows: list[dict]) -> dict[str, dict]:
    """Return medians by pair and preset, and the clock's ratio of the fewest threads to the most."""
    found: dict[str, dict] = {}
    kinds = {(row["pair"], row["preset"], row["torch_alone"]) for row in rows}
    for kind in sorted(kinds):
        alike = [row for row in rows if (row["pair"], row["preset"], row["torch_alone"]) == kind]
        means = found.setdefault(f"{kind[0]}, {kind[1]}{', torch alone' if kind[2] else ''}", {})
        for threads in sorted({row["threads"] for row in alike}):
            own = [row for row in alike if row["threads"] == threads]
            middle = {k: statistics.median(row[k] for row in own) for k in ("seconds", "cpu_seconds", "peak_gb")}
            means[f"{threads} threads"] = {"rounds": len(own), **middle}
        first, *_, last = [*means.values()] * 2
        means["times as fast"] = first["seconds"] / last["seconds"]
    return found


def main() -> None:
    """Do what is not done, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="best")
    parser.add_argument("--torch", action="store_true", help="hide numba from the engine")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("command_cost.json"))
    options = parser.parse_args()
    if options.make:
        make_large(options.shared, options.make)
        return
    fill_cache()
    about = {"preset": options.preset, "torch_alone": options.torch}
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    rows = before.get("rows", [])
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.only:
            for turn in range(options.rounds):
                for threads in options.threads:
                    key = {"pair": kind, "threads": threads, "round": turn, **about}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    rows.append(key | measure(kind, pair_of(kind, options.shared, Path(scratch)), threads, options))
                    result = {"mean": summary(rows), "rows": rows, "date": time.strftime("%Y-%m-%d")}
                    write_atomically(options.out, to_json(result | {"software": software()}, indent=1).encode())
                    print({k: v for k, v in rows[-1].items() if k != "phases"}, flush=True)
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
