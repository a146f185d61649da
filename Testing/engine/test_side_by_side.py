"""Tables of methods side by side, and what is done to images before they are registered."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import blob_grid, blob_image, blob_labels, write_dataset
from comparison import changes
from comparison.side_by_side import Arm, Task, cropped, development_pairs, fill

from MorphSeekLib.app.phantom import abdomen, abdomen_grid
from MorphSeekLib.data.datasets import Pair, load_dataset
from MorphSeekLib.space.geometry import Grid, Volume, resample


@pytest.fixture
def task(tmp_path):
    """Three pairs, registered by a method that says that nothing moved and counts its calls."""
    calls = []

    def still(fixed, moving):
        calls.append(float(moving.data.mean()))
        return np.eye(4)

    dataset = load_dataset(write_dataset(tmp_path / "data", count=4))
    cases = dataset.split("training", "cases")
    pairs = [Pair(a, b) for a, b in pairwise(cases)]
    return Task(dataset, pairs, {"still": Arm(still), "still, noise": Arm(still, moving=changes.inverted)}), calls


def test_a_table_goes_on_where_it_was_stopped(task, tmp_path):
    whole, calls = task
    first = Task(whole.dataset, whole.pairs[:1], whole.arms)
    fill(tmp_path / "table.json", {"blobs": first}, {"split": "x"})
    assert len(calls) == 2
    result = fill(tmp_path / "table.json", {"blobs": whole}, {"split": "x"})
    assert len(calls) == 2 * len(whole.pairs)
    assert result["sets"]["blobs"]["mean"]["still"]["pairs"] == len(whole.pairs)
    assert json.loads((tmp_path / "table.json").read_text())["sets"] == result["sets"]


def test_a_change_reaches_the_method_and_not_the_other_arm(task, tmp_path):
    whole, calls = task
    fill(tmp_path / "table.json", {"blobs": whole}, {})
    assert all(plain != changed for plain, changed in zip(calls[::2], calls[1::2], strict=True))


def test_a_table_of_another_kind_is_refused(task, tmp_path):
    whole, _ = task
    fill(tmp_path / "table.json", {"blobs": whole}, {"split": "x"})
    with pytest.raises(SystemExit, match="other settings"):
        fill(tmp_path / "table.json", {"blobs": whole}, {"split": "y"})


def test_noise_follows_from_the_name_alone():
    image = blob_image(blob_labels(0, blob_grid()), 0)
    first, again, other = (changes.shaded_and_noisy(image, name).data for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_t2_like_curve_turns_fluid_grey_and_white_around_and_leaves_the_background():
    grid = Grid.from_parts((4, 4, 4), (1, 1, 1), np.eye(3), (0, 0, 0))
    values = torch.zeros(4, 4, 4)
    values[1], values[2], values[3] = 50.0, 130.0, 210.0  # fluid, grey matter, white matter
    found = changes.t2_like(Volume(values, grid)).data
    assert found[1, 0, 0] > 1.4 * found[2, 0, 0] > 1.6 * found[3, 0, 0] > 0
    assert float(found[0].abs().max()) == 0


def test_table_and_arms_leave_the_body_as_it_is_and_lie_elsewhere_in_each_image():
    scan = abdomen(abdomen_grid(6.0), "ct")
    image = Volume(((scan.data + 125) / 400 * 255).clamp(0, 255), scan.grid)
    fixed, moving = (changes.table_and_arms(image, name) for name in ("fixed", "moving"))
    body = image.data > changes.BODY
    for changed in (fixed, moving):
        assert torch.equal(resample(changed, image.grid, mode="nearest").data[body], image.data[body])
        assert (changed.data > 0).sum() > 1.2 * (image.data > 0).sum()
    assert not torch.equal(fixed.data, moving.data)
    scanned = changes.hounsfield(fixed).data
    assert float(scanned.min()) == -1000
    torch.testing.assert_close(scanned[fixed.data > 0], 400 / 255 * fixed.data[fixed.data > 0] - 125)


def test_a_cube_out_of_the_middle_keeps_its_place():
    image = blob_image(blob_labels(0, blob_grid()), 0)
    cube = cropped(image, 20.0)
    assert cube.grid.shape == (10, 10, 8)
    assert torch.equal(resample(image, cube.grid, mode="nearest").data, cube.data)


def test_development_pairs_hold_no_test_pair(shared):
    dataset = load_dataset(shared / "data" / "abdomen" / "dataset_mrct.json")
    pairs = development_pairs(dataset, 6)
    assert len(pairs) == 6
    assert all(p.fixed.file.name.startswith("mr_") and p.moving.file.name.startswith("ct_") for p in pairs)
    tested = {case.file for pair in dataset.split("registration_test") for case in (pair.fixed, pair.moving)}
    assert not tested & {case.file for pair in pairs for case in (pair.fixed, pair.moving)}
