"""Figures of any method from its transforms: by hand, against SimpleITK and NumPy, on the labels that the data have."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from cases import blob_grid, blob_image, blob_labels, write_dataset
from comparison.scoring import DEFINITIONS, measure, peak_memory, score

from MorphSeekLib.data.datasets import Case, Dataset, Pair, load_dataset
from MorphSeekLib.io.images import sitk_from_volume, write_image
from MorphSeekLib.protocol.errors import Cancelled, MorphSeekError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.space.geometry import DenseTransform, Grid, Volume, dense_from_voxels

OBLIQUE = Grid.from_parts(
    (24, 20, 18), (1.0, 1.5, 2.0), np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]]), (5, 6, 7)
)
ANY = Dataset(Path("any"), labels={1: "shell", 2: "core", 3: "ball"})


def boxes(grid: Grid, **places: tuple[slice, slice, slice]) -> Volume:
    """Labels in boxes: l1 = (slices), l2 = ..."""
    data = torch.zeros(grid.shape, dtype=torch.int32)
    for name, place in places.items():
        data[place] = int(name[1:])
    return Volume(data, grid)


BOX, SMALL = (slice(6, 14), slice(5, 12), slice(4, 12)), (slice(8, 11), slice(7, 10), slice(6, 9))


def along_i(profile: np.ndarray, grid: Grid) -> DenseTransform:
    """A displacement along the first axis, in voxels, that depends on the first index alone."""
    field = torch.zeros(1, 3, *grid.shape)
    field[0, 0] = torch.from_numpy(profile).float().view(-1, 1, 1)
    return dense_from_voxels(field, grid)


def test_a_shift_by_whole_voxels_is_undone_exactly():
    fixed = boxes(OBLIQUE, l1=BOX, l2=SMALL)
    moving = Volume(fixed.data.roll((3, -2, 1), (0, 1, 2)), OBLIQUE)  # what lay at x lies at x + shift
    matrix = np.eye(4)
    matrix[:3, 3] = OBLIQUE.affine[:3, :3] @ (3, -2, 1)
    for transform in (matrix, dense_from_voxels(torch.zeros(1, 3, *OBLIQUE.shape), OBLIQUE, matrix)):
        found = score(fixed, moving, transform, ANY)
        assert found.dice_per_label == {"shell": 1.0, "core": 1.0}
        assert (found.dice, found.hd95, found.njd_percent) == (1.0, 0.0, 0.0)
        assert found.sdlogj == pytest.approx(0, abs=1e-4)
    worse = score(fixed, moving, np.eye(4), ANY)
    assert worse.dice_per_label["core"] == pytest.approx(0.0)
    assert 1.0 < worse.hd95 < 10.0


def test_a_known_field_has_its_known_folds():
    """One step of three voxels down: two slices of 24 fold, whatever way the grid lies; all others keep their size."""
    profile = np.where(np.arange(24) >= 10, -3.0, 0.0)
    labels = boxes(OBLIQUE, l1=BOX)
    found = score(labels, labels, along_i(profile, OBLIQUE), ANY)
    assert found.njd_percent == pytest.approx(100 * 2 / 24)
    assert found.sdlogj == pytest.approx(0, abs=1e-4)


def test_folding_is_as_numpy_has_it():
    profile = np.random.default_rng(0).normal(0, 0.8, 24).cumsum()
    jacobian = 1 + np.gradient(profile)
    labels = boxes(OBLIQUE, l1=BOX)
    found = score(labels, labels, along_i(profile, OBLIQUE), ANY)
    assert 0 < found.njd_percent == pytest.approx(100 * (jacobian <= 0).mean())
    assert found.sdlogj == pytest.approx(np.log(jacobian[jacobian > 0]).std(), rel=1e-3)
    assert "above 0" in DEFINITIONS["SDlogJ"]


def test_dice_is_as_simpleitk_has_it():
    """Moved labels, warped there and here nearest-neighbor by a shift of broken voxels."""
    shift = (1.3, -2.1, 0.7)
    fixed, moving = blob_labels(0, blob_grid()), blob_labels(1, blob_grid((26, 26, 22), (2.0, 2.2, 2.3)))
    images = [sitk_from_volume(volume) for volume in (fixed, moving)]
    warped = sitk.Resample(images[1], images[0], sitk.TranslationTransform(3, shift), sitk.sitkNearestNeighbor)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(images[0], warped)
    matrix = np.eye(4)
    matrix[:3, 3] = shift
    found = score(fixed, moving, matrix, ANY)
    assert list(found.dice_per_label) == ["shell", "core", "ball"]
    for label, name in ANY.labels.items():
        assert found.dice_per_label[name] == pytest.approx(overlap.GetDiceCoefficient(label), abs=1e-12)
    assert found.dice == pytest.approx(np.mean(list(found.dice_per_label.values())))


def test_only_evaluated_labels_count():
    fixed, moving = blob_labels(0, blob_grid()), blob_labels(1, blob_grid())
    every = score(fixed, moving, np.eye(4), ANY)
    some = score(fixed, moving, np.eye(4), dataclasses.replace(ANY, evaluated=(1, 3), labels={1: "shell"}))
    assert some.dice_per_label == {"shell": every.dice_per_label["shell"], "3": every.dice_per_label["ball"]}
    assert some.dice == pytest.approx(np.mean(list(some.dice_per_label.values())))
    assert some.hd95 != every.hd95


def test_a_lost_label_counts_as_dice_0_and_not_in_the_distance():
    """Label 2 lies in both images, but warping puts it outside; label 3 is in one image only."""
    wide = blob_grid((60, 20, 18), (1.0, 1.0, 1.0))
    narrow = Grid.from_parts((24, 20, 18), (1.0, 1.0, 1.0), np.eye(3), wide.origin)
    fixed = boxes(narrow, l1=BOX, l2=SMALL, l3=(slice(0, 2),) * 3)
    far = (slice(40, 44), slice(5, 9), slice(5, 9))
    moving = boxes(wide, l1=BOX, l2=far)
    found = score(fixed, moving, np.eye(4), ANY)
    assert found.dice_per_label["core"] == 0.0
    assert "ball" not in found.dice_per_label
    alone = dataclasses.replace(ANY, evaluated=(1,))
    assert found.hd95 == score(fixed, moving, np.eye(4), alone).hd95 < 10
    nothing = score(fixed, moving, np.eye(4), dataclasses.replace(ANY, evaluated=(2,)))
    assert nothing.dice == 0.0
    assert nothing.hd95 is None
    assert nothing.lost_labels == found.lost_labels == ["core"]


# ------------------------------------------------------------------ over a data set


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return load_dataset(write_dataset(tmp_path_factory.mktemp("blobs"), 2))


def identity(fixed: Volume, moving: Volume) -> np.ndarray:
    return np.eye(4)


def test_a_row_a_pair(dataset):
    def slow(fixed, moving):
        assert fixed.data.dtype == torch.float32, "an image, not labels"
        time.sleep(0.05)
        return np.eye(4)

    events = []
    rows = measure(dataset, "registration_test", slow, job=Job(events.append))
    assert [(row.fixed, row.moving) for row in rows] == [
        ("image_0.nii.gz", "image_1.nii.gz"),
        ("image_1.nii.gz", "image_0.nii.gz"),
    ]
    expected = score(blob_labels(0, blob_grid()), blob_labels(1, blob_grid()), np.eye(4), dataset)
    spent = {name: getattr(rows[0], name) for name in ("fixed", "moving", "seconds", "cpu_seconds", "peak_gb")}
    assert rows[0] == dataclasses.replace(expected, **spent)
    assert all(row.seconds >= 0.05 > row.cpu_seconds for row in rows), "waiting costs no processor time"
    assert [event.message for event in events] == ["Pair 1 of 2", "Pair 2 of 2"]
    assert measure(dataset, "registration_test", identity, pairs=1)[0].dice == rows[0].dice
    with pytest.raises(Cancelled):
        measure(dataset, "registration_test", identity, job=Job(cancelled=lambda: True))


def test_merged_labels_are_one(dataset):
    """As a tumour counts as its organ: the same as labels that were merged in the files."""
    pair = dataset.split("registration_test")[0]
    merged = Pair(*(dataclasses.replace(case, merged=((2, 1), (3, 1))) for case in (pair.fixed, pair.moving)))
    rows = measure(dataclasses.replace(dataset, pairs={"test": [merged]}), "test", identity)
    whole = [Volume((blob_labels(n, blob_grid()).data > 0).int(), blob_grid()) for n in (0, 1)]
    assert rows[0].dice_per_label == {"shell": score(*whole, np.eye(4), dataset).dice}


def test_pairs_that_cannot_be_scored_are_named(dataset, tmp_path):
    pair = dataset.split("registration_test")[0]
    bare = dataclasses.replace(dataset, pairs={"test": [Pair(pair.fixed, Case(pair.moving.image))]})
    with pytest.raises(MorphSeekError, match=r"image_1\.nii\.gz, the moving one of pair 1 .*label map"):
        measure(bare, "test", identity)
    write_image(blob_image(blob_labels(2, blob_grid()), 2), tmp_path / "i.nii.gz")
    write_image(boxes(blob_grid(), l9=BOX), tmp_path / "l.nii.gz")
    other = Case(tmp_path / "i.nii.gz", tmp_path / "l.nii.gz")
    with pytest.raises(MorphSeekError, match=r"label_0\.nii\.gz and l\.nii\.gz have no label in common"):
        measure(dataclasses.replace(dataset, pairs={"test": [Pair(pair.fixed, other)]}), "test", identity)
    with pytest.raises(MorphSeekError, match="registration_test"):
        measure(dataset, "secret", identity)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak (not Linux)")
def test_peak_memory_sees_what_was_there_for_a_moment():
    with peak_memory() as before:
        pass
    with peak_memory() as during:
        torch.ones(50_000_000)  # 200 MB, gone at once
    with peak_memory() as after:
        pass
    assert during() - before() == pytest.approx(0.2e9 / 2**30, abs=0.02)
    assert after() < before() + 0.02, "each block on its own"
