"""Where a training iteration's processor time goes, and how much less it takes than at another commit.

    python Testing/benchmarks/training_speed.py parts brain
    python Testing/benchmarks/training_speed.py compare --before CHECKOUT [--rounds 5] [--ways native plain] [--out F]

The data are those of ../shared/data, or of the folder that MORPHSEEK_DATA names.

CHECKOUT is a working tree of the commit to compare with. "compare" runs both commits in turn, each in a process of its
own, with the same seeds, the settings of the panel (a VoxelMorph from scratch, three steps, six trajectories; for names
that end in "-features" the network that learns to find labels) and one thread; a ratio is the median of the runs before
over that of the runs after, of processor time per iteration. Both with the precision that the processor is fastest in
(bfloat16 where it multiplies that itself: "native") and in float32 without its matrix instructions ("plain"), as on
processors that have none.

Parts: "loader" makes the pairs; "prepare" puts a pair on the device; "encode", "decode" and "losses" are passes of the
network and what is computed from its field, with what autograd does for each; "sampling" draws and scores trajectories;
"optimizer" moves the weights; "rest" is what no part claims.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from MorphSeekLib.app.runs import fresh_network
from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.networks.model_file import Card, save
from MorphSeekLib.networks.policy import RegistrationModel
from MorphSeekLib.space.preprocessing import Preprocessing
from MorphSeekLib.training import finetuning, grpo
from MorphSeekLib.training.finetuning import FinetuneConfig, Finetuning
from MorphSeekLib.training.trainer import Task

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MORPHSEEK_DATA", ROOT.parent / "shared" / "data"))
OUT = ROOT / "Testing" / "benchmarks" / "results" / "training-speed.json"
SETS = {
    "brain": ("brain_oasis/dataset.json", 2.0, 2),
    "ct": ("abdomen/dataset_ct.json", 3.0, 2),
    "hippocampus": ("hippocampus/dataset.json", 1.0, 6),
    "ct-features": ("abdomen/dataset_ct.json", 3.0, 8),
    "hippocampus-features": ("hippocampus/dataset.json", 1.0, 8),
}
"""Data set, spacing of the working grid (mm), iterations that are timed in a run."""
TARGETS = {"brain": 2.0, "ct": 1.6, "hippocampus": 1.2}
"""Of the trainings that move images."""
WAYS = {"native": {}, "plain": {"MORPHSEEK_PRECISION": "float32", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}
"""The environment of each way to run."""


class Stopwatch:
    """Adds up processor seconds by part; inner parts are not counted in outer ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.process_time()

    def _pass(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1] if self._open else "rest"] += now - self._since
        self._since = now

    def begin(self, part: str) -> None:
        """Open a part within the one that is open."""
        self._pass()
        self._open.append(part)

    def end(self) -> None:
        """Close the part that was opened last."""
        self._pass()
        self._open.pop()

    def turn(self, part: str) -> None:
        """Go over to another part in place of the one that is open, if one is."""
        if self._open:
            self._pass()
            self._open[-1] = part

    def around(self, part: str, owner: Any, name: str) -> None:
        """Time a function of a module or a class as a part."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            self.begin(part)
            try:
                return function(*arguments, **options)
            finally:
                self.end()

        setattr(owner, name, timed)


def watch_parts(watch: Stopwatch) -> None:
    """Time the parts of every iteration of this process."""
    for part, owner, name in (
        ("loader", Finetuning, "batch"),
        ("prepare", finetuning, "prepare"),
        ("encode", RegistrationModel, "encode"),
        ("decode", RegistrationModel, "field"),
        ("losses", grpo, "warmup_loss"),
        ("sampling", grpo, "sample_group"),
        ("optimizer", Finetuning, "_descend"),
        ("losses", torch.Tensor, "backward"),  # the first that autograd goes through, see :func:`turning`
    ):
        watch.around(part, owner, name)
    advance = grpo.advance

    def turning(*arguments: Any) -> Any:
        """Advance; autograd reaches the decoder at the field, and the encoder at the latent."""
        watch.begin("losses")
        step = advance(*arguments)
        watch.end()
        step.field.register_hook(lambda _: watch.turn("decode"))
        step.latent.mu.register_hook(lambda _: watch.turn("encode"))
        return step

    grpo.advance = turning


def mover(name: str) -> Task[Any]:
    """Return the fine-tuning of a VoxelMorph from scratch."""
    file, spacing, _ = SETS[name]
    with tempfile.TemporaryDirectory() as folder:
        init = Path(folder) / "init.safetensors"
        torch.manual_seed(0)
        network = RegistrationModel(fresh_network("voxelmorph"))
        card = Card(title="from scratch", preprocessing=Preprocessing(spacing=(spacing,) * 3, align="center"))
        save(init, network, card)
        return Finetuning(load_dataset(DATA / file), FinetuneConfig(), init, torch.device("cpu"))


def finder(name: str) -> Task[Any]:
    """Return the first stage of a training with labels; older commits have none."""
    from MorphSeekLib.app.runs import stage_settings
    from MorphSeekLib.protocol.options import TrainingOptions
    from MorphSeekLib.training.segmentation import Segmentation, SegmentationConfig, suited

    file, spacing, _ = SETS[name]
    dataset = load_dataset(DATA / file)
    options = TrainingOptions(name, str(DATA / file), "f.safetensors", stages=("features",), spacing=spacing)
    config = stage_settings(options)["features"]
    assert isinstance(config, SegmentationConfig)
    return Segmentation(dataset, suited(config, dataset), torch.device("cpu"))


def measure(name: str) -> dict[str, Any]:
    """Return the processor seconds of an iteration, in all and by part, and the losses."""
    torch.set_num_threads(1)
    count = SETS[name][2]
    task = finder(name) if name.endswith("-features") else mover(name)
    warm = count // 2
    for iteration in range(count + warm):
        task.batch(iteration)  # the cases are read from their files before the clock starts
    watch = Stopwatch()
    watch_parts(watch)
    losses = [task.update(iteration, task.batch(iteration))["loss"] for iteration in range(warm)]
    watch.seconds.clear()
    begin = time.process_time()
    losses += [task.update(iteration, task.batch(iteration))["loss"] for iteration in range(warm, count + warm)]
    seconds = (time.process_time() - begin) / count
    watch.begin("rest")
    parts = {part: round(spent / count, 4) for part, spent in sorted(watch.seconds.items())}
    return {"seconds": round(seconds, 4), "parts": parts, "losses": [round(loss, 6) for loss in losses]}


def measured(name: str, way: str, checkout: Path) -> dict[str, Any]:
    """Return what :func:`measure` says in a process of its own, with the engine of a checkout."""
    environment = os.environ | WAYS[way] | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "measure", name],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over runs."""
    parts = {part for run in runs for part in run["parts"]}
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "parts": {part: statistics.median(run["parts"].get(part, 0.0) for run in runs) for part in sorted(parts)},
        "runs": [run["seconds"] for run in runs],
        "losses": runs[-1]["losses"],
    }


