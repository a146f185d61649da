"""Each network against the official definition of the same network: same weights, same images, same process.

    python Testing/benchmarks/network_speed.py CLONES [--only NAME ...] [--size 64 64 64] [--repetitions 5]

CLONES is the folder of official_networks.py. Official and own code take turns within each repetition, so that a machine
that slows down slows both; a ratio is the median over repetitions. All times are processor time, on one thread by
default: where other programs run, wall time is theirs as much as ours. "forward" ends with the warped image; "training
step" is forward, loss, backward and Adam (amsgrad). The loss is LNCC of window 9 and diffusion (LapIRN: its own, with
windows of 7, 5 and 3 on three scales), on the official side by official code, on ours by MorphSeek's. Ours always has
the policy's head in it, which official networks have not. The flow heads are scaled so that a field is of the order of
a voxel: fresh ones would hide any error.

"bfloat16" is our network under autocast, in the layout that goes with it, against our own in float32. What it costs in
accuracy is told with these weights, which are no trained ones but for LapIRN's where `--weights NAME=FILE` gives them.

Every architecture is a process of its own. Results are kept row by row: a run that was stopped goes on, `--anew` begins
again. Targets: forward at most 1.05 of the official one, training step at least 3 times faster where the official loss
dominates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from lncc import image_pair, machine
from official_networks import Official, halved, official
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout need not be installed

from MorphSeekLib.backbones.architectures import ARCHITECTURES
from MorphSeekLib.measures.regularizers import diffusion
from MorphSeekLib.measures.similarity import lncc
from MorphSeekLib.networks.policy import ModelSettings, PolicySettings, RegistrationModel
from MorphSeekLib.protocol.settings import to_dict
from MorphSeekLib.space import fields

OUT = Path(__file__).parent / "results" / "network_speed.json"
CHILD = "--child"


def enlarge_heads(model: Official, moving: Tensor, fixed: Tensor) -> None:
    """Multiply the flow heads, which start near nothing, until the field is of the order of a voxel."""
    heads = [p for p in model.network.parameters() if p.dim() == 5 and 0 < float(p.detach().std()) < 1e-4]
    with torch.no_grad():
        for _ in range(30):
            if not heads or float(model.field(model.run(moving, fixed)[1]).abs().mean()) > 0.5:
                return
            for weight in heads:
                weight.mul_(2)


def own_model(name: str, state: dict[str, Tensor]) -> RegistrationModel:
    """MorphSeek's network with the official weights, the policy's head in it."""
    known = ARCHITECTURES[name]
    model = RegistrationModel(ModelSettings(known.backbone, to_dict(known.settings), PolicySettings(mean="linear")))
    model.backbone.load_state_dict(known.from_official(state))
    return model


def own_loss(name: str, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
    """What the official loss computes, by MorphSeek's functions."""
    if not name.startswith("lapirn"):
        return lncc(fixed, warped) + diffusion(field)
    total = (1.0 if name.endswith("disp") else 3.5) * 4 * diffusion(field)
    for scale, window in enumerate((7, 5, 3)):
        total = total + lncc(fixed, warped, window) / 2**scale
        fixed, warped = halved(fixed), halved(warped)
    return total


def timed(work: Callable[[], object]) -> float:
    """Processor seconds."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def compare(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each way, and the ratio of each to the first."""
    for work in ways.values():
        work()
    times = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, work in ways.items():
            times[name].append(timed(work))
    first = next(iter(times.values()))
    figures = {}
    for name, spent in times.items():
        figures[f"{name}_seconds"] = round(median(spent), 4)
        figures[f"{name}_ratio"] = round(median(own / one for own, one in zip(spent, first, strict=True)), 3)
    return figures


