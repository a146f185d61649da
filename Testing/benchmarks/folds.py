"""What the proof that a transform does not fold costs, beside a central-difference Jacobian of the same field.

    python Testing/benchmarks/folds.py [--shared ../shared] [--rounds 9] [--no-real] [--out FILE]

Figures are seconds of the processor, one thread, the least of all rounds, in which all take turns; the goal is a ratio
of at most 4 with the compiled kernels; "by torch" is without them. Made fields follow from a seed. "open" is the share
of cells that the cheapest bound (:func:`MorphSeekLib.space.fields.determinant_bound`) does not clear, "folded" of those
that the proof finds folded. Fields named "delivered" have been through :func:`MorphSeekLib.measures.folds.unfold`, as
every fit has. The folding penalty's value and gradient are timed against the same penalty by central differences.

Real fits, where the data are there: the first pair of each data set, registered and then fitted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from MorphSeekLib.data.datasets import load_dataset, read_pair
from MorphSeekLib.io import compiled
from MorphSeekLib.io.transforms import rounded
from MorphSeekLib.measures import folds
from MorphSeekLib.measures.regularizers import folding_penalty
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import software, write_atomically
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, Grid, dense_from_voxels, is_mirrored, voxel_displacement

ROOT = Path(__file__).resolve().parents[2]
REAL = {"hippocampus": "hippocampus-mr", "brain_oasis": "brain-mr"}
"""Data set -> model."""


def noise(shape: tuple[int, int, int], sigma: float) -> Tensor:
    """(1, 3, *shape): white noise blurred by sigma nodes, of unit deviation."""
    generator = np.random.default_rng(0)
    blurred = np.stack([ndimage.gaussian_filter(generator.standard_normal(shape), sigma) for _ in range(3)])
    return torch.from_numpy(blurred / blurred.std()).float()[None]


def scaled_to(unit: Tensor, share: Callable[[Tensor], Tensor], wanted: float) -> Tensor:
    """A multiple of a field of which a share of cells is as wanted."""
    low, high = 0.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if float(share(middle * unit)) < wanted else (low, middle)
    return high * unit


def share_open(u: Tensor) -> Tensor:
    """Cells that the cheapest bound leaves open."""
    return (fields.determinant_bound(u) <= 0).double().mean()


def share_folded(u: Tensor) -> Tensor:
    """Cells with a corner determinant <= 0."""
    return (fields.least_determinant(u) <= 0).double().mean()


def made() -> Iterator[tuple[str, DenseTransform, Grid]]:
    """Fields that follow from a seed: name, transform, fixed grid."""

    def transform(u: Tensor) -> DenseTransform:
        return rounded(dense_from_voxels(u, Grid(tuple(u.shape[2:]), np.eye(4))))

    smooth = transform(3 * noise((144, 160, 128), 12))
    yield "smooth, 3 million nodes", smooth, smooth.grid
    fitted = folds.unfold(transform(scaled_to(noise((100, 100, 100), 2), share_open, 0.1)))
    yield "10 % open, 1 million nodes, delivered", fitted, fitted.grid
    small = noise((36, 50, 31), 1.5)
    fitted = folds.unfold(transform(scaled_to(small, share_open, 0.4)))
    yield "40 % open, 55,000 nodes, delivered", fitted, fitted.grid
    folded = transform(scaled_to(small, share_folded, 0.04))
    yield "4 % folded, 55,000 nodes", folded, folded.grid


def real(shared: Path) -> Iterator[tuple[str, DenseTransform, Grid]]:
    """Transforms of the first pair of each data set, without and with a fit."""
    for name, model_name in REAL.items():
        dataset = shared / "data" / name / "dataset.json"
        if not dataset.is_file():
            print(f"{name}: {dataset} is not here; left out")
            continue
        model = load_model(model_name, "cpu")
        (fixed, _), (moving, _) = read_pair(load_dataset(dataset).split("registration_test")[0])
        for fit, kind in (("off", "network"), ("on", "fitted, delivered")):
            found = register(fixed, moving, model, RegistrationOptions(inverse=False, fit=fit))
            yield f"{name}, {kind}", found.transform, fixed.grid


def least_seconds(jobs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Processor seconds of each job, the least of the rounds, in which they take turns."""
    least = [float("inf")] * len(jobs)
    for _ in range(rounds):
        for n, job in enumerate(jobs):
            begin, repeats = time.process_time(), 0
            while repeats == 0 or time.process_time() - begin < 0.02:
                job()
                repeats += 1
            least[n] = min(least[n], (time.process_time() - begin) / repeats)
    return least


def measure(name: str, transform: DenseTransform, fixed: Grid, rounds: int) -> dict:
    """Return the row of one field."""
    u = voxel_displacement(transform, transform.grid)
    mirrored = is_mirrored(transform)
    leaf = u.clone().requires_grad_()

    def certify_by_torch() -> None:
        with mock.patch.object(folds, "kernels", return_value=None):
            folds.certify(transform, fixed, mirrored)

    jobs = [
        lambda: fields.jacobian_determinant(u),
        lambda: folds.certify(transform, fixed, mirrored),
        certify_by_torch,
        lambda: torch.relu(0.05 - fields.jacobian_determinant(leaf)).mean().backward(),
        lambda: folding_penalty(leaf).backward(),
    ]
    jacobian, certify, by_torch, central, penalty = least_seconds(jobs, rounds)
    count = folds.certify(transform, fixed, mirrored).count
    return {
        "field": name,
        "nodes": int(np.prod(transform.grid.shape)),
        "open_percent": round(100 * float(share_open(u)), 2),
        "folded_percent": round(count.folded_percent, 3),
        "no_fold_proven": count.no_fold_proven,
        "jacobian_ms": round(1e3 * jacobian, 3),
        "certify_ms": round(1e3 * certify, 3),
        "ratio": round(certify / jacobian, 2),
        "ratio_by_torch": round(by_torch / jacobian, 2),
        "penalty_ms": round(1e3 * penalty, 3),
        "penalty_ratio": round(penalty / central, 2),
    }


def main() -> None:
    """Measure every field and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-real", action="store_true", help="made fields only")
    parser.add_argument("--out", type=Path, default=ROOT / "Testing/benchmarks/results/folds.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels = "numba" if compiled.kernels("measures.fold_kernels") is not None else "torch"
    rows = []
    for fields_of in (made(),) if options.no_real else (made(), real(options.shared)):
        for name, transform, fixed in fields_of:
            rows.append(measure(name, transform, fixed, options.rounds))
            row = rows[-1]
            shares = f"open {row['open_percent']:5.1f} %  folded {row['folded_percent']:6.3f} %"
            ratios = f"certify {row['ratio']:.2f} ({row['certify_ms']:.1f} ms), by torch {row['ratio_by_torch']:.2f}"
            print(f"{name:<42}{shares}  ratios: {ratios}, penalty {row['penalty_ratio']:.2f}", flush=True)
    about = {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": options.rounds,
        "goal": 4,
        "kernels": kernels,
    }
    report = {**about, "rows": rows, "software": software()}
    write_atomically(options.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
