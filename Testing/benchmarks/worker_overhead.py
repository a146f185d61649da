"""From the click to the picture: the first and the second registration of the panel's worker, against greedy.

    python Testing/benchmarks/worker_overhead.py [--shared ../shared] [--model none] [--threads 2] [--rounds 3]
        [--out FILE]

In each round, on one pair of native 1 mm brains (without --shared's data the demo's pair), by the clock:

- cold: arrays written, the worker started, asked to register by the panel's defaults, and its arrays read;
- second: the same once more through the same worker;
- greedy: a process of its own from files to files, with the same number of threads (``comparison/command.py``).

"first picture" is when the worker hands over the aligned image for the live view. "overhead" is what the second click
takes over the stages themselves: arrays written and read, messages. The kernels' cache is filled before.
Figures are medians over the rounds, ratios medians of the ratios within a round. Rounds that are in FILE are not done
again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from comparison.command import ROOT, fill_cache, greedy_command, run

from MorphSeekLib.app.demo import deformed, template
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.images import read_image, write_image
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.space.geometry import Volume

sys.path.append(str(ROOT / "MorphSeek"))
from MorphSeekGui.engine_client import EngineClient

READ = ("warped", "jacobian", "folding", "displacement", "inverse")


def click(client: EngineClient, pair: list[Volume], model: str, threads: int) -> dict[str, float]:
    """Register as the panel does; return the seconds until the first picture and until the results are read."""
    first: list[float] = []

    def hear(message) -> None:
        if message["phase"] == "picture" and not first:
            first.append(time.perf_counter() - begin)

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        params = {"model": model, "device": "cpu", "threads": threads, "output": folder, "show_steps": True}
        for name, volume in zip(("fixed", "moving"), pair, strict=True):
            np.save(Path(folder) / f"{name}.npy", volume.data.numpy())
            params[name] = {"path": f"{folder}/{name}.npy", "affine": volume.grid.affine.tolist()}
        answer = client.call("register", params, hear)
        for name in READ:
            np.load(answer[name]["path"]).sum()
        seconds = answer["report"]["seconds"]
        stages = seconds["total"] - seconds["read"] - seconds["load"] - seconds["write"]
        return {"first_picture": first[0], "stages": stages, "seconds": time.perf_counter() - begin}


def measure(pair: list[Volume], files: list[Path], model: str, threads: int) -> dict[str, dict[str, float]]:
    """Do one round."""
    found = {}
    with EngineClient(sys.executable, environment=os.environ | {"PYTHONPATH": str(ROOT)}) as client:
        for name in ("cold", "second"):
            found[name] = click(client, pair, model, threads)
    with tempfile.TemporaryDirectory() as folder:
        found["greedy"] = {"seconds": run(greedy_command(*files, Path(folder), threads)).seconds}
    return found


def summary(rounds: list[dict]) -> dict:
    """Return medians over the rounds."""
    found: dict[str, dict[str, float]] = {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in values}
        for name, values in rounds[0].items()
    }
    for name, row in found.items():
        row["times_greedy"] = statistics.median(o[name]["seconds"] / o["greedy"]["seconds"] for o in rounds)
    overhead = statistics.median(o["second"]["seconds"] / o["second"]["stages"] - 1 for o in rounds)
    return {**found, "overhead": overhead}


def files_of(shared: Path, folder: Path) -> list[Path]:
    """Return two images' files: native brains, or else the demo's pair, written."""
    found = sorted((shared / "data" / "brain_oasis" / "native").glob("*_t1.nii.gz"))[:2]
    if not found:
        fixed = template()
        found = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
        for volume, path in zip((fixed, deformed(fixed)[0]), found, strict=True):
            write_image(volume, path)
    return found


def main() -> None:
    """Measure what is missing and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--model", default="none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("worker_overhead.json"))
    options = parser.parse_args()
    fill_cache()
    about = {"model": options.model, "threads": options.threads}
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    rounds = before["rounds"] if before.get("about") == about else []
    with tempfile.TemporaryDirectory() as folder:
        files = files_of(options.shared, Path(folder))
        pair = [read_image(path) for path in files]
        while len(rounds) < options.rounds:
            rounds.append(measure(pair, files, **about))
            result = {"about": about, "median": summary(rounds), "rounds": rounds, "date": time.strftime("%Y-%m-%d")}
            write_atomically(options.out, to_json(result | {"software": software()}, indent=1).encode())
            print({name: round(row["seconds"], 2) for name, row in rounds[-1].items()}, flush=True)
    print(json.dumps(summary(rounds), indent=1))


if __name__ == "__main__":
    main()
