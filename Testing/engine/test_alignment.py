"""The crude alignment: known motions are recovered, real brains come together, Cancel is heard."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels

from MorphSeekLib.io.images import read_image, read_labels
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.registration.alignment import align, object_size
from MorphSeekLib.space.geometry import DenseTransform, Grid, Transform, Volume, apply_affine, covering_grid, resample

LINEAR = [[1.1, 0.05, 0.0], [0.0, 0.92, -0.04], [0.0, 0.0, 1.0]]


@pytest.fixture(scope="module")
def brain() -> Volume:
    """The MNI152 template of nilearn, 2 mm, without skull."""
    datasets = pytest.importorskip("nilearn.datasets")
    template = datasets.load_mni152_template(resolution=2)
    data = torch.from_numpy(np.ascontiguousarray(template.get_fdata(), dtype=np.float32))
    return Volume(data, Grid(template.shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ template.affine))


def inside(brain: Volume) -> np.ndarray:
    """Points in the brain, LPS mm."""
    return apply_affine(brain.grid.affine, (brain.data > 0.2 * brain.data.max()).nonzero().numpy()[::100])


def motion(about: np.ndarray, degrees=(0, 0, 0), shift=(0, 0, 0), linear=None) -> np.ndarray:
    """Rotations about x, y and z after a linear map, around a point; then a shift."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3) if linear is None else linear
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(4)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    matrix[:3, 3] = about - matrix[:3, :3] @ about + shift
    return matrix


def moved(brain: Volume, true: np.ndarray, orientation: str = "PIR") -> Volume:
    """The brain where ``true`` takes its points, on a grid of its own."""
    carried = Grid(brain.grid.shape, true @ brain.grid.affine)
    return resample(brain, covering_grid(carried, (2.0, 2.0, 2.5), orientation), np.linalg.inv(true))


def error_mm(found: Transform, true: np.ndarray, points: np.ndarray) -> float:
    went = found.map_points(points) if isinstance(found, DenseTransform) else apply_affine(found, points)
    return float(np.linalg.norm(went - apply_affine(true, points), axis=1).mean())


@pytest.mark.parametrize(
    ("kind", "inverted", "how"),
    [
        ("rigid", False, {"degrees": (-22, 14, -18), "shift": (250, -90, 400)}),
        ("affine", False, {"degrees": (10, 6, -12), "shift": (-20, 30, 15), "linear": LINEAR}),
        ("affine", True, {"degrees": (10, 6, -12), "shift": (-20, 30, 15), "linear": LINEAR}),
    ],
)
def test_known_motion_is_recovered(brain, kind, inverted, how):
    true = motion(brain.grid.center, **how)
    moving = moved(brain, true)
    if inverted:  # dark for bright inside the brain
        top = float(brain.data.max())
        moving = Volume(torch.where(moving.data > 0.05 * top, 1.05 * top - moving.data, 0.0), moving.grid)
    # measured: 0.1 mm, inverted 0.4 mm
    assert error_mm(align(brain, moving, kind), true, inside(brain)) < (1.5 if inverted else 0.5)


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_a_pair_elsewhere_in_the_world_is_aligned_the_same(kind):
    here = [blob_image(blob_labels(seed, blob_grid()), seed) for seed in (0, 1)]
    shift = motion(np.zeros(3), shift=(1200.0, -900.0, 1300.0))
    away = [Volume(volume.data, Grid(volume.grid.shape, shift @ volume.grid.affine)) for volume in here]
    found = np.linalg.inv(shift) @ align(*away, kind) @ shift
    expected = align(*here, kind)
    corners = here[0].grid.corners()
    assert np.abs(apply_affine(found, corners) - apply_affine(expected, corners)).max() < 1e-3


@pytest.mark.parametrize("value", [-50.0, -4000.0])
def test_a_fill_around_both_fields_of_view_does_not_hold_the_images_where_they_are(value):
    here = blob_image(blob_labels(0, blob_grid()), 0)
    true = motion(np.zeros(3), (8, -6, 10), (4.0, -3.0, 2.0))
    there = resample(here, here.grid, np.linalg.inv(true))
    i, j = (torch.linspace(-1, 1, n) for n in here.grid.shape[:2])
    outside = (i[:, None] ** 2 + j**2 > 1.0)[:, :, None]
    filled = [Volume(v.data.masked_fill(outside & (v.data < 30), value), v.grid) for v in (here, there)]
    assert error_mm(align(*filled, "rigid"), true, inside(here)) < 1.5


