"""Lost alignments: images that are far apart and turned come together again, and an initial transform that does not fit
is said."""

from __future__ import annotations

import numpy as np
import pytest
from cases import blob_grid, blob_image, blob_labels

from MorphSeekLib.io.images import read_image
from MorphSeekLib.protocol.errors import Cancelled
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.registration.pair import Pair
from MorphSeekLib.registration.wide import look_around
from MorphSeekLib.space.geometry import Grid, Volume, apply_affine


def turn(about: np.ndarray, degrees: float, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
    """A rotation about an oblique axis through a point, then a shift; (4, 4) LPS mm."""
    axis = np.array([2.0, -1.0, 2.0]) / 3
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    matrix[:3, 3] = about - matrix[:3, :3] @ about + shift
    return matrix


def carried(volume: Volume, motion: np.ndarray) -> Volume:
    return Volume(volume.data, Grid(volume.grid.shape, motion @ volume.grid.affine))


def error_mm(found: np.ndarray, true: np.ndarray, grid: Grid) -> float:
    corners = 0.5 * (grid.corners() + grid.center)
    return float(np.linalg.norm(apply_affine(found, corners) - apply_affine(true, corners), axis=1).mean())


@pytest.fixture(scope="module")
def mr_and_ct(shared) -> tuple[Volume, Volume]:
    folder = shared / "data" / "abdomen" / "images"
    return read_image(folder / "mr_15.nii.gz"), read_image(folder / "ct_05.nii.gz")


@pytest.mark.parametrize("degrees", [-55, 50])
def test_an_image_turned_far_comes_back_without_being_mirrored(degrees):
    image = blob_image(blob_labels(0, blob_grid()), 0)
    true = turn(image.grid.center, degrees, (60.0, -30.0, 40.0))
    pair = Pair(image, carried(image, true))
    found = look_around(pair.crop, pair.source)
    assert np.linalg.det(found[:3, :3]) == pytest.approx(1)
    assert error_mm(found, true, image.grid) < 5
    assert np.array_equal(found, look_around(pair.crop, pair.source))


def test_no_start_is_improved_where_the_images_are_together(mr_and_ct):
    pair = Pair(mr_and_ct[0], mr_and_ct[0])
    assert look_around(pair.crop, pair.source, np.eye(4)) is None


def test_two_modalities_turned_far_come_together(mr_and_ct):
    mr, ct = mr_and_ct
    here = Pair(mr, ct)
    here.align("auto", None)
    true = turn(ct.grid.center, 55.0, (50.0, 40.0, -60.0))
    away = Pair(mr, carried(ct, true))
    away.align("auto", None)
    assert error_mm(np.linalg.inv(true) @ away.alignment.transform, here.alignment.transform, mr.grid) < 25


def test_an_initial_transform_that_does_not_fit_is_said(mr_and_ct):
    mr, ct = mr_and_ct
    codes = []
    for start in (np.eye(4), turn(mr.grid.center, -60.0)):
        pair = Pair(mr, ct)
        pair.align("none", start)
        codes.append([notice.code for notice in pair.notices])
    assert "initial-lost" not in codes[0]
    assert "initial-lost" in codes[1]


def test_cancel_is_heard():
    image = blob_image(blob_labels(0, blob_grid()), 0)
    pair = Pair(image, image)

    def cancelled() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        look_around(pair.crop, pair.source, job=Job(cancelled=cancelled))
