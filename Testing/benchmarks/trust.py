"""How well the error that is estimated of a registration is the true one: calibrate it, and judge it on unseen cases.

    nice -n 5 python Testing/benchmarks/trust.py measure [--shared ../shared] [--work FOLDER] [--only hippocampus brain]
        [--preset best] [--pairs 12] [--stage calibration evaluation real]
    python Testing/benchmarks/trust.py calibrate [--work FOLDER]
    python Testing/benchmarks/trust.py evaluate [--work FOLDER] [--out Testing/benchmarks/results/trust.json]
    python Testing/benchmarks/trust.py samples [--pairs 6] [--work FOLDER]
    python Testing/benchmarks/trust.py draw

``measure`` registers pairs, one at a time with one thread, and leaves a file for each; pairs that FOLDER holds already
are not done again. Simulated pairs (comparison/simulated.py) of training cases are for calibration (of the cases on
which the network was validated, for the kind that it answers), those of test cases for evaluation, and the test pairs
as they are, with their labels, for evaluation too. ``calibrate`` writes the offsets beside the presets, ``evaluate``
what they are worth, ``samples`` what the
spread of a policy's samples would add, ``draw`` makes the pictures of the documents. CT is
given in Hounsfield units, as scanners write it.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison.side_by_side import ROOT
from comparison.simulated import Other, Simulated, affine_displacement, hounsfield, simulated
from comparison.trust_figures import (
    Measured,
    calibrated_kind,
    holds,
    logs,
    pooled_fit,
    real_figures,
    simulated_figures,
    table,
    target,
)
from comparison.trust_pictures import draw
from scipy import ndimage
from scipy.stats import spearmanr

from MorphSeekLib.data.datasets import Case, Dataset, load_dataset, read_pair, scored_pairs
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.images import read_image
from MorphSeekLib.networks.loading import LoadedModel, load_model
from MorphSeekLib.networks.policy import RegistrationModel, take_steps
from MorphSeekLib.networks.policy import draw as draw_latent
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_dict, to_json
from MorphSeekLib.registration.calibrated import FILE, Calibration, calibration, fingerprint, look_of
from MorphSeekLib.registration.compile_kernels import main as compile_kernels
from MorphSeekLib.registration.pair import Pair
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.registration.result import Registration
from MorphSeekLib.registration.trust import Quantities
from MorphSeekLib.registration.trust_map import Trust
from MorphSeekLib.space.geometry import Grid, Volume, in_box, index_points, resample
from MorphSeekLib.space.preprocessing import foreground_of

PRESETS = ("best", "fast")
LOOKS = 40
"""Images of each side of a kind, by whose look the kind is recognized."""
SAMPLES = 6
"""Of a network's policy."""
STAGES = ("calibration", "evaluation", "real")
MOST = 12_000
"""Blocks of a pair that are kept, drawn at random."""
EDGES = 0.85
"""Quantile of the gradient's length in tissue, above which a voxel is an edge."""


@dataclass(frozen=True)
class Kind:
    """A kind of pair.

    Attributes:
        file: of its data set, under data.
        title: in words.
        splits: whose cases are simulated, by stage.
        model: a bundled name; None for none.
        curve: the two images are of two modalities.
        fixed, moving: what the files of each image begin with.
        others: pairs of cases whose registrations simulated pairs are deformed by, in each stage.
        affine: share of their affine part that is kept: two bodies differ in size by more than a search reaches, which
            shows as a registration that has failed everywhere.
    """

    file: str
    title: str
    splits: dict[str, str]
    model: str | None = None
    curve: bool = False
    fixed: str = ""
    moving: str = ""
    others: int = 6
    affine: float = 1.0


_SPLITS = {"calibration": "training", "evaluation": "test"}
KINDS = {
    "hippocampus": Kind("hippocampus/dataset.json", "hippocampi in T1-weighted MR crops of 1 mm", _SPLITS),
    "brain": Kind("brain_oasis/dataset.json", "brains without skull in T1-weighted MR of 2 mm", _SPLITS),
    "ct": Kind(
        "abdomen/dataset_ct.json", "abdomens in CT of 3 mm", _SPLITS, fixed="ct", moving="ct", others=3, affine=0.3
    ),
    "mr-ct": Kind(
        "abdomen/dataset_mrct.json",
        "abdomens in MR and CT of 3 mm",
        _SPLITS,
        curve=True,
        fixed="mr",
        moving="ct",
        others=3,
        affine=0.3,
    ),
    "hippocampus-learned": Kind(
        "hippocampus/dataset.json",
        "hippocampi in T1-weighted MR crops of 1 mm, by the model hippocampus-mr",
        _SPLITS | {"calibration": "validation"},
        model="hippocampus-mr",
    ),
}


