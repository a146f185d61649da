"""How much Dice a smoother answer costs: Dice against SDlogJ, as the weight of the fit's regularization changes.

    python Testing/benchmarks/smoothness.py [--shared ../shared] [--out FILE] [--only hippocampus brain] [--pairs 8]
        [--site MODEL] [--plot]

Pairs are those of the split registration_val, and then training cases, each with the next; no test pair. "none, x 2" is
a registration without a model whose fit weighs smoothness twice as much as it does. On the hippocampus also: "site",
a model of thirty cases (``training_answers.py --keep``), by the same weights; and "hippocampus-mr", whose answer is the
mean of a fit and of the network's steps, by the share of the fit. The default is "x 1" and, of hippocampus-mr, 0.8.

The knee is the point of a curve's best part that lies farthest from the line between its ends (Satopaa et al. 2011),
both axes scaled to their ranges. Rows that are in FILE are not done again; ``--plot`` draws it beside FILE.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from comparison.side_by_side import ROOT, SETS, Arm, Task, development_pairs, fill, means, without_model

from MorphSeekLib.data.datasets import load_dataset
from MorphSeekLib.networks.loading import LoadedModel, load_model
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration import plans
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Transform, Volume

matplotlib.use("Agg")
from matplotlib import pyplot

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PLANS = (plans.CORRELATION, plans.CORRELATION_FROM_NEAR, plans.CORRELATION_OPPOSITE, plans.FEATURES, plans.LEARNED)


@contextmanager
def smoother(factor: float) -> Iterator[None]:
    """Weigh smoothness so many times as much in every fit."""
    kept = [dict(by_preset) for by_preset in PLANS]
    for by_preset in PLANS:
        for preset, plan in by_preset.items():
            by_preset[preset] = dataclasses.replace(plan, regularization=factor * plan.regularization)
    try:
        yield
    finally:
        for by_preset, before in zip(PLANS, kept, strict=True):
            by_preset.update(before)


def by_model(model: LoadedModel | None, factor: float, fixed: Volume, moving: Volume) -> Transform:
    """Register with a model, or without one."""
    with smoother(factor):
        if model is None:
            return without_model(fixed, moving)
        return register(fixed, moving, model, RegistrationOptions(inverse=False)).transform


def arms_of(name: str, site: Path | None) -> dict[str, Arm]:
    """Return every answer by its name."""
    arms = {f"none, x {factor:g}": Arm(partial(by_model, None, factor)) for factor in FACTORS}
    if name != "hippocampus":
        return arms
    if site is not None:
        model = load_model(str(site), "cpu")
        arms |= {f"site, x {factor:g}": Arm(partial(by_model, model, factor)) for factor in FACTORS}
    bundled = load_model("hippocampus-mr", "cpu")
    for share in SHARES:
        steps_alone = {"fit": False, "compare": "intensities"}
        card = dataclasses.replace(bundled.card, **({"share": share} if share else steps_alone))
        arms[f"hippocampus-mr, {share:g}"] = Arm(partial(by_model, dataclasses.replace(bundled, card=card), 1.0))
    return arms


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Return which point of a curve of (SDlogJ, Dice) lies farthest above the line between the roughest and the
    smoothest; of those only than which no other is both smoother and better."""
    best = [n for n, (rough, dice) in enumerate(points) if not any(r < rough and d > dice for r, d in points)]
    found = np.array([points[n] for n in best])
    scaled = (found - found.min(axis=0)) / np.maximum(np.ptp(found, axis=0), 1e-9)
    first, last = scaled[found[:, 0].argmin()], scaled[found[:, 0].argmax()]
    (run, rise), away = last - first, scaled - first
    return best[int((run * away[:, 1] - rise * away[:, 0]).argmax())]


def curves(rows: Sequence[dict]) -> dict[str, dict]:
    """Return the means of every answer, and of each kind which one is the knee."""
    found = means(rows)
    for kind in dict.fromkeys(name.split(", ")[0] for name in found):
        names = [name for name in found if name.startswith(f"{kind}, ")]
        at = knee([(found[name]["sdlogj"], found[name]["dice"]) for name in names])
        for number, name in enumerate(names):
            found[name]["knee"] = float(number == at)
    return found


def draw(result: dict, out: Path) -> None:
    """Draw the curves of every data set."""
    sets = result["sets"]
    figure, axes = pyplot.subplots(1, len(sets), figsize=(4.2 * len(sets), 3.8), squeeze=False, layout="constrained")
    for axis, (name, table) in zip(axes[0], sets.items(), strict=True):
        mean = table["mean"]
        for kind in dict.fromkeys(key.split(", ")[0] for key in mean):
            chosen = {key.split(", ")[1]: row for key, row in mean.items() if key.startswith(f"{kind}, ")}
            points = [(row["sdlogj"], row["dice"]) for row in chosen.values()]
            axis.plot(*zip(*points, strict=True), ".-", label=kind)
            for said, point, row in zip(chosen, points, chosen.values(), strict=True):
                usual = said in ("x 1", f"{plans.SHARE:g}")
                axis.annotate(said, point, fontsize=8, weight="bold" if usual else "normal")
                if row["knee"]:
                    axis.plot(*point, "o", fillstyle="none", color="black", markersize=10)
        axis.set(title=f"{name}, {len(table['pairs'])} pairs", xlabel="SDlogJ", ylabel="Dice")
        axis.legend(loc="lower right")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Do what is not done, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=Path("smoothness.json"))
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    tasks = {}
    for name in options.only:
        dataset = load_dataset(options.shared / "data" / SETS[name][0])
        tasks[name] = Task(dataset, development_pairs(dataset, options.pairs), arms_of(name, options.site))
    result = fill(options.out, tasks, {"split": "development"}, curves)
    if options.plot:
        draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
