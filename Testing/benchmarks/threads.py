"""What it costs and saves that waiting threads sleep (OMP_WAIT_POLICY=passive), on a quiet and on a busy machine.

    python Testing/benchmarks/threads.py [--pair FIXED MOVING] [--model auto] [--rounds 3] [--out FILE.json]
    python Testing/benchmarks/threads.py --small    # tiny synthetic pair: only shows that the script works

`morphseek register` runs as a process with all threads, in turn

- passive: as the command line is, which sets OMP_WAIT_POLICY=passive and KMP_BLOCKTIME=0;
- untold: the same program without setting them, as it was before;
- active: with OMP_WAIT_POLICY=active, where --active is given;

first on the machine as it is ("quiet": see to it that nothing else runs), then ("busy") beside a second process that
keeps every core at work. Seconds of the clock and of the processor (user + system) are medians over the rounds, the
ratios are medians of passive / untold within a round. Passive should be below 1 on the busy machine and lose at most
3 % (ratio 1.03, clock) on the quiet one. The default pair needs: pip install -e '.[demo]'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comparison.command import run

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))

PROGRAMS = {
    "passive": "from MorphSeekLib.app.cli import main; main()",
    "untold": "from MorphSeekLib.app.cli import app; app()",
    "active": "from MorphSeekLib.app.cli import main; main()",
}
VARIABLES = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
LOAD = """
import os
for _ in range(os.cpu_count() - 1):
    if os.fork() == 0:
        break
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""


def main() -> None:
    """Measure in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("FIXED", "MOVING"), help="default: the demo's pair")
    parser.add_argument("--model", default="auto", help="as for the command; default: auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--active", action="store_true", help="also measure OMP_WAIT_POLICY=active")
    parser.add_argument("--small", action="store_true", help="a tiny synthetic pair")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    modes = [mode for mode in PROGRAMS if mode != "active" or options.active]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pair = options.pair or make_pair(folder, options.small)
        arguments = ["register", *map(str, pair), "--model", options.model, "--device", "cpu"]
        arguments += ["-o", str(folder / "out")]
        once("passive", arguments)  # reads the files into the system's memory
        figures = {"cores": os.cpu_count(), "rounds": options.rounds, "load_before": os.getloadavg()[0]}
        figures["quiet"] = measure(modes, arguments, options.rounds)
        with load():
            figures["busy"] = measure(modes, arguments, options.rounds)
    for state in ("quiet", "busy"):
        for mode in modes:
            found = figures[state][mode]
            print(f"{state}, {mode}: {found['clock']:.2f} s, {found['processor']:.2f} s of the processor")
        ratio = figures[state]["passive / untold"]
        print(f"{state}, passive / untold: {ratio['clock']:.3f} (clock), {ratio['processor']:.3f} (processor)")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2))


def measure(modes: list[str], arguments: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each mode, and of the ratios within rounds; every other round goes backwards."""
    taken: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for number in range(rounds):
        for mode in modes if number % 2 == 0 else reversed(modes):
            taken[mode].append(once(mode, arguments))
    found = {
        mode: {kind: statistics.median(pair[n] for pair in pairs) for n, kind in enumerate(("clock", "processor"))}
        for mode, pairs in taken.items()
    }
    both = list(zip(taken["passive"], taken["untold"], strict=True))
    found["passive / untold"] = {
        kind: statistics.median(passive[n] / untold[n] for passive, untold in both)
        for n, kind in enumerate(("clock", "processor"))
    }
    return found


def once(mode: str, arguments: list[str]) -> tuple[float, float]:
    """Seconds of the clock and of the processor that a registration takes."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    if mode == "active":
        environment["OMP_WAIT_POLICY"] = "active"
    cost = run([sys.executable, "-c", PROGRAMS[mode], *arguments], environment)
    return cost.seconds, cost.cpu_seconds


@contextmanager
def load() -> Iterator[None]:
    """A second process, with a child for every further core, that computes until this ends."""
    process = subprocess.Popen([sys.executable, "-c", LOAD])
    try:
        yield
    finally:
        process.kill()  # its children see that it is gone
        process.wait()


def make_pair(folder: Path, small: bool) -> list[Path]:
    """The demo's template and its known deformation, or two blobs, as files."""
    from MorphSeekLib.io.images import write_image

    if small:
        from cases import blob_grid, blob_image, blob_labels

        volumes = [blob_image(blob_labels(seed, blob_grid()), seed) for seed in (0, 1)]
    else:
        from MorphSeekLib.app.demo import deformed, template

        fixed = template()
        volumes = [fixed, deformed(fixed)[0]]
    paths = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    for volume, path in zip(volumes, paths, strict=True):
        write_image(volume, path)
    return paths


if __name__ == "__main__":
    main()