def folder(work: Path, name: str, preset: str, stage: str) -> Path:
    """Return where the files of a kind's stage go; made when missing."""
    found = work / f"{name}-{preset}-{stage}"
    found.mkdir(parents=True, exist_ok=True)
    return found


class Bench:
    """Registers pairs of a kind.

    Args:
        name: of the kind.
        preset: of the registration.
        shared: the folder that holds data.
        work: where files of pairs go.
    """

    def __init__(self, name: str, preset: str, shared: Path, work: Path) -> None:
        self.kind, self.name, self.preset, self.work = KINDS[name], name, preset, work
        self.dataset: Dataset = load_dataset(shared / "data" / self.kind.file)
        self.model: LoadedModel | None = None if self.kind.model is None else load_model(self.kind.model, "cpu")

    def simulate(self, stage: str, number: int) -> Simulated:
        """Make a pair of a stage; the same each time."""
        generator = np.random.default_rng([zlib.crc32(f"{self.kind.file} {stage}".encode()), number])
        cases = self.dataset.cases[self.kind.splits[stage]]
        fixed = [case for case in cases if case.file.name.startswith(self.kind.fixed)]
        moving = [case for case in cases if case.file.name.startswith(self.kind.moving)]
        pool = np.random.default_rng(zlib.crc32(f"{self.kind.file} {stage} others".encode()))
        pairs = [(f, m) for f in fixed for m in moving if f is not m]
        pairs = [pairs[n] for n in pool.permutation(len(pairs))[: self.kind.others]]
        first, second = pairs[number % len(pairs)]
        known = self.work / "others" / f"{first.file.name.split('.')[0]} {second.file.name.split('.')[0]}.npz"
        other = Other.of(_read(first), _read(second), known, self.kind.curve, self.kind.affine)
        free = [case for case in moving if case not in (first, second)]
        pair = simulated(_read(free[generator.integers(len(free))]), other, self.kind.curve, generator)
        fixed, moving = pair.fixed, pair.moving
        if self.kind.fixed == "ct":
            fixed = hounsfield(fixed)
        if self.kind.moving == "ct":
            moving = hounsfield(moving)
        return replace(pair, fixed=fixed, moving=moving)

    def registered(self, fixed: Volume, moving: Volume) -> tuple[Registration, dict[str, float]]:
        """Register a pair; return what was found, and the seconds of search, steps and fit, and of the estimate."""
        options = RegistrationOptions(inverse=False, preset=self.preset, trust="on")  # type: ignore[arg-type]
        found = register(fixed, moving, self.model, options)
        seconds = found.report["seconds"]
        fit = sum(seconds.get(stage, 0.0) for stage in ("search", "network", "fit"))
        return found, {"fit seconds": fit, "trust seconds": seconds["trust"]}

    def measure(self, stage: str, number: int) -> Measured:
        """Register a pair of a stage and compare with what is known of it."""
        if stage == "real":
            return self._real(number)
        pair = self.simulate(stage, number)
        found, seconds = self.registered(pair.fixed, pair.moving)
        return at_blocks(pair, found, seconds)

    def _real(self, number: int) -> Measured:
        pair = scored_pairs(self.dataset, "registration_test")[number]
        (fixed, fixed_labels), (moving, moving_labels) = read_pair(pair)
        images = [
            hounsfield(i) if case.file.name.startswith("ct") else i
            for i, case in ((fixed, pair.fixed), (moving, pair.moving))
        ]
        found, seconds = self.registered(images[0], images[1])
        return at_surfaces(self.dataset, (fixed_labels, moving_labels), found, images[0], seconds)


