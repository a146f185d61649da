"""What a batch costs: the throughput of two workers against one, and the look at a batch that is finished.

    python Testing/benchmarks/batch_cost.py [--shared ../shared] [--rounds 3] [--rows 10000] [--out FILE]

- throughput: 12 hippocampus and 4 brain pairs (2 mm) of registration_test, by one local worker of one thread and by
  two, in turn. The clock begins when each worker has registered one pair (models loaded, kernels compiled) and ends
  with the last pair. "of_two" is the seconds of one worker over those of two, halved: 1 is perfect.
- finished: ``batch`` on a folder of so many rows that are all done, in processor seconds of a process of its own, over
  those of one that imports torch. The rows are copies of one that was registered.

Figures are medians over the rounds. "gb" is the largest memory of a worker.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from comparison.side_by_side import ROOT

from MorphSeekLib.app.batch import BatchOptions, batch
from MorphSeekLib.data.datasets import given, load_dataset
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.batch import ROWS, BatchSettings
from MorphSeekLib.protocol.job import Event, Job
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_json

COUNTS = {"brain_oasis": 4, "hippocampus": 12}


def rows(shared: Path) -> list[dict[str, str]]:
    """Return the rows of the benchmark, the longest pairs first."""
    found = []
    for name, count in COUNTS.items():
        dataset = load_dataset(shared / "data" / name / "dataset.json")
        for number, pair in enumerate(dataset.split("registration_test")[:count]):
            images = {side: str(given(getattr(pair, side).image)) for side in ("fixed", "moving")}
            found.append({"name": f"{name}-{number}", **images})
    return found


def seconds(pairs: Sequence[dict[str, str]], workers: int) -> float:
    """Return the seconds from when each worker has registered a pair to the end of all others."""
    first = [{**pairs[-1], "name": f"first-{number}"} for number in range(workers)]
    at: dict[int, float] = {}

    def hear(event: Event) -> None:
        if event.phase == "step":
            at.setdefault(event.step, time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = BatchOptions(Path(folder) / "out", BatchSettings(), workers, 1, "cpu")
        found = batch([*first, *pairs], options, job=Job(hear))
    assert all(outcome.state == "done" for outcome in found), found
    return at[len(found)] - at[workers]


def processor_seconds(command: Sequence[str]) -> float:
    """Return the processor seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def finished(pairs: Sequence[dict[str, str]], count: int, rounds: int) -> dict[str, float]:
    """Return the processor seconds of a batch that is all done, of an import of torch, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quick = RegistrationOptions(align="none", search="off", fit="off", inverse=False)
        settings = BatchSettings("none", quick, ("warped",))
        [outcome] = batch([pairs[-1] | {"name": "pair-0"}], BatchOptions(folder / "out", settings, 1, 1, "cpu"))
        line = json.loads((folder / "out" / ROWS).read_text())
        given = [pairs[-1] | {"name": f"pair-{number}"} for number in range(count)]
        with (folder / "pairs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(given[0]))
            writer.writeheader()
            writer.writerows(given)
        report = (folder / "out" / outcome.name / "report.json").read_bytes()
        for row in given[1:]:
            (folder / "out" / row["name"]).mkdir()
            (folder / "out" / row["name"] / "report.json").write_bytes(report)
        lines = [to_json(line | {"name": row["name"]}) for row in given]
        (folder / "out" / ROWS).write_text("".join(f"{text}\n" for text in lines))
        command = [sys.executable, "-m", "MorphSeekLib.app.cli", "batch", str(folder / "pairs.csv")]
        command += ["-o", str(folder / "out"), "--model", "none", "--align", "none", "--search", "off", "--fit", "off"]
        command += ["--no-inverse", "--keep", "warped"]
        processor_seconds(command)  # writes the table of all rows
        own = [processor_seconds(command) for _ in range(rounds)]
        torch = [processor_seconds([sys.executable, "-c", "import torch"]) for _ in range(rounds)]
    found = {"batch": statistics.median(own), "import_torch": statistics.median(torch)}
    return {"rows": count, **found, "ratio": found["batch"] / found["import_torch"]}


def main() -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("batch_cost.json"))
    options = parser.parse_args()
    pairs = rows(options.shared)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for workers, taken in times.items():
            taken.append(seconds(pairs, workers))
            print(f"{workers} workers: {taken[-1]:.1f} s", flush=True)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    middle = {workers: statistics.median(taken) for workers, taken in times.items()}
    ratios = [one / two / 2 for one, two in zip(*times.values(), strict=True)]
    found = {
        "throughput": {
            "pairs": COUNTS,
            "seconds": middle,
            "of_two": statistics.median(ratios),
            "of_two_by_round": ratios,
            "gb": memory,
        },
        "finished": finished(pairs, options.rows, options.rounds),
        "software": software(),
    }
    write_atomically(options.out, to_json(found, indent=1).encode())
    print(to_json(found, indent=1))


if __name__ == "__main__":
    main()
