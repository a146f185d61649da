"""Small synthetic cases for tests: blobs with labels, written as real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from MorphSeekLib.backbones import BACKBONES
from MorphSeekLib.backbones.voxelmorph import VoxelMorph
from MorphSeekLib.io.images import write_image
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.space.geometry import Grid, Volume

TINY = {
    "corrmlp": {"encoder_width": 2, "decoder_width": 8, "windows": [2, 3]},
    "lapirn": {"width": 8, "blocks": 1},
    "nice_trans": {"encoder_width": 2, "decoder_width": 2, "head_width": 2, "depth": 2, "window": 3},
    "spac": {"encoder": [4, 8, 8], "decoder": [8, 8, 8, 4], "plan": 8, "size": [16, 16, 16]},
    "transmorph": {"channels": 4, "depths": [2, 2], "heads": [1, 2], "window": [2, 3, 2], "drop_path": 0.0},
    "voxelmorph": {"encoder": [4, 8, 8], "decoder": [8, 8, 4], "extra": [4]},
    "vxm_dense": {"encoder": [4, 8, 8], "decoder": [8, 8, 4], "extra": [4], "squarings": 3},
}
"""Settings of each backbone that keep tests fast."""
SHIPPED = sorted(name for name, kind in BACKBONES.items() if kind.moves and kind.__module__.startswith("MorphSeekLib."))
"""The backbones that users have; experiments register others."""


def blob_labels(seed: int, grid: Grid) -> Volume:
    """Two nested ellipsoids (labels 1 and 2) and a small ball (3), placed a little differently for every seed."""
    generator = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in grid.shape], indexing="ij"))
    center = generator.uniform(-0.08, 0.08, 3).reshape(3, 1, 1, 1)
    radii = generator.uniform(0.55, 0.7, 3).reshape(3, 1, 1, 1)
    distance = np.sqrt((((index - center) / radii) ** 2).sum(0))
    ball = np.sqrt((((index - center - 0.15) / 0.2) ** 2).sum(0))
    labels = (distance < 1).astype(np.int32) + (distance < 0.6)
    labels[ball < 1] = 3
    return Volume(torch.from_numpy(labels), grid)


def blob_image(labels: Volume, seed: int) -> Volume:
    """A noisy image of the labels."""
    generator = np.random.default_rng(seed + 1000)
    means = torch.tensor([0.0, 90.0, 160.0, 230.0])
    noise = torch.from_numpy(generator.normal(0, 4, labels.grid.shape)).float()
    return Volume(means[labels.data.long()] + noise, labels.grid)


def blob_grid(shape=(24, 28, 20), spacing=(2.0, 2.0, 2.5)) -> Grid:
    """An LPS grid around the origin."""
    origin = [-(n - 1) * s / 2 for n, s in zip(shape, spacing, strict=True)]
    return Grid.from_parts(shape, spacing, np.eye(3), origin)


def write_dataset(folder: Path, count: int = 4, grid: Grid | None = None) -> Path:
    """``count`` labeled cases and a dataset.json with cases and pairs; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(count):
        labels = blob_labels(seed, grid or blob_grid())
        row = {"image": f"image_{seed}.nii.gz", "label": f"label_{seed}.nii.gz"}
        write_image(blob_image(labels, seed), folder / row["image"])
        write_image(labels, folder / row["label"])
        rows.append(row)
    pair = [{"fixed": rows[0]["image"], "moving": rows[1]["image"]}]
    values = {
        "name": "blobs",
        "licence": "none needed",
        "labels": {"0": "background", "1": "shell", "2": "core", "3": "ball"},
        "training": rows,
        "registration_val": pair,
        "registration_test": [*pair, {"fixed": rows[1]["image"], "moving": rows[0]["image"]}],
    }
    (folder / "dataset.json").write_text(json.dumps(values))
    return folder / "dataset.json"


@torch.no_grad()
def follow_forces(backbone: VoxelMorph, gain: float = 0.3) -> None:
    """Let a random network's field be the forces of two scales, blurred, and a little of what its layers say.

    So it brings images closer, which no random network does. It must have been built with two ``forces`` and one
    ``extra`` convolution of at least six channels.
    """
    carry, flow = backbone.extra[0][0].weight, backbone.flow.weight
    torch.nn.init.normal_(flow, 0, 0.005)
    carry[:6] = 0
    backbone.extra[0][0].bias[:6] = 0
    flow[:, :6] = 0
    for axis in range(3):
        for sign, channel in ((1, axis), (-1, axis + 3)):  # LeakyReLU(f) - LeakyReLU(-f) is a multiple of f
            carry[channel, axis - 6, 1, 1, 1] = carry[channel, axis - 3, 1, 1, 1] = sign
            flow[axis, channel] = sign * gain / 27


def steps_only(**choices: object) -> RegistrationOptions:
    """Return the choices of a registration by the network's steps alone."""
    return RegistrationOptions(**({"search": "off", "fit": "off"} | choices))
