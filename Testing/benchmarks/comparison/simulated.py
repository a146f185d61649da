"""Pairs of images whose true displacement is known: a scan, and the same scan deformed and changed.

The fixed image is a case A after a map, F(x) = A(T(x)), the moving one is A itself, so that T is the truth at every
voxel of F. T is what another pair of cases was registered by, plus random fields of three scales. F is then changed as
scans differ: gamma, a bias field, noise, what was left of the other pair's intensities after its registration, a
lesion, two blurred and two replaced regions; and for two modalities by a random curve that is not monotonic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume, resample, voxel_displacement

SCALES = ((12.0, 1.2), (6.0, 0.6), (3.0, 0.3))
"""Of the random fields: standard deviation of the Gaussian that smooths each, and of its components, voxels."""
STRENGTH = (0.5, 1.5)
"""Times which the random fields are taken."""
LEAST_DETERMINANT, MOST_BELOW = 0.05, 0.001
"""Where more than this share of the voxels has a smaller determinant, the random fields are halved."""
RESIDUAL = (0.7, 1.3)
"""Times which the other pair's residual is added."""
AIR = -1000.0


@dataclass(frozen=True)
class Simulated:
    """A pair whose truth is known.

    Attributes:
        fixed, moving: the images.
        truth: fixed point -> moving point.
        changed: (i, j, k) bool, the lesion, the blurred and the replaced regions.
    """

    fixed: Volume
    moving: Volume
    truth: DenseTransform
    changed: Tensor


@dataclass(frozen=True)
class Other:
    """Another pair of cases, registered.

    Attributes:
        transform: fixed point -> moving point, between grids whose centers were brought together.
        fixed: its fixed image.
        residual: what is left of the fixed image after the warped one, each in shares of its own range.
    """

    transform: DenseTransform
    fixed: Volume
    residual: Volume

    @classmethod
    def of(cls, fixed: Volume, moving: Volume, file: Path, curve: bool, affine: float) -> Other:
        """Register two images, or read what an earlier call has found from a file.

        Args:
            fixed, moving: the images.
            file: that keeps the transform.
            curve: they are of two modalities, so that the residual is that of the mean of the one's values where the
                other has a value.
            affine: share of the transform's affine part that is kept.
        """
        if file.is_file():
            saved = np.load(file)
            found = DenseTransform(torch.from_numpy(saved["displacement"]), Grid(saved["shape"], saved["affine"]))
        else:
            found = register(fixed, moving, options=RegistrationOptions(inverse=False, preset="fast")).transform
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, displacement=found.displacement.numpy(), shape=found.grid.shape, affine=found.grid.affine)
        warped = resample(moving, fixed.grid, found, background=float(moving.data.min()))
        part = found.affine_part()
        apart = torch.from_numpy(moving.grid.center - fixed.grid.center).float().view(3, 1, 1, 1)
        part[:3, 3] -= moving.grid.center - fixed.grid.center
        less = (1 - affine) * affine_displacement(part, found.grid)
        centered = DenseTransform(found.displacement - apart - less, found.grid)
        shares = [_share(image.data) for image in (fixed, warped)]
        expected = _explained(*shares) if curve else shares[1]
        return cls(centered, fixed, Volume(shares[0] - expected, fixed.grid))


def simulated(case: Volume, other: Other, curve: bool, generator: np.random.Generator) -> Simulated:
    """Make a pair of a case and of what another pair of cases has in it.

    Args:
        case: A.
        other: the other pair.
        curve: give the fixed image another contrast.
        generator: of everything random.
    """
    truth = _bent(case.grid, other, generator)
    points = fields.identity(case.grid.shape) + voxel_displacement(truth, case.grid)
    values = fields.sample(case.data.float()[None, None], points, padding="border")[0, 0]
    fixed, changed = _changed(Volume(values, case.grid), other, curve, generator)
    return Simulated(fixed, case, truth, changed)


def hounsfield(image: Volume) -> Volume:
    """Give an abdomen whose window of -125 to 275 HU was made 0 to 255 its Hounsfield units, air where it is black."""
    return Volume(torch.where(image.data <= 0, AIR, image.data * (400 / 255) - 125), image.grid)


