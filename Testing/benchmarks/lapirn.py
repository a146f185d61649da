"""LapIRN's real OASIS weights at 160x192x224: MorphSeek, the official code and greedy in one run.

    git clone https://github.com/cwmok/LapIRN FOLDER
    python Testing/benchmarks/lapirn.py --official FOLDER [--repeats 3] [--threads 2] [--out FILE.json]

The pair is ../shared/fixtures/lapirn_disp_oasis_like_160x192x224.pt: a brain and its copy under a smooth field of up to
seven voxels. Dice is the mean over 27 structures of the moving labels warped by nearest neighbor, edge values held
beyond the image. Both networks are timed from two images in memory to the field and the warped image, greedy (NCC,
radius 2, 100x50x10) with its files, as it comes. Every run is a process of its own, so that peak memory is its own; the
methods take turns and each one's median counts. Where other programs run beside it, believe the processor's seconds and
their ratios. The official code is made to run without CUDA by replacing .cuda().
Needs: pip install -e '.[benchmark,test]'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from inference import CHILD, child_greedy, measure
from torch import Tensor

from MorphSeekLib.backbones.lapirn import DISPLACEMENT, LapIRN, from_official, half_sizes
from MorphSeekLib.measures.metrics import label_figures
from MorphSeekLib.networks.devices import network_autocast, place
from MorphSeekLib.networks.model_file import software
from MorphSeekLib.space import fields

SHARED = Path(__file__).resolve().parents[3] / "shared"
METHODS = ("official", "MorphSeek, float32", "MorphSeek", "greedy")


class Stopwatch:
    """Seconds by the clock, and of the processors, which other programs on the machine do not lengthen."""

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        clock, processor = time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]
        self.seconds = {"seconds": clock, "cpu_seconds": processor}


def load_case(fixtures: Path) -> tuple[dict[str, Tensor], dict]:
    """The pair, (1, 1, i, j, k) each, with its labels; and what the fixture says of it."""
    case = torch.load(fixtures / "lapirn_disp_oasis_like_160x192x224.pt", weights_only=True)
    shape = case["config"]["shape"]

    def unpack(name: str) -> Tensor:
        flat = np.frombuffer(zlib.decompress(case[f"{name}_zlib"].numpy().tobytes()), np.uint8)
        return torch.from_numpy(flat.reshape(1, 1, *shape).copy())

    volumes = {name: unpack(name) for name in ("moving", "fixed", "moving_seg", "fixed_seg")}
    return {k: v if k.endswith("seg") else v.float() / 255 for k, v in volumes.items()}, case


def mean_dice(volumes: dict[str, Tensor], warped_labels: Tensor, labels: list[int]) -> float | None:
    """Return the mean over the fixture's structures, by the definition of every table."""
    fixed, moving = (volumes[f"{name}_seg"][0, 0].int() for name in ("fixed", "moving"))
    return label_figures(fixed, warped_labels.int(), moving, labels=labels).mean_dice


def figures_of(field: Tensor, volumes: dict[str, Tensor], case: dict) -> dict[str, float]:
    """Dice of a field in voxels, and how far it lies from the official one on every fourth voxel."""
    warped = fields.warp(volumes["moving_seg"].float(), field, "nearest", "border")[0, 0]
    official = (case["flow_stride4"].flip(1)) * half_sizes(field)
    distance = (field[..., ::4, ::4, ::4] - official).norm(dim=1)
    return {
        "dice": mean_dice(volumes, warped, case["config"]["labels"]),
        "distance_voxels_mean": float(distance.mean()),
        "distance_voxels_max": float(distance.max()),
    }


def child_morphseek(fixtures: Path, weights: dict[str, Tensor]) -> dict:
    """Our network, in the precision that devices.py chooses here."""
    volumes, case = load_case(fixtures)
    network = LapIRN(DISPLACEMENT)
    network.load_state_dict(from_official(weights))
    device = torch.device("cpu")
    network = place(network.eval(), device)
    with torch.inference_mode(), Stopwatch() as spent:
        with network_autocast(device):
            field = network.decode(*network.encode(volumes["moving"], volumes["fixed"]))
        fields.warp(volumes["moving"], field, padding="border")
    return spent.seconds | figures_of(field, volumes, case)


