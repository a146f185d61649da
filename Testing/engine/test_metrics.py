"""Metrics against Learn2Reg's own figures, DeepMind's surface-distance, SimpleITK, and their own algebra."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from MorphSeekLib.measures import metrics
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.space import fields

SHAPE = (7, 6, 5)
label_images = hnp.arrays(np.uint8, SHAPE, elements=st.integers(0, 3)).map(torch.from_numpy)
masks = hnp.arrays(bool, SHAPE).filter(np.any)
displacements = hnp.arrays(np.float32, (1, 3, *SHAPE), elements=st.floats(-2, 2, width=32)).map(torch.from_numpy)
few = settings(max_examples=40, deadline=None)


def blobs(seed: int, shape=(24, 22, 20), labels=4) -> torch.Tensor:
    """Smooth random structures."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, labels, 4, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(noise, shape, mode="trilinear", align_corners=True).argmax(1)[0]


# --- Dice


def test_dice_is_learn2regs(reference):
    case = reference("dice_hd95")
    for warped, expected in ((case["warped_seg"], "dice"), (case["warped_seg_missing3"], "dice_missing3")):
        scores = metrics.dice_per_label(case["fixed_seg"], warped, case["labels"], case["moving_seg"])
        assert set(scores) == {1, 2, 3}  # 4 is absent from the moving labels, 7 from both
        for label, value in zip(case["labels"], case[expected], strict=True):
            assert math.isnan(value) if label not in scores else scores[label] == pytest.approx(value, abs=1e-12)


def test_dice_agrees_with_simpleitk():
    a, b = blobs(1), blobs(2)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(x.numpy().astype(np.int32)) for x in (a, b)))
    scores = metrics.dice_per_label(a, b)
    assert list(scores) == [1, 2, 3]
    for label, score in scores.items():
        assert score == pytest.approx(overlap.GetDiceCoefficient(label), abs=1e-12)