def test_center_survives_air_at_minus_1000(brain):
    true = motion(brain.grid.center, shift=(80, -40, 120))
    moving = moved(brain, true)
    scan = Volume(torch.where(moving.data > 0, 100 * moving.data / moving.data.max(), -1000.0), moving.grid)
    scan.data[:3] = -3024.0  # beyond the scanner's circle
    found = align(brain, scan, "center")
    assert np.allclose(found[:3, :3], np.eye(3))
    assert error_mm(found, true, inside(brain)) < 3


def test_none(brain):
    assert np.array_equal(align(brain, brain, "none"), np.eye(4))
    start = motion(brain.grid.center, shift=(1, 2, 3))
    assert np.array_equal(align(brain, brain, "none", start), start)
    with pytest.raises(MorphSeekError, match="There is no alignment 'fancy'"):
        align(brain, brain, "fancy")


def test_initial_matrix_is_contained(brain):
    # a mirrored brain: no alignment finds that by itself
    mirror = motion(brain.grid.center, (4, 3, -6), (5, 0, 8), np.diag([-1.0, 1.0, 1.0]))
    moving = moved(brain, mirror)
    start = motion(brain.grid.center, shift=(0, 0, 0), linear=np.diag([-1.0, 1.0, 1.0]))
    found = align(brain, moving, "rigid", start)
    assert np.linalg.det(found[:3, :3]) < 0
    assert error_mm(found, mirror, inside(brain)) < 0.5


def test_initial_dense_transform_is_contained(brain):
    true = motion(brain.grid.center, (6, -4, 5), (60, -30, 20))
    moving = moved(brain, true)
    nodes = covering_grid(brain.grid, (8.0, 8.0, 8.0))
    shift = torch.tensor([60.0, -30.0, 20.0]).view(3, 1, 1, 1).expand(3, *nodes.shape)
    found = align(brain, moving, "rigid", DenseTransform(shift.contiguous(), nodes))
    assert isinstance(found, DenseTransform)
    assert found.grid is nodes
    assert error_mm(found, true, inside(brain)) < 0.7


def test_initial_that_leads_nowhere(brain):
    with pytest.raises(MorphSeekError, match="do not overlap"):
        align(brain, brain, "rigid", motion(brain.grid.center, shift=(500, 0, 0)))


def test_aligned_images_stay(brain):
    assert error_mm(align(brain, brain, "affine"), np.eye(4), inside(brain)) < 0.1


def test_same_images_same_matrix_and_progress_grows(brain):
    moving = moved(brain, motion(brain.grid.center, (8, -5, 12), (6, -9, 4)))
    seen: list[float] = []
    first = align(brain, moving, "rigid", job=Job(lambda event: seen.append(event.fraction)))
    assert np.array_equal(first, align(brain, moving, "rigid"))
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert seen[-1] == 1.0


@pytest.mark.parametrize("calls", [5, 40])
def test_cancel_is_heard_within_a_second(brain, calls):
    moving = moved(brain, motion(brain.grid.center, (8, -5, 12), (6, -9, 4)))
    count = 0
    asked = 0.0

    def cancelled() -> None:
        nonlocal count, asked
        count += 1
        if count == calls:
            asked = time.process_time()
            raise Cancelled

    with pytest.raises(Cancelled):
        align(brain, moving, "affine", job=Job(cancelled=cancelled))
    assert count == calls
    assert time.process_time() - asked < 1.0


