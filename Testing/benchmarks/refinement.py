"""The fit of a pair without labels, compared with best-of-J sampling and greedy: Dice, folding, seconds, in one run.

    python Testing/benchmarks/refinement.py DATASET.json MODEL [--split registration_test] [--fit 0 30 60+20]
        [--best-of 16] [--out FILE]

Every method gets the same pairs and the same threads. MorphSeek: the whole of ``register`` without inverse and labels
(alignment, network, fit, warp at full resolution, Jacobian); "60+20" is ``--fit 60 --fit-fine 20``.
greedy: affine from the image centers, then deformable, both NCC radius 2, 100x50x10, then the warped image. Best of J:
the label-free objective picks among J samples of the last step's latent. Dice is the mean over labels,
nearest-neighbor warped; NJD the share of voxels of the fixed grid with a Jacobian determinant <= 0 (the whole
transform for both); times are medians over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from comparison.classical import greedy

from MorphSeekLib.data.datasets import Pair, PairLoader, load_dataset
from MorphSeekLib.io.images import read_image, read_labels
from MorphSeekLib.measures.metrics import dice_per_label, folding
from MorphSeekLib.networks.loading import LoadedModel, load_model
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.networks.policy import Latent, RegistrationModel, draw, take_steps
from MorphSeekLib.protocol.options import FitOptions, RegistrationOptions
from MorphSeekLib.registration.fit import Fitted, Objective, objective
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import Volume, jacobian_volume, resample


def figures(warped_labels: torch.Tensor, jacobian: torch.Tensor, labels: list[Volume], seconds: float) -> dict:
    """A row."""
    dice = dice_per_label(labels[0].data, warped_labels, moving_labels=labels[1].data)
    found = folding(jacobian=jacobian)
    return {
        "dice": statistics.fmean(dice.values()),
        "njd_percent": found.njd_percent,
        "sdlogj": found.sdlogj,
        "seconds": seconds,
    }


def run_morphseek(images: list[Volume], labels: list[Volume], model: LoadedModel, fit: str) -> dict:
    """``register --fit K --fit-fine F``, of "K" or "K+F"."""
    iterations, _, fine = fit.partition("+")
    settings = FitOptions(iterations=int(iterations), fine_iterations=int(fine or 0))
    begin = time.perf_counter()
    result = register(*images, model, RegistrationOptions(inverse=False, fit=settings))
    seconds = time.perf_counter() - begin
    warped = resample(labels[1], images[0].grid, result.transform, mode="nearest")
    return figures(warped.data, result.jacobian.data, labels, seconds)


def run_greedy(images: list[Volume], labels: list[Volume], threads: int) -> dict:
    """greedy, its files included."""
    begin = time.perf_counter()
    transform = greedy(*images, affine=True, threads=threads)
    seconds = time.perf_counter() - begin
    warped = resample(labels[1], images[0].grid, transform, mode="nearest")
    return figures(warped.data, jacobian_volume(transform, images[0].grid).data, labels, seconds)


@torch.no_grad()
def best_of(
    model: RegistrationModel,
    latent: Latent,
    outer: torch.Tensor,
    total: torch.Tensor,
    value: Objective,
    count: int,
    tau: float = 1.0,
    generator: torch.Generator | None = None,
) -> Fitted:
    """Return the best by the objective among the network's answer and ``count`` samples of the last step's latent.

    The rival of ``MorphSeekLib.registration.fit.optimize`` that needs no gradient; arguments as there.
    """
    objectives = [value(total)]
    for _ in range(count):
        z = draw(latent.mu, latent.log_sigma, tau, 1, generator=generator)
        candidate = fields.compose(outer, model.displacement(model.field(latent, z)).float())
        found = value(candidate)
        if found < min(objectives):
            total = candidate
        objectives.append(found)
    return Fitted(total, torch.stack(objectives).view(-1))


def run_best_of(pair: Pair, loader: PairLoader, model: LoadedModel, count: int) -> dict:
    """Sampling on the working grid (alignment by centers, as in training)."""
    prepared = loader(pair)
    last = before = torch.zeros(1, 3, *prepared.fixed.shape[2:])

    def on_step(step: int, total: torch.Tensor, warped: torch.Tensor) -> None:
        nonlocal last, before
        before, last = last, total

    def moving_at(total: torch.Tensor) -> torch.Tensor:
        return fields.warp(prepared.moving, total)

    begin = time.perf_counter()
    with torch.no_grad():
        steps = model.card.preprocessing.steps
        total = take_steps(model.network, moving_at, prepared.fixed, steps, on_step)
        latent = model.network.encode(moving_at(before), prepared.fixed)
        value = objective(prepared.fixed, moving_at, FitOptions())
        generator = torch.Generator().manual_seed(0)
        total = best_of(model.network, latent, before, total, value, count, generator=generator).total
    seconds = time.perf_counter() - begin
    warped = fields.warp(prepared.moving_labels.float(), total, "nearest").int()[0, 0]
    labels = [Volume(v[0, 0], prepared.grid) for v in (prepared.fixed_labels, prepared.moving_labels)]
    return figures(warped, fields.jacobian_determinant(total)[0, 0], labels, seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model")
    parser.add_argument("--split", default="registration_test")
    parser.add_argument("--pairs", type=int, help="only the first so many")
    parser.add_argument("--fit", nargs="+", default=["0", "30", "60+20"])
    parser.add_argument("--best-of", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset, model = load_dataset(options.dataset), load_model(options.model, "cpu")
    loader = PairLoader(model.card.preprocessing, model.network.multiple_of, centered=True)
    rows: dict[str, list[dict]] = {}
    for pair in dataset.split(options.split)[: options.pairs]:
        images = [read_image(case.image) for case in (pair.fixed, pair.moving)]
        labels = [read_labels(case.label) for case in (pair.fixed, pair.moving)]
        for fit in options.fit:
            row = run_morphseek(images, labels, model, fit)
            rows.setdefault(f"MorphSeek, fit {fit}", []).append(row)
        rows.setdefault(f"MorphSeek, best of {options.best_of}", []).append(
            run_best_of(pair, loader, model, options.best_of)
        )
        rows.setdefault("greedy, NCC radius 2", []).append(run_greedy(images, labels, options.threads))
    names = ("dice", "njd_percent", "sdlogj")
    means = {
        method: {name: statistics.fmean(r[name] for r in found) for name in names}
        | {"seconds": statistics.median(r["seconds"] for r in found)}
        for method, found in rows.items()
    }
    print(f"{'method':<28}{'Dice':>8}{'NJD %':>9}{'SDlogJ':>8}{'seconds':>9}{'x greedy':>10}")
    for method, row in means.items():
        row["ratio_to_greedy"] = row["seconds"] / means["greedy, NCC radius 2"]["seconds"]
        print(
            f"{method:<28}{row['dice']:>8.4f}{row['njd_percent']:>9.4f}{row['sdlogj']:>8.3f}{row['seconds']:>9.2f}"
            f"{row['ratio_to_greedy']:>10.2f}"
        )
    if options.out:
        content = {"means": means, "pairs": rows, "model": model.card.title, "software": software()}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
