"""How well the error that is estimated of a registration is the true one: calibrate it, and judge it on unseen cases.

    nice -n 5 python Testing/benchmarks/trust.py measure [--shared ../shared] [--work FOLDER] [--only hippocampus brain]
        [--preset best] [--pairs 12] [--stage calibration evaluation real]
    python Testing/benchmarks/trust.py calibrate [--work FOLDER]
    python Testing/benchmarks/trust.py evaluate [--work FOLDER] [--out Testing/benchmarks/results/trust.json]

``measure`` registers pairs, one at a time with one thread, and leaves a file for each; pairs that FOLDER holds already
are not done again. Simulated pairs (comparison/simulated.py) of training cases are for calibration (of the cases on
which the network was validated, for the kind that it answers), those of test cases for evaluation, and the test pairs
as they are, with their labels, for evaluation too. ``calibrate`` writes the offsets beside the presets, ``evaluate``
what they are worth. CT is given in Hounsfield units, as scanners write it.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from comparison.side_by_side import ROOT
from comparison.simulated import Other, Simulated, hounsfield, simulated
from scipy import ndimage

from MorphSeekLib.data.datasets import Case, Dataset, load_dataset, read_pair, scored_pairs
from MorphSeekLib.io.images import read_image
from MorphSeekLib.networks.loading import LoadedModel, load_model
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.compile_kernels import main as compile_kernels
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.registration.result import Registration
from MorphSeekLib.registration.trust import Quantities
from MorphSeekLib.registration.trust_map import Trust
from MorphSeekLib.space.geometry import Grid, Volume, in_box, index_points, resample
from MorphSeekLib.space.preprocessing import foreground_of

STAGES = ("calibration", "evaluation", "real")
MOST = 12_000
"""Blocks of a pair that are kept, drawn at random."""
EDGES = 0.85
"""Quantile of the gradient's length in tissue, above which a voxel is an edge."""
OTHERS = 6
"""Other pairs of cases whose registrations are drawn from, for each kind and stage."""


@dataclass(frozen=True)
class Kind:
    """A kind of pair.

    Attributes:
        file: of its data set, under data.
        splits: whose cases are simulated, by stage.
        model: a bundled name; None for none.
        curve: the two images are of two modalities.
        fixed, moving: what the files of each image begin with.
    """

    file: str
    splits: dict[str, str]
    model: str | None = None
    curve: bool = False
    fixed: str = ""
    moving: str = ""


_SPLITS = {"calibration": "training", "evaluation": "test"}
KINDS = {
    "hippocampus": Kind("hippocampus/dataset.json", _SPLITS),
    "brain": Kind("brain_oasis/dataset.json", _SPLITS),
    "ct": Kind("abdomen/dataset_ct.json", _SPLITS, fixed="ct", moving="ct"),
    "mr-ct": Kind("abdomen/dataset_mrct.json", _SPLITS, curve=True, fixed="mr", moving="ct"),
    "hippocampus-learned": Kind(
        "hippocampus/dataset.json", _SPLITS | {"calibration": "validation"}, model="hippocampus-mr"
    ),
}