def test_real_brains_come_together(shared):
    folder = shared / "data" / "brain_oasis" / "native"
    fixed, moving = (read_image(folder / f"oasis_{n}_t1.nii.gz") for n in (1013, 1036))
    fixed_labels, moving_labels = (read_labels(folder / f"oasis_{n}_seg.nii.gz") for n in (1013, 1036))

    def dice(matrix: np.ndarray) -> float:
        labels = resample(moving_labels, fixed.grid, matrix, mode="nearest").data
        number = int(max(fixed_labels.data.max(), moving_labels.data.max())) + 1
        pairs = torch.bincount((fixed_labels.data * number + labels).flatten().long(), minlength=number**2)
        pairs = pairs.view(number, number).double()
        sizes = pairs.sum(0) + pairs.sum(1)
        present = pairs.sum(1)[1:] > 0
        return float((2 * pairs.diagonal() / sizes)[1:][present].mean())

    # measured: 0.06 as the files lie, 0.54 center, 0.57 rigid, 0.64 affine
    assert dice(np.eye(4)) < 0.2
    assert dice(align(fixed, moving, "affine")) > 0.6


def test_head_with_skull_onto_brain_without(brain):
    """Colin27 (Debian's mricron-data) onto MNI152, as make demo does; both lie in MNI space, some mm apart."""
    try:
        head = read_image("/usr/share/mricron/templates/ch2.nii.gz")
    except MorphSeekError:
        pytest.skip("needs Colin27 of Debian's mricron-data, which is not here")
    true = motion(brain.grid.center, (12, -6, 9), (35, -20, 60))
    carried = Volume(head.data, Grid(head.grid.shape, true @ head.grid.affine))
    points = inside(brain)
    found = align(brain, carried, "affine")
    # both lie in MNI space, so ``true`` is nearly right by itself; measured 2.3 mm from it
    assert error_mm(found, true, points) < 3.5
    # both ways round
    back = align(carried, brain, "affine")
    assert error_mm(np.linalg.inv(back), found, points) < 0.5


def scaled(volume: Volume, factor: float) -> Volume:
    return Volume(volume.data, Grid(volume.grid.shape, np.diag([factor] * 3 + [1.0]) @ volume.grid.affine))


@pytest.fixture(scope="module")
def blobs() -> tuple[Volume, Volume]:
    grid = blob_grid()
    return tuple(blob_image(blob_labels(n, grid), n) for n in (0, 1))


@pytest.mark.parametrize("factor", [0.001, 0.1, 1000])
def test_tiny_and_huge_images_are_aligned_as_small_ones_are(blobs, factor):
    """A NIfTI in meters whose header does not say so: a margin of 9 mm was 4,500 voxels, and never came to an end."""
    usual = align(*blobs, "affine")
    found = align(*(scaled(volume, factor) for volume in blobs), "affine")
    np.testing.assert_allclose(found[:3, :3], usual[:3, :3], atol=1e-4)
    np.testing.assert_allclose(found[:3, 3] / factor, usual[:3, 3], atol=1e-2)


@pytest.mark.parametrize("kind", ["center", "rigid", "affine"])
@pytest.mark.parametrize("slices", [2, 3])
def test_volumes_of_two_and_three_slices_are_aligned(blobs, kind, slices):
    thin = [Volume(v.data[..., 8 : 8 + slices].contiguous(), Grid((24, 28, slices), v.grid.affine)) for v in blobs]
    assert np.isfinite(align(*thin, kind)).all()


def test_a_ct_with_shifted_values_is_aligned(shared):
    """Hounsfield units minus 32768: nothing of it lies between -1000 and 1000."""
    fixed, moving = (read_image(shared / "cases" / f"ct33792_{name}.nii.gz") for name in ("fix", "mov"))
    found = align(fixed, moving, "rigid")
    true = align(*(Volume(v.data + 32768, v.grid) for v in (fixed, moving)), "rigid")
    assert np.linalg.norm(apply_affine(found, fixed.grid.corners()) - apply_affine(true, fixed.grid.corners())) < 30


def test_one_outlier_voxel_is_not_taken_for_ct(blobs):
    spoiled = blobs[0].data.clone()
    spoiled[0, 0, 0] = -1000.0
    assert object_size(Volume(spoiled, blobs[0].grid)) == pytest.approx(object_size(blobs[0]), abs=4)


def test_the_size_of_an_object_is_its_longest_side():
    data = torch.zeros(60, 50, 40)
    data[10:50, 20:30, 10:20] = 1
    data[0, 0, 0] = 1
    assert object_size(Volume(data, Grid(data.shape, np.diag([2.0, 3.0, 1.0, 1.0])))) == pytest.approx(80, abs=6)
