"""Rewards against plain references: the metrics' own Dice and NJD, loops over landmarks, the losses' similarity."""

from __future__ import annotations

import pytest
import torch
from cases import blob_grid, blob_image, blob_labels
from hypothesis import given, settings
from hypothesis import strategies as st

from MorphSeekLib.measures.metrics import dice_per_label
from MorphSeekLib.measures.similarity import SIMILARITIES
from MorphSeekLib.space import fields
from MorphSeekLib.training.rewards import (
    TERMS,
    RewardSettings,
    State,
    quantile_among,
    quantile_by_order,
    reward_map,
)

GRID = blob_grid((20, 24, 16))


def smooth(seed: int, size: float, count: int = 1) -> torch.Tensor:
    """(count, 3, i, j, k) smooth random displacements, voxels."""
    coarse = torch.randn(count, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) * size
    return torch.nn.functional.interpolate(coarse, size=GRID.shape, mode="trilinear", align_corners=True)


def state(total: torch.Tensor, **more) -> State:
    labels = [blob_labels(seed, GRID) for seed in (0, 1)]
    images = [blob_image(volume, seed).data[None, None] / 255 for seed, volume in enumerate(labels)]
    return State(*images, total, *(volume.data[None, None] for volume in labels), **more)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0.1, 3))
def test_dice_map_sums_to_the_gain_in_dice(seed, size):
    before, candidates = smooth(seed, 0.5), smooth(seed + 1, size, 3)
    pair = state(before)

    def dice(u):
        warped = fields.warp(pair.moving_labels.float(), u, "nearest").int()[0, 0]
        values = dice_per_label(pair.fixed_labels[0, 0], warped, moving_labels=pair.moving_labels[0, 0])
        return sum(values.values()) / len(values)

    expected = [dice(u[None]) - dice(before) for u in candidates]
    found = TERMS["dice"](pair, candidates).flatten(1).sum(dim=1)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_labels_of_one_image_alone_do_not_count():
    pair = state(smooth(0, 0.5))
    only_fixed = pair.fixed_labels.clone()
    only_fixed[0, 0, :2] = 7
    with_extra = State(pair.fixed, pair.moving, pair.total, only_fixed, pair.moving_labels)
    assert with_extra.labels.tolist() == [1, 2, 3]


def test_dice_credit_lies_where_labels_changed():
    pair = state(torch.zeros(1, 3, *GRID.shape))
    candidate = torch.zeros(1, 3, *GRID.shape)
    candidate[:, :, :8] = smooth(3, 2.0)[:, :, :8]
    changed = TERMS["dice"](pair, candidate) - TERMS["dice"](pair, pair.total)
    # elsewhere only the common denominators differ
    assert float(changed[:, :, 8:].abs().mean()) < 0.3 * float(changed[:, :, :8].abs().mean())


def test_folding_terms():
    candidates = smooth(5, 4.0, 2)
    pair = state(torch.zeros(1, 3, *GRID.shape))
    for u, share, depth in zip(
        candidates, TERMS["folding"](pair, candidates), TERMS["folding_magnitude"](pair, candidates), strict=True
    ):
        determinant = fields.corner_determinants(u[None]).amin(dim=1)
        assert float(share.sum()) == pytest.approx(-float((determinant <= 0).float().mean()), abs=1e-6)
        assert float(depth.sum()) == pytest.approx(-float((-determinant).clamp(min=0).mean()), rel=1e-4)
        assert float(share.sum()) < 0, "these candidates do fold"


def test_landmark_gain_is_the_change_of_the_mean_error():
    before, candidates = smooth(1, 1.0), smooth(2, 1.0, 2)
    fixed_points = torch.tensor([[3.2, 4.0, 5.5], [12.0, 20.4, 9.0], [17.9, 1.2, 14.0]])
    moving_points = fixed_points + torch.tensor([[1.0, -1.0, 0.5]])
    pair = state(before, fixed_points=fixed_points, moving_points=moving_points, spacing=(2.0, 2.0, 2.5))

    def error(u):
        total = 0.0
        for f, m in zip(fixed_points, moving_points, strict=True):
            mapped = f + fields.sample(u[None], f.view(1, 3, 1, 1, 1))[0, :, 0, 0, 0]
            total += float(((mapped - m) * torch.tensor([2.0, 2.0, 2.5])).norm())
        return total / 3

    found = TERMS["landmarks"](pair, candidates)
    for u, map_ in zip(candidates, found, strict=True):
        assert float(map_.sum()) == pytest.approx(error(before[0]) - error(u), abs=1e-4)
    assert int((found[0] != 0).sum()) == 3


