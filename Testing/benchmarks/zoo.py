"""The model zoo's table: what each published network costs here. Writes Resources/Docs/zoo.md from results/zoo.json.

    python Testing/benchmarks/zoo.py [--only NAME ...] [--sizes small full] [--anew]

For every architecture: parameters, the policy head's share, N (the policy's dimensions), and for one forward pass of
the whole model (encoder, head, decoder; no training) at 64x64x64 and 160x192x224 voxels the seconds of one processor
core (processor time: wall time is another program's as much as ours where several run), in float32 and in bfloat16, and
the peak memory of a fresh process (resident set, PyTorch and the images included). Every figure is a process of its
own, so that none sees another's memory. A figure that would not fit into the memory that is free now is left out, with
the reason. Results are kept row by row: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from lncc import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout need not be installed

from MorphSeekLib.backbones.architectures import ARCHITECTURES
from MorphSeekLib.networks.policy import ModelSettings, PolicySettings, RegistrationModel
from MorphSeekLib.protocol.settings import to_dict

OUT = Path(__file__).parent / "results" / "zoo.json"
PAGE = Path(__file__).resolve().parents[2] / "Resources" / "Docs" / "zoo.md"
SIZES = {"small": (64, 64, 64), "full": (160, 192, 224)}
ANY_WIDTH = ("vxm", "vxm-dense")
"""Names under which files of any width are imported; the networks stand in the table under their own."""
PASSES = {"small": 3, "full": 1}
PRECISIONS = ("float32", "bfloat16")
CHILD = "--child"
INTRODUCTION = """# Model zoo

The published networks that MorphSeek builds, each with its policy head. `morphseek import-checkpoint official.pt
--architecture NAME --out mine.safetensors` makes a model of official weights, which gives what the official code gives.
Written by `Testing/benchmarks/zoo.py`; do not edit.

Seconds: processor time of one forward pass on one core ({device}, torch {torch}), at 64³ the median of three. GB: peak
resident set of a fresh process. Head: the policy head's share of the backbone's parameters. N: how many numbers the
policy decides on.
"""
RESERVE_GB = 1.0
"""Memory that is left to the machine."""


def model_of(name: str) -> RegistrationModel:
    """The whole model with fresh weights, as import-checkpoint builds it."""
    known = ARCHITECTURES[name]
    return RegistrationModel(ModelSettings(known.backbone, to_dict(known.settings), PolicySettings(mean="linear")))


def dimensions(name: str, size: tuple[int, int, int]) -> int:
    """N: how many numbers the policy decides on for images of a size; nothing is computed."""
    with torch.device("meta"):
        return model_of(name).encode(*torch.rand(2, 1, 1, *size)).mu.numel()


def child(name: str, size: str, precision: str) -> dict[str, float]:
    """Processor seconds of a forward pass, the median of some, after a first one on small images."""
    torch.manual_seed(0)
    model = model_of(name).eval()
    low = precision == "bfloat16"
    if low:
        model = model.to(memory_format=torch.channels_last_3d)
    seconds = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        model(*torch.rand(2, 1, 1, *SIZES["small"]))
        moving, fixed = torch.rand(2, 1, 1, *SIZES[size])
        for _ in range(PASSES[size]):
            begin = time.process_time()
            model(moving, fixed)
            seconds.append(time.process_time() - begin)
    return {"seconds": round(median(seconds), 3)}


def measure(name: str, size: str, precision: str, limit_gb: float) -> dict:
    """A figure, in a process of its own that may not take more memory than there is."""
    command = [sys.executable, "-W", "ignore", __file__, CHILD, name, size, precision]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident_gb(process.pid))
        if peak > limit_gb:
            process.kill()
            process.wait()
            return {"skipped": f"over {limit_gb:.0f} GB"}
        time.sleep(0.05)
    lines = process.stdout.read().strip().splitlines()
    if process.returncode != 0 or not lines:
        return {"skipped": f"stopped with exit code {process.returncode}"}
    return json.loads(lines[-1]) | {"load": round(os.getloadavg()[0], 1)}


def resident_gb(pid: int) -> float:
    """Memory of a process now; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmRSS:")), 0.0)


def peak_gb() -> float:
    """The most memory that this process ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20, 2)


def available_gb() -> float:
    """What the machine could give now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


def page(content: dict) -> str:
    """Resources/Docs/zoo.md."""
    lines = [
        INTRODUCTION.format(**content["machine"]),
        "| architecture | parameters | head | N at 64³ | N at 160×192×224 "
        "| 64³: float32 | bfloat16 | 160×192×224: float32 | bfloat16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["rows"].items():
        count = row["parameters"]
        cells = [name, f"{count['backbone']:,}", f"{count['policy_head_percent']} %"]
        cells += [f"{row['dimensions'][size]:,}" for size in SIZES]
        for size in SIZES:
            for precision in PRECISIONS:
                figures = row.get(f"{size}/{precision}", {"skipped": "not measured"})
                cells.append(figures.get("skipped") or f"{figures['seconds']:.2f} s, {figures['peak_gb']:.1f} GB")
        lines.append("| " + " | ".join(cells) + " |")
    sources = {known.source for known in ARCHITECTURES.values()}
    lines += ["", "Sources: " + "; ".join(sorted(sources)) + ".", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="architectures; all by default")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--anew", action="store_true", help="measure again what was measured")
    options = parser.parse_args()
    known = [name for name in ARCHITECTURES if name not in ANY_WIDTH]
    rows = json.loads(OUT.read_text())["rows"] if OUT.is_file() else {}
    for name in options.only or known:
        row = rows.setdefault(name, {})
        with torch.device("meta"):
            row["parameters"] = model_of(name).parameter_counts()
        row["dimensions"] = {size: dimensions(name, shape) for size, shape in SIZES.items()}
        for size in options.sizes:
            for precision in PRECISIONS:
                key = f"{size}/{precision}"
                if "seconds" in row.get(key, {}) and not options.anew:
                    continue
                limit = available_gb() - RESERVE_GB
                row[key] = measure(name, size, precision, limit)
                print(name, key, row[key], flush=True)
                content = {"machine": machine(torch.device("cpu")), "rows": {k: rows[k] for k in known if k in rows}}
                OUT.write_text(json.dumps(content, indent=1) + "\n")
                PAGE.write_text(page(content), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        torch.set_num_threads(1)
        figures = child(*sys.argv[2:])
        print("\n" + json.dumps(figures | {"peak_gb": peak_gb()}))
    else:
        main()