def commit(checkout: Path) -> str:
    """Return the commit of a checkout."""
    text = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return text.strip()


def processor() -> str:
    """Return the processor's name and whether it has matrix instructions."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return f"{name}, {'with' if 'amx_bf16' in text else 'without'} AMX"


def compare(before: Path, rounds: int, names: list[str], ways: list[str], out: Path) -> None:
    """Run both commits in turn, print each ratio and write all to ``out``."""
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    content |= {
        "command": f"python Testing/benchmarks/training_speed.py compare --before CHECKOUT --rounds {rounds} "
        f"--ways {' '.join(ways)} --names {' '.join(names)}",
        "processor": processor(), "torch": torch.__version__, "threads": 1, "rounds": rounds,
        "before": commit(before), "after": commit(ROOT), "targets": TARGETS,
    }  # fmt: skip
    for way in ways:
        for name in names:
            runs: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
            for _ in range(rounds):
                for side, checkout in (("before", before), ("after", ROOT)):
                    runs[side].append(measured(name, way, checkout))
            row: dict[str, Any] = {side: middle(found) for side, found in runs.items()}
            row["ratio"] = round(row["before"]["seconds"] / row["after"]["seconds"], 3)
            row["load"] = round(os.getloadavg()[0], 1)
            content.setdefault("rows", {}).setdefault(way, {})[name] = row
            out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(f"{way:8}{name:21}{row['before']['seconds']:8.3f} s {row['after']['seconds']:8.3f} s ", end="")
            print(f"{row['ratio']:6.2f} times (target {TARGETS.get(name, 'none')})", flush=True)


def main() -> None:
    """Do as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("measure", "parts"):
        one = verbs.add_parser(verb)
        one.add_argument("name", choices=SETS)
        one.add_argument("--way", choices=WAYS, default="native")
    both = verbs.add_parser("compare")
    both.add_argument("--before", type=Path, required=True)
    both.add_argument("--rounds", type=int, default=5)
    both.add_argument("--names", nargs="+", choices=SETS, default=list(TARGETS))
    both.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    both.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.verb == "measure":
        print(json.dumps(measure(options.name)))
    elif options.verb == "parts":
        found = measured(options.name, options.way, ROOT)
        for part, seconds in sorted(found["parts"].items(), key=lambda item: -item[1]):
            print(f"{part:12}{seconds:9.4f} s {100 * seconds / found['seconds']:5.1f} %")
        print(f"{'iteration':12}{found['seconds']:9.4f} s")
    else:
        compare(options.before, options.rounds, options.names, options.ways, options.out)


if __name__ == "__main__":
    main()