def at_blocks(
    pair: Simulated, found: Registration, seconds: dict[str, float], samples: Volume | None = None
) -> Measured:
    """Compare a registration with the truth at the blocks of tissue that both images see.

    Args:
        pair: whose truth is known.
        found: its registration.
        seconds: of it.
        samples: another rival, the spread of a policy's samples.
    """
    quantities = _given(found.trust)
    grid = quantities.grid
    truth, answer = (one.displacement_at(grid) for one in (pair.truth, found.transform))
    error = (truth - answer).norm(dim=0)
    shown = _shown(pair.fixed, grid)
    there = index_points(grid, pair.truth, pair.moving.grid)
    counted = (shown & quantities.known & in_box(there, pair.moving.grid)[0, 0]).numpy()
    changed = resample(Volume(pair.changed.to(torch.uint8), pair.fixed.grid), grid, mode="nearest").data.numpy()
    chosen = np.flatnonzero(counted)
    chosen = np.random.default_rng(0).permutation(chosen)[:MOST]
    before = float(np.median(truth.norm(dim=0).numpy()[counted]))
    rivals = {key: value.ravel()[chosen] for key, value in _rivals(pair.fixed, found, grid).items()}
    if samples is not None:
        rivals["samples"] = resample(samples, grid).data.numpy().ravel()[chosen]
    about = {"voxel": quantities.voxel, "before": before, "blocks": float(counted.sum()), **seconds}
    maps = quantities.maps.flatten(1).numpy()[:, chosen]
    return Measured(maps, error.numpy().ravel()[chosen], rivals, changed.ravel()[chosen], about)


def at_surfaces(
    dataset: Dataset, labels: tuple[Volume, Volume], found: Registration, fixed: Volume, seconds: dict[str, float]
) -> Measured:
    """Compare a registration with the distances of label surfaces, both ways; sulci are no labels."""
    quantities, grid = _given(found.trust), labels[0].grid
    warped = resample(labels[1], grid, found.transform, mode="nearest").data.numpy()
    own, known = labels[0].data.numpy(), dataset.evaluated or tuple(dataset.labels)
    places, distances = [], []
    for value in known:
        sulcus = dataset.path.parent.name == "brain_oasis" and dataset.label_name(value)[:1].islower()
        if value == 0 or sulcus:
            continue
        surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (own == value, warped == value)]
        if min(surface.sum() for surface in surfaces) < 20:
            continue
        for one, other in (surfaces, surfaces[::-1]):
            distances.append(ndimage.distance_transform_edt(~other, sampling=grid.spacing)[one])
            places.append(np.argwhere(one))
    at, distance = np.concatenate(places), np.concatenate(distances)
    maps = [resample(Volume(m, quantities.grid), grid).data.numpy()[tuple(at.T)] for m in quantities.maps]
    seen = resample(Volume(quantities.known.to(torch.uint8), quantities.grid), grid, mode="nearest").data.numpy()
    kept = seen[tuple(at.T)] > 0
    patch = at // 6
    group = (patch[:, 0] * 10_000 + patch[:, 1] * 100 + patch[:, 2]).astype(np.int64)
    rivals = {key: value[tuple(at.T)][kept] for key, value in _rivals(fixed, found, grid).items()}
    about = {"voxel": quantities.voxel, **seconds}
    return Measured(np.stack(maps)[:, kept].astype(np.float32), distance[kept], rivals, group[kept], about)


def _read(case: Case) -> Volume:
    assert case.image is not None  # a case of a data set of images
    return read_image(case.image)


def _given(trust: Trust | None) -> Quantities:
    assert trust is not None  # it was asked for
    return trust.quantities


def _shown(image: Volume, grid: Grid) -> torch.Tensor:
    """Return which voxels of a grid lie in an image's tissue."""
    tissue = Volume(foreground_of(image.data).to(torch.uint8), image.grid)
    return resample(tissue, grid, mode="nearest").data > 0


def _rivals(image: Volume, found: Registration, grid: Grid) -> dict[str, np.ndarray]:
    """Return what else may tell of errors at the voxels of a grid, larger where more error is expected."""
    data = image.data.numpy().astype(np.float32)
    tissue = foreground_of(image.data).numpy()
    slope = ndimage.gaussian_gradient_magnitude(data, 1.0)
    edges = slope > np.quantile(slope[tissue], EDGES)
    edge = ndimage.distance_transform_edt(~edges, sampling=image.grid.spacing)
    mean, squares = ndimage.uniform_filter(data, 5), ndimage.uniform_filter(data**2, 5)
    flat = -np.sqrt(np.clip(squares - mean**2, 0, None))
    maps = {"edge": edge, "flat": flat}
    rivals = {
        key: resample(Volume(torch.from_numpy(value.astype(np.float32)), image.grid), grid).data.numpy()
        for key, value in maps.items()
    }
    moved = found.transform.displacement_at(grid)
    start = found.state.start
    if isinstance(start, np.ndarray):  # without the alignment
        moved = moved - affine_displacement(start, grid)
    return rivals | {"length": moved.norm(dim=0).numpy()}


