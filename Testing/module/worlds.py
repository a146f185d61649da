"""Small synthetic registrations on awkward grids, computed with the engine's geometry: what the worker would answer.

Used by the module's tests, which compare what MRML makes of it with what the engine computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import slicer
import slicer.util
import torch
from MorphSeekGui import scene

from MorphSeekLib.measures import folds, metrics
from MorphSeekLib.space import fields, geometry


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """(3, 3) rotation about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        a, b = [n for n in range(3) if n != axis]
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    return matrix


# name -> (fixed grid, moving grid), LPS: an oblique and left-handed one with thick slices among them
GRIDS = {
    "upright": (
        geometry.Grid.from_parts((36, 40, 32), (1.5, 1.5, 1.5), np.eye(3), (-20, -25, 10)),
        geometry.Grid.from_parts((40, 38, 36), (1.4, 1.6, 1.5), np.eye(3), (-22, -24, 8)),
    ),
    "oblique": (
        geometry.Grid.from_parts((40, 44, 22), (1.1, 0.9, 2.3), rotation((-15, 0, 25)), (12, -30, 55)),
        geometry.Grid.from_parts((50, 46, 50), (1.0, 1.2, 1.3), rotation((-12, 8, 0)), (5, -33, 45)),
    ),
    "left-handed": (
        geometry.Grid.from_parts(
            (40, 44, 22), (1.1, 0.9, 2.3), rotation((10, -20, 5)) @ np.diag([1, 1, -1]), (0, 0, 50)
        ),
        geometry.Grid.from_parts(
            (48, 50, 44), (1.1, 1.1, 1.2), rotation((0, -9, 0)) @ np.diag([-1, 1, 1]), (50, -8, -6)
        ),
    ),
}


@dataclass
class World:
    """Two volumes, in LPS world coordinates, and a transform between them with a little folding."""

    fixed: geometry.Volume
    moving: geometry.Volume
    moving_labels: torch.Tensor
    transform: geometry.DenseTransform


def make_world(name: str = "oblique", amplitude_mm: float = 4.0) -> World:
    """A world on the grids of that name; the same every time."""
    onto, other = GRIDS[name]
    rng = torch.Generator().manual_seed(4)
    i, j, k = fields.identity(other.shape)[0]
    data = 300 + 100 * (torch.sin(i / 5) + torch.cos(j / 6) + torch.sin(k / 4))
    labels = torch.zeros(other.shape, dtype=torch.int32)
    labels[10:25, 12:30, 10:26] = 3
    labels[26:34, 12:30, 14:30] = 7
    nodes = geometry.covering_grid(onto, spacing=(4.0, 4.0, 4.0))
    noise = torch.randn((1, 3, *[max(4, n // 3) for n in nodes.shape]), generator=rng)
    smooth = torch.nn.functional.interpolate(noise, nodes.shape, mode="trilinear", align_corners=True)[0]
    # about its own middle, so that both images overlap whatever their grids
    shift = torch.tensor(other.center - onto.center, dtype=torch.float32).view(3, 1, 1, 1)
    transform = geometry.DenseTransform(amplitude_mm * smooth + shift, nodes)
    moving = geometry.Volume(data, other)
    return World(geometry.resample(moving, onto, transform), moving, labels, transform)


def add_volume(name: str, volume: geometry.Volume, kind: str = "vtkMRMLScalarVolumeNode", frame=None):
    """The volume as a node; under the linear transform node ``frame`` it stands at the same place in the world."""
    node = slicer.mrmlScene.AddNewNodeByClass(kind, name)
    slicer.util.updateVolumeFromArray(node, volume.data.numpy().transpose(2, 1, 0))
    affine = scene.FLIP @ volume.grid.affine
    if frame is not None:
        affine = np.linalg.inv(slicer.util.arrayFromTransformMatrix(frame, toWorld=True)) @ affine
        node.SetAndObserveTransformNodeID(frame.GetID())
    node.SetIJKToRASMatrix(scene.to_vtk(affine))
    return node


def linear_transform(name: str, degrees=(4.0, -7.0, 12.0), shift=(6.0, -3.0, 9.0), scale: float = 1.0):
    """A linear transform node."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", name)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(degrees) * scale
    matrix[:3, 3] = shift
    slicer.util.updateTransformMatrixFromArray(node, matrix)
    return node


def result_of(world: World, folder: Path, inverse: bool = True, labels: bool = True, mirrored: bool = False) -> dict:
    """The worker's answer for this world, its arrays written to ``folder``."""
    transform, grid = world.transform, world.fixed.grid
    jacobian = fields.jacobian_determinant(geometry.voxel_displacement(transform, grid))[0, 0]
    certificate = folds.certify(transform, grid, mirrored)
    least = geometry.Volume(folds.folded_voxels(certificate.folded, transform.grid, grid), grid)
    regions = [vars(region) for region in folds.regions(least)]
    folding = vars(metrics.folding(jacobian=jacobian)) | {"cells": vars(certificate.count)}
    report = {"mirrored": mirrored, "folding": folding | {"regions": regions, "region_count": len(regions)}}
    back = transform.inverse(geometry.covering_grid(world.moving.grid, spacing=(4.0, 4.0, 4.0))) if inverse else None

    def save(name: str, data: torch.Tensor, affine: np.ndarray) -> dict:
        np.save(folder / f"{name}.npy", data.numpy())
        return {"path": str(folder / f"{name}.npy"), "affine": affine.tolist()}

    label_volume = geometry.Volume(world.moving_labels, world.moving.grid)
    warped_labels = geometry.resample(label_volume, grid, transform, mode="nearest").data
    return {
        "warped": save("warped", geometry.resample(world.moving, grid, transform).data, grid.affine),
        "aligned": save("aligned", geometry.resample(world.moving, grid, transform.affine_part()).data, grid.affine),
        "displacement": save("displacement", transform.displacement, transform.grid.affine),
        "inverse": save("inverse", back.displacement, back.grid.affine) if back else None,
        "jacobian": save("jacobian", jacobian, grid.affine),
        "folding": save("folding", (least.data <= 0).to(torch.uint8), grid.affine),
        "warped_labels": save("warped-labels", warped_labels, grid.affine) if labels else None,
        "report": json.loads(json.dumps(report)),  # as it comes through the pipe
    }