@dataclass(frozen=True)
class Measured:
    """What a benchmark keeps of a registration: at blocks of a simulated pair, or at surface voxels of a real one.

    Attributes:
        maps: (3, n) quantities.
        error: (n,) mm: the true error, or the distance of label surfaces.
        rivals: what else may tell of errors, name -> (n,), larger where more error is expected.
        group: (n,) int: 1 in changed regions of a simulated pair; the patch of a real one.
        about: voxel (mm), seconds of the registration and of the estimate, and the median error before it, mm.
    """

    maps: np.ndarray
    error: np.ndarray
    rivals: dict[str, np.ndarray]
    group: np.ndarray
    about: dict[str, float]

    def save(self, file: Path) -> None:
        """Write a file, whole or not at all."""
        part = file.with_suffix(".part.npz")
        named = {f"rival {key}": value for key, value in self.rivals.items()}
        named |= {f"about {key}": np.float64(value) for key, value in self.about.items()}
        np.savez_compressed(part, maps=self.maps, error=self.error, group=self.group, **named)
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Measured:
        """Read a file."""
        with np.load(file) as saved:
            named = {key: saved[key] for key in saved.files}
        rivals = {key[6:]: value for key, value in named.items() if key.startswith("rival ")}
        about = {key[6:]: float(value) for key, value in named.items() if key.startswith("about ")}
        return cls(named["maps"], named["error"], rivals, named["group"], about)


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

    def folder(self, stage: str) -> Path:
        """Return where the files of a stage go; made when missing."""
        found = self.work / f"{self.name}-{self.preset}-{stage}"
        found.mkdir(parents=True, exist_ok=True)
        return found

    def simulate(self, stage: str, number: int) -> Simulated:
        """Make a pair of a stage; the same each time."""
        generator = np.random.default_rng([zlib.crc32(f"{self.kind.file} {stage}".encode()), number])
        cases = self.dataset.cases[self.kind.splits[stage]]
        fixed = [case for case in cases if case.file.name.startswith(self.kind.fixed)]
        moving = [case for case in cases if case.file.name.startswith(self.kind.moving)]
        pool = np.random.default_rng(zlib.crc32(f"{self.kind.file} {stage} others".encode()))
        pairs = [(f, m) for f in fixed for m in moving if f is not m]
        pairs = [pairs[n] for n in pool.permutation(len(pairs))[:OTHERS]]
        first, second = pairs[number % len(pairs)]
        known = self.work / "others" / f"{first.file.name.split('.')[0]} {second.file.name.split('.')[0]}.npz"
        other = Other.of(_read(first), _read(second), known, self.kind.curve)
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
        images = [hounsfield(i) if case.file.name.startswith("ct") else i for i, case in ((fixed, pair.fixed), (moving, pair.moving))]
        found, seconds = self.registered(images[0], images[1])
        return at_surfaces(self.dataset, (fixed_labels, moving_labels), found, images[0], seconds)


def at_blocks(pair: Simulated, found: Registration, seconds: dict[str, float]) -> Measured:
    """Compare a registration with the truth at the blocks of tissue that both images see."""
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
        if value == 0 or dataset.label_name(value)[:1].islower() and dataset.path.parent.name == "brain_oasis":
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
        moved = moved - _affine_displacement(start, grid)
    return rivals | {"length": moved.norm(dim=0).numpy()}


def _affine_displacement(matrix: np.ndarray, grid: Grid) -> torch.Tensor:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")).reshape(3, -1)
    points = grid.affine[:3, :3] @ index + grid.affine[:3, 3:]
    moved = (matrix[:3, :3] - np.eye(3)) @ points + matrix[:3, 3:]
    return torch.from_numpy(moved.reshape(3, *grid.shape)).float()


def measure(options: argparse.Namespace) -> None:
    """Do the pairs that are not done, each stage of each kind in turn."""
    torch.set_num_threads(1)
    compile_kernels()
    for stage in options.stage:
        for name in options.only:
            bench = Bench(name, options.preset, options.shared, options.work)
            for number in range(options.pairs):
                file = bench.folder(stage) / f"{number:02}.npz"
                if file.is_file():
                    continue
                begin = time.perf_counter()
                found = bench.measure(stage, number)
                found.save(file)
                figures = {key: round(value, 2) for key, value in found.about.items()}
                middle = np.median(found.error)
                print(name, stage, number, f"median error {middle:.2f} mm", figures, f"{time.perf_counter() - begin:.0f} s", flush=True)


def main() -> None:
    """Measure, calibrate or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands: dict[str, Callable[[argparse.Namespace], None]] = {"measure": measure}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "trust")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--preset", default="best")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=STAGES)
    options = parser.parse_args()
    commands[options.command](options)


if __name__ == "__main__":
    main()