class _Sampled:
    """A network whose latent is drawn from its policy in place of its mean."""

    def __init__(self, network: RegistrationModel, generator: torch.Generator) -> None:
        self._network, self._generator = network, generator
        self.features = network.features

    def __call__(self, moving: torch.Tensor, fixed: torch.Tensor, known: list[torch.Tensor] | None) -> torch.Tensor:
        latent = self._network.encode(moving, fixed, known)
        z = draw_latent(latent.mu, latent.log_sigma, 1.0, 1, generator=self._generator)
        return self._network.displacement(self._network.field(latent, z))


def sampled(options: argparse.Namespace) -> None:
    """Write what the spread of samples of a network's policy tells of its errors, beside the other quantities."""
    torch.set_num_threads(1)
    bench, rows = Bench("hippocampus-learned", options.preset, options.shared, options.work), []
    assert bench.model is not None  # the kind has one
    for number in range(options.pairs):
        pair = bench.simulate("evaluation", number)
        found, seconds = bench.registered(pair.fixed, pair.moving)
        seen = Pair(pair.fixed, pair.moving, bench.model)
        seen.align(found.report["align"], None)
        steps, totals = bench.model.card.preprocessing.steps, []
        for seed in range(SAMPLES):
            network: Any = _Sampled(bench.model.network, torch.Generator().manual_seed(seed))
            seen.seen = torch.ones(1, 1, *seen.grid.shape, dtype=torch.bool)
            with torch.no_grad():
                totals.append(take_steps(network, seen.moving_at, seen.fixed_intensities, steps))
        spread = torch.stack(totals).std(dim=0).norm(dim=1)[0]
        measured = at_blocks(pair, found, seconds, Volume(spread, seen.grid))
        values = np.vstack([logs(measured), np.log(measured.rivals["samples"] + 0.05)])
        ranks = [float(spearmanr(row, measured.error)[0]) for row in values]
        both = np.linalg.lstsq(np.vstack([values, np.ones(values.shape[1])]).T, target(measured), rcond=None)[0]
        alone = np.linalg.lstsq(np.vstack([values[:3], np.ones(values.shape[1])]).T, target(measured), rcond=None)[0]
        joint = [float(spearmanr(w[:-1] @ v, measured.error)[0]) for w, v in ((alone, values[:3]), (both, values))]
        rows.append([*ranks, *joint])
        print(number, np.round(rows[-1], 3), flush=True)
    names = ("inconsistency", "spread", "unlikeness", "samples", "three fitted to each pair", "with samples")
    means = {name: round(float(mean), 3) for name, mean in zip(names, np.mean(rows, axis=0), strict=True)}
    file = options.work / "samples.json"
    write_atomically(file, (to_json({"pairs": len(rows), "samples": SAMPLES, **means}, indent=1) + "\n").encode())
    print(means)


def records(work: Path, name: str, preset: str, stage: str) -> list[Measured]:
    """Return what was measured of a kind's stage."""
    return [Measured.load(file) for file in sorted(folder(work, name, preset, stage).glob("[0-9][0-9].npz"))]


def calibrate(shared: Path, work: Path, least: int) -> None:
    """Write weights and offsets of every kind of which there are so many simulated pairs."""
    known: dict[str, dict[str, list[Measured]]] = {}
    for name in KINDS:
        by_preset = {preset: records(work, name, preset, "calibration") for preset in PRESETS}
        known[name] = {preset: pairs for preset, pairs in by_preset.items() if len(pairs) >= least}
    known = {name: by_preset for name, by_preset in known.items() if by_preset}
    fits = [pairs for name, by_preset in known.items() if KINDS[name].model is None for pairs in by_preset.values()]
    weights, pooled = pooled_fit(fits)
    kinds = {}
    for name, by_preset in known.items():
        kind = KINDS[name]
        looks = [looks_of(shared, kind, side) for side in (kind.fixed, kind.moving)]
        kinds[name] = replace(
            calibrated_kind(by_preset),
            title=kind.title,
            stage="fit" if kind.model is None or load_model(kind.model, "cpu").card.fit else "network",
            model="" if kind.model is None else str(load_model(kind.model, "cpu").sha256),
            fixed=ranges(looks[0]),
            moving=ranges(looks[1]),
        )
    found = Calibration(fingerprint(), time.strftime("%Y-%m-%d"), weights, pooled, kinds, fingerprint(learned=True))
    write_calibration(found)


def write_calibration(found: Calibration) -> None:
    """Write what comes with MorphSeek."""
    write_atomically(FILE, (to_json(to_dict(found), indent=1) + "\n").encode())
    print(f"Wrote {FILE}")


