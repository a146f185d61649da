"""What a second registration through the worker costs over the network and warping alone.

    python Testing/benchmarks/worker_overhead.py [--model brain-mr] [--repetitions 5]

One process registers the same pair in turn through a running worker (JSON lines, memory-mapped arrays) and by a direct
call of the engine on arrays in memory; alignment and inverse are off in both. The first round, in which both load the
model, is left out. The worker's cost is (worker - direct) / direct, median over the rounds; its budget is 15 %.
Needs: pip install -e '.[demo]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from MorphSeekLib.app.demo import deformed, template
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.pipeline import register


def main() -> None:
    """Measure in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="brain-mr")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    fixed = template()
    moving, _ = deformed(fixed)
    model = load_model(options.model, "cpu")
    worker = subprocess.Popen(
        [sys.executable, "-m", "MorphSeekLib.app.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repetitions + 1):
            begin = time.perf_counter()
            register(fixed, moving, model, RegistrationOptions(align="none", inverse=False))
            direct = time.perf_counter() - begin
            begin = time.perf_counter()
            params = {
                "model": options.model,
                "device": "cpu",
                "output": folder,
                "options": {"align": "none", "inverse": False},
            }
            for name, volume in (("fixed", fixed), ("moving", moving)):
                path = Path(folder) / f"{name}.npy"
                np.save(path, volume.data.numpy())
                params[name] = {"path": str(path), "affine": volume.grid.affine.tolist()}
            request = {"jsonrpc": "2.0", "id": number, "method": "register", "params": params}
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            while "id" not in (answer := json.loads(worker.stdout.readline())):
                pass
            for name in ("warped", "jacobian", "folding"):
                np.load(answer["result"][name]["path"], mmap_mode="r").sum()
            rounds.append((direct, time.perf_counter() - begin))
    worker.stdin.close()
    worker.wait()
    ratios = [(through - direct) / direct for direct, through in rounds[1:]]
    figures = {
        "direct_seconds": statistics.median(d for d, _ in rounds[1:]),
        "worker_seconds": statistics.median(w for _, w in rounds[1:]),
        "overhead": statistics.median(ratios),
        "overhead_range": [min(ratios), max(ratios)],
        "threads": torch.get_num_threads(),
        "repetitions": options.repetitions,
    }
    print(f"direct {figures['direct_seconds']:.2f} s, worker {figures['worker_seconds']:.2f} s")
    print(f"overhead {100 * figures['overhead']:.1f} % (of {100 * min(ratios):.1f} to {100 * max(ratios):.1f} %)")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
