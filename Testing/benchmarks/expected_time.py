"""How well the time of a first registration is foretold.

    python Testing/benchmarks/expected_time.py [--shared ../shared] [--pairs 2] [--threads 1] [--processor] [--out FILE]

The pace of the processor is measured as the worker does it, once, then pairs of every data set are registered by both
presets, and with a model where one knows such images; a row is what was foretold over what it took. Wanted: within a
factor of 1.5 in nine of ten. ``--processor`` counts processor seconds, for a machine that does other work too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from MorphSeekLib.data.datasets import load_dataset, scored_pairs
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.images import read_image
from MorphSeekLib.networks.loading import LoadedModel, load_model
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_json
from MorphSeekLib.registration.compile_kernels import main as compile_kernels
from MorphSeekLib.registration.expected import Pace, Sizes, expected_seconds, measure, network_pace
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space.geometry import Grid, Volume, resample
from MorphSeekLib.space.preprocessing import foreground_of

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 1.5
SETS = {
    "hippocampus": "hippocampus/dataset.json",
    "brain": "brain_oasis/dataset.json",
    "ct": "abdomen/dataset_ct.json",
    "mr-ct": "abdomen/dataset_mrct.json",
}
MODELS = {"hippocampus": "hippocampus-mr", "native": "brain-mr"}


def sizes_of(fixed: Volume) -> Sizes:
    """Return what the time depends on, as the panel sees it."""
    places = np.argwhere(foreground_of(fixed.data).numpy())
    shown = (np.ptp(places, axis=0) + 1) / np.array(fixed.grid.shape)
    return Sizes(fixed.grid, tuple(shown.tolist()))


def files_of(shared: Path, count: int) -> list[tuple[str, Path, Path]]:
    """Return pairs of images, each with the name of its set."""
    pairs = []
    for name, file in SETS.items():
        found = scored_pairs(load_dataset(shared / "data" / file), "registration_test")[:count]
        pairs += [(name, Path(pair.fixed.image), Path(pair.moving.image)) for pair in found]
    native = sorted((shared / "data" / "brain_oasis" / "native").glob("*_t1.nii.gz"))
    return pairs + [("native", native[n], native[n + 1]) for n in range(min(count, len(native) - 1))]


def half_size(volume: Volume) -> Volume:
    """Return an image on voxels of twice the length, another size of the same."""
    affine = volume.grid.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    return resample(volume, Grid(tuple(n // 2 for n in volume.grid.shape), affine))


def row_of(
    name: str, pair: tuple[Volume, Volume], pace: Pace, preset: str, model: LoadedModel | None, step: float
) -> dict:
    """Register a pair; return what was foretold, and what it took."""
    options = RegistrationOptions(preset=preset)  # type: ignore[arg-type]
    foretold = expected_seconds(pace, sizes_of(pair[0]), options, model, step)
    begin = time.perf_counter()
    report = register(*pair, model, options).report
    took = time.perf_counter() - begin
    phases = {phase: round(seconds, 2) for phase, seconds in report["seconds"].items()}
    model_name = None if model is None else model.name
    row = {"set": name, "shape": pair[0].grid.shape, "preset": preset, "model": model_name}
    return {**row, "foretold": foretold, "took": took, "ratio": foretold / took, "phases": phases}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.processor:
        time.perf_counter = time.process_time
    torch.set_num_threads(options.threads)
    compile_kernels()
    begin = time.perf_counter()
    pace = measure(torch.device("cpu"))
    print(f"{pace}, measured in {time.perf_counter() - begin:.1f} s", flush=True)
    rows = []
    for name, *files in files_of(options.shared, options.pairs):
        fixed, moving = (read_image(file) for file in files)
        models: list[tuple[LoadedModel | None, float]] = [(None, 0.0)]
        if name in MODELS:
            model = load_model(MODELS[name], "cpu")
            models.append((model, network_pace(model)))
        pairs = {name: (fixed, moving)}
        if name == "native":
            pairs["native, half"] = half_size(fixed), half_size(moving)
        for own, pair in pairs.items():
            for preset in ("best", "fast"):
                for model, step in models:
                    row = row_of(own, pair, pace, preset, model, step)
                    rows.append(row)
                    print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    good = sum(1 / WITHIN <= row["ratio"] <= WITHIN for row in rows)
    print(f"within a factor of {WITHIN}: {good} of {len(rows)}")
    if options.out:
        found = {"threads": options.threads, "processor_seconds": options.processor, "pace": vars(pace), "rows": rows}
        write_atomically(options.out, to_json({**found, "within": good, "software": software()}, indent=1).encode())


if __name__ == "__main__":
    main()