def looks_of(shared: Path, kind: Kind, side: str, split: str = "training") -> list[dict[str, float]]:
    """Return how the images of a side of a kind look, of at most :data:`LOOKS` cases."""
    dataset = load_dataset(shared / "data" / kind.file)
    cases = [case for case in dataset.cases[split] if case.file.name.startswith(side)][:LOOKS]
    images = ((case, _read(case)) for case in cases)
    return [look_of(hounsfield(image) if case.file.name.startswith("ct") else image) for case, image in images]


def ranges(looks: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the range of every figure, a quarter of it wider on both sides, and at least a twentieth of the value."""
    found = {}
    for figure in looks[0]:
        low, high = (side(look[figure] for look in looks) for side in (min, max))
        rim = max(0.25 * (high - low), 0.05 * abs(high), 0.02)
        found[figure] = (round(low - rim, 4), round(high + rim, 4))
    return found


def evaluate(shared: Path, work: Path, out: Path) -> None:
    """Write what the offsets are worth on cases that they did not see, and for which kinds millimeters are told."""
    known = calibration()
    told: dict[str, tuple[str, ...]] = dict.fromkeys(known.kinds, ())
    result: dict[str, Any] = {"fit": known.fit, "calibrated": known.date, "kinds": {}, "looks": {}}
    if (work / "samples.json").is_file():
        result["samples of the policy, Spearman"] = json.loads((work / "samples.json").read_text())
    for name, kind in known.kinds.items():
        for preset, offsets in kind.offsets.items():
            pairs = records(work, name, preset, "evaluation")
            if not pairs:
                continue
            others = [
                records(work, other, preset, "calibration")
                for other, own in known.kinds.items()
                if other.split("-")[0] != name.split("-")[0] and not own.model
            ]
            figures = simulated_figures(pairs, kind.weights, offsets, [one for one in others if one])
            row = {"calibrated on": kind.pairs[preset], "told": holds(figures), "simulated": figures}
            told[name] += (preset,) if holds(figures) else ()
            if real := records(work, name, preset, "real"):
                row["real"] = real_figures(real, kind.weights, offsets)
            result["kinds"].setdefault(name, {})[preset] = row
    for name, kind in KINDS.items():
        tests = [looks_of(shared, kind, side, "test") for side in (kind.fixed, kind.moving)]
        found = [[n for n, own in known.kinds.items() if own.fits(f, m)] for f in tests[0] for m in tests[1]]
        counts = {n: sum(n in names for names in found) for n in known.kinds}
        result["looks"][name] = {"pairs": len(found), **counts}
    kinds = {name: replace(kind, told=told[name]) for name, kind in known.kinds.items()}
    write_calibration(replace(known, kinds=kinds))
    write_atomically(out, (to_json(result, indent=1) + "\n").encode())
    print(table(result["kinds"]), to_json(result["looks"], indent=1), f"\nWrote {out}")


def measure(options: argparse.Namespace) -> None:
    """Do the pairs that are not done, each stage of each kind in turn."""
    torch.set_num_threads(1)
    compile_kernels()
    for stage in options.stage:
        for name in options.only:
            bench = Bench(name, options.preset, options.shared, options.work)
            for number in range(options.pairs):
                file = folder(options.work, name, options.preset, stage) / f"{number:02}.npz"
                if file.is_file():
                    continue
                begin = time.perf_counter()
                found = bench.measure(stage, number)
                found.save(file)
                figures = {key: round(value, 2) for key, value in found.about.items()}
                words = f"median error {np.median(found.error):.2f} mm, {time.perf_counter() - begin:.0f} s"
                print(name, stage, number, words, figures, flush=True)


def main() -> None:
    """Measure, calibrate or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "measure": measure,
        "calibrate": lambda o: calibrate(o.shared, o.work, o.least),
        "evaluate": lambda o: evaluate(o.shared, o.work, o.out),
        "samples": sampled,
        "draw": lambda o: draw(ROOT / "Resources" / "Screenshots"),
    }
    parser.add_argument("command", choices=commands)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "trust")
    parser.add_argument("--out", type=Path, default=ROOT / "Testing" / "benchmarks" / "results" / "trust.json")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--preset", default="best", choices=PRESETS)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--least", type=int, default=6, help="fewest simulated pairs that a kind is calibrated on")
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=STAGES)
    options = parser.parse_args()
    commands[options.command](options)


if __name__ == "__main__":
    main()