@few
@given(label_images, label_images)
def test_dice_is_symmetric_bounded_and_blind_to_order(a, b):
    scores = metrics.dice_per_label(a, b, moving_labels=b)
    assert scores == metrics.dice_per_label(b, a, moving_labels=a)
    assert scores == metrics.dice_per_label(a.flip(0).transpose(0, 2), b.flip(0).transpose(0, 2), moving_labels=b)
    assert all(0 <= score <= 1 for score in scores.values())
    assert set(scores) == (set(a.unique().tolist()) & set(b.unique().tolist())) - {0}
    assert all(score == 1 for score in metrics.dice_per_label(a, a).values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_label_values_are_only_names(dtype):
    a, b = blobs(3).to(dtype), blobs(4).to(dtype)
    names = torch.tensor([0, 100, 7, 42], dtype=dtype)
    if dtype in (torch.int32, torch.int64):
        names[1] = 2_000_000_000  # too large to count directly
    scores, renamed = metrics.dice_per_label(a, b), metrics.dice_per_label(names[a.long()], names[b.long()])
    assert renamed == {int(names[label]): score for label, score in sorted(scores.items(), key=lambda s: names[s[0]])}
    surfaces, renamed = metrics.hd95_per_label(a, b), metrics.hd95_per_label(names[a.long()], names[b.long()])
    assert renamed == {int(names[label]): value for label, value in surfaces.items()}


def test_a_label_lost_in_warping_scores_zero_and_a_missing_one_nothing():
    fixed = torch.zeros(4, 4, 4, dtype=torch.int32)
    fixed[1:3], moving = 5, fixed.clone()
    moving[1:3] = 5
    lost = torch.zeros_like(fixed)
    assert metrics.dice_per_label(fixed, lost, moving_labels=moving) == {5: 0.0}
    assert metrics.hd95_per_label(fixed, lost, moving_labels=moving) == {5: math.inf}
    assert metrics.dice_per_label(fixed, lost, moving_labels=lost) == {}
    assert metrics.hd95_per_label(fixed, lost, moving_labels=lost) == {}
    assert metrics.dice_per_label(lost, fixed) == {}


@pytest.mark.parametrize("figure", [metrics.dice_per_label, metrics.hd95_per_label])
def test_what_are_no_labels_is_refused(figure):
    good = torch.ones(3, 3, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="one grid"):
        figure(good, good[:2])
    with pytest.raises(ValueError, match="whole numbers"):
        figure(good.float(), good)
    with pytest.raises(MorphSeekError, match=r"fixed label map has the label -1, and labels must not be negative"):
        figure(-good, good)


# --- HD95


def test_hd95_is_learn2regs(reference):
    case = reference("dice_hd95")
    for warped, expected in ((case["warped_seg"], "hd95"), (case["warped_seg_missing3"], "hd95_missing3")):
        distances = metrics.hd95_per_label(
            case["fixed_seg"], warped, labels=case["labels"], moving_labels=case["moving_seg"]
        )
        for label, value in zip(case["labels"], case[expected], strict=True):
            assert math.isnan(value) if label not in distances else distances[label] == pytest.approx(value, abs=1e-12)


@few
@given(masks, masks, st.tuples(*[st.sampled_from([0.7, 1.0, 1.3, 3.0])] * 3))
def test_hd95_is_surface_distances(a, b, spacing):
    surface_distance = pytest.importorskip("surface_distance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls SciPy by its old names
        distances = surface_distance.compute_surface_distances(a, b, spacing)
    # areas that sum to 95 % but for rounding end at either of two elements
    expected = [surface_distance.compute_robust_hausdorff(distances, 95 + change) for change in (-1e-9, 0, 1e-9)]
    a, b = (torch.from_numpy(x.astype(np.uint8)) for x in (a, b))
    found = metrics.hd95_per_label(a, b, spacing)[1]
    assert min(abs(found - one) for one in expected) < 1e-9, (found, expected)


def test_every_cell_has_surface_distances_area():
    tables = pytest.importorskip("surface_distance.lookup_tables")
    spacing = (0.8, 1.7, 2.9)
    expected = tables.create_table_neighbour_code_to_surface_area(spacing)
    bits_reversed = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
    np.testing.assert_allclose(metrics._cell_areas(spacing)[bits_reversed], expected, atol=1e-12)


def test_hd95_of_a_shift_is_the_shift_and_scales_with_spacing():
    cube = torch.zeros(20, 20, 20, dtype=torch.uint8)
    cube[5:12, 5:12, 5:12] = 1
    shifted = cube.roll(3, 0)
    assert metrics.hd95_per_label(cube, cube) == {1: 0.0}
    assert metrics.hd95_per_label(cube, shifted) == metrics.hd95_per_label(shifted, cube) == {1: 3.0}
    assert metrics.hd95_per_label(cube, shifted, (2.0, 1.0, 1.0)) == {1: 6.0}
    with pytest.raises(ValueError, match="three positive"):
        metrics.hd95_per_label(cube, shifted, (1, 1, 0))


# --- folding


@pytest.mark.parametrize("case", ["smooth", "folded"])
def test_folding_is_the_official_codes(reference, case):
    tensors = reference("jacobian_metrics")
    displacement = tensors[f"{case}_disp"]
    figures = metrics.folding(displacement)
    official = tensors[f"{case}_vxm_np_gradient_jacdet"].double()
    assert figures.njd_percent == pytest.approx(100 * tensors[f"{case}_vxm_frac_le0"], abs=1e-9)
    assert figures.folded_voxels == int((official <= 0).sum())
    assert figures.voxels == official.numel()
    assert figures.min_jacobian == pytest.approx(float(official.min()), abs=1e-4)
    assert figures.max_jacobian == pytest.approx(float(official.max()), abs=1e-4)
    assert figures.sdlogj == pytest.approx(float(official[official > 0].log().std(correction=0)), rel=1e-3)
    assert figures.sdlogj_learn2reg == pytest.approx(tensors[f"{case}_l2r_sdlogj"], rel=1e-5)
    assert metrics.sdlogj_learn2reg(displacement) == figures.sdlogj_learn2reg
    inner = fields.jacobian_determinant(displacement)[0, 0, 2:-2, 2:-2, 2:-2]
    assert int((inner <= 0).sum()) == tensors[f"{case}_count_jac_le0_l2r"]
    torch.testing.assert_close(inner, tensors[f"{case}_l2r_jacdet"], atol=1e-4, rtol=1e-4)


@few
@given(displacements)
def test_a_jacobian_known_already_gives_the_same(displacement):
    jacobian = fields.jacobian_determinant(displacement)
    figures = metrics.folding(displacement)
    for known in (jacobian, jacobian[0, 0]):
        # compared as text, where NaN equals NaN
        assert str(metrics.folding(jacobian=known)) == str(figures)
    assert figures.njd_percent == 100 * figures.folded_voxels / figures.voxels
    assert figures.min_jacobian <= figures.max_jacobian


@few
@given(st.floats(-0.9, 1.0), st.floats(-5, 5))
def test_a_uniform_stretch_is_even_and_never_folds(stretch, shift):
    figures = metrics.folding(fields.identity(SHAPE, torch.zeros(0, dtype=torch.float64)) * stretch + shift)
    assert figures.folded_voxels == 0
    assert figures.sdlogj == pytest.approx(0, abs=1e-9)
    assert figures.min_jacobian == pytest.approx((1 + stretch) ** 3, abs=1e-9)


def test_a_mirrored_axis_folds_everywhere():
    displacement = torch.zeros(1, 3, *SHAPE)
    displacement[:, 0] = -2 * fields.identity(SHAPE)[:, 0]
    figures = metrics.folding(displacement)
    assert figures.njd_percent == 100
    assert math.isnan(figures.sdlogj)
    assert "J <= 0" in figures.definition


def test_the_figures_of_a_report_are_read_back():
    figures = metrics.folding(torch.linspace(0, 3, 3 * 7 * 6 * 5).view(1, 3, 7, 6, 5))
    assert metrics.FoldingFigures.from_report(vars(figures) | {"regions": [], "region_count": 0}) == figures


def test_folding_refuses_nothing_and_nan():
    with pytest.raises(ValueError, match="Give a displacement"):
        metrics.folding()
    with pytest.raises(ValueError, match="NaN"):
        metrics.folding(torch.full((1, 3, *SHAPE), torch.nan))
    assert math.isnan(metrics.sdlogj_learn2reg(torch.zeros(1, 3, 4, 4, 4)))  # nothing left after the crop


# --- landmarks


def test_target_registration_error():
    fixed = np.array([[0.0, 0, 0], [10, 20, 30]])
    error = metrics.target_registration_error(lambda p: p + np.array([3, 0, 0]), fixed, fixed + np.array([0, 4, 0]))
    np.testing.assert_allclose(error, [5, 5])
    assert metrics.target_registration_error(lambda p: p, np.zeros((0, 3)), np.zeros((0, 3))).shape == (0,)
    with pytest.raises(ValueError, match="pairs"):
        metrics.target_registration_error(lambda p: p, fixed, fixed[:1])
