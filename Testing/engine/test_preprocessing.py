"""Intensities as a network takes them, whatever the image's shape, outliers and number of values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels

from MorphSeekLib.io.images import read_image
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space.geometry import Grid, Volume
from MorphSeekLib.space.preprocessing import (
    HOUNSFIELD,
    SOFT_TISSUE,
    Preprocessing,
    background_of,
    foreground_of,
    general,
    normalize,
    normalized,
    sampled,
)


@pytest.fixture
def image():
    """Noise from 100 to 200 inside a box, exactly 0 around it."""
    data = torch.zeros(40, 50, 60)
    data[10:30, 10:40, 10:50] = 100 + 100 * torch.rand(20, 30, 40, generator=torch.Generator().manual_seed(0))
    return data


def test_a_sample_reads_every_slice():
    """A stride of 10 would read the last axis at 0 alone."""
    data = torch.arange(10.0).expand(400, 500, 10)
    assert len(sampled(data.contiguous(), 200_000)) == 200_000
    assert sampled(data.contiguous(), 200_000).unique().tolist() == list(range(10))


def test_a_sample_is_the_same_every_time_and_all_of_a_small_image():
    values = torch.rand(1000)
    assert torch.equal(sampled(values, 100), sampled(values, 100))
    assert torch.equal(sampled(values, 1000), values)


def test_an_empty_first_slice_does_not_make_an_image_black():
    data = 100 + 100 * torch.rand(400, 500, 10, generator=torch.Generator().manual_seed(0))
    data[:, :, 0] = 0
    seen = normalize(data, Preprocessing())[:, :, 1:]
    assert float(seen.mean()) == pytest.approx(0.5, abs=0.01)


def test_percentiles_of_a_real_image_of_448_by_448_by_30_voxels_are_those_of_all_its_voxels(shared):
    data = read_image(shared / "cases" / "stride448_a.nii.gz").data
    inside = data[data > 0].numpy()
    low, high = np.percentile(inside, [0.5, 99.5])
    expected = ((data - float(low)) / float(high - low)).clamp(0, 1)
    torch.testing.assert_close(normalize(data, Preprocessing()), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("outlier", [-1000.0, 1e6])
def test_one_outlier_voxel_changes_nothing_else(image, outlier):
    spoiled = image.clone()
    spoiled[0, 0, 0] = outlier
    clean, found = normalize(image, Preprocessing()), normalize(spoiled, Preprocessing())
    torch.testing.assert_close(found.flatten()[1:], clean.flatten()[1:], atol=1e-3, rtol=0)


def test_the_background_is_the_black_around_an_object_even_below_it_lie_a_few_voxels(image):
    assert background_of(image) == 0
    image[0, 0, :9] = -torch.arange(1.0, 10.0)
    assert background_of(image) == 0
    assert torch.equal(foreground_of(image), image > 0)


def test_a_fill_far_darker_than_air_is_not_the_background_though_there_is_more_of_it_than_of_the_object(image):
    clean = normalize(image, Preprocessing())
    image[:10] = -2000
    assert float((image < 0).float().mean()) > float((image > 0).float().mean())
    assert background_of(image) == 0
    torch.testing.assert_close(normalize(image, Preprocessing()), clean, atol=1e-3, rtol=0)


def test_white_around_an_object_is_not_its_background(image):
    white = 255 - image
    assert background_of(white) == float(white.min())


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (-1024, 3000)])
def test_a_mask_keeps_its_two_values(image, values):
    mask = torch.where(image > 0, float(values[1]), float(values[0]))
    assert torch.equal(normalize(mask, Preprocessing()), (image > 0).float())


def test_labels_are_told_apart():
    labels = blob_labels(0, blob_grid()).data.float()
    assert normalize(labels, Preprocessing()).unique().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_an_object_that_the_sample_misses_is_seen():
    data = torch.zeros(200, 200, 50)
    data[100, 100, 25:28] = 7
    assert float(normalize(data, Preprocessing()).sum()) == 3


def test_what_is_constant_then_is_refused_in_one_sentence():
    grid = Grid((4, 4, 4), np.eye(4))
    constant = Volume(torch.full((4, 4, 4), 3.0), grid)
    with pytest.raises(MorphSeekError, match=r"^scan\.nii has intensities from 3 to 3, but .*one value"):
        normalized(constant, Preprocessing(), "scan.nii")


def test_ct_is_told_by_its_air_and_its_tissue(image):
    ct = torch.where(image > 0, image - 100, -1000.0)  # 0 to 100 Hounsfield units
    scanned = ct.clone()
    scanned[:4] = -3024  # beyond the field of view
    assert general(ct, scanned).intensity == "window"
    filled = torch.where(image > 0, image, -5000.0)
    for other in (image, filled, ct / 1e4 - 997, ct - 1000, ct + 1000, 20 * ct):
        assert general(ct, other).intensity == "percentile"


def test_organs_are_told_apart_in_ct_and_lungs_are_seen_where_there_are_some(image, shared):
    abdomen = torch.where(image > 0, image - 100, -1000.0)
    chest = abdomen.clone()
    tissue = (image > 0).nonzero()
    chest[tuple(tissue[::5].T)] = -800.0
    assert (general(abdomen, abdomen).low, general(abdomen, abdomen).high) == SOFT_TISSUE
    assert (general(abdomen, chest).low, general(abdomen, chest).high) == HOUNSFIELD
    scan = read_image(shared / "data" / "ct_abdomen" / "example_ct.nii.gz").data  # on a pad of foam
    assert (general(scan).low, general(scan).high) == SOFT_TISSUE


def test_a_ct_with_shifted_values_is_refused_where_the_model_sees_a_window(shared):
    window = Preprocessing(intensity="window", low=-160, high=240)
    scan = read_image(shared / "cases" / "ct33792_fix.nii.gz")
    with pytest.raises(MorphSeekError, match=r"from -33582 to -31371, .* -160 to 240 only.* rescale slope"):
        normalized(scan, window, "The fixed image")


def test_an_ordinary_image_passes():
    image = blob_image(blob_labels(0, blob_grid()), 0)
    data = normalized(image, Preprocessing(), "scan").data
    assert (float(data.min()), float(data.max())) == (0, 1)


def test_a_size_is_compared_with_those_of_training():
    known = Preprocessing(knows=(100.0, 200.0), spacing=(1.0, 2.0, 3.0))
    assert [known.beyond(size) for size in (10.0, 150.0, 300.0)] == [0.1, 1.0, 1.5]
    assert Preprocessing().beyond(10.0) == 1
    assert known.scaled(0.5).spacing == (0.5, 1.0, 1.5)
    with pytest.raises(ValueError, match="two sizes"):
        Preprocessing(knows=(3.0, 2.0))