def test_label_free_terms_are_the_losses():
    before, candidates = smooth(1, 0.5), smooth(2, 1.0, 2)
    pair = state(before)
    for name in ("lncc", "mind"):
        loss, maps = SIMILARITIES[name], TERMS[name](pair, candidates)
        for u, map_ in zip(candidates, maps, strict=True):
            gain = loss(pair.fixed, fields.warp(pair.moving, before)) - loss(
                pair.fixed, fields.warp(pair.moving, u[None])
            )
            assert float(map_.sum()) == pytest.approx(float(gain), abs=1e-5)


def test_surface_tail_rewards_a_better_surface():
    """Fixed = moving shifted by two voxels: shifting back gains, shifting away loses, doing nothing is 0."""
    labels = torch.zeros(1, 1, 24, 24, 24, dtype=torch.int32)
    labels[..., 8:16, 8:16, 8:16] = 1
    fixed = torch.roll(labels, 2, 2)
    zero = torch.zeros(1, 3, 24, 24, 24)
    shift = zero.clone()
    shift[:, 0] = 2.0
    pair = State(fixed.float(), labels.float(), zero, fixed, labels, spacing=(1.5, 1.5, 1.5))
    nothing, towards, away = TERMS["surface_tail"](pair, torch.cat([zero, -shift, shift])).flatten(1).sum(dim=1)
    assert float(nothing) == pytest.approx(0.0, abs=1e-6)
    assert float(towards) > 0.2
    assert float(away) < -0.2


def test_a_structure_that_one_side_has_lost_has_no_surface_to_reward():
    labels = torch.zeros(1, 1, 12, 12, 12, dtype=torch.int32)
    labels[..., 4:8, 4:8, 4:8] = 1
    away = torch.full((1, 3, 12, 12, 12), 30.0)
    pair = State(labels.float(), labels.float(), away, labels, labels)
    assert not TERMS["surface_tail"](pair, torch.zeros_like(away)).any()


@pytest.mark.parametrize(("quantile", "share"), [(0.5, 0.3), (0.25, 0.01), (0.95, 1.0), (0.5, 0.0)])
def test_a_quantile_is_the_same_with_and_without_waiting_for_the_device(quantile, share):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(6, 7, 8, generator=generator)
    among = torch.rand(6, 7, 8, generator=generator) < share
    picked, ordered = (of(values, among, quantile) for of in (quantile_among, quantile_by_order))
    torch.testing.assert_close(ordered, picked)


def test_a_reward_is_its_weighted_terms():
    pair, candidates = state(smooth(0, 0.5)), smooth(1, 2.0, 2)
    found = reward_map(pair, candidates, RewardSettings({"dice": 2.0, "folding": 0.5, "mind": 0.0}))
    expected = 2 * TERMS["dice"](pair, candidates) + 0.5 * TERMS["folding"](pair, candidates)
    torch.testing.assert_close(found, expected)


def test_reward_settings_are_checked():
    with pytest.raises(ValueError, match="no reward 'psnr'; known rewards: dice"):
        RewardSettings({"psnr": 1.0})
    with pytest.raises(ValueError, match="weight 0"):
        RewardSettings({"dice": 0.0})
    assert RewardSettings({"dice": 1.0}).needs_labels
    assert not RewardSettings({"lncc": 1.0, "folding": 1.0}).needs_labels


def test_missing_labels_and_landmarks_are_said():
    image = torch.rand(1, 1, 8, 8, 8)
    pair = State(image, image, torch.zeros(1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match="labels on both images"):
        reward_map(pair, pair.total, RewardSettings({"dice": 1.0}))
    with pytest.raises(ValueError, match="landmarks on both images"):
        reward_map(pair, pair.total, RewardSettings({"landmarks": 1.0}))