def child_official(fixtures: Path, weights: dict[str, Tensor], folder: Path) -> dict:
    """The official code, imported from its clone."""
    sys.path.insert(0, str(folder / "Code"))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_: self
    import miccai2020_model_stage as official

    volumes, case = load_case(fixtures)
    shape = case["config"]["shape"]
    network = None
    for level in (1, 2, 3):
        build = getattr(official, f"Miccai2020_LDR_laplacian_unit_disp_add_lvl{level}")
        finer = {} if network is None else {f"model_lvl{level - 1}": network}
        size = [n // 2 ** (3 - level) for n in shape]
        network = build(2, 3, 7, is_train=level < 3, imgshape=size, range_flow=0.4, **finer)
    network.load_state_dict(weights)
    network.eval()
    transform = official.SpatialTransform_unit()
    grid = torch.from_numpy(official.generate_grid_unit(shape)).float()[None]
    with torch.inference_mode(), Stopwatch() as spent:
        flow = network(volumes["moving"], volumes["fixed"])
        transform(volumes["moving"], flow.permute(0, 2, 3, 4, 1), grid)
    return spent.seconds | figures_of(flow.flip(1) * half_sizes(flow), volumes, case)


def child_classic(fixtures: Path) -> dict:
    """greedy."""
    from picsl_greedy import Greedy3D

    from MorphSeekLib.io.images import read_labels, write_image
    from MorphSeekLib.space.geometry import Grid, Volume

    volumes, case = load_case(fixtures)
    grid = Grid.from_parts(case["config"]["shape"], (1.0, 1.0, 1.0), np.eye(3), (0.0, 0.0, 0.0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, data in volumes.items():
            data = data[0, 0]
            write_image(Volume(data.int() if kind.endswith("seg") else data, grid), folder / f"{kind}.nii.gz")
        with Stopwatch() as spent:
            child_greedy(folder)
        Greedy3D().execute(
            f"-d 3 -rf {folder}/fixed.nii.gz -ri NN -rm {folder}/moving_seg.nii.gz {folder}/warped.nii.gz "
            f"-r {folder}/greedy.nii.gz"
        )
        warped = read_labels(folder / "warped.nii.gz").data
    return spent.seconds | {"dice": mean_dice(volumes, warped, case["config"]["labels"])}


def child(method: str, fixtures: str, official: str) -> dict:
    """One run of a method."""
    if method == "greedy":
        return child_classic(Path(fixtures))
    weights = torch.load(Path(fixtures) / "lapirn_disp_real_weights.pt", weights_only=True)["state_dict"]
    if method == "official":
        return child_official(Path(fixtures), weights, Path(official))
    return child_morphseek(Path(fixtures), weights)


def main() -> None:
    """Let the methods take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="a clone of the official repository")
    parser.add_argument("--fixtures", type=Path, default=SHARED / "fixtures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lapirn.json")
    options = parser.parse_args()
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    for _ in range(options.repeats):
        for method in METHODS:
            variables = {"MORPHSEEK_PRECISION": "float32"} if method.endswith("float32") else {}
            arguments = [method, str(options.fixtures), str(options.official)]
            runs[method].append(measure(arguments, options.threads, __file__, variables))
            print(method, runs[method][-1], flush=True)
    rows = {
        method: {name: statistics.median(row[name] for row in found) for name in found[0]}
        | {"all_seconds": [round(row["seconds"], 2) for row in found]}
        for method, found in runs.items()
    }
    for row in rows.values():
        for kind in ("seconds", "cpu_seconds"):
            row[f"ratio_to_greedy_{kind}"] = row[kind] / rows["greedy"][kind]
            row[f"times_faster_than_official_{kind}"] = rows["official"][kind] / row[kind]
    print(f"{'method':<20}{'seconds':>9}{'of CPU':>8}{'x greedy':>10}{'faster, CPU':>13}{'peak GB':>9}{'Dice':>9}")
    for method, row in rows.items():
        print(
            f"{method:<20}{row['seconds']:>9.1f}{row['cpu_seconds']:>8.1f}{row['ratio_to_greedy_cpu_seconds']:>10.3f}"
            f"{row['times_faster_than_official_cpu_seconds']:>13.2f}{row['peak_gb']:>9.2f}{row['dice']:>9.4f}"
        )
    _, case = load_case(options.fixtures)
    content = {
        "settings": {"shape": case["config"]["shape"], "threads": options.threads, "repeats": options.repeats},
        "load": "other programs ran beside it" if os.getloadavg()[1] > options.threads + 1 else "none beside it",
        "dice_before": case["config"]["dice_before"],
        "dice_of_the_fixture": case["config"]["dice_after"],
        "software": software(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == CHILD:
        print("\n" + json.dumps(child(*sys.argv[2:])))
    else:
        main()