def measure(name: str, size: list[int], clones: Path, repetitions: int, weights: Path | None) -> dict:
    """A row: times, ratios, and how far the fields are apart."""
    torch.manual_seed(0)
    fixed, moving = image_pair(size, 0.0, 0, torch.device("cpu"))
    theirs = official(name, tuple(size), clones)
    theirs.network.eval()
    if weights is None:
        enlarge_heads(theirs, moving, fixed)
    else:
        theirs.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    ours, low = (own_model(name, theirs.network.state_dict()).eval() for _ in range(2))
    low = low.to(memory_format=torch.channels_last_3d)

    def forward(model: RegistrationModel, precise: bool = True) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            field = model(moving, fixed).float()
        return fields.warp(moving, field), field

    def trained(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    def their_loss() -> Tensor:
        warped, field = theirs.run(moving, fixed)
        return theirs.loss(warped, fixed, field)

    def our_loss(model: RegistrationModel, precise: bool = True) -> Tensor:
        warped, field = forward(model, precise)
        return own_loss(name, warped, fixed, field)

    with torch.no_grad():
        field, exact, rounded = theirs.field(theirs.run(moving, fixed)[1]), forward(ours)[1], forward(low, False)[1]
        row = {
            "mean_displacement": float(field.norm(dim=1).mean()),
            "largest_difference": float((field - exact).abs().max()),
            "bfloat16_mean_difference": float((rounded - exact).norm(dim=1).mean()),
            "bfloat16_largest_difference": float((rounded - exact).abs().max()),
        }
        row["forward"] = compare(
            {
                "official": lambda: theirs.run(moving, fixed),
                "own": lambda: forward(ours),
                "bfloat16": lambda: forward(low, False),
            },
            repetitions,
        )
    for model in (theirs.network, ours, low):
        model.train()
    steps = {
        "official": trained(theirs.network, their_loss),
        "own": trained(ours, lambda: our_loss(ours)),
        "bfloat16": trained(low, lambda: our_loss(low, False)),
    }
    row["training_step"] = compare(steps, repetitions)
    with torch.no_grad():
        warped, field = theirs.run(moving, fixed)
    warped, field = warped.detach().requires_grad_(), field.detach().requires_grad_()
    losses = {
        "official": lambda: theirs.loss(warped, fixed, field).backward(),
        "own": lambda: own_loss(name, warped, fixed, field).backward(),
    }
    row["loss"] = compare(losses, repetitions)
    return row


def table(rows: dict[str, dict]) -> str:
    """The rows as text: seconds of the official code, then ratios of ours to it."""
    lines = [
        f"{'':20}{'forward':^26}{'training step':^26}{'loss':^16}{'difference in voxels':^30}",
        f"{'':20}{'official':>10}{'own':>8}{'bf16':>8}{'official':>10}{'own':>8}{'bf16':>8}{'share':>8}{'own':>8}"
        f"{'own':>10}{'bf16':>10}{'of':>10}",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"{name:20}{row['failed']}")
            continue
        forward, step, loss = row["forward"], row["training_step"], row["loss"]
        lines.append(
            f"{name:20}{forward['official_seconds']:9.2f}s{forward['own_ratio']:8.2f}{forward['bfloat16_ratio']:8.2f}"
            f"{step['official_seconds']:9.2f}s{step['own_ratio']:8.2f}{step['bfloat16_ratio']:8.2f}"
            f"{loss['official_seconds'] / step['official_seconds']:8.2f}{loss['own_ratio']:8.3f}"
            f"{row['largest_difference']:10.1e}{row['bfloat16_mean_difference']:10.4f}{row['mean_displacement']:10.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every row that is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="folder of the official repositories' clones")
    parser.add_argument("--only", nargs="+", help="architectures; all by default")
    parser.add_argument("--size", type=int, nargs=3, default=[64, 64, 64])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE", help="real weights of an architecture")
    parser.add_argument("--anew", action="store_true", help="measure again what was measured")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    known = [name for name, architecture in ARCHITECTURES.items() if architecture.infer is None]
    weights = dict(pair.split("=", 1) for pair in options.weights)
    settings = {"size": options.size, "threads": options.threads, "repetitions": options.repetitions}
    rows = json.loads(options.out.read_text())["rows"] if options.out.is_file() else {}
    for name in options.only or known:
        known_row = rows.get(name, {"failed": ""})
        if "failed" not in known_row and not options.anew and known_row.get("settings") == settings:
            continue
        arguments = [name, json.dumps(options.size), str(options.clones), str(options.repetitions)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, CHILD, *arguments, weights.get(name, "")],
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            rows[name] = json.loads(done.stdout.strip().splitlines()[-1])
            rows[name]["load"] = round(os.getloadavg()[0], 1)
        else:
            rows[name] = {"failed": f"exit code {done.returncode}"}
        rows[name] |= {"settings": settings, "weights": "real" if name in weights else "random"}
        content = {"machine": machine(torch.device("cpu")), "rows": {k: rows[k] for k in known if k in rows}}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        print(table({name: rows[name]}), flush=True)
    print(table({k: rows[k] for k in known if k in rows}))


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        architecture, voxels, folder, count, file = sys.argv[2:]
        figures = measure(architecture, json.loads(voxels), Path(folder), int(count), Path(file) if file else None)
        print("\n" + json.dumps(figures))
    else:
        main()
