"""Masks: what lies outside of them changes nothing, and what is left out does not draw on its surroundings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels
from torch import Tensor

from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.registration.masks import filled, masked
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.space import fields
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume, apply_affine, index_points

GRID = Grid.from_parts((36, 40, 32), (2.0, 2.0, 2.0), np.eye(3), (-40.0, -50.0, 10.0))
FAST = RegistrationOptions(preset="fast", inverse=False, search="on", align="affine")


def structured(seed: int = 0) -> Volume:
    """An image with structure at many scales everywhere, 0 to 100."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(GRID.shape)
    for size in (6, 11, 22):
        noise = torch.rand(1, 1, size, size, size, generator=generator)
        image += torch.nn.functional.interpolate(noise, GRID.shape, mode="trilinear")[0, 0]
    return Volume(100 * (image - image.min()) / (image.max() - image.min()), GRID)


def moved(image: Volume, size: float = 2.0) -> tuple[Volume, Tensor]:
    """The image after a smooth displacement, and that displacement from the moved image to it, voxels."""
    points = fields.identity(GRID.shape)
    u = torch.stack([size * torch.sin(points[0, (axis + 1) % 3] / 7) for axis in range(3)])[None]
    return Volume(fields.warp(image.data[None, None], u, padding="border")[0, 0], GRID), u


def box(low: float, high: float) -> Tensor:
    """A box in the middle part of the grid, bool; ends in shares of the axes."""
    inside = torch.zeros(GRID.shape, dtype=torch.bool)
    inside[tuple(slice(int(low * n), int(high * n)) for n in GRID.shape)] = True
    return inside


def mask(inside: Tensor, grid: Grid = GRID) -> Volume:
    return Volume(inside.to(torch.uint8), grid)


def error(transform: DenseTransform, true: Tensor, where: Tensor) -> float:
    """The mean distance between a transform and a true displacement of the fixed grid, voxels."""
    found = index_points(GRID, transform, GRID) - fields.identity(GRID.shape)
    return float((found - true).norm(dim=1)[0][where].mean())


def test_a_filled_image_is_the_same_inside_and_as_smooth_as_its_means_outside():
    image, inside = structured().data, box(0.3, 0.7)
    found = filled(image, inside)
    assert torch.equal(found[inside], image[inside])
    outside = found[~inside]
    assert image[inside].min() <= outside.min()
    assert outside.max() <= image[inside].max()
    steps = found.diff(dim=0)[2:8].abs().max(), image.diff(dim=0)[2:8].abs().max()
    assert steps[0] < 0.3 * steps[1]
    one = torch.zeros_like(inside)
    one[3, 4, 5] = True
    assert torch.allclose(filled(image, one), image[3, 4, 5])
    assert filled(image, None) is image


def test_an_image_of_few_slices_is_filled():
    inside = torch.zeros(40, 44, 5, dtype=torch.bool)
    inside[3:30, 5:20, 2:] = True
    image = torch.rand(inside.shape)
    found = filled(image, inside)
    assert torch.equal(found[inside], image[inside])
    assert 0.4 < found[~inside].mean() < 0.6


@pytest.mark.parametrize("side", ["fixed", "moving", "both"])
def test_what_lies_outside_of_a_mask_changes_nothing(side):
    moving = structured()
    fixed, _ = moved(moving)
    inside = box(0.2, 0.8)
    masks = [mask(inside) if side in (name, "both") else None for name in ("fixed", "moving")]
    garbage = [replace(v, data=torch.where(inside, v.data, 300 * torch.rand(GRID.shape))) for v in (fixed, moving)]
    other = [g if m is not None else v for v, g, m in zip((fixed, moving), garbage, masks, strict=True)]
    first, second = (
        register(*(masked(v, m) for v, m in zip(images, masks, strict=True)), None, FAST)
        for images in ((fixed, moving), other)
    )
    assert torch.equal(first.transform.displacement, second.transform.displacement)
    assert first.report["similarity"] == second.report["similarity"]
    assert first.report["masks"][side if side != "both" else "fixed"] == int(inside.sum())
    assert first.report["folding"]["inside"]["of"] == ("tissue" if side == "moving" else "mask")


def test_what_is_masked_is_found_where_it_counts():
    moving = structured()
    fixed, true = moved(moving)
    inside = box(0.25, 0.75)
    result = register(masked(fixed, mask(inside)), moving, None, FAST)
    assert error(result.transform, true, inside) < 0.25 * error(still(), true, inside)


def still() -> DenseTransform:
    return DenseTransform(torch.zeros(3, *GRID.shape), GRID)


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_a_lesion_that_is_ignored_does_not_draw_on_what_is_around_it(side):
    moving = structured()
    fixed, true = moved(moving)
    lesion, around = box(0.4, 0.62), box(0.3, 0.72)
    images = {"fixed": fixed, "moving": moving}
    images[side] = replace(images[side], data=torch.where(lesion, structured(5).data + 60, images[side].data))
    taken = register(*images.values(), None, FAST).transform
    images[side] = masked(images[side], ignore=mask(lesion))
    ignored = register(*images.values(), None, FAST).transform
    ring = around & ~box(0.38, 0.64)
    assert error(ignored, true, ring) < 0.6 * error(taken, true, ring)


def test_masks_lie_on_any_grid_and_are_brought_over_by_the_nearest_voxel():
    labels = blob_labels(0, blob_grid())
    coarse = Grid.from_parts((9, 9, 9), (6.0, 6.0, 6.0), np.eye(3), blob_grid().origin)
    marks = torch.zeros(coarse.shape, dtype=torch.int32)
    marks[2:5, 3:7, 2:6] = 7
    found = masked(labels, Volume(marks, coarse)).counts
    index = np.stack(np.meshgrid(*(np.arange(n) for n in labels.grid.shape), indexing="ij"), -1).reshape(-1, 3)
    at = apply_affine(np.linalg.inv(coarse.affine) @ labels.grid.affine, index)
    nearest = np.floor(at + 0.5).astype(int)
    lies = ((nearest >= 0) & (nearest < 9)).all(axis=1)
    expected = np.zeros(len(index), bool)
    expected[lies] = marks.numpy()[tuple(nearest[lies].T)] > 0
    assert np.array_equal(found.numpy().ravel(), expected)


def test_masks_that_leave_nothing_are_refused():
    fixed = moving = blob_image(blob_labels(0, blob_grid()), 0)
    away = Grid.from_parts((8, 8, 8), (2.0, 2.0, 2.0), np.eye(3), (900.0, 0.0, 0.0))
    with pytest.raises(MorphSeekError, match=r"The mask of the moving image .* marks nothing inside of that image"):
        masked(moving, replace(mask(torch.ones(8, 8, 8), away), name="m.nii"), role="moving")
    with pytest.raises(MorphSeekError, match="leaves nothing of that image; check whether you meant it as a mask"):
        masked(fixed, ignore=mask(torch.ones(fixed.grid.shape), fixed.grid))
    point = torch.zeros(fixed.grid.shape)
    point[10, 10, 10] = 1
    with pytest.raises(MorphSeekError, match="what the mask leaves of the fixed image has one value only"):
        masked(fixed, mask(point, fixed.grid))
    point[10:13, 10:14, 10:12] = 1
    with pytest.raises(MorphSeekError, match="at least 64 are needed"):
        register(masked(fixed, mask(point, fixed.grid)), moving, None, FAST)


def test_a_small_mask_is_said():
    found = masked(structured(), mask(box(0.45, 0.6)))
    assert [notice.code for notice in found.notices] == ["small-mask"]
    assert "image, which is little to register by" in found.notices[0].message
