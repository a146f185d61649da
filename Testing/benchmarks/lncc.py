"""How fast is MorphSeek's LNCC?

Measures one forward and backward pass (gradient with respect to the warped image) of local normalized
cross-correlation, VoxelMorph's definition, for MorphSeekLib.measures.similarity.lncc and for the other ways of summing
over the window: the dense convolution of the official codes, pooling, separable convolution and pooling, running
(cumulative) sums, doubling sums, and matrix products differentiated by autograd; MONAI's loss too where MONAI is
installed.

All are run in turn within each repetition, so that a machine that slows down slows all of them. The table gives
medians of wall time and of processor time (of all threads; the fairer one where other programs run), each with the
ratio to the dense convolution (the median of the ratios within a repetition), and how far value and gradient (relative
to its largest element) are from the dense convolution in float64.

    python Testing/benchmarks/lncc.py
    python Testing/benchmarks/lncc.py --threads 2 --size 96 96 96 --repetitions 5 --offset 1000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout need not be installed

from MorphSeekLib.measures.similarity import lncc

Box = Callable[[Tensor, int], Tensor]
AXES = (2, 3, 4)


def textbook(box: Box) -> Callable[[Tensor, Tensor, int], Tensor]:
    """LNCC as the formula reads, with one way to sum over the window."""

    def loss(fixed: Tensor, warped: Tensor, window: int) -> Tensor:
        n = window**3
        sum_f, sum_w = box(fixed, window), box(warped, window)
        cross = box(fixed * warped, window) - sum_f * sum_w / n
        variance_f = box(fixed * fixed, window) - sum_f * sum_f / n
        variance_w = box(warped * warped, window) - sum_w * sum_w / n
        return -(cross * cross / (variance_f * variance_w + 1e-5)).mean()

    return loss


def dense_conv(x: Tensor, window: int) -> Tensor:
    return F.conv3d(x, x.new_ones(1, 1, window, window, window), padding=window // 2)


def dense_pool(x: Tensor, window: int) -> Tensor:
    return F.avg_pool3d(x, window, 1, window // 2) * window**3


def separable_conv(x: Tensor, window: int) -> Tensor:
    for axis in AXES:
        kernel = [window if a == axis else 1 for a in AXES]
        x = F.conv3d(x, x.new_ones(1, 1, *kernel), padding=[k // 2 for k in kernel])
    return x


def separable_pool(x: Tensor, window: int) -> Tensor:
    for axis in AXES:
        kernel = [window if a == axis else 1 for a in AXES]
        x = F.avg_pool3d(x, kernel, 1, [k // 2 for k in kernel]) * window
    return x


def padded(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    return F.pad(x, [0, 0] * (4 - axis) + [before, after])


def cumulative(x: Tensor, window: int) -> Tensor:
    for axis in AXES:
        n = x.shape[axis]
        total = padded(x, axis, window // 2 + 1, window // 2).cumsum(axis)
        x = total.narrow(axis, window, n) - total.narrow(axis, 0, n)
    return x


def doubling(x: Tensor, window: int) -> Tensor:
    """Sums of 1, 2, 4, 8 ... voxels from two of the half; the window is put together from its binary digits."""
    for axis in AXES:
        n = x.shape[axis]
        run, length = padded(x, axis, window // 2, window // 2), 1
        start, total = 0, 0
        while True:
            if window & length:
                total, start = total + run.narrow(axis, start, n), start + length
            if 2 * length > window:
                break
            m = run.shape[axis] - length
            run, length = run.narrow(axis, 0, m) + run.narrow(axis, length, m), 2 * length
        x = total
    return x


def banded(x: Tensor, window: int) -> Tensor:
    for axis in AXES:
        index = torch.arange(x.shape[axis], device=x.device)
        band = ((index[:, None] - index).abs() <= window // 2).to(x.dtype)
        x = (x.transpose(axis, -1) @ band).transpose(axis, -1)
    return x


def candidates() -> dict[str, Callable[[Tensor, Tensor, int], Tensor]]:
    ways = {
        "dense conv3d (official codes)": textbook(dense_conv),
        "avg_pool3d": textbook(dense_pool),
        "separable conv3d": textbook(separable_conv),
        "separable avg_pool3d": textbook(separable_pool),
        "cumulative sums": textbook(cumulative),
        "doubling sums": textbook(doubling),
        "matrix products, autograd": textbook(banded),
    }
    try:
        from monai.losses import LocalNormalizedCrossCorrelationLoss
    except ImportError:
        print("MONAI is not installed; its loss is left out.")
    else:
        ways["MONAI (rectangular)"] = lambda fixed, warped, window: LocalNormalizedCrossCorrelationLoss(
            kernel_size=window, kernel_type="rectangular", smooth_nr=0, smooth_dr=1e-5
        )(warped, fixed)
    return ways | {"MorphSeek": lncc}


def run(loss: Callable[[Tensor, Tensor, int], Tensor], fixed: Tensor, warped: Tensor, window: int):
    """One pass: ((wall, processor milliseconds), value, gradient with respect to ``warped``)."""
    warped = warped.clone().requires_grad_()
    synchronise(warped.device)
    start, processor = time.perf_counter(), time.process_time()
    value = loss(fixed, warped, window)
    value.backward()
    synchronise(warped.device)
    spent = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - processor)
    return spent, value.detach(), warped.grad


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def image_pair(size: list[int], offset: float, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two smooth random images in [0, 1] (plus an offset) that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 1, *[max(n // 4, 2) for n in size], generator=generator)
    coarse[1] = 0.7 * coarse[0] + 0.3 * coarse[1]
    images = F.interpolate(coarse, size=tuple(size), mode="trilinear", align_corners=True) + offset
    return images[:1].to(device), images[1:].to(device)


def measure(size: list[int], window: int, repetitions: int, offset: float, seed: int, device: torch.device) -> dict:
    """Rows of the table by name, the dense convolution first."""
    fixed, warped = image_pair(size, offset, seed, device)
    _, value, gradient = run(textbook(dense_conv), fixed.double(), warped.double(), window)
    ways = candidates()
    rows, times = {}, {name: [] for name in ways}
    for name, loss in ways.items():  # the first pass, not timed, is compared
        _, own_value, own_gradient = run(loss, fixed, warped, window)
        difference = (own_gradient - gradient).abs().max() / gradient.abs().max()
        rows[name] = {"value_error": float((own_value - value).abs()), "gradient_error": float(difference)}
    for _ in range(repetitions):
        for name, loss in ways.items():
            times[name].append(run(loss, fixed, warped, window)[0])
    reference = next(iter(times.values()))
    for name, row in rows.items():
        for kind, label in enumerate(("wall", "processor")):
            row[f"{label}_ms"] = median(spent[kind] for spent in times[name])
            ratios = [dense[kind] / own[kind] for dense, own in zip(reference, times[name], strict=True)]
            row[f"{label}_ratio"] = median(ratios)
    return rows


def machine(device: torch.device) -> dict:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[64, 64, 64], help="voxels (default: 64 64 64)")
    parser.add_argument("--window", type=int, default=9, help="odd window (default: 9)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed passes of each (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    parser.add_argument("--offset", type=float, default=0.0, help="added to both images, to see precision suffer")
    parser.add_argument("--seed", type=int, default=0, help="of the random images (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = machine(device)
    size = " x ".join(map(str, options.size))
    print(f"LNCC, window {options.window}, {size} voxels, float32, forward + backward")
    print(
        f"{where['device']}, {where['threads']} thread(s) of {where['cores']} cores, torch {where['torch']}; "
        f"load before the start: {where['load']}"
    )
    rows = measure(options.size, options.window, options.repetitions, options.offset, options.seed, device)
    print(f"\n{'':32}{'wall ms':>10}{'ratio':>8}{'processor':>11}{'ratio':>8}{'value off by':>14}{'gradient':>10}")
    for name, row in rows.items():
        print(
            f"{name:32}{row['wall_ms']:10.1f}{row['wall_ratio']:8.1f}{row['processor_ms']:11.1f}"
            f"{row['processor_ratio']:8.1f}{row['value_error']:14.1e}{row['gradient_error']:10.1e}"
        )
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        options.out.write_text(json.dumps({"settings": settings, "machine": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