def affine_displacement(matrix: np.ndarray, grid: Grid) -> Tensor:
    """Return the displacement of a (4, 4) map at the voxels of a grid, (3, i, j, k) LPS mm."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")).reshape(3, -1)
    points = grid.affine[:3, :3] @ index + grid.affine[:3, 3:]
    moved = (matrix[:3, :3] - np.eye(3)) @ points + matrix[:3, 3:]
    return torch.from_numpy(moved.reshape(3, *grid.shape)).float()


def _bent(grid: Grid, other: Other, generator: np.random.Generator) -> DenseTransform:
    """Return the other pair's transform with random fields, on a grid whose center is brought to its fixed image's."""
    affine = grid.affine.copy()
    affine[:3, 3] += other.fixed.grid.center - grid.center
    base = other.transform.displacement_at(Grid(grid.shape, affine))
    strength = generator.uniform(*STRENGTH)
    random = np.zeros((3, *grid.shape), np.float32)
    for sigma, size in SCALES:
        for component in random:
            noise = ndimage.gaussian_filter(generator.standard_normal(grid.shape).astype(np.float32), sigma)
            component += strength * size * noise / noise.std()
    spacing = torch.from_numpy(grid.spacing).float()
    turned = torch.einsum("ab,bijk->aijk", torch.from_numpy(grid.direction).float() * spacing, torch.from_numpy(random))
    while True:
        found = DenseTransform(base + turned, grid)
        determinants = fields.jacobian_determinant(voxel_displacement(found, grid))
        if float((determinants < LEAST_DETERMINANT).float().mean()) <= MOST_BELOW or float(turned.abs().max()) < 0.01:
            return found
        turned = turned / 2


def _changed(image: Volume, other: Other, curve: bool, generator: np.random.Generator) -> tuple[Volume, Tensor]:
    """Return an image as another scan would show it, and where more than its intensities were changed."""
    data = image.data.clone()
    low, high = float(data.min()), float(np.quantile(data.numpy(), 0.999))
    shown = data > low + 0.02 * (high - low)
    here = other.fixed.grid.affine.copy()
    here[:3, 3] += image.grid.center - other.fixed.grid.center
    replacing = resample(Volume(_share(other.fixed.data), Grid(other.fixed.grid.shape, here)), image.grid).data
    residual = resample(Volume(other.residual.data, Grid(other.fixed.grid.shape, here)), image.grid).data
    changed = torch.zeros_like(shown)
    scaled = ((data - low) / (high - low)).clamp(0, 1.2)
    by = replacing.clamp(0, 1.2)
    for change in (_lesion(generator), _blurred, _replaced(by, curve), _blurred, _replaced(by, curve)):
        ball = _ball(shown, generator)
        scaled = scaled + ball * (change(scaled) - scaled)
        changed |= ball > 0.5
    if curve:
        scaled = _curved(scaled, generator)
    scaled = scaled.clamp(0, 1.2) ** float(np.exp(0.15 * generator.standard_normal()))
    bias = torch.from_numpy(generator.uniform(0.8, 1.2, (1, 1, 3, 3, 3)).astype(np.float32))
    scaled = scaled * F.interpolate(bias, size=data.shape, mode="trilinear", align_corners=True)[0, 0]
    scaled = scaled + float(generator.uniform(*RESIDUAL)) * residual
    scaled = scaled + float(generator.uniform(0.005, 0.03)) * torch.from_numpy(
        generator.standard_normal(data.shape).astype(np.float32)
    )
    scaled = torch.where(shown | (changed & (scaled > 0.05)), scaled.clamp(min=0.021), 0.0)
    if not curve:
        scaled = low + (high - low) * scaled
    return Volume(scaled, image.grid), changed


def _lesion(generator: np.random.Generator) -> Callable[[Tensor], Tensor]:
    value = float(generator.uniform(0.05, 1.0))
    return lambda data: torch.full_like(data, value)


def _blurred(data: Tensor) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(data.numpy(), 2.0))


def _replaced(by: Tensor, curve: bool) -> Callable[[Tensor], Tensor]:
    """Return what takes the other pair's fixed image; of another modality the same image from elsewhere."""
    return (lambda data: data.roll((11, 7, 5), (0, 1, 2))) if curve else (lambda _: by)


def _ball(shown: Tensor, generator: np.random.Generator) -> Tensor:
    """Return a ball about a random place of what is shown, 1 inside with a soft edge, (i, j, k)."""
    places = torch.nonzero(shown).numpy()
    center = places[generator.integers(len(places))]
    radius = float(generator.uniform(0.06, 0.18)) * float(np.cbrt(int(shown.sum())))
    away = [np.arange(n) - c for n, c in zip(shown.shape, center, strict=True)]
    distance = np.sqrt(away[0][:, None, None] ** 2 + away[1][:, None] ** 2 + away[2] ** 2)
    return torch.from_numpy(np.clip(0.5 + (radius - distance) / 2, 0, 1).astype(np.float32))


def _curved(data: Tensor, generator: np.random.Generator) -> Tensor:
    """Return intensities after a random curve through six values, of which black stays black."""
    knots = np.concatenate([[0.0], generator.uniform(0.1, 1.0, 6)])
    found = np.interp(data.numpy(), [0.0, 0.05, 0.25, 0.45, 0.65, 0.85, 1.1], knots)
    return torch.from_numpy(found.astype(np.float32))


def _share(data: Tensor) -> Tensor:
    """Return intensities in shares of their range, but for the brightest thousandth."""
    low = float(data.min())
    return (data - low) / max(float(np.quantile(data.numpy(), 0.999)) - low, 1e-6)


def _explained(fixed: Tensor, warped: Tensor) -> Tensor:
    """Return the mean of what the fixed image shows where the warped one has a value, voxel by voxel.

    It explains one modality by another.
    """
    edges = torch.quantile(warped.flatten()[:: max(1, warped.numel() // 100_000)], torch.linspace(0, 1, 33)).unique()
    index = torch.bucketize(warped, edges[1:-1].contiguous())
    count = torch.bincount(index.flatten(), minlength=34).clamp(min=1)
    means = torch.bincount(index.flatten(), fixed.flatten().float(), minlength=34) / count
    return means[index]
