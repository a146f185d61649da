"""The base pair of the fuzz: a head and the same head moved by a known affine and smooth map.

The head is the MNI152 T1 template that ships inside the package nilearn. The map is a formula, so the moving image, its
labels and the true positions of all points are exact on every grid, without any resampling code of the product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from MorphSeekLib.space.geometry import Grid, apply_affine

VOXEL = 2.5
"""Millimeters of the undressed images' voxels; the source is blurred for it."""
REGIONS = 8
"""Labels of the undressed images are 1 to this."""


@dataclass(frozen=True)
class Motion:
    """A map of moving points to fixed points: an affine plus a sum of waves.

    Attributes:
        affine: (4, 4), LPS mm.
        waves: (n, 3) wave vectors in 1/mm.
        sizes: (n, 3) amplitudes in mm.
        phases: (n,) radians.
    """

    affine: np.ndarray
    waves: np.ndarray
    sizes: np.ndarray
    phases: np.ndarray

    @classmethod
    def random(cls, generator: np.random.Generator, center: np.ndarray) -> Motion:
        """A head that lies a little differently in the scanner and differs a little in shape."""
        angles = np.deg2rad(generator.uniform(-5, 5, 3))
        linear = np.eye(3)
        for axis, angle in enumerate(angles):
            i, j = (axis + 1) % 3, (axis + 2) % 3
            turn = np.eye(3)
            turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
            linear = linear @ turn
        affine = np.eye(4)
        affine[:3, :3] = linear * generator.uniform(0.97, 1.03, 3)
        affine[:3, 3] = center - affine[:3, :3] @ center + generator.uniform(-6, 6, 3)
        directions = generator.normal(size=(6, 3))
        lengths = generator.uniform(60, 110, (6, 1))  # mm
        waves = 2 * np.pi * directions / np.linalg.norm(directions, axis=1, keepdims=True) / lengths
        sizes = generator.normal(size=(6, 3))
        sizes *= 2.2 / np.linalg.norm(sizes, axis=1, keepdims=True)
        return cls(affine, waves, sizes, generator.uniform(0, 2 * np.pi, 6))

    def to_fixed(self, points: np.ndarray) -> np.ndarray:
        """Map (n, 3) moving points to fixed points, LPS mm."""
        return apply_affine(self.affine, points) + np.sin(points @ self.waves.T + self.phases) @ self.sizes

    def to_moving(self, points: np.ndarray) -> np.ndarray:
        """Map (n, 3) fixed points to moving points, LPS mm, by fixed-point iteration."""
        back = np.linalg.inv(self.affine)
        found = apply_affine(back, points)
        for _ in range(200):
            rest = self.to_fixed(found) - points
            found = found - rest @ back[:3, :3].T
            if np.abs(rest).max() < 1e-7:
                return found
        raise RuntimeError("The map of the base pair has no inverse; make its waves smaller.")


@dataclass(frozen=True)
class Heads:
    """The base pair as functions of space.

    Attributes:
        source: (i, j, k) float32, 0 to 1, the fixed head at 1 mm, blurred for voxels of ``VOXEL``.
        inside: (i, j, k) bool, where the head is.
        affine: (4, 4), voxels of ``source`` to LPS mm.
        motion: moving points to fixed points.
        points: (n, 3) LPS mm, random points of the fixed head.
        truth: (n, 3) LPS mm, where they lie in the moving head.
    """

    source: np.ndarray
    inside: np.ndarray
    affine: np.ndarray
    motion: Motion
    points: np.ndarray
    truth: np.ndarray

    @classmethod
    def make(cls, seed: int) -> Heads:
        """Read the template and draw a motion."""
        from MorphSeekLib.app.demo import template

        volume = template()
        data = volume.data.numpy()
        affine = volume.grid.affine
        inside = data > 0
        width = np.sqrt(VOXEL**2 - 1) / 2.3548
        source = gaussian_filter(data / data.max(), width).astype(np.float32)
        source[source < 1e-4] = 0
        generator = np.random.default_rng([seed, 0])
        index = np.argwhere(inside)
        motion = Motion.random(generator, apply_affine(affine, index).mean(axis=0))
        points = apply_affine(affine, generator.choice(index, 4000, replace=False))
        return cls(source, inside, affine, motion, points, motion.to_moving(points))

    def save(self, folder: Path) -> None:
        """Write arrays that the worker processes map into memory."""
        np.save(folder / "source.npy", self.source)
        np.save(folder / "inside.npy", self.inside)
        motion = {name: value.tolist() for name, value in vars(self.motion).items()}
        rest = {"affine": self.affine.tolist(), "points": self.points.tolist(), "truth": self.truth.tolist()}
        (folder / "heads.json").write_text(json.dumps({"motion": motion, **rest}))

    @classmethod
    def load(cls, folder: Path) -> Heads:
        """Read what :meth:`save` wrote."""
        values = json.loads((folder / "heads.json").read_text())
        motion = Motion(**{name: np.array(value) for name, value in values.pop("motion").items()})
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("source", "inside")}
        return cls(**arrays, motion=motion, **{name: np.array(value) for name, value in values.items()})

    @property
    def grid(self) -> Grid:
        """The undressed grid: LPS, voxels of ``VOXEL``, around the head."""
        shape = np.ceil(np.array(self.source.shape) / VOXEL).astype(int)
        center = apply_affine(self.affine, (np.array(self.source.shape) - 1)[None] / 2)[0]
        return Grid.from_parts(shape.tolist(), (VOXEL,) * 3, np.eye(3), center - VOXEL * (shape - 1) / 2)

    def image(self, grid: Grid, moving: bool, averaged: bool = True) -> np.ndarray:
        """Sample a head on a grid.

        Args:
            grid: in the space of the base pair.
            moving: which head.
            averaged: take the mean of sub-voxels where voxels are larger than ``VOXEL``.

        Returns:
            (i, j, k) float64, 0 to 1.
        """
        parts = np.maximum(1, np.ceil(grid.spacing / VOXEL - 1e-6).astype(int)) if averaged else np.ones(3, int)
        total = np.zeros(grid.shape)
        for part in np.ndindex(*parts):
            points = _centers(grid, (np.array(part) + 0.5) / parts - 0.5)
            index = apply_affine(np.linalg.inv(self.affine), self.motion.to_fixed(points) if moving else points)
            total += map_coordinates(self.source, index.T, order=1).reshape(grid.shape)
        return total / parts.prod()

    def labels(self, grid: Grid, moving: bool) -> np.ndarray:
        """Number the eight parts of a head around its middle, 1 to 8, at the voxels of a grid."""
        points = _centers(grid, np.zeros(3))
        if moving:
            points = self.motion.to_fixed(points)
        index = apply_affine(np.linalg.inv(self.affine), points)
        inside = map_coordinates(self.inside.view(np.uint8), index.T, order=0)
        number = 1 + ((points > self.points.mean(axis=0)) @ [1, 2, 4])
        return np.where(inside > 0, number, 0).reshape(grid.shape)


def _centers(grid: Grid, shift: np.ndarray) -> np.ndarray:
    """(n, 3) LPS mm of the voxels, moved by a part of a voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    return apply_affine(grid.affine, index + shift)
