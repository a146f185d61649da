"""What is done to images before a registration is measured: noise, shading, another contrast, a table and arms."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from MorphSeekLib.app.phantom import MILLIMETERS
from MorphSeekLib.space.geometry import Grid, Volume, index_points, resample

Change = Callable[[Volume, str], Volume]
"""(image, its name with that of its side) -> the image changed; the same each time."""
SIGMA = 0.01  # of the image's range
BIAS = (0.8, 1.2)
T2_LIKE = {0.0: 1.0, 0.25: 0.95, 0.4: 0.75, 0.55: 0.6, 0.7: 0.45, 0.85: 0.3, 1.0: 0.25}
"""T1 intensity, as a share of the brightest tissue's -> T2-like: fluid is bright, grey matter middle, white dark."""
WHITEST = 0.995  # quantile of the foreground
BODY, SOFT, BONE, PLATE = 30.0, 112.0, 255.0, 120.0
"""On the abdomen's scale, -125 to 275 HU as 0 to 255: least of a body, muscle, bone, the plate of a table."""


def generator_of(name: str) -> torch.Generator:
    """Return a generator that follows from a name alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def noisy(image: Volume, generator: torch.Generator) -> Volume:
    """Add Rician noise to an image (Gudbjartsson and Patz, 1995)."""
    sigma = SIGMA * float(image.data.max() - image.data.min())
    real, imaginary = (sigma * torch.randn(image.data.shape, generator=generator) for _ in range(2))
    return Volume(torch.hypot(image.data + real, imaginary), image.grid)


def shaded(image: Volume, generator: torch.Generator) -> Volume:
    """Multiply an image by a smooth field that runs from 0.8 to 1.2."""
    field = torch.rand(1, 1, 3, 3, 3, generator=generator)
    field = F.interpolate(field, size=image.data.shape, mode="trilinear", align_corners=True)[0, 0]
    field = (field - field.min()) / (field.max() - field.min())
    return Volume(image.data * (BIAS[0] + (BIAS[1] - BIAS[0]) * field), image.grid)


def shaded_and_noisy(image: Volume, name: str) -> Volume:
    """Do both, as a scanner would: the field first."""
    generator = generator_of(name)
    return noisy(shaded(image, generator), generator)


def _share(image: Volume) -> tuple[Tensor, Tensor, float]:
    """Return the foreground, the image as a share of its brightest tissue, and that tissue's intensity."""
    inside = image.data > image.data.min()
    white = float(np.quantile(image.data[inside].numpy(), WHITEST))
    return inside, (image.data / white).clamp(0, 1), white


def inverted(image: Volume, name: str = "") -> Volume:
    """Turn the contrast of what is not background around: the darkest becomes the brightest."""
    inside, share, white = _share(image)
    return Volume(torch.where(inside, white * (1.05 - share), image.data), image.grid)


def t2_like(image: Volume, name: str = "") -> Volume:
    """Give a T1-weighted brain on black the contrast of a T2-weighted one (:data:`T2_LIKE`, linear in between)."""
    inside, share, white = _share(image)
    values = np.interp(share.numpy(), list(T2_LIKE), list(T2_LIKE.values())).astype(np.float32)
    return Volume(torch.where(inside, white * torch.from_numpy(values), image.data), image.grid)


def padded(image: Volume, name: str = "") -> Volume:
    """Give an abdomen room for arms (130 mm on each side) and a table (80 mm behind), with air in it.

    Data sets of abdomens are cut close to the body; this is the field of view that a scanner has.
    """
    wide = np.array([260.0, 80.0, 0.0])  # LPS mm
    count = np.rint(np.abs(image.grid.direction.T @ wide) / image.grid.spacing).astype(int)
    corner = np.array([-130.0, 0.0, 0.0])
    low = np.minimum(image.grid.direction.T @ corner, image.grid.direction.T @ (corner + wide))
    before = np.rint(-low / image.grid.spacing).astype(int)
    affine = image.grid.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ before
    grid = Grid(tuple(int(n) for n in np.array(image.grid.shape) + count), affine)
    return resample(image, grid, mode="nearest", background=float(image.data.min()))


def hounsfield(image: Volume, name: str = "") -> Volume:
    """Return an abdomen in Hounsfield units, as a scanner writes it; what is black becomes air."""
    low, high = -125.0, 275.0  # HU, 0 and 255 of the abdomen's scale
    values = torch.where(image.data > 0, low + (high - low) / 255 * image.data, -1000.0)
    return Volume(values, image.grid)


def table_and_arms(image: Volume, name: str) -> Volume:
    """Put a table under an abdomen and arms beside it, elsewhere in every image; the field of view is enlarged first.

    Args:
        image: on the abdomens' scale (:data:`BODY` and so on).
        name: whose generator draws the places.
    """
    image = padded(image)
    tilt, gap, *arms = torch.rand(8, generator=generator_of(name)).tolist()
    x, y, z = index_points(image.grid, None, MILLIMETERS)[0]
    body = image.data > BODY
    left, right, back = (float(v[body].quantile(q)) for v, q in ((x, 0.998), (x, 0.002), (y, 0.999)))
    middle = (left + right) / 2
    data = image.data.clone()
    height = y - back - 6 - 14 * gap - 0.0006 * (x - middle).square() - 0.06 * (tilt - 0.5) * (x - middle)
    depth = 25 + 10 * tilt
    plate = (height.abs() < 3.5) | ((height - depth).abs() < 3.5)
    data[plate & ((x - middle).abs() < 215) & ~body] = PLATE
    for side, edge, (away, low, lean) in ((1, left, arms[:3]), (-1, right, arms[3:])):
        along = z - float(z.mean())
        center = edge + side * (52 + 16 * away) + 0.25 * (lean - 0.5) * along
        distance = torch.hypot(x - center, y - float(y[body].mean()) - 60 * (low - 0.3))
        for radius, value in ((42.0, 15.0), (35.0, SOFT), (11.0, BONE)):
            data[(distance < radius) & ~body] = value
    return Volume(data, image.grid)
